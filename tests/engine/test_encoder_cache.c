/* Pictures that come again, with the encoder cache against without: tokens and log-probabilities of every row
 * to the bit, and the tower run only for what is not kept. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "engine/encoder_cache.h"
#include "support/requests.h"
#include "support/videos.h"
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

static struct demo demo;
static struct ops counting;
static const struct ops *plain;
static atomic_int layers; /* of the tower, run so far */

static const char *const files[] = { "tests/golden/images/grey.png", "tests/golden/images/cmyk.jpg",
                                     "tests/golden/images/full_colour.jpg" };
enum { FILES = 3, PICTURES_MOST = 3, TALKS = 8 };
static uint64_t sizes[FILES]; /* of their rows */
static const char *const frames[] = { "tests/golden/demo/frames/0.png", "tests/golden/demo/frames/1.png",
                                      "tests/golden/demo/frames/2.png" };
enum { FRAMES = 3, PAIRS = 2 };
static uint64_t video_size;
static char *video;

static void count_layer(struct queue *q, struct mat y, struct mat qkv, int n_heads)
{
    atomic_fetch_add(&layers, 1);
    plain->attention_all(q, y, qkv, n_heads);
}

static int towers(void)
{
    return atomic_load(&layers) / demo.loaded.model.config->vision.depth;
}

/* A prompt with pictures at some of its places. */
struct talk {
    const char *text, *pictures[PICTURES_MOST];
    int n_pictures;
};
#define SEEN  "<|vision_start|><|image_pad|><|vision_end|>"
#define MOVES "<|vision_start|><|video_pad|><|vision_end|>"
static struct talk talks[TALKS] = {
    { "<|im_start|>user\n" SEEN "What is this?<|im_end|>\n<|im_start|>assistant\n", { files[0] }, 1 },
    { "A farmer has 17 sheep. " SEEN " How many are in the picture?", { files[0] }, 1 },
    { SEEN, { files[0] }, 1 },
    { SEEN "and" SEEN "and once more" SEEN, { files[1], files[0], files[1] }, 3 },
    { "<|im_start|>user\nCompare " SEEN SEEN "<|im_end|>\n", { files[2], files[1] }, 2 },
    { "No picture at all", { NULL }, 0 },
    { "<0.5 seconds>" MOVES "<2.0 seconds>" MOVES "And" SEEN,
      { NULL, files[0] },
      2 }, /* a video of 3 frames */
    { SEEN "<0.5 seconds>" MOVES "<2.0 seconds>" MOVES "What moves?", { files[2], NULL }, 2 },
};

static struct request_options options(const struct talk *t, struct token_list *tokens)
{
    *tokens = demo_encode(&demo, t->text);
    struct request_options o = answer_options(tokens->ids, (int64_t)tokens->n, 12);
    o.prompt_logprobs = 3;
    o.pictures = t->pictures;
    o.n_pictures = t->n_pictures;
    return o;
}

static void ask_talk(struct answer *a, struct service *s, const struct talk *t)
{
    struct token_list tokens;
    struct request_options o = options(t, &tokens);
    answer_ask(a, s, &o);
    assert_int_equal(a->finish, FINISHED_LENGTH);
    free(tokens.ids);
}

static struct scheduler_stats stats_of(struct service *s)
{
    struct scheduler_stats stats;
    scheduler_stats(s->scheduler, &stats);
    return stats;
}

/* What a service without a cache says. */
static struct answer *cold_answers(void)
{
    struct service s;
    struct answer *a = calloc(TALKS, sizeof *a);
    int before = towers();
    service_start(&s, &demo, (struct engine_options){ .sequences = 1 }, (struct scheduler_options){ 0 });
    for (int i = 0; i < TALKS; i++) ask_talk(&a[i], &s, &talks[i]);
    assert_int_equal(towers() - before, 8 + 3 + 3);
    assert_int_equal(stats_of(&s).encoder_queries, 0);
    service_stop(&s);
    return a;
}

static void the_same_bits_with_and_without(void **state)
{
    (void)state;
    struct service s;
    struct answer *cold = cold_answers(), *a = calloc(1, sizeof *a);
    int before = towers();
    service_start(&s, &demo, (struct engine_options){ 0 },
                  (struct scheduler_options){ .encoder_cache_bytes = 1 << 26 });
    for (int round = 0; round < 2; round++)
        for (int i = 0; i < TALKS; i++) {
            ask_talk(a, &s, &talks[i]);
            answer_same(a, &cold[i], talks[i].text);
        }
    struct scheduler_stats stats = stats_of(&s);
    assert_int_equal(towers() - before, FILES + PAIRS);
    assert_int_equal(stats.encoder_queries, 28);
    assert_int_equal(stats.encoder_hits, 28 - FILES - PAIRS);
    assert_int_equal(stats.encoder_bytes, sizes[0] + sizes[1] + sizes[2] + video_size);
    service_stop(&s);
    free(cold);
    free(a);
}

/* Room for two of three: the one used longest ago goes, and comes again with its bits. */
static void what_was_used_longest_ago_goes(void **state)
{
    (void)state;
    static const struct {
        int file;
        bool hit;
    } asked[] = { { 0, false }, { 1, false }, { 0, true },  { 2, false }, { 0, true },
                  { 1, false }, { 0, true },  { 2, false }, { 2, true },  { 1, false } };
    struct service s;
    struct answer *cold = calloc(FILES, sizeof *cold), *a = calloc(1, sizeof *a);
    uint64_t most = sizes[0] + (sizes[1] > sizes[2] ? sizes[1] : sizes[2]);
    service_start(&s, &demo, (struct engine_options){ 0 }, (struct scheduler_options){ 0 });
    for (int i = 0; i < FILES; i++) ask_talk(&cold[i], &s, &(struct talk){ SEEN "?", { files[i] }, 1 });
    service_stop(&s);
    assert_true(sizes[1] + sizes[2] + sizes[0] > most);
    service_start(&s, &demo, (struct engine_options){ 0 },
                  (struct scheduler_options){ .encoder_cache_bytes = most });
    for (size_t i = 0; i < sizeof asked / sizeof *asked; i++) {
        int before = towers();
        ask_talk(a, &s, &(struct talk){ SEEN "?", { files[asked[i].file] }, 1 });
        answer_same(a, &cold[asked[i].file], files[asked[i].file]);
        if (towers() - before != !asked[i].hit)
            fail_msg("question %zu: %s", i, asked[i].hit ? "miss" : "hit");
        assert_true(stats_of(&s).encoder_bytes <= most);
    }
    service_stop(&s);
    /* a byte less than the smallest needs: nothing is kept, everything is answered */
    uint64_t least = sizes[0] < sizes[1] ? sizes[0] : sizes[1];
    least = least < sizes[2] ? least : sizes[2];
    service_start(&s, &demo, (struct engine_options){ 0 },
                  (struct scheduler_options){ .encoder_cache_bytes = least - 1 });
    for (int i = 0; i < 2 * FILES; i++) {
        ask_talk(a, &s, &(struct talk){ SEEN "?", { files[i % FILES] }, 1 });
        answer_same(a, &cold[i % FILES], files[i % FILES]);
    }
    assert_int_equal(stats_of(&s).encoder_queries, 2 * FILES);
    assert_int_equal(stats_of(&s).encoder_hits, 0);
    assert_int_equal(stats_of(&s).encoder_bytes, 0);
    service_stop(&s);
    free(cold);
    free(a);
}

/* What stands where something else was promised is refused, and nothing is held. */
static void refuse(struct service *s, const char *text, const char *clip, const char *says)
{
    struct talk t = { text, { clip, files[0] }, 2 };
    struct token_list tokens;
    struct request_options o = options(&t, &tokens);
    struct request *r;
    struct err e = { 0 };
    assert_false(scheduler_submit(s->scheduler, &r, &o, &e));
    if (!strstr(e.text, says)) fail_msg("%s: %s", text, e.text);
    free(tokens.ids);
}

static void places_are_for_their_kind(void **state)
{
    (void)state;
    struct service s;
    service_start(&s, &demo, (struct engine_options){ 0 }, (struct scheduler_options){ 0 });
    refuse(&s, MOVES SEEN, video, "the prompt has places for 2 images, 3 given");
    refuse(&s, MOVES MOVES MOVES SEEN, video, "the prompt has places for 4 images, 3 given");
    refuse(&s, MOVES SEEN MOVES, video, "images and videos in another order than given");
    refuse(&s, SEEN MOVES MOVES, video, "images and videos in another order than given");
    refuse(&s, MOVES SEEN, "data:video/jpeg;base64,AAAA,BBBB",
           "video 1: frame 1 of 2: not an image of a known format");
    refuse(&s, MOVES SEEN, "data:video/jpeg;base64,AAAA", "video 1: a video has 2 to 768 frames, found 1");
    service_stop(&s);
}

/* Other salts, requests that are to be computed anew, and what was forgotten find nothing. */
static void who_may_not_know_does_not(void **state)
{
    (void)state;
    struct service s;
    struct token_list tokens;
    struct answer *cold = calloc(1, sizeof *cold), *a = calloc(1, sizeof *a);
    struct request_options o = options(&talks[1], &tokens), other = o, anew = o;
    other.salt[31] = 1;
    anew.no_prefix_cache = true;
    const struct {
        const struct request_options *o;
        int towers, queries;
        bool forget; /* before it */
    } asked[] = { { &anew, 1, 0, false },  { &o, 1, 1, false },     { &o, 0, 1, false },
                  { &other, 1, 1, false }, { &other, 0, 1, false }, { &anew, 1, 0, false },
                  { &o, 0, 1, false },     { &o, 1, 1, true },      { &other, 1, 1, false } };
    service_start(&s, &demo, (struct engine_options){ 0 },
                  (struct scheduler_options){ .encoder_cache_bytes = 1 << 26 });
    for (size_t i = 0; i < sizeof asked / sizeof *asked; i++) {
        int before = towers();
        int64_t queries = stats_of(&s).encoder_queries;
        if (asked[i].forget) scheduler_forget(s.scheduler);
        answer_ask(i == 0 ? cold : a, &s, asked[i].o);
        if (i > 0) answer_same(a, cold, "one of the same");
        if (towers() - before != asked[i].towers) fail_msg("question %zu: %d towers", i, towers() - before);
        assert_int_equal(stats_of(&s).encoder_queries - queries, asked[i].queries);
    }
    service_stop(&s);
    free(tokens.ids);
    free(cold);
    free(a);
}

/* Requests of several threads at a time, a cache too small for all of them, which is emptied now and then:
 * rows live as long as a request has them. */
enum { ASKERS = 3, QUESTIONS = 8 };
struct asker {
    struct service *s;
    const struct answer *cold;
    int first;
    pthread_t thread;
    struct answer answers[QUESTIONS];
    struct token_list tokens[QUESTIONS];
};

static void *submit_all(void *ctx)
{
    struct asker *k = ctx;
    for (int i = 0; i < QUESTIONS; i++) {
        struct request_options o = options(&talks[(k->first + i) % TALKS], &k->tokens[i]);
        answer_submit(&k->answers[i], k->s, &o);
        if (i % 3 == k->first) scheduler_forget(k->s->scheduler);
    }
    return NULL;
}

static void several_at_a_time(void **state)
{
    (void)state;
    struct service s;
    struct answer *cold = cold_answers();
    struct asker *askers = calloc(ASKERS, sizeof *askers);
    service_start(&s, &demo, (struct engine_options){ .sequences = 4 },
                  (struct scheduler_options){ .encoder_cache_bytes = sizes[0] + sizes[1] });
    for (int round = 0; round < rounds(6); round++) {
        for (int k = 0; k < ASKERS; k++) {
            askers[k] = (struct asker){ .s = &s, .cold = cold, .first = k };
            assert_int_equal(pthread_create(&askers[k].thread, NULL, submit_all, &askers[k]), 0);
        }
        for (int k = 0; k < ASKERS; k++) pthread_join(askers[k].thread, NULL);
        for (int k = 0; k < ASKERS; k++) {
            answer_finish_all(askers[k].answers, QUESTIONS, &s);
            for (int i = 0; i < QUESTIONS; i++) {
                answer_same(&askers[k].answers[i], &cold[(k + i) % TALKS], "among others");
                free(askers[k].tokens[i].ids);
            }
        }
    }
    assert_true(stats_of(&s).encoder_hits > 0);
    service_stop(&s);
    free(askers);
    free(cold);
}

/* Two that show the same, submitted before either has begun: one of them runs the tower. */
static void two_at_once_encode_once(void **state)
{
    (void)state;
    struct service s;
    struct token_list tokens[2];
    struct answer *cold = cold_answers(), *a = calloc(2, sizeof *a);
    for (int cached = 0; cached < 2; cached++) {
        int before = towers();
        service_start(&s, &demo, (struct engine_options){ 0 },
                      (struct scheduler_options){ .encoder_cache_bytes = cached ? 1 << 26 : 0 });
        for (int i = 0; i < 2; i++) {
            struct request_options o = options(&talks[i], &tokens[i]);
            answer_submit(&a[i], &s, &o);
        }
        answer_finish_all(a, 2, &s);
        for (int i = 0; i < 2; i++) {
            answer_same(&a[i], &cold[i], "two at once");
            free(tokens[i].ids);
        }
        assert_int_equal(towers() - before, cached ? 1 : 2);
        service_stop(&s);
    }
    free(cold);
    free(a);
}

/* The key holds all that goes in. */
static void keys_differ(void **state)
{
    (void)state;
    enum { KEYS = 6 };
    uint8_t keys[KEYS][32], salt[32] = { 0 };
    struct cut_picture p = { .first = 3, .height = 4, .width = 6, .digest = { 7 } };
    struct err e = { 0 };
    must(encoder_key(keys[0], salt, &p, &e), &e);
    p.first = 99; /* where it stands is no part of it */
    must(encoder_key(keys[1], salt, &p, &e), &e);
    assert_memory_equal(keys[0], keys[1], 32);
    p.height = 6, p.width = 4;
    must(encoder_key(keys[1], salt, &p, &e), &e);
    p.height = 3, p.width = 8;
    must(encoder_key(keys[2], salt, &p, &e), &e);
    p.digest[31] = 1;
    must(encoder_key(keys[3], salt, &p, &e), &e);
    salt[0] = 1;
    must(encoder_key(keys[4], salt, &p, &e), &e);
    salt[0] = 0, salt[31] = 1;
    must(encoder_key(keys[5], salt, &p, &e), &e);
    for (int i = 0; i < KEYS; i++)
        for (int k = 0; k < i; k++) assert_memory_not_equal(keys[i], keys[k], 32);
}

static int load(void **state)
{
    (void)state;
    struct picture_reader *reader;
    struct picture p;
    struct err e = { 0 };
    demo_load(&demo);
    plain = demo.loaded.backend.ops;
    counting = *plain;
    counting.attention_all = count_layer;
    demo.loaded.backend.ops = &counting;
    must(picture_reader_create(&reader, &demo.loaded.model, &e), &e);
    for (int i = 0; i < FILES; i++) {
        must(picture_read(reader, &p, files[i], NULL, &e), &e);
        sizes[i] = (uint64_t)(p.height * p.width * p.cols) * sizeof *p.rows;
        picture_free(&p);
    }
    struct picture pairs[PAIRS];
    struct patches patches[PAIRS];
    video = video_url(frames, FRAMES);
    talks[6].pictures[0] = talks[7].pictures[1] = video;
    must(picture_open_video(reader, pairs, patches, video, NULL, &e), &e);
    for (int i = 0; i < PAIRS; i++) {
        video_size += (uint64_t)(pairs[i].height * pairs[i].width * pairs[i].cols) * sizeof(float);
        patches_free(&patches[i]);
    }
    picture_reader_free(reader);
    return 0;
}

static int unload(void **state)
{
    (void)state;
    demo.loaded.backend.ops = plain;
    free(video);
    demo_unload(&demo);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc > 1) cmocka_set_test_filter(argv[1]); /* a pattern */
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_same_bits_with_and_without),
        cmocka_unit_test(what_was_used_longest_ago_goes),
        cmocka_unit_test(places_are_for_their_kind),
        cmocka_unit_test(who_may_not_know_does_not),
        cmocka_unit_test(several_at_a_time),
        cmocka_unit_test(two_at_once_encode_once),
        cmocka_unit_test(keys_differ),
    };
    return cmocka_run_group_tests(tests, load, unload);
}
