/* A checkpoint's tensors as a stream over several safetensors files, model-00001-of-0000N.safetensors, and
 * their index. The names and sizes are known beforehand; the data follow in the same order. */
#ifndef QUANTIZE_SHARDS_H
#define QUANTIZE_SHARDS_H
#include "base/err.h"
#include "checkpoint/safetensors.h"
#include <stddef.h>
#include <stdint.h>

struct shards;
/* tensors: borrowed until shards_free. No file is larger than max_bytes, header included, unless it holds a
 * single tensor. Creates nothing in the folder yet. */
bool shards_create(struct shards **out, const char *folder, const struct tensor *tensors, size_t n,
                   uint64_t max_bytes, struct err *e);
void shards_free(struct shards *s); /* NULL is fine; leaves files as they are */
int64_t shards_count(const struct shards *s);

/* The next bytes, of one tensor or several. Files are synced as they fill. */
bool shards_append(struct shards *s, const void *data, uint64_t bytes, struct err *e);
/* Bytes of tensors appended so far, over all files. */
uint64_t shards_offset(const struct shards *s);
/* Everything before shards_offset is durable. */
bool shards_sync(struct shards *s, struct err *e);
/* Before the first append: goes on where an earlier run of the same tensors and sizes had synced. Cuts off
 * what it wrote after that; a file that lacks something before it is an error. */
bool shards_resume(struct shards *s, uint64_t offset, struct err *e);
/* Proves that all was written and writes the index. */
bool shards_finish(struct shards *s, struct err *e);
#endif
