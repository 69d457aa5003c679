/* Byte-pair merging of one piece: start with one symbol per byte; among adjacent pairs that have a merge take
 * the one of lowest rank, leftmost on ties; join it; repeat. */
#ifndef TOKENIZER_BPE_H
#define TOKENIZER_BPE_H
#include "base/err.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { BPE_ID_END = 1 << 24 }; /* ids are smaller: two of them make one 48-bit key */

struct bpe_merge {
    uint64_t pair;   /* left << 24 | right; UINT64_MAX in an empty slot */
    uint64_t result; /* rank << 32 | id */
};
struct bpe {
    struct bpe_merge *slots; /* open addressing, at most half full */
    int shift;               /* 64 - log2(number of slots) */
    int32_t byte_id[256];
};

bool bpe_init(struct bpe *b, size_t n_merges, struct err *e);
void bpe_deinit(struct bpe *b); /* accepts a zeroed one */
/* False: the pair has a merge already. At most n_merges calls. */
bool bpe_add(struct bpe *b, int32_t left, int32_t right, uint32_t rank, int32_t id);

/* Memory of long pieces, kept from one piece to the next. Zero-initialise. */
struct bpe_work {
    uint32_t *memory;
    size_t capacity; /* in pieces' bytes */
};
void bpe_work_deinit(struct bpe_work *w);
/* Writes the ids of a piece of 1 <= n < 2^32 bytes to ids, which has room for n, and their number to *n_ids.
 * Takes O(n log n). Only long pieces need memory and can fail. */
bool bpe_encode(const struct bpe *b, struct bpe_work *w, const unsigned char *piece, size_t n, int32_t *ids,
                size_t *n_ids, struct err *e);
#endif
