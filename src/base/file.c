#include "base/file.h"
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static bool open_regular(int *fd, uint64_t *bytes, const char *path, struct err *e)
{
    struct stat st;
    *fd = open(path, O_RDONLY | O_CLOEXEC);
    if (*fd < 0) return err_errno(e, path);
    if (fstat(*fd, &st) == 0 && S_ISREG(st.st_mode)) {
        *bytes = (uint64_t)st.st_size;
        return true;
    }
    close(*fd);
    return err_set(e, ERR_IO, "%s: not a regular file", path);
}

bool file_map_open(struct file_map *m, const char *path, struct err *e)
{
    *m = (struct file_map){ 0 };
    int fd;
    if (!open_regular(&fd, &m->bytes, path, e)) return false;
    void *data = m->bytes ? mmap(NULL, m->bytes, PROT_READ, MAP_PRIVATE, fd, 0) : NULL;
    int saved = errno;
    close(fd);
    if (data == MAP_FAILED) {
        *m = (struct file_map){ 0 };
        errno = saved;
        return err_errno(e, path);
    }
    m->data = data;
    return true;
}

void file_map_close(struct file_map *m)
{
    if (m->data) munmap((void *)(uintptr_t)m->data, m->bytes);
    *m = (struct file_map){ 0 };
}

bool file_read(char **text, size_t *bytes, const char *path, size_t max, struct err *e)
{
    int fd;
    uint64_t size = 0;
    *text = NULL;
    *bytes = 0;
    if (!open_regular(&fd, &size, path, e)) return false;
    bool ok = size <= max || err_set(e, ERR_LIMIT, "%s: %llu bytes, at most %zu are read", path,
                                     (unsigned long long)size, max);
    char *buffer = ok ? malloc((size_t)size + 1) : NULL;
    if (ok && !buffer) ok = err_memory(e, path, size);
    size_t got = 0;
    while (ok && got < size) {
        ssize_t n = read(fd, buffer + got, (size_t)size - got);
        if (n > 0)
            got += (size_t)n;
        else if (n == 0)
            ok = err_set(e, ERR_IO, "%s: ends after %zu of %llu bytes", path, got, (unsigned long long)size);
        else if (errno != EINTR)
            ok = err_errno(e, path);
    }
    close(fd);
    if (!ok) {
        free(buffer);
        return false;
    }
    buffer[got] = 0;
    *text = buffer;
    *bytes = got;
    return true;
}

bool file_exists(const char *path)
{
    struct stat st;
    return lstat(path, &st) == 0;
}

bool file_is_folder(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

bool file_same(const char *a, const char *b)
{
    struct stat x, y;
    return stat(a, &x) == 0 && stat(b, &y) == 0 && x.st_dev == y.st_dev && x.st_ino == y.st_ino;
}

char *file_join(const char *dir, const char *name)
{
    char *path;
    return asprintf(&path, "%s/%s", dir, name) < 0 ? NULL : path;
}

bool file_write_all(int fd, const void *data, size_t bytes, struct err *e)
{
    const char *p = data;
    while (bytes > 0) {
        ssize_t n = write(fd, p, bytes < (1u << 30) ? bytes : (1u << 30));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return err_errno(e, "write");
        p += n;
        bytes -= (size_t)n;
    }
    return true;
}

bool file_read_at(int fd, void *to, uint64_t bytes, uint64_t at, struct err *e)
{
    for (uint64_t done = 0; done < bytes;) {
        ssize_t n = pread(fd, (char *)to + done, (size_t)(bytes - done), (off_t)(at + done));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return err_errno(e, "read");
        if (n == 0) return err_set(e, ERR_IO, "ends early");
        done += (uint64_t)n;
    }
    return true;
}

bool file_write_at(int fd, const void *data, uint64_t bytes, uint64_t at, struct err *e)
{
    for (uint64_t done = 0; done < bytes;) {
        ssize_t n = pwrite(fd, (const char *)data + done, (size_t)(bytes - done), (off_t)(at + done));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return err_errno(e, "write");
        done += (uint64_t)n;
    }
    return true;
}

bool file_write(const char *path, const void *data, size_t bytes, struct err *e)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) return err_errno(e, path);
    bool ok = file_write_all(fd, data, bytes, e) || err_note(e, "%s", path);
    if (ok && fsync(fd) != 0) ok = err_errno(e, path);
    if (close(fd) != 0 && ok) ok = err_errno(e, path);
    return ok;
}

bool file_copy(const char *from, const char *to, struct err *e)
{
    struct file_map m;
    if (!file_map_open(&m, from, e)) return false;
    bool ok = file_write(to, m.data, (size_t)m.bytes, e);
    file_map_close(&m);
    return ok;
}

bool file_sync_folder(const char *path, struct err *e)
{
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return err_errno(e, path);
    bool ok = fsync(fd) == 0 || err_errno(e, path);
    close(fd);
    return ok;
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *walk)
{
    (void)st, (void)type, (void)walk;
    return remove(path);
}

bool file_remove_tree(const char *path, struct err *e)
{
    if (!file_exists(path)) return true;
    return nftw(path, remove_one, 16, FTW_DEPTH | FTW_PHYS) == 0 || err_errno(e, path);
}
