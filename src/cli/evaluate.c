/* A text file in, tokens out. */
#include "cli/evaluate.h"
#include "base/file.h"
#include "tokenizer/utf8.h"
#include <stdlib.h>
#include <string.h>

enum { TEXT_BYTES_MAX = 1 << 30 };

/* CR LF and lone CR become LF, as when a text file is opened in text mode: the published token counts of
 * WikiText-2 are of such readers, while copies of the file with CR LF are in use. Returns the new length. */
static size_t normalise_line_ends(char *text, size_t n)
{
    size_t out = 0;
    for (size_t i = 0; i < n; i++) {
        if (text[i] == '\r' && i + 1 < n && text[i + 1] == '\n') continue;
        text[out++] = text[i] == '\r' ? '\n' : text[i];
    }
    return out;
}

bool evaluate_tokens(struct token_list *list, const struct tokenizer *t, const char *path, struct err *e)
{
    char *text;
    size_t bytes;
    if (!file_read(&text, &bytes, path, TEXT_BYTES_MAX, e)) return false;
    size_t valid = utf8_valid_prefix(text, bytes); /* here, where offsets are still the file's */
    bool ok = (bytes > 0 || err_set(e, ERR_FORMAT, "the text is empty")) &&
              (valid == bytes || err_set(e, ERR_FORMAT, "the text is not UTF-8 at byte %zu", valid));
    bytes = normalise_line_ends(text, bytes);
    ok = ok && tokenizer_encode(t, list, text, bytes, 0, e);
    free(text);
    return ok || err_note(e, "%s", path);
}

bool evaluate_same_tokens(const struct token_list *tokens, const struct tokenizer *other, const char *path,
                          const char *model, const char *against, struct err *e)
{
    struct token_list b = { 0 };
    bool ok = evaluate_tokens(&b, other, path, e);
    if (ok && (tokens->n != b.n || memcmp(tokens->ids, b.ids, b.n * sizeof *b.ids) != 0))
        ok = err_set(e, ERR_ARGUMENT, "the tokenizers of %s and %s differ on %s", model, against, path);
    free(b.ids);
    return ok;
}
