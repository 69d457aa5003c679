/* Videos as frames: which URLs they are, what is wrong with them, and that each frame lies where it belongs.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "image/data_url.h"
#include "image/frames.h"
#include "support/models.h"
#include "support/videos.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct patch_rule rule = {
    16, 2, 2, 4096, 25165824, { 0.5f, 0.5f, 0.5f }, { 0.5f, 0.5f, 0.5f }
};
#define FRAME(n) "tests/golden/demo/frames/" #n ".png"

static void which_urls_are_videos(void **state)
{
    (void)state;
    static const struct {
        const char *url;
        int64_t frames;
    } cases[] = {
        { "data:video/jpeg;base64,", 1 },
        { "data:video/jpeg;base64,AAAA,BBBB", 2 },
        { "DATA:Video/JPEG;Base64,AAAA,,", 3 },
        { "data:video/mp4;base64,AAAA,BBBB", 0 },
        { "data:image/jpeg;base64,AAAA,BBBB", 0 },
        { "data:video/jpeg,AAAA", 0 },
        { "http://a/data:video/jpeg;base64,A", 0 },
        { "", 0 },
        { "data:video/jpe", 0 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        assert_int_equal(frames_count(cases[i].url), cases[i].frames);
}

static char *repeated(const char *part, int n)
{
    char *url = calloc(64 + (size_t)n * (strlen(part) + 1), 1);
    strcpy(url, "data:video/jpeg;base64,");
    char *to = url + strlen(url);
    for (int i = 0; i < n; i++) to += sprintf(to, "%s%s", i ? "," : "", part);
    return url;
}

static void refuse(const char *url, const struct image_limits *l, enum err_code code, const char *says)
{
    struct patches out[FRAMES_MOST];
    struct err e = { 0 };
    assert_false(frames_patches(out, url, &rule, l, &e));
    if (e.code != code || !strstr(e.text, says)) fail_msg("%d: %s", (int)e.code, e.text);
}

static void what_is_refused(void **state)
{
    (void)state;
    static const char *const two_sizes[] = { FRAME(0), "tests/golden/images/rgb.png" },
                             *const good[] = { FRAME(0), FRAME(1), FRAME(2) },
                             *const cut[] = { FRAME(0), "tests/golden/demo/reference.json" };
    char *one = repeated("AAAA", 1), *many = repeated("A", FRAMES_MOST + 1), *worst = repeated("A", 5000),
         *sizes = video_url(two_sizes, 2), *three = video_url(good, 3), *no_picture = video_url(cut, 2);
    refuse(one, NULL, ERR_LIMIT, "a video has 2 to 768 frames, found 1");
    refuse(many, NULL, ERR_LIMIT, "found more than 768");
    refuse(worst, NULL, ERR_LIMIT, "found more than 768");
    refuse(sizes, NULL, ERR_FORMAT, "frame 2 of 2: ");
    refuse(sizes, NULL, ERR_FORMAT, "the first frame has 100 x 70");
    refuse(no_picture, NULL, ERR_UNSUPPORTED, "frame 2 of 2: not an image of a known format");
    refuse(three, &(struct image_limits){ .pixels = 100 }, ERR_LIMIT,
           "frame 1 of 3: PNG: 100 x 70 pixels are more");
    refuse(three, &(struct image_limits){ .bytes = 100 }, ERR_LIMIT, "frame 1 of 3: ");
    for (size_t n = 40, end = strlen(three); n < end; n += 97) { /* what is no digit, anywhere */
        struct patches out[2];
        struct err e = { 0 };
        three[n] = '*';
        assert_false(frames_patches(out, three, &rule, NULL, &e));
        assert_non_null(strstr(e.text, "is not a base64 digit"));
    }
    free(one);
    free(many);
    free(worst);
    free(sizes);
    free(three);
    free(no_picture);
}

/* Pixels of all frames together: a frame may have the fewer, the more there are. */
static void frames_share_their_pixels(void **state)
{
    (void)state;
    /* a PNG that says it has 1400 x 1000 pixels, and no more */
    static const char head[] =
        "\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\x05\x78\0\0\x03\xe8\x08\x02\0\0\0\xeb\xdf\x01\x19"
        "\0\0\0\1IDAT";
    struct err e = { 0 };
    char *url;
    must(data_url_encode(&url, (const uint8_t *)head, sizeof head - 1, &e), &e);
    char *most = repeated(strchr(url, ',') + 1, FRAMES_MOST);
    refuse(most, NULL, ERR_LIMIT, "frame 1 of 768: PNG: 1400 x 1000 pixels are more than 1398101");
    free(most);
    free(url);
}

/* Frame f of a pair has the values that the frame alone has as a picture resized alike. */
static void frames_lie_beside_each_other(void **state)
{
    (void)state;
    static const char *const files[] = { FRAME(0), FRAME(1), FRAME(2) };
    enum { AREA = 16 * 16 };
    struct patches pairs[2], alone;
    struct image m;
    struct err e = { 0 };
    struct patch_rule still = rule;
    char *url = video_url(files, 3);
    must(frames_patches(pairs, url, &rule, NULL, &e), &e);
    still.pixels_min = 1; /* of a picture: as many pixels as the clip's rule gives each frame */
    for (int f = 0; f < 4; f++) {
        const struct patches *p = &pairs[f / 2];
        must(image_load(&m, files[f < 3 ? f : 2], NULL, &e), &e);
        must(patches_make(&alone, &m, &still, &e), &e);
        assert_int_equal(p->height, alone.height);
        assert_int_equal(p->width, alone.width);
        for (int64_t i = 0; i < p->height * p->width * 3; i++)
            assert_memory_equal(p->values + (2 * i + f % 2) * AREA, alone.values + 2 * i * AREA,
                                AREA * sizeof(float));
        patches_free(&alone);
        image_free(&m);
    }
    patches_free(&pairs[0]);
    patches_free(&pairs[1]);
    free(url);
}

/* JPEG files, smaller than a patch: a grey frame beside one in colours. */
static void jpegs_are_frames(void **state)
{
    (void)state;
    static const char *const files[] = { "tests/golden/images/grey.jpg",
                                         "tests/golden/images/full_colour.jpg" };
    enum { AREA = 16 * 16 };
    struct patches p;
    struct err e = { 0 };
    char *url = video_url(files, 2);
    must(frames_patches(&p, url, &rule, NULL, &e), &e);
    assert_int_equal(p.height, 2); /* 23 x 14 grows to 52 x 32, that is 64 x 32 in whole blocks */
    assert_int_equal(p.width, 4);
    for (int f = 0; f < 2; f++) {
        bool same = true;
        for (int64_t i = 0; i < p.height * p.width; i++)
            for (int c = 1; c < 3; c++)
                same = same && memcmp(p.values + i * p.cols + f * AREA,
                                      p.values + i * p.cols + (2 * c + f) * AREA, AREA * sizeof(float)) == 0;
        assert_int_equal(same, f == 0);
    }
    patches_free(&p);
    free(url);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(which_urls_are_videos),     cmocka_unit_test(what_is_refused),
        cmocka_unit_test(frames_share_their_pixels), cmocka_unit_test(frames_lie_beside_each_other),
        cmocka_unit_test(jpegs_are_frames),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
