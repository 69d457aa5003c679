/* Decides which tensor goes into which file, then opens and closes the files as the data pass by. */
#include "quantize/shards.h"
#include "base/doc.h"
#include "base/file.h"
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { NAME_BYTES = 64 };
static const char INDEX_NAME[] = "model.safetensors.index.json";

struct shards {
    const char *folder;
    const struct tensor *tensors;
    size_t n_tensors;
    size_t *first; /* [n + 1] first tensor of each shard */
    size_t n, current;
    size_t tensor;    /* the one being written */
    uint64_t written; /* of its bytes */
    uint64_t offset;  /* bytes appended in all */
    struct safetensors_writer *writer;
};

/* Bytes of a name in JSON, at most: six for a character that is escaped. */
static uint64_t name_bytes(const char *name)
{
    uint64_t n = 0;
    for (const char *p = name; *p; p++) n += (unsigned char)*p < 0x20 || *p == '"' || *p == '\\' ? 6 : 1;
    return n;
}

/* What a tensor takes of a file, rounded up: its bytes and its entry of the header. */
static uint64_t file_bytes(const struct tensor *t)
{
    enum { ENTRY = 80, NUMBER = 21 };
    return t->bytes + name_bytes(t->name) + ENTRY + (uint64_t)(t->n_dims + 2) * NUMBER;
}

static void divide(struct shards *s, uint64_t max_bytes)
{
    enum { FILE_EXTRA = 64 }; /* length, metadata, padding */
    uint64_t used = 0;
    for (size_t i = 0; i < s->n_tensors; i++) {
        uint64_t need = file_bytes(&s->tensors[i]);
        if (s->n == 0 || used > max_bytes || need > max_bytes - used) {
            s->first[s->n++] = i;
            used = FILE_EXTRA;
        }
        used += need;
    }
    s->first[s->n] = s->n_tensors;
}

static void shard_name(char out[NAME_BYTES], const struct shards *s, size_t i)
{
    snprintf(out, NAME_BYTES, "model-%05zu-of-%05zu.safetensors", i + 1, s->n);
}

bool shards_create(struct shards **out, const char *folder, const struct tensor *tensors, size_t n,
                   uint64_t max_bytes, struct err *e)
{
    *out = NULL;
    struct shards *s = calloc(1, sizeof *s);
    if (!s) return err_memory(e, "shards", sizeof *s);
    *s = (struct shards){ .folder = folder, .tensors = tensors, .n_tensors = n };
    s->first = malloc((n + 2) * sizeof *s->first);
    if (!s->first) {
        free(s);
        return err_memory(e, "shards", n * sizeof *s->first);
    }
    divide(s, max_bytes);
    *out = s;
    return true;
}

void shards_free(struct shards *s)
{
    if (!s) return;
    safetensors_writer_abandon(s->writer);
    free(s->first);
    free(s);
}

int64_t shards_count(const struct shards *s)
{
    return (int64_t)s->n;
}

static char *shard_path(const struct shards *s, size_t i, struct err *e)
{
    char name[NAME_BYTES];
    shard_name(name, s, i);
    char *path = file_join(s->folder, name);
    if (!path) err_memory(e, "path", strlen(s->folder));
    return path;
}

static bool open_shard(struct shards *s, struct err *e)
{
    size_t first = s->first[s->current];
    char *path = shard_path(s, s->current, e);
    bool ok = path && safetensors_writer_create(&s->writer, path, s->tensors + first,
                                                s->first[s->current + 1] - first, e);
    free(path);
    return ok && file_sync_folder(s->folder, e);
}

static bool close_shard(struct shards *s, struct err *e)
{
    struct safetensors_writer *w = s->writer;
    s->writer = NULL;
    s->current++;
    return safetensors_writer_finish(w, e);
}

/* Goes past every tensor that is full, those without bytes too, and on to the next shard where one ends. */
static bool step_over_full(struct shards *s, struct err *e)
{
    while (s->tensor < s->n_tensors && s->written == s->tensors[s->tensor].bytes) {
        if (!s->writer && !open_shard(s, e)) return false;
        s->tensor++;
        s->written = 0;
        if (s->tensor == s->first[s->current + 1] && !close_shard(s, e)) return false;
    }
    return true;
}

static bool append(struct shards *s, const void *data, uint64_t bytes, struct err *e)
{
    if (!s->writer && !open_shard(s, e)) return false;
    if (!safetensors_writer_append(s->writer, data, bytes, e)) return false;
    s->written += bytes;
    s->offset += bytes;
    return step_over_full(s, e);
}

bool shards_append(struct shards *s, const void *data, uint64_t bytes, struct err *e)
{
    if (!step_over_full(s, e)) return false;
    for (uint64_t n; bytes > 0; data = (const char *)data + n, bytes -= n) {
        if (s->tensor == s->n_tensors)
            return err_set(e, ERR_ARGUMENT, "%" PRIu64 " bytes given after the last tensor", bytes);
        uint64_t left = s->tensors[s->tensor].bytes - s->written;
        n = bytes < left ? bytes : left;
        if (!append(s, data, n, e)) return false;
    }
    return true;
}

uint64_t shards_offset(const struct shards *s)
{
    return s->offset;
}

bool shards_sync(struct shards *s, struct err *e)
{
    return !s->writer || safetensors_writer_sync(s->writer, e);
}

/* A file that was finished has all its bytes. */
static bool check_finished(const struct shards *s, size_t i, struct err *e)
{
    struct stat st;
    uint64_t want;
    char *path = shard_path(s, i, e);
    bool ok =
        path && safetensors_file_bytes(&want, s->tensors + s->first[i], s->first[i + 1] - s->first[i], e);
    if (ok && (stat(path, &st) != 0 || (uint64_t)st.st_size != want))
        ok = err_set(e, ERR_FORMAT,
                     "%s: is no longer what the interrupted run left; "
                     "remove the .quench-partial folder to start anew",
                     path);
    free(path);
    return ok;
}

/* Files from the current one on hold nothing that counts. */
static bool remove_rest(const struct shards *s, struct err *e)
{
    for (size_t i = s->current; i < s->n; i++) {
        char *path = shard_path(s, i, e);
        if (!path) return false;
        int status = unlink(path);
        free(path);
        if (status != 0 && errno != ENOENT) return err_errno(e, s->folder);
    }
    return true;
}

static bool resume_shard(struct shards *s, struct err *e)
{
    size_t first = s->first[s->current], n = s->first[s->current + 1] - first;
    uint64_t bytes = s->written;
    for (size_t i = first; i < s->tensor; i++) bytes += s->tensors[i].bytes;
    if (bytes == 0) return remove_rest(s, e) && (s->tensor == first || open_shard(s, e));
    char *path = shard_path(s, s->current, e);
    bool ok = path && safetensors_writer_resume(&s->writer, path, s->tensors + first, n, bytes, e);
    free(path);
    s->current++;
    ok = ok && remove_rest(s, e);
    s->current--;
    return ok;
}

bool shards_resume(struct shards *s, uint64_t offset, struct err *e)
{
    s->offset = s->written = offset;
    while (s->tensor < s->n_tensors && s->written >= s->tensors[s->tensor].bytes)
        s->written -= s->tensors[s->tensor++].bytes;
    if (s->tensor == s->n_tensors && s->written > 0)
        return err_set(e, ERR_FORMAT, "%s: the journal is that of another checkpoint", s->folder);
    while (s->current < s->n && s->first[s->current + 1] <= s->tensor)
        if (!check_finished(s, s->current++, e)) return false;
    return s->current == s->n || resume_shard(s, e);
}

static json_t *build_index(const struct shards *s)
{
    json_t *map = json_object();
    uint64_t total = 0;
    bool ok = map;
    for (size_t i = 0; ok && i < s->n; i++) {
        char name[NAME_BYTES];
        shard_name(name, s, i);
        for (size_t k = s->first[i]; ok && k < s->first[i + 1]; k++) {
            ok = json_object_set_new(map, s->tensors[k].name, json_string(name)) == 0;
            total += s->tensors[k].bytes;
        }
    }
    if (ok)
        return json_pack("{s:{s:I}, s:o}", "metadata", "total_size", (json_int_t)total, "weight_map", map);
    json_decref(map);
    return NULL;
}

static bool write_index(const struct shards *s, struct err *e)
{
    json_t *index = build_index(s);
    char *text = index ? json_dumps(index, JSON_INDENT(2) | JSON_SORT_KEYS) : NULL;
    char *path = file_join(s->folder, INDEX_NAME);
    bool ok =
        text && path ? file_write(path, text, strlen(text), e) : err_memory(e, "index", s->n_tensors * 200);
    json_decref(index);
    free(text);
    free(path);
    return ok;
}

bool shards_finish(struct shards *s, struct err *e)
{
    if (!step_over_full(s, e)) return false;
    if (s->tensor < s->n_tensors)
        return err_set(e, ERR_ARGUMENT, "%s: tensor '%s' and %zu more were not written", s->folder,
                       s->tensors[s->tensor].name, s->n_tensors - s->tensor - 1);
    return write_index(s, e);
}
