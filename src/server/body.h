/* Bodies of requests: bytes from outside to JSON within limits. */
#ifndef SERVER_BODY_H
#define SERVER_BODY_H
#include "server/api_struct.h"
#include "server/fault.h"

/* What a JSON text would be in memory, in values of 40 bytes, more or less; known before it is parsed. */
enum { BODY_VALUES_MAX = 1 << 20 };
size_t body_values(const char *text, size_t bytes);

/* One object that fills the body; nesting, number of values and duplicate names are bounded, the model is
 * one that is served. With strict_params names that the route does not know are refused. The caller owns
 * *out.
 */
bool body_parse(json_t **out, enum api_route route, const struct api *a, const char *body, size_t bytes,
                struct fault *f);
#endif
