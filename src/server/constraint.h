/* What an answer must look like, from the fields of a request that say so. */
#ifndef SERVER_CONSTRAINT_H
#define SERVER_CONSTRAINT_H
#include "server/api_struct.h"
#include "server/fault.h"

/* Compiled grammars and the answers that still follow them. */
struct grammar_share;
/* response_format, structured_outputs and the older guided_*, tool_choice and strict tools, of a body in the
 * form of chat completions. *out NULL: answers are free. More than one form is refused, as is what grammar.h
 * does not support. tools: NULL where there are none. */
bool constraint_read(struct grammar_share **out, const json_t *body, const json_t *tools, struct fault *f);
void grammar_share_release(struct grammar_share *g); /* NULL is fine */
/* For one answer; to be handed to scheduler_submit, which frees it. */
bool constraint_create(struct constraint **out, struct grammar_share *g, const struct api *a, struct err *e);
#endif
