/* Names, locks and renames of the folder a run writes. */
#include "quantize/destination.h"
#include "base/file.h"
#include "quantize/record.h"
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

static const char WORK[] = ".quench-partial", CHECKPOINT[] = "checkpoint", JOURNAL[] = "journal";

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
    if (!d->parent || asprintf(&d->work, "%s%s", d->path, WORK) < 0) {
        d->work = NULL;
        return err_memory(e, "path", n);
    }
    d->partial = file_join(d->work, CHECKPOINT);
    return d->partial || err_memory(e, "path", n);
}

static bool has_file(const char *folder, const char *name)
{
    char *path = file_join(folder, name);
    bool has = path && file_exists(path);
    free(path);
    return has;
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

bool destination_exists(const struct destination *d, struct err *e)
{
    return err_set(e, ERR_ARGUMENT, "%s: already exists; remove it or name another destination", d->path);
}

static bool check_names(const struct destination *d, const char *source, struct err *e)
{
    if (file_same(d->path, source))
        return err_set(e, ERR_ARGUMENT, "%s: the destination is the source folder; name another one",
                       d->path);
    if (file_exists(d->path) && !d->is_renamed && !d->has_report) return destination_exists(d, e);
    if (!file_is_folder(d->parent))
        return err_set(e, ERR_ARGUMENT, "%s: no folder %s to create it in", d->path, d->parent);
    if (lies_in(d->parent, source))
        return err_set(e, ERR_ARGUMENT, "%s: lies inside the source folder %s; name a place outside", d->path,
                       source);
    if (file_exists(d->work) && lies_in(source, d->work))
        return err_set(e, ERR_ARGUMENT,
                       "%s: the source folder is where this run would write; rename it first", d->work);
    return true;
}

bool destination_init(struct destination *d, const char *path, const char *source, struct err *e)
{
    *d = (struct destination){ .lock = -1 };
    if (!set_names(d, path, e)) return false;
    d->is_renamed = file_is_folder(d->path) && has_file(d->work, JOURNAL) && !file_exists(d->partial);
    if (d->is_renamed || !file_exists(d->path)) return check_names(d, source, e);
    rmdir(d->work);
    d->has_report = has_file(d->path, RECORD_FILE);
    return check_names(d, source, e);
}

static bool busy(const struct destination *d, struct err *e)
{
    return err_set(e, ERR_ARGUMENT, "%s: another run is writing it", d->work);
}

/* What was locked may be a folder that another run has removed since. */
static bool check_lock(const struct destination *d, struct err *e)
{
    struct stat locked, named;
    if (fstat(d->lock, &locked) != 0) return err_errno(e, d->work);
    if (stat(d->work, &named) != 0 || locked.st_ino != named.st_ino || locked.st_dev != named.st_dev)
        return busy(d, e);
    return d->is_renamed == file_exists(d->path) || busy(d, e);
}

bool destination_lock(struct destination *d, struct err *e)
{
    if (mkdir(d->work, 0777) != 0 && errno != EEXIST) return err_errno(e, d->work);
    d->lock = open(d->work, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (d->lock < 0) return err_errno(e, d->work);
    bool ok = flock(d->lock, LOCK_EX | LOCK_NB) == 0;
    if (!ok) ok = errno == EWOULDBLOCK ? busy(d, e) : err_errno(e, d->work);
    if (ok && check_lock(d, e)) return true;
    close(d->lock);
    d->lock = -1;
    return false;
}

/* Calls body for every name in the folder but . and .. */
static bool for_each_name(const char *folder, bool (*body)(void *ctx, const char *name, struct err *e),
                          void *ctx, struct err *e)
{
    DIR *dir = opendir(folder);
    if (!dir) return err_errno(e, folder);
    bool ok = true;
    struct dirent *entry;
    while (ok && (errno = 0, entry = readdir(dir)))
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
            ok = body(ctx, entry->d_name, e);
    if (ok && errno != 0) ok = err_errno(e, folder);
    closedir(dir);
    return ok;
}

struct clearing {
    const struct destination *d;
    const struct report *report;
    bool found;
};

static bool remove_name(void *ctx, const char *name, struct err *e)
{
    struct clearing *c = ctx;
    char *path = file_join(c->d->work, name);
    if (!path) return err_memory(e, "path", strlen(name));
    bool is_new = strcmp(name, JOURNAL) == 0; /* or has no head, and then nothing was done */
    if (!c->found && !is_new) report_warn(c->report, "%s: left by an interrupted run, removed", c->d->work);
    c->found = c->found || !is_new;
    bool ok = file_remove_tree(path, e);
    free(path);
    return ok;
}

bool destination_clear(struct destination *d, const struct report *report, struct err *e)
{
    struct clearing c = { d, report, false };
    return for_each_name(d->work, remove_name, &c, e);
}

struct used {
    const char *folder;
    uint64_t bytes;
};

static bool add_file(void *ctx, const char *name, struct err *e)
{
    struct used *u = ctx;
    struct stat st;
    char *path = file_join(u->folder, name);
    if (!path) return err_memory(e, "path", strlen(name));
    if (lstat(path, &st) == 0 && S_ISREG(st.st_mode)) u->bytes += (uint64_t)st.st_blocks * 512;
    free(path);
    return true;
}

static bool check_room(const struct destination *d, uint64_t bytes, struct err *e)
{
    struct statvfs fs;
    struct used work = { d->work, 0 }, checkpoint = { d->partial, 0 };
    if (!for_each_name(d->work, add_file, &work, e) || !for_each_name(d->partial, add_file, &checkpoint, e))
        return false;
    if (statvfs(d->parent, &fs) != 0) return err_errno(e, d->parent);
    uint64_t used = work.bytes + checkpoint.bytes, block = fs.f_frsize ? fs.f_frsize : 1;
    uint64_t need = bytes > used ? bytes - used : 0;
    if (fs.f_bavail >= need / block) return true;
    return err_set(e, ERR_IO, "%s: %.1f GB are needed, %.1f GB are free", d->parent, (double)need / 1e9,
                   (double)fs.f_bavail * (double)block / 1e9);
}

bool destination_prepare(struct destination *d, uint64_t bytes, struct err *e)
{
    if (mkdir(d->partial, 0777) != 0 && errno != EEXIST) return err_errno(e, d->partial);
    return check_room(d, bytes, e);
}

bool destination_create(struct destination *d, uint64_t bytes, const struct report *report, struct err *e)
{
    if (d->is_renamed || d->has_report) return destination_exists(d, e);
    return destination_lock(d, e) && destination_clear(d, report, e) && destination_prepare(d, bytes, e);
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

/* All but the journal, which says until the end what the folder is. */
static bool remove_work_file(void *ctx, const char *name, struct err *e)
{
    const struct destination *d = ctx;
    char *path = file_join(d->work, name);
    if (!path) return err_memory(e, "path", strlen(name));
    bool ok = strcmp(name, JOURNAL) == 0 || file_remove_tree(path, e);
    free(path);
    return ok;
}

bool destination_commit(struct destination *d, const struct report *report, struct err *e)
{
    struct err sync = { 0 };
    if (!file_sync_folder(d->partial, e)) return false;
    if (rename_new(d->partial, d->path) != 0) return err_errno(e, d->path);
    if (!file_sync_folder(d->parent, &sync)) report_warn(report, "%s", sync.text);
    destination_remove(d, report);
    return true;
}

void destination_remove(struct destination *d, const struct report *report)
{
    struct err e = { 0 };
    if (!for_each_name(d->work, remove_work_file, d, &e) || !file_remove_tree(d->work, &e))
        report_warn(report, "%s: could not be removed: %s", d->work, e.text);
}

void destination_deinit(struct destination *d)
{
    if (d->lock >= 0) close(d->lock);
    free(d->path);
    free(d->work);
    free(d->partial);
    free(d->parent);
    *d = (struct destination){ .lock = -1 };
}
