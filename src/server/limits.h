/* How much work one key, and all together, may have here: requests under way, tokens of prompts that wait,
 * time. Loop's thread only. Nothing is counted beside the connections, so nothing can drift from them. */
#ifndef SERVER_LIMITS_H
#define SERVER_LIMITS_H
#include <stdbool.h>

struct connection;
struct server;

enum { LIMITS_MESSAGE = 240 };

/* Whether one more request of this key may begin: before its body is read. False: `message` says why not. */
bool limits_allow_request(const struct connection *c, char message[LIMITS_MESSAGE]);
/* Whether its prompt may wait, now that its tokens are counted. Where none waits, one of any length may.
 * *status: 429, the key's limit; 503, that of all. */
bool limits_allow_tokens(const struct connection *c, int *status, char message[LIMITS_MESSAGE]);
/* Whether the answer has taken longer than it may. */
bool limits_expired(const struct connection *c, double now);

/* A request has ended that was computed for so long, beside the others that run. */
void limits_observe(struct server *s, double seconds);
/* Seconds after which one who was turned away should ask again: what those that wait will take at the rate
 * at which requests ended of late. */
int limits_retry_after(const struct server *s);
#endif
