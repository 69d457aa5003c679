/* Written in the order of the layers, read in the order of the output. */
#include "quantize/spool.h"
#include "base/file.h"
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct spooled {
    struct packed packed; /* its pointers are of no use here */
    uint64_t at;
    bool is_there;
};

bool spool_init(struct spool *s, const char *folder, size_t n, struct err *e)
{
    *s = (struct spool){ .fd = -1, .items = calloc(n + 1, sizeof *s->items) };
    s->path = file_join(folder, "spool");
    if (!s->items || !s->path) return err_memory(e, "packed matrices", n * sizeof *s->items);
    s->fd = open(s->path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    return (s->fd >= 0 && unlink(s->path) == 0) || err_errno(e, s->path);
}

void spool_deinit(struct spool *s)
{
    if (s->fd >= 0) close(s->fd);
    free(s->path);
    free(s->items);
    *s = (struct spool){ .fd = -1 };
}

bool spool_put(struct spool *s, size_t index, const struct packed *packed, struct err *e)
{
    s->items[index] = (struct spooled){ *packed, s->end, true };
    s->end += packed->codes_bytes + packed->scales_bytes;
    return (file_write_all(s->fd, packed->codes, packed->codes_bytes, e) &&
            file_write_all(s->fd, packed->scales, packed->scales_bytes, e)) ||
           err_note(e, "%s", s->path);
}

bool spool_has(const struct spool *s, size_t index)
{
    return s->items && s->items[index].is_there;
}

static bool read_all(const struct spool *s, void *to, uint64_t bytes, uint64_t at, struct err *e)
{
    for (uint64_t done = 0; done < bytes;) {
        ssize_t n = pread(s->fd, (uint8_t *)to + done, bytes - done, (off_t)(at + done));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return err_errno(e, s->path);
        if (n == 0) return err_set(e, ERR_IO, "%s: ends early", s->path);
        done += (uint64_t)n;
    }
    return true;
}

bool spool_get(const struct spool *s, struct packed *out, size_t index, struct packer *into, struct err *e)
{
    const struct spooled *item = &s->items[index];
    *out = item->packed;
    out->codes = into->codes;
    out->scales = into->scales;
    return read_all(s, into->codes, out->codes_bytes, item->at, e) &&
           read_all(s, into->scales, out->scales_bytes, item->at + out->codes_bytes, e);
}
