#include "server/local_media.h"
#include "image/data_url.h"
#include "server/http.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static int open_below(const struct local_media *m, const char *path, uint64_t flags)
{
    struct open_how how = { .flags = flags | O_CLOEXEC, .resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS };
    return (int)syscall(SYS_openat2, m->fd, path, &how, sizeof how);
}

static void cut_slashes(char *path)
{
    for (size_t n = strlen(path); n > 0 && path[n - 1] == '/'; n--) path[n - 1] = 0;
}

static void drop(struct local_media *m)
{
    if (m->fd >= 0) close(m->fd);
    free(m->given);
    free(m->real);
    *m = (struct local_media){ .fd = -1 };
}

bool local_media_open(struct local_media *m, const char *folder, struct err *e)
{
    *m = (struct local_media){ .fd = -1 };
    if (folder[0] != '/') return err_set(e, ERR_ARGUMENT, "%s: an absolute path is needed", folder);
    m->fd = open(folder, O_PATH | O_DIRECTORY | O_CLOEXEC);
    m->given = strdup(folder);
    m->real = realpath(folder, NULL);
    int self = m->fd >= 0 ? open_below(m, ".", O_PATH) : -1;
    bool ok = m->given && m->real && self >= 0;
    if (!ok && errno == ENOSYS)
        err_set(e, ERR_UNSUPPORTED, "%s: this kernel has no openat2; Linux 5.6 is needed", folder);
    else if (!ok)
        err_errno(e, folder);
    if (self >= 0) close(self);
    if (!ok) {
        drop(m);
        return false;
    }
    cut_slashes(m->given);
    cut_slashes(m->real);
    return true;
}

void local_media_close(struct local_media *m)
{
    if (m->given) drop(m); /* a zeroed one has not been opened */
}

static bool nothing_there(struct err *e)
{
    return err_set(e, ERR_ARGUMENT,
                   "it names no file that may be read below the folder of --allowed-local-media-path");
}

/* What of the path is below the folder, or NULL. */
static const char *rest_of(const char *path, const char *folder)
{
    size_t n = strlen(folder);
    if (strncmp(path, folder, n) != 0 || path[n] != '/') return NULL;
    return path + n + strspn(path + n, "/");
}

/* The URL's path, decoded; malloc'd. */
static bool read_path(char **out, const char *url, struct err *e)
{
    const char *path = url + 7;
    *out = NULL;
    if (strncasecmp(url, "file://", 7) != 0) return err_set(e, ERR_ARGUMENT, "expected file:///PATH");
    if (strncasecmp(path, "localhost/", 10) == 0) path += 9;
    if (*path != '/') return err_set(e, ERR_ARGUMENT, "it names another machine: expected file:///PATH");
    if (strpbrk(path, "?#")) return err_set(e, ERR_ARGUMENT, "'?' and '#' must be percent-encoded");
    *out = strdup(path);
    if (!*out) return err_memory(e, "a path", strlen(path));
    return http_percent_decode(*out) || err_set(e, ERR_ARGUMENT, "the path is not percent-encoded UTF-8");
}

/* A device may do something when it is opened, a pipe may wait: what it is is known before. */
static bool open_regular(int *fd, uint64_t *bytes, const struct local_media *m, const char *path,
                         struct err *e)
{
    struct stat before, now;
    int place = open_below(m, path, O_PATH);
    bool is_file = place >= 0 && fstat(place, &before) == 0 && S_ISREG(before.st_mode);
    *fd = is_file ? open_below(m, path, O_RDONLY | O_NONBLOCK | O_NOCTTY) : -1;
    if (place >= 0) close(place);
    if (*fd < 0) return nothing_there(e);
    *bytes = 0;
    bool ok = fstat(*fd, &now) == 0 && S_ISREG(now.st_mode);
    if (ok) *bytes = (uint64_t)now.st_size;
    return ok || nothing_there(e);
}

static bool read_all(uint8_t *out, size_t *got, size_t most, int fd, struct err *e)
{
    for (*got = 0; *got < most;) {
        ssize_t n = read(fd, out + *got, most - *got);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return nothing_there(e);
        if (n == 0) break;
        *got += (size_t)n;
    }
    return true;
}

static bool read_file(char **out, size_t *bytes, const struct local_media *m, const char *path, size_t most,
                      struct err *e)
{
    int fd = -1;
    uint64_t size;
    uint8_t *data = NULL;
    bool ok = open_regular(&fd, &size, m, path, e);
    if (ok && size > most) ok = err_set(e, ERR_LIMIT, "it has more than %.1f MB", (double)most / 1e6);
    if (ok && !(data = malloc(size + 1))) ok = err_memory(e, "an image", size);
    ok = ok && read_all(data, bytes, size, fd, e) && data_url_encode(out, data, *bytes, e);
    if (fd >= 0) close(fd);
    free(data);
    return ok;
}

bool local_media_data_url(char **out, size_t *bytes, const struct local_media *m, const char *url,
                          size_t bytes_max, struct err *e)
{
    char *path;
    *out = NULL;
    *bytes = 0;
    bool ok = read_path(&path, url, e);
    const char *rest = ok ? rest_of(path, m->given) : NULL;
    if (ok && !rest) rest = rest_of(path, m->real);
    ok = ok && (rest && *rest ? read_file(out, bytes, m, rest, bytes_max, e) : nothing_there(e));
    free(path);
    return ok;
}
