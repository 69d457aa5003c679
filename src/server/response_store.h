/* Responses that clients come back to by their id: bounded in bytes and in age, in memory only, each seen by
 * the key that asked for it alone. The one used longest ago goes first. Any thread may call. */
#ifndef SERVER_RESPONSE_STORE_H
#define SERVER_RESPONSE_STORE_H
#include "base/err.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { RESPONSE_ID_MAX = 96 };

struct response_store;
/* One response; immutable. */
struct stored_response {
    const char *body; /* as it was answered, JSON */
    size_t body_bytes;
    const char *messages; /* the conversation with its answer, as an array of a chat's messages, JSON */
    size_t messages_bytes;
};

/* bytes_max counts texts, ids and what keeps them together. */
bool response_store_create(struct response_store **out, size_t bytes_max, double seconds_max, struct err *e);
void response_store_free(struct response_store *s); /* nobody holds a response any more; NULL is fine */

/* Copies all of r. In the place of an older one with this id and owner. False: there is no room for it, nor
 * would there be without the others. */
bool response_store_put(struct response_store *s, const char *id, uint64_t owner,
                        const struct stored_response *r);
/* NULL: unknown, too old, or another owner's. To be released. */
const struct stored_response *response_store_get(struct response_store *s, const char *id, uint64_t owner);
void response_store_release(const struct stored_response *r);                         /* NULL is fine */
bool response_store_delete(struct response_store *s, const char *id, uint64_t owner); /* false: unknown */
size_t response_store_bytes(struct response_store *s);
#endif
