/* Decoding against PIL (tools/make_image_goldens.py): every kind of file, upright and over white. And faults:
 * limits, truncation at every byte, what is no image. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "base/file.h"
#include "image/exif.h"
#include "image/image.h"
#include "support/models.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char FOLDER[] = "tests/golden/images";

static char *read_all(const char *path, size_t *n)
{
    struct err e = { 0 };
    char *data;
    must(file_read(&data, n, path, 1 << 24, &e), &e);
    return data;
}

/* The largest difference between an image and NAME.ppm. */
static int difference(const char *name)
{
    char path[300];
    struct image m;
    struct err e = { 0 };
    size_t n;
    int width, height, header, worst = 0;
    snprintf(path, sizeof path, "%s/%s", FOLDER, name);
    must(image_load(&m, path, NULL, &e), &e);
    snprintf(path, sizeof path, "%s/%s.ppm", FOLDER, name);
    char *ppm = read_all(path, &n);
    assert_int_equal(sscanf(ppm, "P6 %d %d 255%n", &width, &height, &header), 2);
    if (m.width != width || m.height != height)
        fail_msg("%s: %d x %d, PIL has %d x %d", name, (int)m.width, (int)m.height, width, height);
    assert_int_equal(n, (size_t)header + 1 + 3 * (size_t)width * (size_t)height);
    for (int i = 0; i < 3 * width * height; i++) {
        int d = abs(m.rgb[i] - (uint8_t)ppm[header + 1 + i]);
        if (d > worst) worst = d;
    }
    free(ppm);
    image_free(&m);
    return worst;
}

static void exact_formats_match_pil(void **state)
{
    (void)state;
    static const char *const names[] = {
        "rgb.png",         "rgba.png",      "grey.png",       "grey_alpha.png",
        "one_bit.png",     "palette.png",   "grey4.png",      "palette_transparent.png",
        "rgb16.png",       "grey16.png",    "interlaced.png", "rgb_transparent.png",
        "orientation.png", "lossless.webp", "alpha.webp",     "orientation.webp",
        "animated.webp",   "plain.gif",     "interlaced.gif", "transparent.gif",
        "animated.gif",
    };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (difference(names[i]) != 0) fail_msg("%s differs by %d", names[i], difference(names[i]));
}

/* Versions of the libraries may round differently. */
static void lossy_formats_match_pil(void **state)
{
    (void)state;
    static const char *const names[] = {
        "orientation_1.jpg", "orientation_2.jpg", "orientation_3.jpg", "orientation_4.jpg",
        "orientation_5.jpg", "orientation_6.jpg", "orientation_7.jpg", "orientation_8.jpg",
        "grey.jpg",          "progressive.jpg",   "full_colour.jpg",   "cmyk.jpg",
        "lossy.webp",
    };
    int worst = 0;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        int d = difference(names[i]);
        if (d > 1) fail_msg("%s differs by %d", names[i], d);
        if (d > worst) worst = d;
    }
    printf("note: JPEG and lossy WebP differ from PIL by %d at most\n", worst);
}

static void expect_error(const uint8_t *data, size_t n, const struct image_limits *l, enum err_code code,
                         const char *text)
{
    struct image m;
    struct err e = { 0 };
    assert_false(image_decode(&m, data, n, l, &e));
    assert_null(m.rgb);
    if (e.code != code || !strstr(e.text, text))
        fail_msg("error %d '%s', expected '%s'", e.code, e.text, text);
}

/* Cut at any byte a file is refused, but for what decoders may do without: a trailer. */
static void truncated_files_are_refused(void **state)
{
    (void)state;
    static const struct {
        const char *name;
        size_t trailer;
    } files[] = { { "rgb.png", 0 },         { "interlaced.png", 0 }, { "orientation_6.jpg", 0 },
                  { "progressive.jpg", 0 }, { "lossy.webp", 0 },     { "alpha.webp", 0 },
                  { "animated.webp", 0 },   { "plain.gif", 8 },      { "cmyk.jpg", 0 } };
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        char path[300];
        size_t n;
        snprintf(path, sizeof path, "%s/%s", FOLDER, files[i].name);
        char *data = read_all(path, &n);
        for (size_t cut = 0; cut + files[i].trailer < n; cut++) {
            struct image m;
            struct err e = { 0 };
            uint8_t *part = malloc(cut + 1);
            memcpy(part, data, cut);
            if (image_decode(&m, part, cut, NULL, &e))
                fail_msg("%s cut to %zu of %zu bytes passes", path, cut, n);
            assert_true(e.text[0] != 0);
            free(part);
        }
        free(data);
    }
}

/* Headers alone, naming sizes that nothing of is to be made. */
static void sizes_are_checked_before_decoding(void **state)
{
    (void)state;
    static const uint8_t png[] = { 0x89, 'P', 'N', 'G', '\r', '\n', 0x1a, '\n', 0,    0,    0,
                                   13,   'I', 'H', 'D', 'R',  0,    1,    0,    0,    0,    1,
                                   0,    0,   8,   2,   0,    0,    0,    0xe3, 0xe6, 0xa7, 0xb4 };
    static const uint8_t gif[] = { 'G', 'I', 'F',  '8',  '9',  'a',  0xff, 0xff, 0xff, 0xff, 0x80,
                                   0,   0,   0,    0,    0,    0,    0,    0,    0x2c, 0,    0,
                                   0,   0,   0xff, 0xff, 0xff, 0xff, 0,    2,    1,    0 };
    size_t n;
    char *jpeg = read_all("tests/golden/images/grey.jpg", &n);
    expect_error(gif, sizeof gif, NULL, ERR_LIMIT, "GIF: 65535 x 65535 pixels are more than 67108864");
    expect_error((const uint8_t *)jpeg, n, &(struct image_limits){ .pixels = 321 }, ERR_LIMIT,
                 "JPEG: 23 x 14 pixels are more than 321");
    expect_error((const uint8_t *)jpeg, n, &(struct image_limits){ .bytes = n - 1 }, ERR_LIMIT,
                 "of an image");
    free(jpeg);
    uint8_t header[sizeof png + 12];
    memcpy(header, png, sizeof png);
    memcpy(header + sizeof png, "\0\0\0\0IDAT\x35\xaf\x06\x1e", 12);
    expect_error(header, sizeof header, NULL, ERR_LIMIT, "PNG: 65536 x 65536 pixels are more than 67108864");
    char *webp = read_all("tests/golden/images/lossless.webp", &n);
    expect_error((const uint8_t *)webp, n, &(struct image_limits){ .pixels = 321 }, ERR_LIMIT,
                 "WebP: 23 x 14 pixels are more than 321");
    free(webp);
}

static void what_is_no_image_is_refused(void **state)
{
    (void)state;
    struct image m;
    struct err e = { 0 };
    expect_error((const uint8_t *)"", 0, NULL, ERR_UNSUPPORTED, "not an image of a known format");
    expect_error((const uint8_t *)"BM67890", 7, NULL, ERR_UNSUPPORTED, "PNG, JPEG, WebP and GIF are read");
    expect_error((const uint8_t *)"GIF89a", 6, NULL, ERR_FORMAT, "GIF: ");
    assert_false(image_load(&m, "http://a.b/c.png", NULL, &e));
    assert_int_equal(e.code, ERR_UNSUPPORTED);
    assert_false(image_load(&m, "tests/golden/images/none.png", NULL, &e));
    assert_string_equal(e.text, "tests/golden/images/none.png: No such file or directory");
    assert_false(image_load(&m, "tests/golden/README.md", NULL, &e));
    assert_non_null(strstr(e.text, "tests/golden/README.md: not an image"));
}

static void data_urls(void **state)
{
    (void)state;
    static const char good[] = /* 2 x 1, red and transparent blue */
        "data:image/"
        "png;base64,iVBORw0KGgoAAAANSUhEUgAAAAIAAAABCAYAAAD0In+KAAAAEUlEQVR4nGP4z8Dwn4Hh\nPwMADvoC/"
        "uLqlUwAAAAASUVORK5CYII=";
    static const struct {
        const char *url, *error;
    } bad[] = {
        { "data:image/png,abc", "data URL: expected data:TYPE;base64,DIGITS" },
        { "data:image/png;base64", "data URL: expected data:TYPE;base64,DIGITS" },
        { "data:image/png;base64,iVBO!w0K", "data URL: byte 26 is not a base64 digit" },
        { "data:image/png;base64,iVBOR", "data URL: one base64 digit too many" },
        { "data:image/png;base64,", "data URL: not an image of a known format" },
        { "data:;base64,R0lGODlh", "data URL: GIF: " },
    };
    struct image m;
    struct err e = { 0 };
    must(image_load(&m, good, NULL, &e), &e);
    assert_int_equal(m.width, 2);
    assert_int_equal(m.height, 1);
    assert_memory_equal(m.rgb, ((uint8_t[]){ 255, 0, 0, 255, 255, 255 }), 6);
    image_free(&m);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_false(image_load(&m, bad[i].url, NULL, &e));
        if (!strstr(e.text, bad[i].error)) fail_msg("'%s', expected '%s'", e.text, bad[i].error);
    }
    assert_false(image_load(&m, good, &(struct image_limits){ .bytes = 30 }, &e));
    assert_int_equal(e.code, ERR_LIMIT);
}

static void odd_exif_is_upright(void **state)
{
    (void)state;
    uint8_t tiff[] = {
        'I', 'I', '*', 0, 8, 0, 0, 0, 1, 0, 0x12, 1, 3, 0, 1, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0
    };
    assert_int_equal(exif_orientation(tiff, sizeof tiff), 6);
    for (size_t n = 0; n < 22; n++) assert_int_equal(exif_orientation(tiff, n), 1);
    tiff[18] = 9; /* no such orientation */
    assert_int_equal(exif_orientation(tiff, sizeof tiff), 1);
    tiff[18] = 6;
    tiff[12] = 4; /* not a short */
    assert_int_equal(exif_orientation(tiff, sizeof tiff), 1);
    tiff[12] = 3;
    tiff[4] = 0xff; /* the directory lies past the end */
    assert_int_equal(exif_orientation(tiff, sizeof tiff), 1);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(exact_formats_match_pil),     cmocka_unit_test(lossy_formats_match_pil),
        cmocka_unit_test(truncated_files_are_refused), cmocka_unit_test(sizes_are_checked_before_decoding),
        cmocka_unit_test(what_is_no_image_is_refused), cmocka_unit_test(data_urls),
        cmocka_unit_test(odd_exif_is_upright),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
