/* A parcel in a file: a header with all that has to agree, the data, a SHA-256 over both. */
#ifndef ENGINE_PARCEL_FILE_H
#define ENGINE_PARCEL_FILE_H
#include "engine/snapshot.h"

struct parcel_file {
    uint8_t identity[32], key[32]; /* see disk_cache.h */
};
/* Of a file, by the bytes of its parcel. */
uint64_t parcel_file_bytes(uint64_t parcel_bytes);
/* Creates `path` or replaces it; a failure leaves it incomplete. ERR_IO: the disk is full, say. */
bool parcel_file_write(const char *path, const struct parcel_file *f, const struct parcel *p, struct err *e);
/* ERR_FORMAT: not such a file, damaged or of another version. ERR_UNSUPPORTED: whole, but of another identity
 * or key. ERR_IO, ERR_MEMORY. */
bool parcel_file_read(struct parcel **out, const char *path, const struct parcel_file *f, struct err *e);
/* The header alone, and whether the file has the size that it says. */
bool parcel_file_look(struct parcel_file *out, const char *path, struct err *e);
#endif
