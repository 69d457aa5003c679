/* Generation with the demo model: what is handed out as text is exactly what the tokens say, stop strings end
 * it wherever they lie, limits are said in words; and the engine's pages come back whatever sequences do. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "base/doc.h"
#include "engine/generate.h"
#include "support/models.h"
#include "tokenizer/utf8.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CONTEXT = 200, GREEDY = 48, TEXT_MAX = 4000 };

static const char question[] = "<|im_start|>user\nWhat is the capital of "
                               "Finland?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n";
static const char story[] = "The river rose that night, and in the morning";

struct fixture {
    struct loaded loaded;
    struct tokenizer *tokenizer;
    struct engine *engine; /* one sequence of CONTEXT tokens, steps of 16 rows */
    struct token_list story, question;
};

static int setup(void **state)
{
    struct fixture *f = *state = calloc(1, sizeof *f);
    struct err e = { 0 };
    struct engine_options o = { .context = CONTEXT, .step_rows = 16 };
    load_model(&f->loaded, "models/demo", &(struct backend_options){ .device = DEVICE_CPU, .threads = 1 });
    must(tokenizer_load(&f->tokenizer, "models/demo", &e), &e);
    must(engine_create(&f->engine, &f->loaded.model, &o, &e), &e);
    must(tokenizer_encode(f->tokenizer, &f->story, story, strlen(story), 0, &e), &e);
    must(tokenizer_encode(f->tokenizer, &f->question, question, strlen(question), 0, &e), &e);
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    engine_free(f->engine);
    tokenizer_free(f->tokenizer);
    unload_model(&f->loaded);
    free(f->story.ids);
    free(f->question.ids);
    free(f);
    return 0;
}

/* The streamed text; each piece must be whole characters. */
struct stream {
    char text[TEXT_MAX + 1];
    size_t n;
};

static void take(void *ctx, const char *bytes, size_t n)
{
    struct stream *s = ctx;
    assert_true(n > 0);
    assert_int_equal(utf8_valid_prefix(bytes, n), n);
    assert_true(n <= TEXT_MAX - s->n);
    memcpy(s->text + s->n, bytes, n);
    s->n += n;
    s->text[s->n] = 0;
}

/* Continues `prompt` as `o` says, with the text in s. */
static struct generated run(struct fixture *f, struct stream *s, const struct token_list *prompt,
                            struct generation o)
{
    struct generated out;
    struct err e = { 0 };
    *s = (struct stream){ .n = 0 };
    o.ctx = s;
    o.text = take;
    must(generate(&out, f->engine, f->tokenizer, prompt->ids, (int64_t)prompt->n, &o, &e), &e);
    return out;
}

static void assert_decodes(const struct fixture *f, const struct generated *out, const struct stream *s,
                           bool skip_special)
{
    struct err e = { 0 };
    char *text;
    size_t n;
    must(tokenizer_decode(f->tokenizer, out->tokens.ids, out->tokens.n, skip_special, &text, &n, &e), &e);
    assert_int_equal(n, s->n);
    assert_memory_equal(text, s->text, n);
    free(text);
}

static void text_is_the_decoded_tokens(void **state)
{
    struct fixture *f = *state;
    struct stream s;
    for (int64_t n = 0; n <= GREEDY; n += n < 4 ? 1 : 8) {
        struct generated out = run(f, &s, &f->story, (struct generation){ .max_tokens = n });
        assert_int_equal(out.tokens.n, n);
        assert_int_equal(out.finish, FINISH_LENGTH);
        assert_decodes(f, &out, &s, true);
        free(out.tokens.ids);
    }
    struct generated out =
        run(f, &s, &f->question, (struct generation){ .max_tokens = 40, .keep_special = true });
    assert_decodes(f, &out, &s, false);
    assert_non_null(strstr(s.text, "<|im_end|>"));
    free(out.tokens.ids);
    out = run(f, &s, &f->question, (struct generation){ .max_tokens = 40 });
    assert_decodes(f, &out, &s, true);
    assert_null(strstr(s.text, "<|im_end|>"));
    free(out.tokens.ids);
}

/* The receiver is optional. */
static void tokens_alone(void **state)
{
    struct fixture *f = *state;
    struct generated out;
    struct err e = { 0 };
    struct generation o = { .max_tokens = 5 };
    must(generate(&out, f->engine, f->tokenizer, f->story.ids, (int64_t)f->story.n, &o, &e), &e);
    assert_int_equal(out.tokens.n, 5);
    assert_true(out.prefill_seconds > 0 && out.decode_seconds > 0);
    free(out.tokens.ids);
}

/* Where the text must end: byte after byte, until one of them is complete; of two the longer. */
static size_t stop_place(const struct stream *all, const char *const *stops, int n)
{
    for (size_t seen = 1; seen <= all->n; seen++) {
        size_t longest = 0;
        for (int i = 0; i < n; i++) {
            size_t len = strlen(stops[i]);
            if (len <= seen && len > longest && memcmp(all->text + seen - len, stops[i], len) == 0)
                longest = len;
        }
        if (longest > 0) return seen - longest;
    }
    return all->n;
}

static void check_stop(struct fixture *f, const struct stream *all, const char *const *stops, int n)
{
    struct stream s;
    size_t end = stop_place(all, stops, n);
    struct generated out =
        run(f, &s, &f->story, (struct generation){ .max_tokens = GREEDY, .stops = stops, .n_stops = n });
    if (s.n != end || memcmp(s.text, all->text, end) != 0)
        fail_msg("stop '%s': expected %zu bytes, found %zu: '%s'", stops[0], end, s.n, s.text);
    assert_int_equal(out.finish, end < all->n ? FINISH_STOP : FINISH_LENGTH);
    free(out.tokens.ids);
}

/* Every piece of the text as a stop string: most begin and end inside tokens. */
static void stop_strings_end_the_text_wherever_they_lie(void **state)
{
    struct fixture *f = *state;
    struct stream all;
    static const size_t lengths[] = { 1, 3, 8, 20 };
    struct generated out = run(f, &all, &f->story, (struct generation){ .max_tokens = GREEDY });
    assert_true(all.n > 60 && out.tokens.n < all.n);
    free(out.tokens.ids);
    for (size_t k = 0; k < sizeof lengths / sizeof *lengths; k++)
        for (size_t i = 0; i + lengths[k] <= all.n; i += 7) {
            char stop[32] = { 0 };
            memcpy(stop, all.text + i, lengths[k]);
            if (utf8_valid_prefix(stop, lengths[k]) == lengths[k])
                check_stop(f, &all, (const char *const[]){ stop }, 1);
        }
    char *late = strndup(all.text + all.n - 9, 9), *early = strndup(all.text + 30, 4);
    check_stop(f, &all, (const char *const[]){ late, "never met", early }, 3);
    check_stop(f, &all, (const char *const[]){ early, late }, 2);
    for (size_t i = 0; i + 3 < all.n; i += 5) { /* often both inside one token; the first complete counts */
        char inner[2] = { all.text[i + 1] }, outer[4] = { all.text[i], all.text[i + 1], all.text[i + 2] };
        if (utf8_ascii_prefix(all.text + i, 3) == 3)
            check_stop(f, &all, (const char *const[]){ inner, outer }, 2);
    }
    free(late);
    free(early);
}

/* What only began a stop string is text after all, at the end and in the middle. */
static void a_stop_string_half_met_is_handed_out(void **state)
{
    struct fixture *f = *state;
    struct stream all;
    struct generated out = run(f, &all, &f->story, (struct generation){ .max_tokens = GREEDY });
    free(out.tokens.ids);
    for (size_t n = 1; n < 30; n += 4) {
        char end[40], middle[40];
        snprintf(end, sizeof end, "%s\x01", all.text + all.n - n);
        snprintf(middle, sizeof middle, "%.*s\x01", (int)n, all.text + 20);
        check_stop(f, &all, (const char *const[]){ end, middle }, 2);
    }
}

static void stop_tokens_end_it_and_are_not_listed(void **state)
{
    struct fixture *f = *state;
    struct stream s;
    struct err e = { 0 };
    int32_t eos[4];
    int n_eos;
    must(checkpoint_eos_tokens(&f->loaded.checkpoint, eos, 4, &n_eos, &e), &e);
    assert_true(n_eos >= 1);
    struct generation o = { .max_tokens = 80, .stop_tokens = eos, .n_stop_tokens = n_eos };
    struct generated out = run(f, &s, &f->question, o), all;
    assert_int_equal(out.finish, FINISH_STOP);
    assert_non_null(strstr(s.text, "Helsinki"));
    assert_decodes(f, &out, &s, false);
    for (size_t i = 0; i < out.tokens.n; i++)
        for (int k = 0; k < n_eos; k++) assert_int_not_equal(out.tokens.ids[i], eos[k]);
    free(out.tokens.ids);

    all = run(f, &s, &f->story, (struct generation){ .max_tokens = GREEDY });
    for (size_t i = 0; i < all.tokens.n; i += 5) { /* any token may be one */
        size_t first = 0;
        while (all.tokens.ids[first] != all.tokens.ids[i]) first++;
        o.stop_tokens = &all.tokens.ids[i];
        o.n_stop_tokens = 1;
        out = run(f, &s, &f->story, o);
        assert_int_equal(out.finish, FINISH_STOP);
        assert_int_equal(out.tokens.n, first);
        if (first) assert_memory_equal(out.tokens.ids, all.tokens.ids, first * sizeof *out.tokens.ids);
        assert_decodes(f, &out, &s, true);
        free(out.tokens.ids);
    }
    free(all.tokens.ids);
}

static void assert_limit(struct fixture *f, int64_t n, int64_t max_tokens, const char *message)
{
    struct generated out;
    struct err e = { 0 };
    int32_t prompt[3 * CONTEXT];
    for (int64_t i = 0; i < n; i++) prompt[i] = f->story.ids[(size_t)i % f->story.n];
    struct generation o = { .max_tokens = max_tokens };
    bool ok = generate(&out, f->engine, f->tokenizer, prompt, n, &o, &e);
    free(out.tokens.ids);
    assert_int_equal(ok, message == NULL);
    if (ok) return;
    assert_string_equal(e.text, message);
    assert_int_equal(e.code, ERR_LIMIT);
}

static void what_does_not_fit_is_an_error(void **state)
{
    struct fixture *f = *state;
    struct generated out;
    struct err e = { 0 };
    struct generation o = { .max_tokens = 1 };
    assert_limit(f, CONTEXT + 1, 1, "201 tokens do not fit a context of 200");
    assert_limit(f, 3 * CONTEXT, 1, "600 tokens do not fit a context of 200");
    assert_limit(f, CONTEXT - 2, 4, "201 tokens do not fit a context of 200");
    assert_limit(f, CONTEXT, 1, NULL);
    assert_limit(f, CONTEXT - 2, 3, NULL);
    assert_false(generate(&out, f->engine, f->tokenizer, f->story.ids, 0, &o, &e));
    assert_string_equal(e.text, "the prompt is empty");
    assert_int_equal(e.code, ERR_ARGUMENT);

    int handle;
    must(engine_open(f->engine, &handle, &e), &e);
    assert_false(generate(&out, f->engine, f->tokenizer, f->story.ids, 5, &o, &e));
    assert_string_equal(e.text, "all 1 sequences are in use");
    assert_int_equal(e.code, ERR_LIMIT);
    engine_close(f->engine, handle);
    assert_limit(f, CONTEXT, 1, NULL); /* none of these left anything behind */
}

/* At temperature 2 tokens that are parts of characters follow each other in every way. */
static void pieces_are_whole_characters(void **state)
{
    struct fixture *f = *state;
    static const char *const stops[] = { "qu", "\xc3\xa9\xc3\xa9", "the\n" };
    struct stream s;
    int replaced = 0, beyond_ascii = 0;
    for (uint64_t seed = 0; seed < 16; seed++) {
        struct generation o = { .sampling = { .temperature = 2, .seed = seed },
                                .max_tokens = 100,
                                .stops = stops,
                                .n_stops = seed % 2 ? 3 : 0 };
        struct generated out = run(f, &s, &f->story, o);
        for (int i = 0; i < o.n_stops; i++) assert_null(strstr(s.text, stops[i]));
        if (out.finish == FINISH_LENGTH) assert_decodes(f, &out, &s, true);
        replaced += strstr(s.text, "\xef\xbf\xbd") != NULL;
        beyond_ascii += utf8_ascii_prefix(s.text, s.n) < s.n;
        free(out.tokens.ids);
    }
    assert_true(replaced > 0 && beyond_ascii > 0); /* or this tried nothing */
}

/* The demo's tokenizer without its added tokens, so that the head has rows that no token stands for. */
static struct tokenizer *smaller_tokenizer(void)
{
    struct tokenizer *t;
    struct err e = { 0 };
    json_t *root;
    must(doc_load(&root, "models/demo/tokenizer.json", 1 << 24, &e), &e);
    json_array_clear(json_object_get(root, "added_tokens"));
    char *text = json_dumps(root, 0);
    must(tokenizer_create(&t, text, strlen(text), NULL, 0, &e), &e);
    free(text);
    json_decref(root);
    return t;
}

/* At temperature 100 every row of the head comes up, also those without a token. */
static void only_tokens_are_sampled(void **state)
{
    struct fixture *f = *state;
    struct tokenizer *t = smaller_tokenizer();
    struct err e = { 0 };
    assert_true(tokenizer_size(t) < engine_vocab(f->engine));
    for (uint64_t seed = 0; seed < 8; seed++) {
        struct generated out;
        struct generation o = { .sampling = { .temperature = 100, .seed = seed }, .max_tokens = 150 };
        must(generate(&out, f->engine, t, f->story.ids, (int64_t)f->story.n, &o, &e), &e);
        for (size_t i = 0; i < out.tokens.n; i++) assert_true(out.tokens.ids[i] < tokenizer_size(t));
        free(out.tokens.ids);
    }
    tokenizer_free(t);
}

/* Token i is draw i of the seed from the logits after all before it. */
static void tokens_are_the_draws_of_the_seed(void **state)
{
    struct fixture *f = *state;
    struct stream s;
    struct err e = { 0 };
    struct generation o = { .sampling = { 0.8f, 40, 0.98f, 0.001f, 9 }, .max_tokens = 40 };
    struct generated out = run(f, &s, &f->story, o);
    const float *logits;
    int handle;
    must(engine_open(f->engine, &handle, &e), &e);
    must(engine_prefill(f->engine, handle, f->story.ids, (int64_t)f->story.n, &logits, NULL, &e), &e);
    for (size_t i = 0; i < out.tokens.n; i++) {
        int32_t id = sample_token(&o.sampling, logits, engine_vocab(f->engine), i, NULL);
        assert_int_equal(id, out.tokens.ids[i]);
        must(engine_prefill(f->engine, handle, &id, 1, &logits, NULL, &e), &e);
    }
    engine_close(f->engine, handle);
    free(out.tokens.ids);
}

static void a_seed_gives_the_same_text_again(void **state)
{
    struct fixture *f = *state;
    struct stream first, second;
    struct generation o = { .sampling = { 0.9f, 20, 0.95f, 0.01f, 42 }, .max_tokens = 40 };
    struct generated a = run(f, &first, &f->story, o), b = run(f, &second, &f->story, o);
    assert_string_equal(first.text, second.text);
    free(b.tokens.ids);
    o.sampling.seed++;
    b = run(f, &second, &f->story, o);
    assert_string_not_equal(first.text, second.text);
    free(a.tokens.ids);
    free(b.tokens.ids);
}

/* Pages. */

static void append(struct engine *g, int handle, const struct fixture *f, int64_t n, const float **logits)
{
    struct err e = { 0 };
    int32_t ids[CONTEXT];
    int64_t past = engine_length(g, handle);
    for (int64_t i = 0; i < n; i++) ids[i] = f->story.ids[(size_t)(7 * handle + past + i) % f->story.n];
    must(engine_prefill(g, handle, ids, n, logits, NULL, &e), &e);
    assert_int_equal(engine_length(g, handle), past + n);
}

/* Fills all sequences to the last token, a few each in turn so that their pages interleave, and keeps the
 * last logits of each. */
static void fill_all(struct engine *g, const struct fixture *f, int n_seq, float *last)
{
    struct err e = { 0 };
    int handles[8], extra;
    size_t vocab = (size_t)engine_vocab(g);
    for (int i = 0; i < n_seq; i++) {
        must(engine_open(g, &handles[i], &e), &e);
        assert_int_equal(handles[i], i);
    }
    assert_false(engine_open(g, &extra, &e));
    assert_int_equal(e.code, ERR_LIMIT);
    for (int64_t done = 0; done < CONTEXT; done += 40)
        for (int i = 0; i < n_seq; i++) {
            const float *logits;
            append(g, handles[i], f, 40, &logits);
            memcpy(last + (size_t)i * vocab, logits, vocab * sizeof *last);
        }
    for (int i = 0; i < n_seq; i++) engine_close(g, handles[i]);
}

static void check_refusals(struct engine *g, const struct fixture *f, int handle)
{
    struct err e = { 0 };
    struct mat hidden;
    struct row rows[41];
    int64_t length = engine_length(g, handle), left = CONTEXT - length;
    engine_text_rows(rows, f->story.ids, 8, length);
    if (left < 8) {
        assert_false(
            engine_step(g, &(struct engine_run){ .handle = handle, .rows = rows, .n = 8 }, 1, &hidden, &e));
        assert_int_equal(e.code, ERR_LIMIT);
    }
    memset(rows, 0, sizeof rows);
    if (left >= 41) {
        assert_false(
            engine_step(g, &(struct engine_run){ .handle = handle, .rows = rows, .n = 41 }, 1, &hidden, &e));
        assert_string_equal(e.text, "41 rows in a step of at most 40");
    }
    assert_int_equal(engine_length(g, handle), length);
}

static void pages_come_back(void **state)
{
    struct fixture *f = *state;
    enum { N = 4, ROUNDS = 80 };
    struct err e = { 0 };
    struct engine *g;
    struct engine_options o = { .context = CONTEXT, .sequences = N, .step_rows = 40 };
    must(engine_create(&g, &f->loaded.model, &o, &e), &e);
    size_t values = N * (size_t)engine_vocab(g);
    float *fresh = malloc(values * sizeof *fresh), *used = malloc(values * sizeof *used);
    fill_all(g, f, N, fresh);
    bool open[N] = { false };
    for (uint64_t r = 0; r < ROUNDS; r++) {
        int i = (int)(sample_uniform(1, r) * N), handle;
        if (!open[i]) {
            must(engine_open(g, &handle, &e), &e);
            open[handle] = true;
            continue;
        }
        int64_t left = CONTEXT - engine_length(g, i);
        if (sample_uniform(2, r) < 0.3) {
            engine_close(g, i);
            open[i] = false;
        } else if (left > 0) {
            append(g, i, f, 1 + (int64_t)(sample_uniform(3, r) * (double)(left < 90 ? left : 90)), NULL);
            check_refusals(g, f, i);
        }
    }
    for (int i = 0; i < N; i++)
        if (open[i]) engine_close(g, i);
    fill_all(g, f, N, used);
    assert_memory_equal(fresh, used, values * sizeof *fresh); /* no page is two sequences' at once */
    free(fresh);
    free(used);
    engine_free(g);
}

static void engine_limits(void **state)
{
    struct fixture *f = *state;
    struct engine *g;
    struct err e = { 0 };
    struct engine_options o = { .context = 262145 };
    assert_false(engine_create(&g, &f->loaded.model, &o, &e));
    assert_null(g);
    assert_string_equal(e.text, "a context of 262145 tokens was asked for, the model allows 262144");
    assert_int_equal(e.code, ERR_LIMIT);
    must(engine_create(&g, &f->loaded.model, &(struct engine_options){ 0 }, &e), &e);
    assert_int_equal(engine_context(g), 4096);
    assert_int_equal(engine_step_rows(g), 512);
    assert_int_equal(engine_vocab(g), 2048);
    assert_int_equal(engine_logits_rows(g), 512);
    engine_free(g);
    engine_free(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(text_is_the_decoded_tokens),
        cmocka_unit_test(tokens_alone),
        cmocka_unit_test(stop_strings_end_the_text_wherever_they_lie),
        cmocka_unit_test(a_stop_string_half_met_is_handed_out),
        cmocka_unit_test(stop_tokens_end_it_and_are_not_listed),
        cmocka_unit_test(what_does_not_fit_is_an_error),
        cmocka_unit_test(pieces_are_whole_characters),
        cmocka_unit_test(only_tokens_are_sampled),
        cmocka_unit_test(tokens_are_the_draws_of_the_seed),
        cmocka_unit_test(a_seed_gives_the_same_text_again),
        cmocka_unit_test(pages_come_back),
        cmocka_unit_test(engine_limits),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
