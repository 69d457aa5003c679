/* API keys: who a request belongs to. Keys are kept as their SHA-256 only and compared without early exit, so
 * neither a core dump's strings nor timing tell them. */
#ifndef SERVER_KEYS_H
#define SERVER_KEYS_H
#include "base/err.h"
#include <stddef.h>
#include <stdint.h>

enum { KEY_DIGEST = 32, KEY_BYTES_MIN = 1, KEY_BYTES_MAX = 1024 };

struct keys {
    uint8_t (*digests)[KEY_DIGEST];
    size_t n;
};

/* Keys given as words, and those of a file (NULL: none), one a line; empty lines and lines that begin with #
 * are skipped. Errors name the flag, "--api-key", and never hold a key. */
bool keys_load(struct keys *k, const char *flag, const char *const *words, int n_words, const char *path,
               struct err *e);
void keys_free(struct keys *k); /* accepts a zeroed one */

/* Whose key this is. *owner and salt are of the key, the same in every process. */
bool keys_find(const struct keys *k, const char *key, uint64_t *owner, uint8_t salt[KEY_DIGEST]);
/* The key in an Authorization value "Bearer KEY", or NULL. */
const char *keys_bearer(const char *authorization);
#endif
