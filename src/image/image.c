/* A source becomes bytes, bytes become a raster by the format they show, a raster becomes upright RGB. */
#include "image/image.h"
#include "base/clock.h"
#include "base/file.h"
#include "image/data_url.h"
#include "image/decode.h"
#include "image/isolated.h"
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

static const uint64_t BYTES_MAX = UINT64_C(256) << 20, PIXELS_MAX = UINT64_C(1) << 26;

struct image_limits image_limits_filled(const struct image_limits *l)
{
    struct image_limits out = l ? *l : (struct image_limits){ 0 };
    if (out.bytes == 0) out.bytes = BYTES_MAX;
    if (out.pixels == 0) out.pixels = PIXELS_MAX;
    if (out.until == 0) out.until = clock_seconds() + IMAGE_SECONDS;
    return out;
}

bool raster_create(struct raster *out, int64_t width, int64_t height, int channels, uint64_t pixels_max,
                   struct err *e)
{
    if (width < 1 || height < 1)
        return err_set(e, ERR_FORMAT, "%" PRId64 " x %" PRId64 " pixels", width, height);
    if ((uint64_t)width > pixels_max / (uint64_t)height)
        return err_set(e, ERR_LIMIT, "%" PRId64 " x %" PRId64 " pixels are more than %" PRIu64, width, height,
                       pixels_max);
    uint64_t pixels = (uint64_t)width * (uint64_t)height;
    out->width = width;
    out->height = height;
    out->channels = channels;
    out->orientation = 1;
    out->samples = calloc(pixels, (size_t)channels);
    return out->samples || err_memory(e, "pixels", pixels * (unsigned)channels);
}

static decode_format *format_of(const uint8_t *data, size_t bytes)
{
    if (bytes >= 8 && memcmp(data, "\x89PNG\r\n\x1a\n", 8) == 0) return decode_png;
    if (bytes >= 3 && memcmp(data, "\xff\xd8\xff", 3) == 0) return decode_jpeg;
    if (bytes >= 12 && memcmp(data, "RIFF", 4) == 0 && memcmp(data + 8, "WEBP", 4) == 0) return decode_webp;
    if (bytes >= 6 && (memcmp(data, "GIF87a", 6) == 0 || memcmp(data, "GIF89a", 6) == 0)) return decode_gif;
    return NULL;
}

/* In place: over white, the alpha channel dropped. */
static void drop_alpha(struct raster *r)
{
    int64_t n = r->width * r->height;
    for (int64_t i = 0; r->channels == 4 && i < n; i++) {
        const uint8_t *from = r->samples + 4 * i;
        unsigned alpha = from[3];
        for (int c = 0; c < 3; c++) {
            unsigned x = from[c] * alpha + 255 * (255 - alpha) + 128;
            r->samples[3 * i + c] = (uint8_t)((x + (x >> 8)) >> 8);
        }
    }
    r->channels = 3;
}

/* Orientations from 5 on exchange rows and columns; of the rest of the number, minus one, 1 and 2 mirror
 * columns, 2 and 3 rows. EXIF 2.3, 4.6.4: what the first row and the first column stand for. */
static bool turn(struct image *out, const struct raster *r, struct err *e)
{
    static const struct {
        bool swap, flip_x, flip_y; /* flips of the stored picture, before the exchange */
    } how[9] = { { 0 },
                 { false, false, false },
                 { false, true, false },
                 { false, true, true },
                 { false, false, true },
                 { true, false, false },
                 { true, false, true },
                 { true, true, true },
                 { true, true, false } };
    bool swap = how[r->orientation].swap;
    *out = (struct image){ swap ? r->height : r->width, swap ? r->width : r->height, NULL };
    uint64_t bytes = 3 * (uint64_t)r->width * (uint64_t)r->height;
    out->rgb = malloc(bytes);
    if (!out->rgb) return err_memory(e, "pixels", bytes);
    for (int64_t y = 0; y < out->height; y++)
        for (int64_t x = 0; x < out->width; x++) {
            int64_t from_x = swap ? y : x, from_y = swap ? x : y;
            if (how[r->orientation].flip_x) from_x = r->width - 1 - from_x;
            if (how[r->orientation].flip_y) from_y = r->height - 1 - from_y;
            memcpy(out->rgb + 3 * (y * out->width + x), r->samples + 3 * (from_y * r->width + from_x), 3);
        }
    return true;
}

static bool to_image(struct image *out, struct raster *r, struct err *e)
{
    drop_alpha(r);
    if (r->orientation != 1) return turn(out, r, e);
    *out = (struct image){ r->width, r->height, r->samples };
    r->samples = NULL;
    return true;
}

bool image_decode(struct image *out, const uint8_t *data, size_t bytes, const struct image_limits *limits,
                  struct err *e)
{
    struct image_limits l = image_limits_filled(limits);
    struct raster r = { 0 };
    *out = (struct image){ 0 };
    if (bytes > l.bytes)
        return err_set(e, ERR_LIMIT, "%zu bytes are more than the %" PRIu64 " of an image", bytes, l.bytes);
    decode_format *decode = format_of(data, bytes);
    if (!decode)
        return err_set(e, ERR_UNSUPPORTED,
                       "not an image of a known format: PNG, JPEG, WebP and GIF are read");
    if (l.program) return isolated_decode(out, data, bytes, &l, e);
    bool ok = decode(&r, data, bytes, l.pixels, e) && to_image(out, &r, e);
    free(r.samples);
    return ok;
}

static bool load_file(struct image *out, const char *path, const struct image_limits *l, struct err *e)
{
    struct file_map map = { 0 };
    if (!file_map_open(&map, path, e)) return false;
    bool ok = image_decode(out, map.data, (size_t)map.bytes, l, e) || err_note(e, "%s", path);
    file_map_close(&map);
    return ok;
}

static bool load_data(struct image *out, const char *url, const struct image_limits *l, struct err *e)
{
    uint8_t *data = NULL;
    size_t bytes = 0;
    bool ok = (data_url_decode(&data, &bytes, url, l->bytes, e) && image_decode(out, data, bytes, l, e)) ||
              err_note(e, "data URL");
    free(data);
    return ok;
}

bool image_load(struct image *out, const char *source, const struct image_limits *limits, struct err *e)
{
    struct image_limits l = image_limits_filled(limits);
    *out = (struct image){ 0 };
    if (strncasecmp(source, "data:", 5) == 0) return load_data(out, source, &l, e);
    if (strncasecmp(source, "http://", 7) == 0 || strncasecmp(source, "https://", 8) == 0)
        return err_set(e, ERR_UNSUPPORTED, "%.100s: images are read from files and data: URLs only", source);
    return load_file(out, source, &l, e);
}

void image_free(struct image *m)
{
    free(m->rgb);
    *m = (struct image){ 0 };
}
