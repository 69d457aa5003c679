/* Any bytes as an image file, or as a data: URL of an image or of a video's frames: refused with a reason, or
 * decoded within the limits and cut into patches. */
#include "image/frames.h"
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { PIXELS_MAX = 1 << 14 };

static const struct patch_rule rule = { 4, 2, 2, 64, 4096, { 0.5f, 0.5f, 0.5f }, { 0.5f, 0.5f, 0.5f } };
static const struct image_limits limits = { 1 << 20, PIXELS_MAX };

static void check_patches(struct patches *p)
{
    if (p->height < 1 || p->width < 1) abort();
    for (int64_t i = 0; i < p->height * p->width * p->cols; i++)
        if (!(p->values[i] >= -1 && p->values[i] <= 1)) abort();
    patches_free(p);
}

static void check(const struct image *m)
{
    struct patches p;
    struct err e = { 0 };
    if (m->width < 1 || m->height < 1 || m->width * m->height > PIXELS_MAX || !m->rgb) abort();
    if (!patches_make(&p, m, &rule, &e)) {
        if (e.code != ERR_LIMIT || p.values) abort();
        return;
    }
    check_patches(&p);
}

static void check_video(const char *url)
{
    struct patches all[(FRAMES_MOST + 1) / 2];
    struct err e = { 0 };
    int64_t pairs = (frames_count(url) + 1) / 2;
    if (frames_patches(all, url, &rule, &limits, &e))
        for (int64_t i = 0; i < pairs; i++) check_patches(&all[i]);
    else if (!e.text[0])
        abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct image m;
    struct err e = { 0 };
    bool ok;
    if (size > 5 && memcmp(data, "data:", 5) == 0) {
        char *url = malloc(size + 1);
        if (!url) return 0;
        memcpy(url, data, size);
        url[size] = 0;
        if (frames_count(url) > 0) check_video(url);
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
