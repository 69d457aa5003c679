/* Pictures from outside: a PNG, JPEG, WebP or GIF file in, upright 8-bit RGB out. What the bytes are is told
 * by their first ones, not by a name. An animation gives its first frame. Transparent places show white; EXIF
 * orientation is applied; 16-bit samples keep their upper byte; colour profiles and gamma are not. The size a
 * header names is checked before anything of that size is made. A file that ends early is an error. */
#ifndef IMAGE_IMAGE_H
#define IMAGE_IMAGE_H
#include "base/err.h"
#include <stddef.h>
#include <stdint.h>

struct image {
    int64_t width, height;
    uint8_t *rgb; /* [height][width][3], owned */
};

/* 0: the default */
enum { IMAGE_SECONDS = 20 };

struct image_limits {
    uint64_t bytes;      /* of a file, or of what a data URL holds; 256 MiB */
    uint64_t pixels;     /* width * height; 2^26, 8192 x 8192 */
    double until;        /* clock_seconds, of decoding where a program is given; in IMAGE_SECONDS */
    const char *program; /* decodes in a process of its own, see isolated.h; NULL: this one does */
};

/* With the defaults in place of zeroes; NULL: all of them. */
struct image_limits image_limits_filled(const struct image_limits *l);

/* source: a path, or data:TYPE;base64,... limits: NULL for the defaults. ERR_LIMIT past them, ERR_UNSUPPORTED
 * for http URLs and formats not named above, ERR_FORMAT for damaged files. */
bool image_load(struct image *out, const char *source, const struct image_limits *limits, struct err *e);
bool image_decode(struct image *out, const uint8_t *data, size_t bytes, const struct image_limits *limits,
                  struct err *e);
void image_free(struct image *m); /* accepts a zeroed one */
#endif
