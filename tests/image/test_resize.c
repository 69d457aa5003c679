/* The size rule against the vectors, resampling against PIL (tools/make_image_goldens.py), preprocessor
 * files, the order of patches. The released preprocessor's own pixel values: tests/engine/test_picture.c. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "base/file.h"
#include "checkpoint/safetensors.h"
#include "image/patches.h"
#include "support/models.h"
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int64_t number(const json_t *list, size_t i)
{
    return (int64_t)json_real_value(json_array_get(list, i));
}

static void sizes_match_the_vectors(void **state)
{
    (void)state;
    static const struct resize_rule rule = { 32, 65536, 16777216 };
    json_t *root = json_load_file("tests/golden/model_vectors.json", JSON_DECODE_INT_AS_REAL, NULL), *c;
    assert_non_null(root);
    const json_t *cases = json_object_get(json_object_get(root, "image_resize"), "cases");
    size_t i;
    assert_int_equal(json_array_size(cases), 17);
    json_array_foreach(cases, i, c)
    {
        const json_t *in = json_object_get(c, "in_hw"), *out = json_object_get(c, "out_hw");
        struct err e = { 0 };
        int64_t h = 0, w = 0;
        bool ok = resize_fit(&h, &w, number(in, 0), number(in, 1), &rule, &e);
        assert_int_equal(ok, json_is_array(out));
        if (!ok) assert_int_equal(e.code, ERR_LIMIT);
        if (ok && (h != number(out, 0) || w != number(out, 1)))
            fail_msg("%d x %d becomes %d x %d", (int)number(in, 0), (int)number(in, 1), (int)h, (int)w);
    }
    json_decref(root);
}

/* PIL's weights have 22 bits, torchvision's 15 or so: a sample may differ by one, and few do. */
static void resampling_is_near_pil(void **state)
{
    (void)state;
    struct err e = { 0 };
    size_t n, at = 0;
    int64_t off = 0, all = 0;
    char *data;
    must(file_read(&data, &n, "tests/golden/images/resize.bin", 1 << 24, &e), &e);
    while (at < n) {
        int32_t size[4];
        memcpy(size, data + at, sizeof size);
        size_t in = 3 * (size_t)(size[0] * size[1]), out = 3 * (size_t)(size[2] * size[3]);
        const uint8_t *from = (const uint8_t *)data + at + sizeof size, *want = from + in;
        uint8_t *got = malloc(out);
        must(resize_bicubic(got, size[2], size[3], from, size[0], size[1], &e), &e);
        for (size_t i = 0; i < out; i++) {
            if (abs(got[i] - want[i]) > 1)
                fail_msg("%d x %d to %d x %d: sample %d is %d, PIL has %d", size[1], size[0], size[3],
                         size[2], (int)i, got[i], want[i]);
            off += got[i] != want[i];
        }
        all += (int64_t)out;
        free(got);
        at += sizeof size + in + out;
    }
    free(data);
    printf("note: %d of %d resampled samples are one off PIL's\n", (int)off, (int)all);
    assert_true(off * 50 < all);
}

/* 400 clips; 0 x 0 where transformers refuses. */
static void clips_are_sized_as_transformers_does(void **state)
{
    (void)state;
    static const struct resize_rule rule = { 32, 4096, 25165824 };
    struct safetensors f;
    struct err e = { 0 };
    int refused = 0;
    must(safetensors_open(&f, "tests/golden/demo/golden_video.safetensors", &e), &e);
    const struct tensor *t = safetensors_find(&f, "sizes");
    assert_non_null(t);
    assert_int_equal(t->shape[0], 400);
    for (int64_t i = 0; i < t->shape[0]; i++) {
        const int32_t *c = (const int32_t *)(const void *)t->data + 5 * i;
        int64_t height = 0, width = 0;
        bool ok = resize_fit_clip(&height, &width, c[1], c[2], c[0], &rule, &e);
        if (ok != (c[3] > 0) || (ok && (height != c[3] || width != c[4])))
            fail_msg("%d frames of %d x %d: %d x %d, transformers has %d x %d", c[0], c[1], c[2], (int)height,
                     (int)width, c[3], c[4]);
        refused += !ok;
    }
    assert_true(refused > 10 && refused < 200);
    safetensors_close(&f);
}

static void a_flat_picture_stays_flat(void **state)
{
    (void)state;
    struct err e = { 0 };
    uint8_t in[3 * 37 * 53], out[3 * 64 * 16];
    memset(in, 201, sizeof in);
    must(resize_bicubic(out, 64, 16, in, 37, 53, &e), &e);
    for (size_t i = 0; i < sizeof out; i++) assert_int_equal(out[i], 201);
}

/* Each sample tells its channel, row and column of patches; a patch's place in the list follows the released
 * order: blocks of 2 x 2. */
static void patches_lie_in_blocks(void **state)
{
    (void)state;
    enum { SIDE = 4, H = 16, W = 24 };
    static const struct patch_rule rule = { SIDE, 2, 2, 1, 1 << 20, { 0, 0.5f, 0.25f }, { 1, 0.5f, 0.25f } };
    uint8_t rgb[H * W * 3];
    struct patches p;
    struct err e = { 0 };
    for (int i = 0; i < H * W * 3; i++) rgb[i] = (uint8_t)(i * 7);
    must(patches_make(&p, &(struct image){ W, H, rgb }, &rule, &e), &e);
    assert_int_equal(p.height, H / SIDE);
    assert_int_equal(p.width, W / SIDE);
    assert_int_equal(p.cols, 3 * 2 * SIDE * SIDE);
    for (int y = 0; y < H / SIDE; y++)
        for (int x = 0; x < W / SIDE; x++)
            for (int c = 0; c < 3; c++)
                for (int f = 0; f < 2; f++)
                    for (int i = 0; i < SIDE * SIDE; i++) {
                        int row = (y / 2 * (W / SIDE / 2) + x / 2) * 4 + y % 2 * 2 + x % 2;
                        float got = p.values[row * p.cols + (c * 2 + f) * SIDE * SIDE + i];
                        float sample =
                            rgb[((y * SIDE + i / SIDE) * W + x * SIDE + i % SIDE) * 3 + c] / 255.0f;
                        float want = (sample - rule.mean[c]) / rule.deviation[c];
                        if (!(got - want <= 1e-6f && want - got <= 1e-6f))
                            fail_msg("patch (%d, %d), channel %d: %g, expected %g", y, x, c, (double)got,
                                     (double)want);
                    }
    patches_free(&p);
}

static const char *load_rule(const char *text, struct patch_rule *r)
{
    static char folder[] = "/tmp/quench-rule-XXXXXX";
    static struct err e;
    char path[100];
    if (folder[sizeof folder - 2] == 'X') assert_non_null(mkdtemp(folder));
    snprintf(path, sizeof path, "%s/preprocessor_config.json", folder);
    unlink(path);
    if (text) must(file_write(path, text, strlen(text), &e), &e);
    e = (struct err){ 0 };
    bool ok = patch_rule_load(r, folder, 16, 2, 2, &e);
    unlink(path);
    rmdir(folder);
    memcpy(folder + sizeof folder - 7, "XXXXXX", 6);
    return ok ? NULL : strstr(e.text, "config.json: ") ? strstr(e.text, "config.json: ") + 13 : e.text;
}

static void preprocessor_files(void **state)
{
    (void)state;
    static const struct {
        const char *text, *error;
    } bad[] = {
        { "[]", "expected an object" },
        { "{\"patch_size\": 14}", "patch_size is 14, config.json and this program take 16" },
        { "{\"merge_size\": 1}", "merge_size is 1" },
        { "{\"resample\": 2}", "resample is 2" },
        { "{\"do_resize\": false}", "do_resize false is not supported" },
        { "{\"rescale_factor\": 1}", "rescale_factor is 1, only 1/255 is supported" },
        { "{\"image_mean\": [1, 2]}", "image_mean: expected three numbers" },
        { "{\"image_std\": [1, 0, 1]}", "image_std: expected numbers above 0" },
        { "{\"min_pixels\": 9, \"max_pixels\": 8}", "the least number of pixels, 9, is above the most, 8" },
        { "{\"size\": {\"shortest_edge\": 0}}", "size.shortest_edge" },
    };
    struct patch_rule r;
    assert_null(load_rule(NULL, &r));
    assert_int_equal(r.pixels_min, 65536);
    assert_int_equal(r.pixels_max, 16777216);
    assert_null(load_rule(
        "{\"size\": {\"shortest_edge\": 4096, \"longest_edge\": 8192}, \"image_mean\": [0.1, 0.2, 0.3]}",
        &r));
    assert_int_equal(r.pixels_min, 4096);
    assert_int_equal(r.pixels_max, 8192);
    assert_true(r.mean[2] == 0.3f && r.deviation[2] == 0.5f);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        const char *error = load_rule(bad[i].text, &r);
        if (!error || !strstr(error, bad[i].error)) fail_msg("'%s', expected '%s'", error, bad[i].error);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sizes_match_the_vectors),
        cmocka_unit_test(resampling_is_near_pil),
        cmocka_unit_test(clips_are_sized_as_transformers_does),
        cmocka_unit_test(a_flat_picture_stays_flat),
        cmocka_unit_test(patches_lie_in_blocks),
        cmocka_unit_test(preprocessor_files),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
