/* Scoring of texts, shared by the commands that do it. */
#ifndef CLI_EVALUATE_H
#define CLI_EVALUATE_H
#include "cli/common.h"
#include "eval/perplexity.h"

/* The tokens of a UTF-8 file, CR LF and lone CR read as LF. The caller frees list->ids. */
bool evaluate_tokens(struct token_list *list, const struct tokenizer *t, const char *path, struct err *e);
/* The file must be the same tokens for `other`, or chunks would not pair. tokens: what `model` makes of it.
 */
bool evaluate_same_tokens(const struct token_list *tokens, const struct tokenizer *other, const char *path,
                          const char *model, const char *against, struct err *e);
#endif
