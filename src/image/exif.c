#include "image/exif.h"
#include <stdbool.h>
#include <string.h>

struct tiff {
    const uint8_t *data;
    size_t bytes;
    bool big_endian;
};

static unsigned read16(const struct tiff *t, size_t at)
{
    const uint8_t *p = t->data + at;
    return t->big_endian ? (unsigned)p[0] << 8 | p[1] : (unsigned)p[1] << 8 | p[0];
}

static size_t read32(const struct tiff *t, size_t at)
{
    size_t first = read16(t, at), second = read16(t, at + 2);
    return t->big_endian ? first << 16 | second : second << 16 | first;
}

int exif_orientation(const uint8_t *tiff, size_t bytes)
{
    enum { HEADER = 8, ENTRY = 12, ORIENTATION = 0x0112, TYPE_SHORT = 3 };
    if (bytes < HEADER || (memcmp(tiff, "II*\0", 4) != 0 && memcmp(tiff, "MM\0*", 4) != 0)) return 1;
    struct tiff t = { tiff, bytes, tiff[0] == 'M' };
    size_t at = read32(&t, 4);
    if (at > bytes || bytes - at < 2) return 1;
    unsigned n = read16(&t, at);
    at += 2;
    for (; n > 0 && bytes - at >= ENTRY; n--, at += ENTRY) {
        if (read16(&t, at) != ORIENTATION) continue;
        unsigned value = read16(&t, at + 8);
        return read16(&t, at + 2) == TYPE_SHORT && value >= 1 && value <= 8 ? (int)value : 1;
    }
    return 1;
}
