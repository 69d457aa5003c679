/* Files: read-only maps, whole small files, and output that becomes visible only when complete. */
#ifndef BASE_FILE_H
#define BASE_FILE_H
#include "base/err.h"
#include <stddef.h>
#include <stdint.h>

struct file_map {
    const uint8_t *data; /* NULL for an empty file */
    uint64_t bytes;
};

bool file_map_open(struct file_map *m, const char *path, struct err *e);
void file_map_close(struct file_map *m); /* accepts a zeroed one */

/* Reads a whole file of at most `max` bytes; *text is malloc'd, NUL-terminated, and the caller's. */
bool file_read(char **text, size_t *bytes, const char *path, size_t max, struct err *e);
bool file_exists(const char *path);
bool file_is_folder(const char *path);
bool file_same(const char *a, const char *b); /* both exist and are the same file or folder */
/* dir + "/" + name, malloc'd; NULL when out of memory. */
char *file_join(const char *dir, const char *name);

/* Writes through a descriptor until all is written, or says why (disk full included). */
bool file_write_all(int fd, const void *data, size_t bytes, struct err *e);
/* Reads exactly so many bytes from an offset; a file that ends before is an error. Then the same for writing.
 */
bool file_read_at(int fd, void *to, uint64_t bytes, uint64_t at, struct err *e);
bool file_write_at(int fd, const void *data, uint64_t bytes, uint64_t at, struct err *e);
/* Creates or replaces `path` with these bytes and fsyncs it. */
bool file_write(const char *path, const void *data, size_t bytes, struct err *e);
bool file_copy(const char *from, const char *to, struct err *e);
/* fsync of a folder, so that renames inside it survive a crash. */
bool file_sync_folder(const char *path, struct err *e);
/* Removes a folder with everything in it. A missing one is fine. */
bool file_remove_tree(const char *path, struct err *e);
#endif
