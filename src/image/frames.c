#include "image/frames.h"
#include "image/data_url.h"
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

static const char START[] = "data:video/jpeg;base64,";

static const char *digits_of(const char *source)
{
    return strncasecmp(source, START, sizeof START - 1) == 0 ? source + sizeof START - 1 : NULL;
}

int64_t frames_count(const char *source)
{
    const char *at = digits_of(source);
    int64_t n = at ? 1 : 0;
    for (; at && n <= FRAMES_MOST && (at = strchr(at, ',')); at++) n++;
    return n;
}

/* A video on its way. */
struct clip {
    const struct patch_rule *rule;
    struct image_limits limits;
    int64_t n, height, width, out_height, out_width; /* frames; their size, and when resized */
    uint8_t *rgb;                                    /* [rule->frames] of them, resized */
};

static uint64_t bytes_of(const struct clip *c)
{
    return (uint64_t)(3 * c->out_height * c->out_width);
}

/* The first frame says what the others are to be. */
static bool begin(struct clip *c, const struct image *first, struct err *e)
{
    const struct patch_rule *r = c->rule;
    struct resize_rule fit = { (int64_t)r->side * r->merge, r->pixels_min, r->pixels_max };
    c->height = first->height;
    c->width = first->width;
    if (!resize_fit_clip(&c->out_height, &c->out_width, c->height, c->width, c->n, &fit, e)) return false;
    c->rgb = malloc(bytes_of(c) * (unsigned)r->frames);
    return c->rgb || err_memory(e, "frames", bytes_of(c) * (unsigned)r->frames);
}

static bool take(struct clip *c, const struct image *m, int64_t slot, struct err *e)
{
    if (!c->rgb && !begin(c, m, e)) return false;
    if (m->height != c->height || m->width != c->width)
        return err_set(e, ERR_FORMAT,
                       "%" PRId64 " x %" PRId64 " pixels, the first frame has %" PRId64 " x %" PRId64,
                       m->width, m->height, c->width, c->height);
    return resize_bicubic(c->rgb + bytes_of(c) * (uint64_t)slot, c->out_height, c->out_width, m->rgb,
                          m->height, m->width, e);
}

static bool read_frame(struct clip *c, const char *source, const char *text, size_t n, int64_t slot,
                       struct err *e)
{
    struct image m = { 0 };
    uint8_t *data;
    size_t bytes;
    bool ok = data_url_digits(&data, &bytes, text, n, (size_t)(text - source), c->limits.bytes, e) &&
              image_decode(&m, data, bytes, &c->limits, e) && take(c, &m, slot, e);
    free(data);
    image_free(&m);
    return ok;
}

static bool read_all(struct clip *c, struct patches *out, const char *source, struct err *e)
{
    int64_t each = c->rule->frames;
    const char *text = digits_of(source);
    for (int64_t i = 0; i < c->n; i++) {
        size_t n = strcspn(text, ",");
        if (!read_frame(c, source, text, n, i % each, e))
            return err_note(e, "frame %" PRId64 " of %" PRId64, i + 1, c->n);
        text += n + (text[n] == ',');
        if (i + 1 < c->n && (i + 1) % each != 0) continue;
        for (int64_t k = i % each + 1; k < each; k++)
            memcpy(c->rgb + bytes_of(c) * (uint64_t)k, c->rgb + bytes_of(c) * (uint64_t)(k - 1), bytes_of(c));
        if (!patches_of_frames(&out[i / each], c->rgb, c->out_height, c->out_width, c->rule, e)) return false;
    }
    return true;
}

bool frames_patches(struct patches *out, const char *source, const struct patch_rule *rule,
                    const struct image_limits *limits, struct err *e)
{
    struct clip c = { .rule = rule, .limits = image_limits_filled(limits), .n = frames_count(source) };
    int64_t n = (c.n + rule->frames - 1) / rule->frames;
    if (c.n < FRAMES_LEAST || c.n > FRAMES_MOST)
        return err_set(e, ERR_LIMIT, "a video has %d to %d frames, found %s%" PRId64, FRAMES_LEAST,
                       FRAMES_MOST, c.n > FRAMES_MOST ? "more than " : "",
                       c.n > FRAMES_MOST ? FRAMES_MOST : c.n);
    memset(out, 0, (size_t)n * sizeof *out);
    uint64_t most = FRAMES_PIXELS_MAX / (uint64_t)c.n;
    if (c.limits.pixels > most) c.limits.pixels = most;
    bool ok = read_all(&c, out, source, e);
    for (int64_t i = 0; !ok && i < n; i++) patches_free(&out[i]);
    free(c.rgb);
    return ok;
}
