/* Takes records, gives them back after a kill. */
#include "quantize/journal.h"
#include "base/file.h"
#include "quantize/digest.h"
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* A journal of a million matrices has 32 MB. */
static const size_t BYTES_MAX = (size_t)1 << 30;

struct head {
    uint32_t kind, bytes;
};

bool journal_next(const struct journal *j, size_t *at, struct journal_record *record)
{
    struct head head;
    uint64_t sum;
    size_t left = j->bytes - *at;
    if (left < sizeof head + sizeof sum) return false;
    memcpy(&head, j->text + *at, sizeof head);
    if (head.bytes > left - sizeof head - sizeof sum) return false;
    size_t body = sizeof head + head.bytes;
    memcpy(&sum, j->text + *at + body, sizeof sum);
    if (sum != digest(DIGEST_START, j->text + *at, body)) return false;
    *record = (struct journal_record){ head.kind, head.bytes, j->text + *at + sizeof head };
    *at += body + sizeof sum;
    return true;
}

static bool read_records(struct journal *j, struct err *e)
{
    struct journal_record record;
    size_t at = 0;
    if (!file_read(&j->text, &j->bytes, j->path, BYTES_MAX, e)) return false;
    while (journal_next(j, &at, &record)) {
    }
    j->bytes = at;
    j->end = at;
    return ftruncate(j->fd, (off_t)at) == 0 || err_errno(e, j->path);
}

bool journal_open(struct journal *j, const char *folder, struct err *e)
{
    *j = (struct journal){ .fd = -1, .path = file_join(folder, "journal") };
    if (!j->path) return err_memory(e, "path", strlen(folder));
    j->fd = open(j->path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0666);
    return j->fd >= 0 ? read_records(j, e) : err_errno(e, j->path);
}

void journal_close(struct journal *j)
{
    if (j->fd >= 0) close(j->fd);
    free(j->path);
    free(j->text);
    *j = (struct journal){ .fd = -1 };
}

bool journal_append(struct journal *j, uint32_t kind, const void *data, size_t bytes, bool is_synced,
                    struct err *e)
{
    struct head head = { kind, (uint32_t)bytes };
    size_t body = sizeof head + bytes, all = body + sizeof(uint64_t);
    if (bytes > BYTES_MAX) return err_set(e, ERR_LIMIT, "%s: record of %zu bytes", j->path, bytes);
    char *text = malloc(all);
    if (!text) return err_memory(e, "journal record", all);
    memcpy(text, &head, sizeof head);
    if (bytes) memcpy(text + sizeof head, data, bytes);
    uint64_t sum = digest(DIGEST_START, text, body);
    memcpy(text + body, &sum, sizeof sum);
    bool ok = (lseek(j->fd, (off_t)j->end, SEEK_SET) >= 0 || err_errno(e, "seek")) &&
              file_write_all(j->fd, text, all, e) &&
              (!is_synced || fdatasync(j->fd) == 0 || err_errno(e, "sync"));
    free(text);
    if (ok) j->end += all;
    return ok || err_note(e, "%s", j->path);
}
