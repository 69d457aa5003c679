/* The decoders, one file a format. Each takes a whole file and leaves its pixels as stored, with alpha where
 * it has some, and how they are to be turned. */
#ifndef IMAGE_DECODE_H
#define IMAGE_DECODE_H
#include "base/err.h"
#include <stddef.h>
#include <stdint.h>

struct raster {
    int64_t width, height;
    int channels;     /* 3: RGB, 4: RGBA, not premultiplied */
    int orientation;  /* of EXIF, 1 (upright) to 8 */
    uint8_t *samples; /* [height][width][channels], owned */
};

/* Sets the size, checked against the limit, and makes the samples, zeroed. */
bool raster_create(struct raster *out, int64_t width, int64_t height, int channels, uint64_t pixels_max,
                   struct err *e);

/* On failure out->samples may be set and is the caller's still. */
typedef bool decode_format(struct raster *out, const uint8_t *data, size_t bytes, uint64_t pixels_max,
                           struct err *e);
decode_format decode_png, decode_jpeg, decode_webp, decode_gif;
#endif
