/* Written in the order of the layers, read in the order of the output. */
#include "quantize/spool.h"
#include "base/file.h"
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

bool spool_init(struct spool *s, const char *folder, size_t n, struct err *e)
{
    *s = (struct spool){ .fd = -1, .path = file_join(folder, "spool") };
    s->items = calloc(n + 1, sizeof *s->items);
    s->of = calloc(n + 1, sizeof *s->of);
    if (!s->items || !s->of || !s->path) return err_memory(e, "packed matrices", n * sizeof *s->items);
    s->fd = open(s->path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
    return s->fd >= 0 || err_errno(e, s->path);
}

void spool_deinit(struct spool *s)
{
    if (s->fd >= 0) close(s->fd);
    free(s->path);
    free(s->items);
    free(s->of);
    *s = (struct spool){ .fd = -1 };
}

bool spool_append(struct spool *s, const void *data, uint64_t bytes, struct err *e)
{
    s->end += bytes;
    return file_write_all(s->fd, data, bytes, e) || err_note(e, "%s", s->path);
}

void spool_add(struct spool *s, const struct spooled *item)
{
    uint64_t end = item->at + item->codes_bytes + item->scales_bytes;
    s->end = end > s->end ? end : s->end;
    s->items[s->n_items++] = *item;
    s->of[item->index] = s->n_items;
}

bool spool_sync(struct spool *s, struct err *e)
{
    return fdatasync(s->fd) == 0 || err_errno(e, s->path);
}

bool spool_resume(struct spool *s, struct err *e)
{
    off_t have = lseek(s->fd, 0, SEEK_END);
    if (have < 0) return err_errno(e, s->path);
    if ((uint64_t)have < s->end)
        return err_set(e, ERR_FORMAT,
                       "%s: is no longer what the interrupted run left; "
                       "remove the .quench-partial folder to start anew",
                       s->path);
    return (ftruncate(s->fd, (off_t)s->end) == 0 && lseek(s->fd, (off_t)s->end, SEEK_SET) >= 0) ||
           err_errno(e, s->path);
}

const struct spooled *spool_find(const struct spool *s, size_t index)
{
    return s->of && s->of[index] ? &s->items[s->of[index] - 1] : NULL;
}

bool spool_read(const struct spool *s, void *to, uint64_t bytes, uint64_t at, struct err *e)
{
    return file_read_at(s->fd, to, bytes, at, e) || err_note(e, "%s", s->path);
}
