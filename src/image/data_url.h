/* data: URLs with base64 content, both ways. Source: RFC 2397; RFC 4648, section 4. */
#ifndef IMAGE_DATA_URL_H
#define IMAGE_DATA_URL_H
#include "base/err.h"
#include <stddef.h>
#include <stdint.h>
/* url begins with "data:". White space between digits is skipped, padding may be left out. *data is malloc'd;
 * more than bytes_max are ERR_LIMIT before any are decoded. */
bool data_url_decode(uint8_t **data, size_t *bytes, const char *url, uint64_t bytes_max, struct err *e);
/* n base64 digits of such a URL. *data is malloc'd. offset: where they begin in it, for errors. */
bool data_url_digits(uint8_t **data, size_t *bytes, const char *text, size_t n, size_t offset,
                     uint64_t bytes_max, struct err *e);
/* An image's bytes as such a URL, malloc'd. ERR_MEMORY. */
bool data_url_encode(char **url, const uint8_t *data, size_t bytes, struct err *e);
#endif
