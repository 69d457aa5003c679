/* Names, locks and renames of the folder a run writes. */
#include "quantize/destination.h"
#include "base/file.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

static const char PARTIAL[] = ".quench-partial";

/* The folder that holds path, which has no slash at its end. */
static char *parent_of(const char *path)
{
    const char *slash = strrchr(path, '/');
    if (!slash) return strdup(".");
    return slash == path ? strdup("/") : strndup(path, (size_t)(slash - path));
}

static bool set_names(struct destination *d, const char *path, struct err *e)
{
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/') n--;
    if (n == 0) return err_set(e, ERR_ARGUMENT, "the destination has no name");
    d->path = strndup(path, n);
    d->parent = d->path ? parent_of(d->path) : NULL;
    if (!d->parent || asprintf(&d->partial, "%s%s", d->path, PARTIAL) < 0) {
        d->partial = NULL;
        return err_memory(e, "path", n);
    }
    return true;
}

/* inner, resolved, is outer, resolved, or lies below it. Both exist. */
static bool lies_in(const char *inner, const char *outer)
{
    char *a = realpath(inner, NULL), *b = realpath(outer, NULL);
    size_t n = b ? strlen(b) : 0;
    bool below = a && b && (n == 1 || (strncmp(a, b, n) == 0 && (a[n] == '/' || !a[n])));
    free(a);
    free(b);
    return below;
}

static bool check_names(const struct destination *d, const char *source, struct err *e)
{
    if (file_same(d->path, source))
        return err_set(e, ERR_ARGUMENT, "%s: the destination is the source folder; name another one",
                       d->path);
    if (file_exists(d->path))
        return err_set(e, ERR_ARGUMENT, "%s: already exists; remove it or name another destination", d->path);
    if (!file_is_folder(d->parent))
        return err_set(e, ERR_ARGUMENT, "%s: no folder %s to create it in", d->path, d->parent);
    if (lies_in(d->parent, source))
        return err_set(e, ERR_ARGUMENT, "%s: lies inside the source folder %s; name a place outside", d->path,
                       source);
    if (file_exists(d->partial) && lies_in(source, d->partial))
        return err_set(e, ERR_ARGUMENT,
                       "%s: the source folder is where this run would write; rename it first", d->partial);
    return true;
}

bool destination_init(struct destination *d, const char *path, const char *source, struct err *e)
{
    *d = (struct destination){ .lock = -1 };
    return set_names(d, path, e) && check_names(d, source, e);
}

static bool lock_partial(struct destination *d, struct err *e)
{
    d->lock = open(d->partial, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (d->lock < 0) return err_errno(e, d->partial);
    if (flock(d->lock, LOCK_EX | LOCK_NB) == 0) return true;
    bool busy = errno == EWOULDBLOCK;
    bool ok = busy ? err_set(e, ERR_ARGUMENT, "%s: another run is writing it", d->partial)
                   : err_errno(e, d->partial);
    close(d->lock);
    d->lock = -1;
    return ok;
}

static bool remove_leftover(struct destination *d, const struct report *report, struct err *e)
{
    if (!file_exists(d->partial)) return true;
    if (!lock_partial(d, e)) return false;
    report_warn(report, "%s: left by an interrupted run, removed", d->partial);
    bool ok = file_remove_tree(d->partial, e);
    close(d->lock);
    d->lock = -1;
    return ok;
}

static bool check_room(const struct destination *d, uint64_t bytes, struct err *e)
{
    struct statvfs fs;
    if (statvfs(d->parent, &fs) != 0) return err_errno(e, d->parent);
    uint64_t block = fs.f_frsize ? fs.f_frsize : 1;
    if (fs.f_bavail >= bytes / block) return true;
    return err_set(e, ERR_IO, "%s: %.1f GB are needed, %.1f GB are free", d->parent, (double)bytes / 1e9,
                   (double)fs.f_bavail * (double)block / 1e9);
}

bool destination_create(struct destination *d, uint64_t bytes, const struct report *report, struct err *e)
{
    if (!remove_leftover(d, report, e) || !check_room(d, bytes, e)) return false;
    if (mkdir(d->partial, 0777) != 0) return err_errno(e, d->partial);
    if (lock_partial(d, e)) return true;
    rmdir(d->partial);
    return false;
}

static bool ends_in(const char *name, const char *end)
{
    size_t n = strlen(name), m = strlen(end);
    return n >= m && strcmp(name + n - m, end) == 0;
}

/* Files that the run writes itself or that describe the source's weights. */
static bool is_own(const char *name)
{
    static const char *const own[] = { "config.json", "recipe.yaml", "model.safetensors.index.json",
                                       "quantization_report.json" };
    for (size_t i = 0; i < sizeof own / sizeof *own; i++)
        if (strcmp(name, own[i]) == 0) return true;
    return ends_in(name, ".safetensors");
}

/* The result has a card of its own; the source's is kept under this name. */
static const char CARD[] = "README.md", SOURCE_CARD[] = "README.source.md";

/* Links are followed: download caches keep a checkpoint's files as links. */
static bool copy_one(const struct destination *d, const char *source, const char *name,
                     const struct report *report, struct err *e)
{
    struct stat st;
    char *from = file_join(source, name),
         *to = file_join(d->partial, strcmp(name, CARD) == 0 ? SOURCE_CARD : name);
    bool ok = (from && to) || err_memory(e, "path", strlen(name));
    if (ok && stat(from, &st) != 0) ok = err_errno(e, from);
    if (ok && S_ISREG(st.st_mode))
        ok = file_copy(from, to, e);
    else if (ok && name[0] != '.')
        report_warn(report, "%s: not a file, not copied", from);
    free(from);
    free(to);
    return ok;
}

bool destination_copy_files(const struct destination *d, const char *source, const struct report *report,
                            struct err *e)
{
    DIR *dir = opendir(source);
    if (!dir) return err_errno(e, source);
    bool ok = true;
    struct dirent *entry;
    while (ok && (errno = 0, entry = readdir(dir))) {
        const char *name = entry->d_name;
        if (strcmp(name, ".") == 0 || strcmp(name, "..") == 0 || is_own(name)) continue;
        if (strcmp(name, SOURCE_CARD) == 0)
            report_warn(report, "%s/%s: not copied, the name is needed for the source's README.md", source,
                        name);
        else
            ok = copy_one(d, source, name, report, e);
    }
    if (ok && errno != 0) ok = err_errno(e, source);
    closedir(dir);
    return ok;
}

/* A rename that refuses to replace an empty folder made in the meantime; not every file system has one. */
static int rename_new(const char *from, const char *to)
{
    if (renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_NOREPLACE) == 0) return 0;
    if (errno != EINVAL && errno != ENOSYS) return -1;
    if (file_exists(to)) {
        errno = EEXIST;
        return -1;
    }
    return rename(from, to);
}

bool destination_commit(struct destination *d, const struct report *report, struct err *e)
{
    struct err sync = { 0 };
    if (!file_sync_folder(d->partial, e)) return false;
    if (rename_new(d->partial, d->path) != 0) return err_errno(e, d->path);
    close(d->lock);
    d->lock = -1;
    if (!file_sync_folder(d->parent, &sync)) report_warn(report, "%s", sync.text);
    return true;
}

void destination_deinit(struct destination *d, const struct report *report)
{
    struct err e = { 0 };
    if (d->lock >= 0) {
        if (!file_remove_tree(d->partial, &e))
            report_warn(report, "%s: could not be removed: %s", d->partial, e.text);
        close(d->lock);
    }
    free(d->path);
    free(d->partial);
    free(d->parent);
    *d = (struct destination){ .lock = -1 };
}
