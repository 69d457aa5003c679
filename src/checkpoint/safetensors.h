/* One safetensors file, read through a map. Format: 8-byte little-endian header length, JSON header
 * {name: {dtype, shape, data_offsets: [begin, end)}, "__metadata__": {...}}, then the data; offsets are
 * relative to it. Source: huggingface/safetensors, README "Format". Opening proves: the header fits the file;
 * every span lies inside the data, has exactly the bytes its dtype and shape need, and overlaps no other; no
 * hole and no byte after the last tensor; known dtypes; no duplicate names. Nothing is read from the data
 * itself. */
#ifndef CHECKPOINT_SAFETENSORS_H
#define CHECKPOINT_SAFETENSORS_H
#include "base/err.h"
#include "base/file.h"
#include "num/dtype.h"
#include <stddef.h>
#include <stdint.h>

enum { TENSOR_DIMS_MAX = 8, SAFETENSORS_HEADER_MAX = 100000000 };

struct tensor {
    const char *name; /* borrow from the file */
    enum dtype dtype;
    int n_dims;                     /* 0: a scalar of one element */
    int64_t shape[TENSOR_DIMS_MAX]; /* outermost first */
    const uint8_t *data;            /* borrow from the map; may be unaligned */
    uint64_t bytes;
};

struct safetensors {
    struct file_map map;
    struct tensor *tensors; /* sorted by name (strcmp) */
    size_t n_tensors;
    struct safetensors_names *names; /* what the tensors' names borrow from */
};

/* Error text begins with the path. */
bool safetensors_open(struct safetensors *s, const char *path, struct err *e);
/* Takes the map, also on failure; error text begins with "tensor '...'" or what else of the file is at fault.
 */
bool safetensors_parse(struct safetensors *s, struct file_map map, struct err *e);
void safetensors_close(struct safetensors *s); /* accepts a zeroed one */
const struct tensor *safetensors_find(const struct safetensors *s, const char *name); /* NULL: absent */

int64_t tensor_elements(const struct tensor *t); /* product of the shape; fits, by safetensors_open */
/* "[2, 3]" into out; returns out. */
char *tensor_shape_text(const struct tensor *t, char *out, size_t bytes);

/* Writing. The header lists tensors in the order given, `__metadata__` is {"format": "pt"}, the header is
 * padded with spaces to a multiple of 8, offsets are contiguous. Data follow in the same order, streamed by
 * the caller. Errors of a writer begin with its path. */
struct safetensors_writer;
/* Creates `path` (must not exist) and writes the header for these tensors; only name, dtype, n_dims, shape
 * are read. A file whose header could not be written is removed again. */
bool safetensors_writer_create(struct safetensors_writer **out, const char *path,
                               const struct tensor *tensors, size_t n_tensors, struct err *e);
/* Opens a file that such a writer left unfinished, cuts it after data_bytes bytes of data and goes on there.
 * It must begin with the header of these tensors and have that much. */
bool safetensors_writer_resume(struct safetensors_writer **out, const char *path,
                               const struct tensor *tensors, size_t n_tensors, uint64_t data_bytes,
                               struct err *e);
/* Appends bytes of the current tensor; a call may not cross into the next one. */
bool safetensors_writer_append(struct safetensors_writer *w, const void *data, size_t bytes, struct err *e);
/* What was appended is durable; so that this is short, the file system is asked to start writing earlier. */
bool safetensors_writer_sync(struct safetensors_writer *w, struct err *e);
/* Proves every announced byte was written, fsyncs, closes. Frees w in either case. */
bool safetensors_writer_finish(struct safetensors_writer *w, struct err *e);
/* Closes; the partial file stays. NULL is fine. */
void safetensors_writer_abandon(struct safetensors_writer *w);
/* Bytes of file a header plus data of these tensors takes. */
bool safetensors_file_bytes(uint64_t *out, const struct tensor *tensors, size_t n_tensors, struct err *e);
#endif
