/* Writes one safetensors file: takes the list of tensors, writes the header, then counts the bytes streamed
 * into each so that a file which finish() accepted is one that safetensors_open() accepts. */
#include "base/checked.h"
#include "base/doc.h"
#include "checkpoint/safetensors.h"
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* The system is asked to start writing when so much is new: a later sync has little left to wait for. */
enum { PUSH_BYTES = 8 << 20 };

struct announced {
    char *name;
    uint64_t bytes;
};

struct safetensors_writer {
    int fd;
    bool failed; /* a write failed: how much of it reached the file is unknown */
    char *path;
    struct announced *tensors;
    size_t n_tensors, current;
    uint64_t written;    /* bytes of the current tensor */
    uint64_t at, pushed; /* offsets in the file: the next byte; where the system was last asked to write */
};

static bool tensor_bytes(uint64_t *out, const struct tensor *t, struct err *e)
{
    uint64_t n = 1;
    if (t->n_dims < 0 || t->n_dims > TENSOR_DIMS_MAX)
        return err_set(e, ERR_ARGUMENT, "%d dimensions, at most %d", t->n_dims, TENSOR_DIMS_MAX);
    bool fits = true;
    for (int i = 0; i < t->n_dims; i++) {
        if (t->shape[i] < 0)
            return err_set(e, ERR_ARGUMENT, "dimension %" PRId64 " is negative", t->shape[i]);
        fits = fits && fits_mul(n, (uint64_t)t->shape[i], &n) && n <= INT64_MAX;
    }
    if (fits && fits_mul(n, dtype_bytes(t->dtype), out) && *out <= INT64_MAX) return true;
    char shape[200];
    return err_set(e, ERR_ARGUMENT, "shape %s: its size does not fit 63 bits",
                   tensor_shape_text(t, shape, sizeof shape));
}

static bool put_name(FILE *f, const char *name, struct err *e)
{
    json_t *text = json_string(name);
    if (!text) return err_set(e, ERR_ARGUMENT, "name is not UTF-8");
    bool ok = json_dumpf(text, f, JSON_ENCODE_ANY) == 0;
    json_decref(text);
    return ok || err_memory(e, "header", 0);
}

static bool put_tensor(FILE *f, const struct tensor *t, uint64_t *offset, struct err *e)
{
    uint64_t bytes, end;
    if (!tensor_bytes(&bytes, t, e)) return false;
    if (!fits_add(*offset, bytes, &end) || end > INT64_MAX)
        return err_set(e, ERR_ARGUMENT, "ends beyond 2^63 bytes of data");
    fputc(',', f);
    if (!put_name(f, t->name, e)) return false;
    fprintf(f, ":{\"dtype\":\"%s\",\"shape\":[", dtype_name(t->dtype));
    for (int i = 0; i < t->n_dims; i++) fprintf(f, "%s%" PRId64, i ? "," : "", t->shape[i]);
    fprintf(f, "],\"data_offsets\":[%" PRIu64 ",%" PRIu64 "]}", *offset, end);
    *offset = end;
    return true;
}

/* Leaves room for the length in front, so that all of it goes out in one write. */
static bool put_header(FILE *f, const struct tensor *tensors, size_t n, uint64_t *data_bytes, struct err *e)
{
    fprintf(f, "00000000{\"__metadata__\":{\"format\":\"pt\"}");
    *data_bytes = 0;
    for (size_t i = 0; i < n; i++)
        if (!put_tensor(f, &tensors[i], data_bytes, e)) return err_note(e, "tensor '%s'", tensors[i].name);
    fputc('}', f);
    for (long at = ftell(f); at % 8; at++) fputc(' ', f);
    return !ferror(f) || err_memory(e, "header", 0);
}

static int by_text(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

static bool check_names(const struct tensor *tensors, size_t n, struct err *e)
{
    const char **names = malloc((n + 1) * sizeof *names);
    if (!names) return err_memory(e, "tensor names", n * sizeof *names);
    for (size_t i = 0; i < n; i++) names[i] = tensors[i].name;
    names[n] = "__metadata__";
    qsort(names, n + 1, sizeof *names, by_text);
    const char *twice = NULL;
    for (size_t i = 1; i <= n && !twice; i++)
        if (strcmp(names[i - 1], names[i]) == 0) twice = names[i];
    bool reserved = twice && strcmp(twice, "__metadata__") == 0;
    bool ok = !twice || err_set(e, ERR_ARGUMENT, "tensor '%s': %s", twice,
                                reserved ? "the name is reserved" : "announced twice");
    free(names);
    return ok;
}

/* *text: the 8-byte length and the padded header, malloc'd. */
static bool build_header(char **text, size_t *bytes, uint64_t *data_bytes, const struct tensor *tensors,
                         size_t n, struct err *e)
{
    *text = NULL;
    if (!check_names(tensors, n, e)) return false;
    FILE *f = open_memstream(text, bytes);
    if (!f) return err_memory(e, "header", 0);
    bool ok = put_header(f, tensors, n, data_bytes, e);
    if (fclose(f) != 0 && ok) ok = err_memory(e, "header", *bytes);
    if (ok && *bytes - 8 > SAFETENSORS_HEADER_MAX)
        ok = err_set(e, ERR_LIMIT, "header of %zu bytes for %zu tensors, readers accept at most %d",
                     *bytes - 8, n, SAFETENSORS_HEADER_MAX);
    if (!ok) {
        free(*text);
        *text = NULL;
        return false;
    }
    for (unsigned i = 0; i < 8; i++) (*text)[i] = (char)((uint64_t)(*bytes - 8) >> (8 * i) & 0xff);
    return true;
}

bool safetensors_file_bytes(uint64_t *out, const struct tensor *tensors, size_t n_tensors, struct err *e)
{
    char *text;
    size_t bytes;
    uint64_t data_bytes;
    if (!build_header(&text, &bytes, &data_bytes, tensors, n_tensors, e)) return false;
    free(text);
    return fits_add(data_bytes, bytes, out) || err_set(e, ERR_ARGUMENT, "file beyond 2^64 bytes");
}

static void writer_free(struct safetensors_writer *w)
{
    if (!w) return;
    if (w->fd >= 0) close(w->fd);
    for (size_t i = 0; w->tensors && i < w->n_tensors; i++) free(w->tensors[i].name);
    free(w->tensors);
    free(w->path);
    free(w);
}

static struct safetensors_writer *writer_new(const char *path, const struct tensor *tensors, size_t n)
{
    struct safetensors_writer *w = calloc(1, sizeof *w);
    if (!w) return NULL;
    w->fd = -1;
    w->n_tensors = n;
    w->path = strdup(path);
    w->tensors = calloc(n + 1, sizeof *w->tensors);
    bool ok = w->path && w->tensors;
    for (size_t i = 0; ok && i < n; i++) {
        w->tensors[i].name = strdup(tensors[i].name);
        ok = w->tensors[i].name && tensor_bytes(&w->tensors[i].bytes, &tensors[i], NULL);
    }
    if (ok) return w;
    writer_free(w);
    return NULL;
}

/* A file whose header could not be written is of no use to anyone: it goes. */
static bool begin_file(struct safetensors_writer *w, const char *text, size_t bytes, struct err *e)
{
    w->fd = open(w->path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (w->fd < 0) return err_errno(e, w->path);
    if (file_write_all(w->fd, text, bytes, e)) {
        w->at = bytes;
        return true;
    }
    unlink(w->path);
    return err_note(e, "%s", w->path);
}

/* Whether the file begins with these bytes; false also where it is shorter. */
static bool begins_with(int fd, const char *text, size_t bytes)
{
    char *have = malloc(bytes + 1);
    size_t got = 0;
    for (ssize_t n = 1; have && got < bytes && n > 0; got += n > 0 ? (size_t)n : 0)
        n = pread(fd, have + got, bytes - got, (off_t)got);
    bool same = have && got == bytes && memcmp(have, text, bytes) == 0;
    free(have);
    return same;
}

static bool resume_file(struct safetensors_writer *w, const char *text, size_t bytes, uint64_t data_bytes,
                        struct err *e)
{
    struct stat st;
    w->at = bytes + data_bytes;
    w->pushed = w->at;
    w->fd = open(w->path, O_RDWR | O_CLOEXEC);
    if (w->fd < 0 || fstat(w->fd, &st) != 0) return err_errno(e, w->path);
    if ((uint64_t)st.st_size < w->at)
        return err_set(e, ERR_FORMAT, "%s: %lld bytes, at least %" PRIu64 " were written", w->path,
                       (long long)st.st_size, w->at);
    if (!begins_with(w->fd, text, bytes))
        return err_set(e, ERR_FORMAT, "%s: its header is not the one that was written", w->path);
    if (ftruncate(w->fd, (off_t)w->at) != 0 || lseek(w->fd, (off_t)w->at, SEEK_SET) < 0)
        return err_errno(e, w->path);
    for (w->written = data_bytes; w->current < w->n_tensors && w->written >= w->tensors[w->current].bytes;)
        w->written -= w->tensors[w->current++].bytes;
    return true;
}

/* resume_at: NULL for a new file. */
static bool open_writer(struct safetensors_writer **out, const char *path, const struct tensor *tensors,
                        size_t n_tensors, const uint64_t *resume_at, struct err *e)
{
    char *text;
    size_t bytes;
    uint64_t data_bytes;
    *out = NULL;
    if (!build_header(&text, &bytes, &data_bytes, tensors, n_tensors, e)) return err_note(e, "%s", path);
    struct safetensors_writer *w = writer_new(path, tensors, n_tensors);
    bool ok = w || err_memory(e, "shard writer", n_tensors * sizeof *w->tensors);
    ok = ok && (resume_at ? resume_file(w, text, bytes, *resume_at, e) : begin_file(w, text, bytes, e));
    free(text);
    if (ok)
        *out = w;
    else
        writer_free(w);
    return ok;
}

bool safetensors_writer_create(struct safetensors_writer **out, const char *path,
                               const struct tensor *tensors, size_t n_tensors, struct err *e)
{
    return open_writer(out, path, tensors, n_tensors, NULL, e);
}

bool safetensors_writer_resume(struct safetensors_writer **out, const char *path,
                               const struct tensor *tensors, size_t n_tensors, uint64_t data_bytes,
                               struct err *e)
{
    return open_writer(out, path, tensors, n_tensors, &data_bytes, e);
}

/* Steps over tensors that are full; those without bytes are full from the start. */
static void skip_full(struct safetensors_writer *w)
{
    while (w->current < w->n_tensors && w->written == w->tensors[w->current].bytes) {
        w->current++;
        w->written = 0;
    }
}

bool safetensors_writer_append(struct safetensors_writer *w, const void *data, size_t bytes, struct err *e)
{
    if (bytes == 0) return true;
    skip_full(w);
    if (w->current == w->n_tensors)
        return err_set(e, ERR_ARGUMENT, "%s: %zu bytes given after the last tensor", w->path, bytes);
    const struct announced *t = &w->tensors[w->current];
    if (bytes > t->bytes - w->written)
        return err_set(e, ERR_ARGUMENT,
                       "%s: tensor '%s': %zu bytes given, %" PRIu64 " of %" PRIu64 " are left", w->path,
                       t->name, bytes, t->bytes - w->written, t->bytes);
    if (!file_write_all(w->fd, data, bytes, e)) {
        w->failed = true;
        return err_note(e, "%s: tensor '%s'", w->path, t->name);
    }
    w->written += bytes;
    w->at += bytes;
    if (w->at - w->pushed >= PUSH_BYTES) {
        sync_file_range(w->fd, (off_t)w->pushed, (off_t)(w->at - w->pushed), SYNC_FILE_RANGE_WRITE);
        w->pushed = w->at;
    }
    return true;
}

bool safetensors_writer_sync(struct safetensors_writer *w, struct err *e)
{
    if (fdatasync(w->fd) == 0) return true;
    w->failed = true;
    return err_errno(e, w->path);
}

static bool check_complete(struct safetensors_writer *w, struct err *e)
{
    if (w->failed) return err_set(e, ERR_IO, "%s: a write failed, the file is not complete", w->path);
    skip_full(w);
    if (w->current == w->n_tensors) return true;
    const struct announced *t = &w->tensors[w->current];
    return err_set(e, ERR_ARGUMENT, "%s: tensor '%s': %" PRIu64 " of %" PRIu64 " bytes were written", w->path,
                   t->name, w->written, t->bytes);
}

bool safetensors_writer_finish(struct safetensors_writer *w, struct err *e)
{
    bool ok = check_complete(w, e);
    if (ok && fsync(w->fd) != 0) ok = err_errno(e, w->path);
    int fd = w->fd;
    w->fd = -1;
    if (close(fd) != 0 && ok) ok = err_errno(e, w->path);
    writer_free(w);
    return ok;
}

void safetensors_writer_abandon(struct safetensors_writer *w)
{
    writer_free(w);
}
