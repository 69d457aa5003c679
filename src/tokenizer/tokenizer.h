/* Byte-level BPE as tokenizer.json describes it (Hugging Face tokenizers format): added tokens, NFC, one
 * Split regex, ByteLevel, BPE merges; ids exactly as the reference. Encoding: (1) added tokens in the raw
 * text, leftmost, longest first; (2) NFC of each remaining span; (3) regex split; (4) bytes to byte
 * characters; (5) BPE inside each piece. No BOS or EOS is added. Immutable after creation: may be shared by
 * threads. */
#ifndef TOKENIZER_TOKENIZER_H
#define TOKENIZER_TOKENIZER_H
#include "base/err.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct tokenizer;

/* json: tokenizer.json. config_json: tokenizer_config.json, whose added_tokens_decoder may add tokens; NULL
 * if none. Errors name the part that is not byte-level BPE: model.type, byte_fallback, unk_token, normalizer
 * other than NFC or null, a pre-tokenizer that is not Split + ByteLevel, a decoder that is not ByteLevel, a
 * merge of unknown symbols, a byte without an entry, an added token that is empty, strips spaces or has two
 * ids. Ids are below 2^24. */
bool tokenizer_create(struct tokenizer **out, const char *json, size_t bytes, const char *config_json,
                      size_t config_bytes, struct err *e);
/* Reads dir/tokenizer.json and, when present, dir/tokenizer_config.json. */
bool tokenizer_load(struct tokenizer **out, const char *dir, struct err *e);
void tokenizer_free(struct tokenizer *t); /* NULL is fine */

int64_t tokenizer_size(const struct tokenizer *t); /* one past the largest id that has a meaning */
int32_t tokenizer_find(const struct tokenizer *t,
                       const char *added_token); /* id of an added token; -1: none */
bool tokenizer_is_special(const struct tokenizer *t, int32_t id);

struct token_list {
    int32_t *ids; /* owned; free() */
    size_t n, capacity;
};
enum { TOKENIZE_DATA = 1 }; /* flag: added tokens are not recognised, control strings stay text */
/* Appends the tokens of text to list. Fails on text that is not UTF-8 (ERR_FORMAT, byte offset named; NUL is
 * a character like others), on more than 1 GiB, on an expression that PCRE2 gives up on (ERR_LIMIT), and out
 * of memory; the list is then as it was. Takes O(n log n) whatever the text. */
bool tokenizer_encode(const struct tokenizer *t, struct token_list *list, const char *text, size_t bytes,
                      unsigned flags, struct err *e);

/* Bytes of one token, borrow: a regular token's raw bytes (perhaps part of a character), an added token's
 * text, or *bytes = 0 for an id without meaning. */
const char *tokenizer_bytes(const struct tokenizer *t, int32_t id, size_t *bytes);

/* Streaming decode: hands out only whole UTF-8 characters. Bytes that can never become one come out as
 * U+FFFD, one per maximal ill-formed subpart, as the reference's lossy decode does. Zero-initialise. */
struct detokenizer {
    unsigned char tail[4];
    int n_tail;
};
enum { DETOKENIZER_ROOM = 16 }; /* out needs 3 * (bytes of the token) + this */
/* Appends to out what is complete after this token and returns how many bytes; not NUL-terminated. */
size_t detokenizer_push(struct detokenizer *d, const struct tokenizer *t, int32_t id, bool skip_special,
                        char *out);
/* End of stream: an incomplete tail becomes one U+FFFD. */
size_t detokenizer_finish(struct detokenizer *d, char *out);
/* Whole list at once; *text is malloc'd and NUL-terminated. */
bool tokenizer_decode(const struct tokenizer *t, const int32_t *ids, size_t n, bool skip_special, char **text,
                      size_t *bytes, struct err *e);
#endif
