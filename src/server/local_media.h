/* Images by file:// URL, for servers that were told below which folder. The kernel resolves the rest of a
 * path below that folder and nowhere else (openat2, RESOLVE_BENEATH): neither '..' nor a link leads out,
 * whoever changes the folder meanwhile. Regular files only. Linux 5.6. */
#ifndef SERVER_LOCAL_MEDIA_H
#define SERVER_LOCAL_MEDIA_H
#include "base/err.h"
#include <stdbool.h>
#include <stddef.h>

struct local_media {
    int fd;             /* of the folder */
    char *given, *real; /* its name as it was given, and without links; no '/' at their ends */
};

/* folder: absolute. ERR_ARGUMENT, ERR_IO, ERR_UNSUPPORTED: an older kernel. */
bool local_media_open(struct local_media *m, const char *folder, struct err *e);
void local_media_close(struct local_media *m); /* accepts one that was zeroed, or not opened */

/* What url, "file:///..." or "file://localhost/...", names as a data: URL, malloc'd. ERR_ARGUMENT: no such
 * URL, or not below the folder, or nothing there that may be read: one sentence for all of these, so that
 * nobody learns what lies elsewhere. ERR_LIMIT: larger than bytes_max. */
bool local_media_data_url(char **out, size_t *bytes, const struct local_media *m, const char *url,
                          size_t bytes_max, struct err *e);
#endif
