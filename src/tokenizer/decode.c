/* Ids to text: the bytes of the tokens, one after another, read as UTF-8. */
#include "tokenizer/tokenizer_struct.h"
#include "tokenizer/utf8.h"
#include <stdlib.h>
#include <string.h>

static const char REPLACEMENT[3] = "\xef\xbf\xbd"; /* U+FFFD */

int64_t tokenizer_size(const struct tokenizer *t)
{
    return t->n_tokens;
}

int32_t tokenizer_find(const struct tokenizer *t, const char *added_token)
{
    const struct added_token *found = added_find(&t->added, added_token, strlen(added_token));
    return found ? found->id : -1;
}

bool tokenizer_is_special(const struct tokenizer *t, int32_t id)
{
    return id >= 0 && id < t->n_tokens && t->is_special[id];
}

const char *tokenizer_bytes(const struct tokenizer *t, int32_t id, size_t *bytes)
{
    *bytes = 0;
    if (id < 0 || id >= t->n_tokens) return "";
    *bytes = t->tokens[id].bytes;
    return t->bytes + t->tokens[id].at;
}

/* Copies n bytes to out, ill-formed subparts as U+FFFD; stops where a character is incomplete. Returns how
 * many bytes were read, adds what was written to *written. */
static size_t copy_whole(const unsigned char *s, size_t n, char *out, size_t *written)
{
    size_t at = 0;
    while (at < n) {
        int length = utf8_scan(s + at, n - at);
        if (length == 0) break;
        if (length > 0) {
            memcpy(out + *written, s + at, (size_t)length);
            *written += (size_t)length;
            at += (size_t)length;
        } else {
            memcpy(out + *written, REPLACEMENT, sizeof REPLACEMENT);
            *written += sizeof REPLACEMENT;
            at += (size_t)-length;
        }
    }
    return at;
}

size_t detokenizer_push(struct detokenizer *d, const struct tokenizer *t, int32_t id, bool skip_special,
                        char *out)
{
    size_t bytes, at = 0, written = 0;
    const unsigned char *s = (const unsigned char *)tokenizer_bytes(t, id, &bytes);
    if (skip_special && tokenizer_is_special(t, id)) return 0;
    while (d->n_tail > 0 && at < bytes) {
        d->tail[d->n_tail++] = s[at++];
        size_t n = (size_t)d->n_tail, done = copy_whole(d->tail, n, out, &written);
        memmove(d->tail, d->tail + done, n - done);
        d->n_tail = (int)(n - done);
    }
    at += copy_whole(s + at, bytes - at, out, &written);
    while (at < bytes) d->tail[d->n_tail++] = s[at++];
    return written;
}

size_t detokenizer_finish(struct detokenizer *d, char *out)
{
    if (d->n_tail == 0) return 0;
    d->n_tail = 0;
    memcpy(out, REPLACEMENT, sizeof REPLACEMENT);
    return sizeof REPLACEMENT;
}

bool tokenizer_decode(const struct tokenizer *t, const int32_t *ids, size_t n, bool skip_special, char **text,
                      size_t *bytes, struct err *e)
{
    struct detokenizer d = { 0 };
    size_t capacity = 0, used = 0;
    char *buffer = NULL;
    *text = NULL;
    *bytes = 0;
    for (size_t i = 0; i <= n; i++) {
        size_t token_bytes = 0;
        if (i < n) tokenizer_bytes(t, ids[i], &token_bytes);
        if (capacity - used < 3 * token_bytes + DETOKENIZER_ROOM) {
            capacity = 2 * capacity + 3 * token_bytes + 4 * DETOKENIZER_ROOM;
            char *grown = realloc(buffer, capacity);
            if (!grown) {
                free(buffer);
                return err_memory(e, "decoded text", capacity);
            }
            buffer = grown;
        }
        used += i < n ? detokenizer_push(&d, t, ids[i], skip_special, buffer + used)
                      : detokenizer_finish(&d, buffer + used);
    }
    buffer[used] = 0;
    *text = buffer;
    *bytes = used;
    return true;
}
