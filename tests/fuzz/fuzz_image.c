/* Any bytes as an image file, or as a data: URL: refused with a reason, or decoded within the limits and cut
 * into patches. */
#include "image/patches.h"
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { PIXELS_MAX = 1 << 14 };

static void check(const struct image *m)
{
    static const struct patch_rule rule = { 4, 2, 2, 64, 4096, { 0.5f, 0.5f, 0.5f }, { 0.5f, 0.5f, 0.5f } };
    struct patches p;
    struct err e = { 0 };
    if (m->width < 1 || m->height < 1 || m->width * m->height > PIXELS_MAX || !m->rgb) abort();
    if (!patches_make(&p, m, &rule, &e)) {
        if (e.code != ERR_LIMIT || p.values) abort();
        return;
    }
    for (int64_t i = 0; i < p.height * p.width * p.cols; i++)
        if (!(p.values[i] >= -1 && p.values[i] <= 1)) abort();
    patches_free(&p);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const struct image_limits limits = { 1 << 20, PIXELS_MAX };
    struct image m;
    struct err e = { 0 };
    bool ok;
    if (size > 5 && memcmp(data, "data:", 5) == 0) {
        char *url = malloc(size + 1);
        if (!url) return 0;
        memcpy(url, data, size);
        url[size] = 0;
        ok = image_load(&m, url, &limits, &e);
        free(url);
    } else {
        ok = image_decode(&m, data, size, &limits, &e);
    }
    if (ok)
        check(&m);
    else if (m.rgb || !e.text[0])
        abort();
    image_free(&m);
    return 0;
}
