/* Out of memory: the n-th allocation fails, for every n that there is. Whatever was half built is freed (a
 * leak shows under ASan), the error says so, and the next try succeeds. This program's own malloc, calloc,
 * realloc and aligned_alloc stand in front of the library's, and refuse when told to. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "engine/encoder_cache.h"
#include "engine/generate.h"
#include "engine/scheduler.h"
#include "support/models.h"
#include "support/videos.h"
#include <errno.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ASan has its own heap, to which its free() belongs. TSan calls malloc before it can be called itself: there
 * nothing is put in front, and the tests skip. */
#if defined(__SANITIZE_ADDRESS__)
enum { CAN_REFUSE_THREADS = 0 }; /* a thread that begins allocates for ASan, which takes no refusal */
#define NEXT(name)   __interceptor_##name
#define NEXT_ALIGNED __interceptor_aligned_alloc
#else
enum { CAN_REFUSE_THREADS = 1 };
#define NEXT(name)   __libc_##name
#define NEXT_ALIGNED __libc_memalign
#endif

/* Allocations still to succeed; negative: all. */
static atomic_int allowed = -1;

#if !defined(__SANITIZE_THREAD__)
enum { CAN_REFUSE = 1 };
void *NEXT(malloc)(size_t bytes);
void *NEXT(calloc)(size_t n, size_t bytes);
void *NEXT(realloc)(void *p, size_t bytes);
void *NEXT_ALIGNED(size_t align, size_t bytes);

static bool refused(void)
{
    if (atomic_load(&allowed) < 0) return false;
    if (atomic_fetch_sub(&allowed, 1) > 0) return false;
    atomic_store(&allowed, 0);
    errno = ENOMEM;
    return true;
}

void *malloc(size_t bytes)
{
    return refused() ? NULL : NEXT(malloc)(bytes);
}

void *calloc(size_t n, size_t bytes)
{
    return refused() ? NULL : NEXT(calloc)(n, bytes);
}

void *realloc(void *p, size_t bytes)
{
    return refused() ? NULL : NEXT(realloc)(p, bytes);
}

void *aligned_alloc(size_t align, size_t bytes)
{
    return refused() ? NULL : NEXT_ALIGNED(align, bytes);
}
#else
enum { CAN_REFUSE = 0 };
#endif

struct fixture {
    struct loaded loaded;
    struct tokenizer *tokenizer;
};

/* Runs `work` with one allocation fewer missing each time until it succeeds; returns how often it failed. It
 * must fail with ERR_MEMORY and nothing else. Beyond `dense` failures only every `stride`-th is tried. */
static int fail_each(bool (*work)(struct fixture *f, struct err *e), struct fixture *f, int dense, int stride)
{
    int tried = 0;
    for (int n = 0;; n += n < dense ? 1 : stride) {
        struct err e = { 0 };
        atomic_store(&allowed, n);
        bool ok = work(f, &e);
        atomic_store(&allowed, -1);
        if (ok) return tried;
        if (e.code != ERR_MEMORY) fail_msg("allocation %d: code %d, '%s'", n, (int)e.code, e.text);
        assert_non_null(strstr(e.text, "no memory for "));
        tried++;
    }
}

static bool create_engine(struct fixture *f, struct err *e)
{
    struct engine *g;
    struct engine_options o = { .context = 300, .sequences = 2, .step_rows = 32, .kv = KV_BF16 };
    bool ok = engine_create(&g, &f->loaded.model, &o, e);
    assert_int_equal(ok, g != NULL);
    engine_free(g);
    return ok;
}

static bool bind_all(struct fixture *f, struct err *e)
{
    struct model m;
    bool ok = model_init(&m, &f->loaded.checkpoint, &f->loaded.backend, NULL, e) && model_bind_all(&m, e);
    model_deinit(&m);
    return ok;
}

static bool generate_text(struct fixture *f, struct err *e)
{
    static const int32_t prompt[] = { 40, 41, 42, 43, 44 };
    static const char *const stops[] = { "never met" };
    struct generation o = { .sampling = { .temperature = 1 }, .max_tokens = 4, .stops = stops, .n_stops = 1 };
    struct engine *g;
    struct generated out = { 0 };
    bool ok = engine_create(&g, &f->loaded.model, &(struct engine_options){ .context = 64 }, e) &&
              generate(&out, g, f->tokenizer, prompt, 5, &o, e);
    free(out.tokens.ids);
    engine_free(g);
    return ok;
}

static void ignore(void *state)
{
    (void)state;
}

/* Without pictures, whose preprocessor_config.json is read by a library that calls a lack of memory a fault
 * of the file. */
static bool schedule(struct fixture *f, struct err *e)
{
    static const int32_t prompt[] = { 40, 41, 42, 2024, 198, 44 }, turn_end[] = { 2024, 198 };
    static const struct token_run bad[] = { { prompt, 2 } };
    struct constraint none = { .free = ignore };
    struct engine_options g = { .context = 128, .snapshots = 2, .sequences = 2, .step_rows = 128 };
    struct scheduler_options o = {
        .model = &f->loaded.model, .no_pictures = true, .turn_end = turn_end, .n_turn_end = 2
    };
    struct request_options r = { .prompt = prompt,
                                 .n_prompt = 6,
                                 .max_tokens = 3,
                                 .bad_words = bad,
                                 .n_bad_words = 1,
                                 .presence_penalty = 1,
                                 .constraint = &none,
                                 .constraint_after = 5 };
    struct scheduler *s = NULL;
    struct request *asked = NULL;
    struct request_event event = { 0 };
    bool ok = engine_create(&o.engine, &f->loaded.model, &g, e) && scheduler_create(&s, &o, e) &&
              scheduler_submit(s, &asked, &r, e);
    while (ok && event.kind != REQUEST_FINISHED)
        if (request_take(asked, &event, 1) == 0) sched_yield();
    if (ok && event.finish == FINISHED_ERROR) ok = err_set(e, ERR_MEMORY, "%s", request_error(asked));
    request_free(asked);
    scheduler_free(s);
    engine_free(o.engine);
    return ok;
}

/* A picture whose rows cannot be kept is the caller's all the same. */
static struct picture_reader *reader;
static struct patches patches;
static struct picture seen_at; /* its size, no rows */

static bool see_and_keep(struct fixture *f, struct err *e)
{
    (void)f;
    static const uint8_t salt[32];
    uint8_t key[32];
    struct cut_picture place = { .height = seen_at.height, .width = seen_at.width };
    struct encoder_cache *c = NULL;
    struct picture p = seen_at, kept = { 0 };
    bool ok = encoder_cache_create(&c, 1 << 24, e) && encoder_key(key, salt, &place, e) &&
              picture_see(reader, &p, &patches, e);
    if (ok) {
        encoder_cache_add(c, key, &p);
        ok = encoder_cache_find(c, key, &kept) || err_set(e, ERR_MEMORY, "no memory for an entry");
        assert_true(p.rows && (!ok || kept.rows == p.rows));
    }
    encoder_cache_free(c);
    float first = p.rows ? p.rows[0] : 0;
    picture_free(&p);
    if (kept.rows) assert_true(kept.rows[0] == first); /* now it alone has them */
    picture_free(&kept);
    return ok;
}

/* Libraries have sentences of their own for it, so only that nothing is left is asked for. */
static void check_video(void)
{
    static const char *const frames[] = { "tests/golden/demo/frames/0.png", "tests/golden/demo/frames/1.png",
                                          "tests/golden/demo/frames/2.png" };
    char *url = video_url(frames, 3);
    bool ok = false;
    for (int n = 0; !ok; n++) {
        struct picture pairs[2];
        struct patches made[2];
        struct err e = { 0 };
        atomic_store(&allowed, n);
        ok = picture_open_video(reader, pairs, made, url, NULL, &e);
        atomic_store(&allowed, -1);
        for (int i = 0; i < 2; i++) {
            assert_int_equal(made[i].values != NULL, ok);
            patches_free(&made[i]);
        }
        if (ok) assert_true(n >= 9);
    }
    free(url);
}

static void check_encoder_cache(struct fixture *f)
{
    struct err e = { 0 };
    must(picture_reader_create(&reader, &f->loaded.model, &e), &e);
    must(picture_open(reader, &seen_at, &patches, "tests/golden/images/grey.png", NULL, &e), &e);
    int failed = fail_each(see_and_keep, f, 1 << 20, 1);
    printf("note: %d allocations of a picture and its place in a cache\n", failed);
    assert_true(failed >= 6);
    check_video();
    patches_free(&patches);
    picture_reader_free(reader);
}

static void check_scheduler(struct fixture *f)
{
    int scheduled = fail_each(schedule, f, 1 << 20, 1);
    printf("note: %d allocations of a scheduler and a request\n", scheduled);
    assert_true(scheduled >= 30);
}

static void check_device(enum device device)
{
    struct fixture f = { 0 };
    struct err e = { 0 };
    uint8_t digest[32];
    struct backend_options o = { .device = device, .threads = 1 };
    if (!CAN_REFUSE) {
        printf("SKIP: failing allocations: not under TSan\n");
        skip();
    }
    load_model(&f.loaded, "models/demo", &o);
    must(tokenizer_load(&f.tokenizer, "models/demo", &e), &e);
    assert_true(fail_each(create_engine, &f, 1 << 20, 1) >= 15);
    assert_true(fail_each(generate_text, &f, 1 << 20, 1) >= 20);
    assert_true(fail_each(bind_all, &f, 60, 23) >= 70);
    /* libcrypto does not survive a refusal while it sets itself up */
    must(cuts_digest(digest, "", 0, &e), &e);
    check_encoder_cache(&f);
    if (CAN_REFUSE_THREADS)
        check_scheduler(&f);
    else
        printf("SKIP: failing allocations of the scheduler: not under ASan\n");
    tokenizer_free(f.tokenizer);
    unload_model(&f.loaded);
}

static void on_the_cpu(void **state)
{
    (void)state;
    check_device(DEVICE_CPU);
}

static void on_ref(void **state)
{
    (void)state;
    check_device(DEVICE_REF);
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(on_the_cpu), cmocka_unit_test(on_ref) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
