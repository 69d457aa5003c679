/* What each route does with a request. A function returns false with x->fault set; else it has begun an
 * answer (exchange_start), or written the whole of it (exchange_answered). */
#ifndef SERVER_API_ROUTES_H
#define SERVER_API_ROUTES_H
#include "server/exchange.h"

bool api_route_reads_body(enum api_route route);
/* By x->route. argument: of the path, or NULL. */
bool api_route_begin(struct exchange *x, const char *argument);

bool api_chat_begin(struct exchange *x);
/* The same for a conversation in x->chat that is answered in another shape. */
bool api_chat_begin_as(struct exchange *x, const struct shape *shape);
bool api_completions_begin(struct exchange *x);
/* x->prompts and x->params from a completions body. */
bool api_completions_prompts(struct exchange *x);

bool api_responses_begin(struct exchange *x);
/* Of one that is kept. */
bool api_response(struct exchange *x, const char *id);
bool api_response_delete(struct exchange *x, const char *id);
bool api_response_cancel(struct exchange *x, const char *argument); /* "ID/cancel" */
bool api_messages_begin(struct exchange *x);
bool api_count_tokens(struct exchange *x);
bool api_tokenize(struct exchange *x);
bool api_detokenize(struct exchange *x);
bool api_tokenizer_info(struct exchange *x);
bool api_render(struct exchange *x);
bool api_models(struct exchange *x, const char *id); /* NULL: all */
bool api_server_info(struct exchange *x);

/* x->out holds the answer. */
bool exchange_answered(struct exchange *x);
#endif
