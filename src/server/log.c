#include "server/log.h"
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct request_log {
    char *path;
    int fd;
    uint64_t lost;
};

static bool open_file(int *fd, const char *path, struct err *e)
{
    bool standard = strcmp(path, "-") == 0;
    /* a pipe nobody reads must not stop the server */
    *fd = standard ? fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 0)
                   : open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NONBLOCK, 0640);
    return *fd >= 0 || err_errno(e, path) || err_note(e, "--request-log");
}

bool request_log_open(struct request_log **out, const char *path, struct err *e)
{
    struct request_log *l = calloc(1, sizeof *l);
    *out = NULL;
    if (l) l->fd = -1;
    if (!l || !(l->path = strdup(path))) {
        request_log_close(l);
        return err_memory(e, "request log", 0);
    }
    if (open_file(&l->fd, path, e)) {
        *out = l;
        return true;
    }
    request_log_close(l);
    return false;
}

bool request_log_reopen(struct request_log *l, struct err *e)
{
    int fd;
    if (!open_file(&fd, l->path, e)) return false;
    close(l->fd);
    l->fd = fd;
    return true;
}

void request_log_close(struct request_log *l)
{
    if (!l) return;
    if (l->fd >= 0) close(l->fd);
    free(l->path);
    free(l);
}

void request_log_write(struct request_log *l, json_t *line)
{
    char *text = line ? json_dumps(line, JSON_COMPACT) : NULL;
    size_t n = text ? strlen(text) : 0;
    bool written = false;
    if (text) {
        text[n++] = '\n'; /* in the NUL's place: one write a line, whole lines from several processes */
        written = write(l->fd, text, n) == (ssize_t)n;
    }
    l->lost += !written;
    free(text);
    json_decref(line);
}

uint64_t request_log_lost(const struct request_log *l)
{
    return l->lost;
}
