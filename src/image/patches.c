#include "image/patches.h"
#include "base/doc.h"
#include "base/file.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { CHANNELS = 3, CONFIG_BYTES_MAX = 1 << 20, BICUBIC = 3 };
static const int64_t PIXELS_MAX = INT64_C(1) << 31;
static const char WHERE[] = "";

static bool only_int(const json_t *root, const char *key, int64_t value, struct err *e)
{
    int64_t found = value;
    return doc_int_or(&found, root, WHERE, key, 0, PIXELS_MAX, e) &&
           (found == value ||
            err_set(e, ERR_UNSUPPORTED, "%s is %lld, config.json and this program take %lld", key,
                    (long long)found, (long long)value));
}

static bool only_true(const json_t *root, const char *key, struct err *e)
{
    bool found = true;
    return doc_bool_or(&found, root, WHERE, key, e) &&
           (found || err_set(e, ERR_UNSUPPORTED, "%s false is not supported", key));
}

/* The minimum and maximum are numbers of pixels, whatever the keys of `size` say. */
static bool read_sizes(struct patch_rule *r, const json_t *root, struct err *e)
{
    const json_t *size = json_object_get(root, "size");
    if (json_is_object(size) &&
        (!doc_int_or(&r->pixels_min, size, "size", "shortest_edge", 1, PIXELS_MAX, e) ||
         !doc_int_or(&r->pixels_max, size, "size", "longest_edge", 1, PIXELS_MAX, e)))
        return false;
    if (!doc_int_or(&r->pixels_min, root, WHERE, "min_pixels", 1, PIXELS_MAX, e) ||
        !doc_int_or(&r->pixels_max, root, WHERE, "max_pixels", 1, PIXELS_MAX, e))
        return false;
    return r->pixels_min <= r->pixels_max ||
           err_set(e, ERR_FORMAT, "the least number of pixels, %lld, is above the most, %lld",
                   (long long)r->pixels_min, (long long)r->pixels_max);
}

static bool read_three(float *out, const json_t *root, const char *key, struct err *e)
{
    const json_t *list = json_object_get(root, key);
    if (!list || json_is_null(list)) return true;
    for (size_t i = 0; i < CHANNELS; i++) {
        const json_t *v = json_array_get(list, i);
        if (json_array_size(list) != CHANNELS || !json_is_number(v))
            return err_set(e, ERR_FORMAT, "%s: expected three numbers", key);
        out[i] = (float)json_number_value(v);
    }
    return true;
}

static bool read_rule(struct patch_rule *r, const json_t *root, struct err *e)
{
    double rescale = 1.0 / 255;
    if (!json_is_object(root)) return err_set(e, ERR_FORMAT, "expected an object");
    if (!only_int(root, "patch_size", r->side, e) || !only_int(root, "temporal_patch_size", r->frames, e) ||
        !only_int(root, "merge_size", r->merge, e) || !only_int(root, "resample", BICUBIC, e) ||
        !only_true(root, "do_resize", e) || !only_true(root, "do_rescale", e) ||
        !only_true(root, "do_normalize", e) || !doc_number_or(&rescale, root, WHERE, "rescale_factor", e) ||
        !read_sizes(r, root, e) || !read_three(r->mean, root, "image_mean", e) ||
        !read_three(r->deviation, root, "image_std", e))
        return false;
    if (fabs(rescale * 255 - 1) > 1e-6)
        return err_set(e, ERR_UNSUPPORTED, "rescale_factor is %g, only 1/255 is supported", rescale);
    for (int c = 0; c < CHANNELS; c++)
        if (!isfinite(r->mean[c]) || !isfinite(r->deviation[c]) || r->deviation[c] <= 0)
            return err_set(e, ERR_FORMAT, "image_std: expected numbers above 0");
    return true;
}

static bool load(struct patch_rule *out, const char *dir, const char *name, int64_t pixels_min,
                 int64_t pixels_max, struct err *e)
{
    *out = (struct patch_rule){ .side = out->side,
                                .frames = out->frames,
                                .merge = out->merge,
                                .pixels_min = pixels_min,
                                .pixels_max = pixels_max,
                                .mean = { 0.5f, 0.5f, 0.5f },
                                .deviation = { 0.5f, 0.5f, 0.5f } };
    char *path = file_join(dir, name);
    json_t *root = NULL;
    if (!path) return err_memory(e, dir, 0);
    bool ok = !file_exists(path) || (doc_load(&root, path, CONFIG_BYTES_MAX, e) &&
                                     (read_rule(out, root, e) || err_note(e, "%s", path)));
    json_decref(root);
    free(path);
    return ok;
}

bool patch_rule_load(struct patch_rule *out, const char *dir, int side, int frames, int merge, struct err *e)
{
    *out = (struct patch_rule){ .side = side, .frames = frames, .merge = merge };
    return load(out, dir, "preprocessor_config.json", 65536, 16777216, e);
}

bool patch_rule_load_video(struct patch_rule *out, const char *dir, int side, int frames, int merge,
                           struct err *e)
{
    *out = (struct patch_rule){ .side = side, .frames = frames, .merge = merge };
    return load(out, dir, "video_preprocessor_config.json", 4096, 25165824, e);
}

/* One channel's values of a frame, resized, in its place of the patches. */
static void lay_channel(struct patches *p, const uint8_t *rgb, const struct patch_rule *r, int channel,
                        int frame)
{
    int64_t side = r->side, area = side * side, across = p->width / r->merge, unit = r->merge * r->merge;
    float value[256];
    for (int i = 0; i < 256; i++)
        value[i] = ((float)i - r->mean[channel] * 255) / (r->deviation[channel] * 255);
    for (int64_t i = 0; i < p->height * p->width; i++) {
        int64_t block = i / unit, in = i % unit;
        int64_t top = (block / across * r->merge + in / r->merge) * side,
                left = (block % across * r->merge + in % r->merge) * side;
        float *to = p->values + i * p->cols + (channel * r->frames + frame) * area;
        for (int64_t y = 0; y < side; y++)
            for (int64_t x = 0; x < side; x++)
                to[y * side + x] = value[rgb[((top + y) * p->width * side + left + x) * CHANNELS + channel]];
    }
}

static void repeat_first(struct patches *p, const struct patch_rule *r)
{
    int64_t area = (int64_t)r->side * r->side;
    for (int64_t i = 0; i < p->height * p->width * CHANNELS; i++) {
        float *first = p->values + i * r->frames * area;
        for (int f = 1; f < r->frames; f++) memcpy(first + f * area, first, (size_t)area * sizeof *first);
    }
}

/* Room for a picture of so many pixels. */
static bool make_room(struct patches *out, int64_t height, int64_t width, const struct patch_rule *rule,
                      struct err *e)
{
    *out = (struct patches){ .height = height / rule->side,
                             .width = width / rule->side,
                             .cols = (int64_t)CHANNELS * rule->frames * rule->side * rule->side };
    uint64_t bytes = (uint64_t)(out->height * out->width * out->cols) * sizeof *out->values;
    out->values = malloc(bytes);
    if (out->values) return true;
    *out = (struct patches){ 0 };
    return err_memory(e, "patches", bytes);
}

bool patches_make(struct patches *out, const struct image *image, const struct patch_rule *rule,
                  struct err *e)
{
    struct resize_rule fit = { (int64_t)rule->side * rule->merge, rule->pixels_min, rule->pixels_max };
    int64_t height, width;
    *out = (struct patches){ 0 };
    if (!resize_fit(&height, &width, image->height, image->width, &fit, e)) return false;
    uint64_t bytes = (uint64_t)height * (uint64_t)width * CHANNELS;
    uint8_t *rgb = malloc(bytes);
    bool ok = (rgb || err_memory(e, "patches", bytes)) &&
              resize_bicubic(rgb, height, width, image->rgb, image->height, image->width, e) &&
              make_room(out, height, width, rule, e);
    for (int c = 0; ok && c < CHANNELS; c++) lay_channel(out, rgb, rule, c, 0);
    if (ok) repeat_first(out, rule);
    free(rgb);
    return ok;
}

bool patches_of_frames(struct patches *out, const uint8_t *rgb, int64_t height, int64_t width,
                       const struct patch_rule *rule, struct err *e)
{
    if (!make_room(out, height, width, rule, e)) return false;
    for (int f = 0; f < rule->frames; f++)
        for (int c = 0; c < CHANNELS; c++) lay_channel(out, rgb + f * height * width * CHANNELS, rule, c, f);
    return true;
}

void patches_free(struct patches *p)
{
    free(p->values);
    *p = (struct patches){ 0 };
}
