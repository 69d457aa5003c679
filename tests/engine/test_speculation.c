/* Speculation changes nothing but the time: tokens and the bits of their logits are those of a token a step,
 * whatever is guessed, however prompts are cut, with rounds of several sequences in one step; and sampled
 * tokens have the distribution of plain sampling. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "engine/generate.h"
#include "support/models.h"
#include "support/sanitized.h"
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SEQUENCES = 3, NEW = 24, CONTEXT = 1024 };
static const int drafts_of[SEQUENCES] = { 1, 2, 4 };

static const char *const own_prompts[] = {
    "<|im_start|>user\nWhat is the capital of "
    "Finland?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "<|im_start|>user\nAdd 32 and 93.<|im_end|>\n<|im_start|>assistant\n<think>\n",
    "<|im_start|>user\nRepeat: stone market mirror forest<|im_end|>\n<|im_start|>assistant\n<think>\n",
    "The river rose that night, and in the morning",
    "A",
};

static int32_t argmax(const float *x, int64_t n)
{
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return (int32_t)best;
}

struct bench {
    struct loaded loaded;
    struct tokenizer *tokenizer;
    struct engine *plain, *drafting;
    int64_t vocab;
    float *want;         /* [NEW][vocab] logits of a token a step */
    int32_t tokens[NEW]; /* what they say */
    int64_t compared, right, tried;
};

static void setup(struct bench *b, const char *model, const struct backend_options *o)
{
    struct err e = { 0 };
    *b = (struct bench){ 0 };
    load_model(&b->loaded, model, o);
    must(model_bind_mtp(&b->loaded.model, true, &e), &e);
    must(tokenizer_load(&b->tokenizer, model, &e), &e);
    struct engine_options plain = { .context = CONTEXT, .step_rows = 32 };
    struct engine_options drafting = {
        .context = CONTEXT, .step_rows = 32, .sequences = SEQUENCES, .drafts = 4
    };
    must(engine_create(&b->plain, &b->loaded.model, &plain, &e), &e);
    must(engine_create(&b->drafting, &b->loaded.model, &drafting, &e), &e);
    b->vocab = engine_vocab(b->plain);
    b->want = malloc(NEW * (size_t)b->vocab * sizeof *b->want);
}

static void teardown(struct bench *b)
{
    free(b->want);
    engine_free(b->plain);
    engine_free(b->drafting);
    tokenizer_free(b->tokenizer);
    unload_model(&b->loaded);
}

static void run_plain(struct bench *b, const struct token_list *prompt)
{
    struct err e = { 0 };
    const float *logits;
    int handle;
    must(engine_open(b->plain, &handle, &e), &e);
    must(engine_prefill(b->plain, handle, prompt->ids, (int64_t)prompt->n, &logits, NULL, &e), &e);
    for (int i = 0; i < NEW; i++) {
        memcpy(b->want + i * b->vocab, logits, (size_t)b->vocab * sizeof *logits);
        b->tokens[i] = argmax(logits, b->vocab);
        must(engine_prefill(b->plain, handle, &b->tokens[i], 1, &logits, NULL, &e), &e);
    }
    engine_close(b->plain, handle);
}

/* One sequence on its way: the prompt in pieces of odd sizes, then rounds of drafts. */
struct runner {
    struct engine_draft draft;
    int64_t done; /* tokens of the prompt */
    int made;     /* tokens generated */
    struct row rows[16];
    struct engine_run run;
};

static void next_run(struct runner *r, struct engine *g, const struct token_list *prompt, int s, int step)
{
    static const int pieces[SEQUENCES][4] = { { 7, 1, 10, 2 }, { 1, 9, 3, 5 }, { 10, 4, 1, 8 } };
    int64_t left = (int64_t)prompt->n - r->done, n = pieces[s][step % 4] < left ? pieces[s][step % 4] : left;
    if (left > 0) {
        engine_text_rows(r->rows, prompt->ids + r->done, n, r->done);
        r->done += n;
    } else {
        engine_text_rows(r->rows, &r->draft.next, 1, engine_length(g, r->draft.handle));
        engine_text_rows(r->rows + 1, r->draft.tokens, r->draft.n, engine_length(g, r->draft.handle) + 1);
        n = r->draft.n + 1;
    }
    r->run = (struct engine_run){ r->draft.handle, r->rows, n, left <= 0, false };
}

/* Rows [first, ...) of the step belong to r. */
static void check_rows(struct bench *b, struct runner *r, const struct token_list *prompt,
                       const float *logits, int64_t first)
{
    bool in_prompt = !r->run.tentative;
    if (in_prompt && r->done < (int64_t)prompt->n) return;
    int64_t row = in_prompt ? r->run.n - 1 : 0, kept = 0;
    for (; row < r->run.n && r->made < NEW; row++) {
        const float *got = logits + (first + row) * b->vocab;
        if (memcmp(got, b->want + r->made * b->vocab, (size_t)b->vocab * sizeof *got) != 0)
            fail_msg("%d drafts: logits of token %d differ", r->draft.n, r->made);
        b->compared++;
        kept++;
        r->draft.next = argmax(got, b->vocab);
        assert_int_equal(r->draft.next, b->tokens[r->made]);
        r->made++;
        if (in_prompt || row + 1 == r->run.n) break;
        b->tried++;
        if (r->draft.next != r->draft.tokens[row]) break;
        b->right++;
    }
    if (r->run.tentative) engine_keep(b->drafting, r->draft.handle, kept);
}

static void run_drafting(struct bench *b, const struct token_list *prompt)
{
    struct runner r[SEQUENCES] = { 0 };
    struct err e = { 0 };
    for (int s = 0; s < SEQUENCES; s++) must(engine_open(b->drafting, &r[s].draft.handle, &e), &e);
    for (int step = 0;; step++) {
        struct engine_run runs[SEQUENCES];
        struct engine_draft drafts[SEQUENCES];
        int64_t index[32], n_rows = 0;
        int at[SEQUENCES], n = 0, n_drafts = 0;
        struct mat hidden;
        for (int s = 0; s < SEQUENCES; s++) {
            if (r[s].made == 0 || r[s].made == NEW) continue;
            r[s].draft.n = (step + s) % 7 == 3 ? 1 : drafts_of[s];
            drafts[n_drafts++] = r[s].draft;
        }
        if (n_drafts) must(engine_draft(b->drafting, drafts, n_drafts, &e), &e);
        for (int s = 0, i = 0; s < SEQUENCES; s++) {
            if (r[s].made > 0 && r[s].made < NEW) r[s].draft = drafts[i++];
            if (r[s].made == NEW) continue;
            next_run(&r[s], b->drafting, prompt, s, step);
            at[n] = s;
            runs[n++] = r[s].run;
            n_rows += r[s].run.n;
        }
        if (n == 0) break;
        for (int64_t i = 0; i < n_rows; i++) index[i] = i;
        must(engine_step(b->drafting, runs, n, &hidden, &e), &e);
        const float *logits = engine_logits_host(b->drafting, hidden, index, n_rows);
        for (int64_t i = 0, first = 0; i < n; first += runs[i++].n)
            check_rows(b, &r[at[i]], prompt, logits, first);
    }
    for (int s = 0; s < SEQUENCES; s++) engine_close(b->drafting, r[s].draft.handle);
}

static void check_prompt(struct bench *b, const char *text)
{
    struct token_list prompt = { 0 };
    struct err e = { 0 };
    must(tokenizer_encode(b->tokenizer, &prompt, text, strlen(text), 0, &e), &e);
    if (prompt.n + NEW + DRAFTS_MAX < CONTEXT) {
        run_plain(b, &prompt);
        run_drafting(b, &prompt);
    }
    free(prompt.ids);
}

static void check_own(const struct backend_options *o, int n)
{
    struct bench b;
    setup(&b, "models/demo", o);
    for (int i = 0; i < n; i++) check_prompt(&b, own_prompts[i]);
    printf("note: demo on %s: %d logits equal, %d of %d drafts right\n", b.loaded.backend.name,
           (int)b.compared, (int)b.right, (int)b.tried);
    assert_true(b.compared >= n * NEW * SEQUENCES && b.right > 0 && b.right < b.tried);
    teardown(&b);
}

static void drafts_change_no_bit_on_a_gpu(void **state)
{
    (void)state;
    check_own(&(struct backend_options){ .device = DEVICE_CUDA, .rounded = true }, 5);
    check_own(&(struct backend_options){ .device = DEVICE_CUDA }, 5);
}

static void drafts_change_no_bit(void **state)
{
    (void)state;
    check_own(&(struct backend_options){ .device = DEVICE_CPU, .threads = 2, .rounded = true }, 5);
    check_own(&(struct backend_options){ .device = DEVICE_CPU, .isa = CPU_ISA_AVX2 }, 5);
    check_own(&(struct backend_options){ .device = DEVICE_CPU, .isa = CPU_ISA_GENERIC, .rounded = true }, 2);
    check_own(&(struct backend_options){ .device = DEVICE_REF }, 2);
}

/* Drafts of 1, 2 and 4 tokens share steps, prompts come in odd pieces. */
static void check_instructions(const char *model, const char *shared, int n_prompts,
                               const struct backend_options *o)
{
    struct bench b;
    char path[512], line[1 << 16];
    int n = 0;
    snprintf(path, sizeof path, "%s/models/%s/config.json", shared, model);
    if (access(path, R_OK) != 0) {
        printf("SKIP: speculation on instruction prompts: no %s\n", path);
        return;
    }
    snprintf(path, sizeof path, "%s/data/instructions.jsonl", shared);
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    snprintf(path, sizeof path, "%s/models/%s", shared, model);
    setup(&b, path, o);
    for (; n < n_prompts && fgets(line, sizeof line, f); n++) {
        json_t *prompt = json_loads(line, 0, NULL);
        check_prompt(&b, json_string_value(json_object_get(prompt, "prompt")));
        json_decref(prompt);
    }
    assert_int_equal(n, n_prompts);
    printf("note: %s on %s, %d prompts: %d logits equal, %d of %d drafts right\n", model,
           b.loaded.backend.name, n, (int)b.compared, (int)b.right, (int)b.tried);
    assert_true(b.compared > n_prompts * NEW && b.right > 0);
    teardown(&b);
    fclose(f);
}

/* QUENCH_PROMPTS: how many, 200 take minutes on a CPU */
static void check_prompts(enum device device, int n_prompts)
{
    const struct backend_options o = { .device = device, .rounded = true };
    const char *shared = shared_folder("speculation on instruction prompts"),
               *many = getenv("QUENCH_PROMPTS");
    if (!shared) skip();
    if (many) n_prompts = atoi(many);
    check_instructions("demo", shared, n_prompts, &o);
    check_instructions("study", shared, n_prompts, &o);
}

static void drafts_change_no_bit_of_prompts(void **state)
{
    (void)state;
    check_prompts(DEVICE_CPU, SANITIZED ? 4 : 24);
}

static void drafts_change_no_bit_of_prompts_on_a_gpu(void **state)
{
    (void)state;
    check_prompts(DEVICE_CUDA, 200);
}

/* Sampling. A chain over a tiny vocabulary: logits of the next token depend on the last one. A round takes
 * tokens as generate() does: each is sampled by its own generator, a draft counts when it is that token. */
enum { VOCAB = 5, SAMPLES = SANITIZED ? 100000 : 1000000 };
static const float chain[VOCAB][VOCAB] = { { 0, 1, 2, -1, 0.5f },
                                           { 1.5f, -2, 0, 0.3f, 1 },
                                           { -1, 0, 0.2f, 2.5f, -3 },
                                           { 0.7f, 0.7f, -0.5f, 0, 1.2f },
                                           { 2, 0, 1, -1, -2 } };

/* What the sampler's rules leave of a row, by their definitions: temperature, min-p, top-k, top-p. */
static void exact(double p[VOCAB], const struct sampling *s, int last)
{
    int order[VOCAB];
    double total = 0, top = -INFINITY;
    for (int i = 0; i < VOCAB; i++) top = fmax(top, chain[last][i] / s->temperature);
    for (int i = 0; i < VOCAB; i++) {
        order[i] = i;
        p[i] = exp(chain[last][i] / s->temperature - top);
        if (p[i] < s->min_p) p[i] = 0;
    }
    for (int i = 0; i < VOCAB; i++)
        for (int k = i + 1; k < VOCAB; k++)
            if (p[order[k]] > p[order[i]]) {
                int other = order[i];
                order[i] = order[k];
                order[k] = other;
            }
    double kth = s->top_k > 0 ? p[order[s->top_k - 1]] : 0;
    for (int i = 0; i < VOCAB; i++) p[i] = p[i] < kth ? 0 : p[i];
    for (int i = 0; i < VOCAB; i++) total += p[i];
    double sum = 0;
    for (int i = 0; i < VOCAB && s->top_p > 0; i++) {
        double mass = p[order[i]];
        if (sum >= s->top_p * total) p[order[i]] = 0;
        sum += mass;
    }
    total = 0;
    for (int i = 0; i < VOCAB; i++) total += p[i];
    for (int i = 0; i < VOCAB; i++) p[i] /= total;
}

/* Draws SAMPLES tokens in rounds with up to `k` drafts of the likeliest token; counts who follows whom. */
static int64_t draw(int64_t counts[VOCAB][VOCAB], const struct sampling *s, int k)
{
    int last = 0;
    int64_t right = 0;
    for (uint64_t n = 0; n < SAMPLES;) {
        int drafts[DRAFTS_MAX], from = last;
        for (int i = 0; i < k; i++) from = drafts[i] = argmax(chain[from], VOCAB);
        for (int row = 0; row <= k && n < SAMPLES; row++) {
            int id = sample_token(s, chain[last], VOCAB, n++, NULL);
            counts[last][id]++;
            last = id;
            if (row == k || id != drafts[row]) break;
            right++;
        }
    }
    return right;
}

static void sampled_tokens_have_the_distribution(void **state)
{
    (void)state;
    static const struct sampling all[] = { { .temperature = 1, .seed = 1 },
                                           { .temperature = 0.7f, .top_k = 3, .seed = 2 },
                                           { .temperature = 1.5f, .top_p = 0.8f, .seed = 3 },
                                           { .temperature = 1, .min_p = 0.2f, .top_p = 0.95f, .seed = 4 } };
    for (int i = 0; i < 4; i++) {
        int64_t plain[VOCAB][VOCAB] = { { 0 } };
        draw(plain, &all[i], 0);
        for (int k = 1; k <= 4; k++) {
            int64_t counts[VOCAB][VOCAB] = { { 0 } };
            int64_t right = draw(counts, &all[i], k);
            double chi = 0;
            int freedom = 0;
            for (int last = 0; last < VOCAB; last++) {
                double p[VOCAB], seen = 0;
                exact(p, &all[i], last);
                for (int id = 0; id < VOCAB; id++) seen += (double)counts[last][id];
                for (int id = 0; id < VOCAB; id++) {
                    if (p[id] == 0) assert_int_equal(counts[last][id], 0);
                    if (p[id] == 0 || seen == 0) continue;
                    chi += pow((double)counts[last][id] - seen * p[id], 2) / (seen * p[id]);
                    freedom++;
                }
                freedom -= seen > 0;
            }
            /* Wilson and Hilferty: the cube root is nearly normal; 4 deviations */
            double limit = freedom * pow(1 - 2.0 / (9 * freedom) + 4 * sqrt(2.0 / (9 * freedom)), 3);
            if (!(chi <= limit))
                fail_msg("sampling %d, %d drafts: chi-square %g, limit %g", i, k, chi, limit);
            assert_memory_equal(counts, plain, sizeof counts); /* the very same draws */
            assert_true(right > SAMPLES / 10);
        }
    }
}

/* The same through the model: a seed's text does not depend on drafts. */
static void a_seed_gives_the_same_text_with_drafts(void **state)
{
    (void)state;
    struct bench b;
    struct err e = { 0 };
    setup(&b, "models/demo", &(struct backend_options){ .device = DEVICE_CPU, .rounded = true });
    struct token_list prompt = { 0 };
    must(tokenizer_encode(b.tokenizer, &prompt, own_prompts[3], strlen(own_prompts[3]), 0, &e), &e);
    for (uint64_t seed = 0; seed < 12; seed++) {
        struct speculation s;
        struct generated plain, drafted;
        struct generation o = { .sampling = { 0.8f, seed % 2 ? 20 : 0, 0.95f, 0.01f, seed },
                                .max_tokens = 50 };
        must(generate(&plain, b.plain, b.tokenizer, prompt.ids, (int64_t)prompt.n, &o, &e), &e);
        speculation_init(&s, 4);
        s.is_fixed = seed % 3;
        o.speculation = &s;
        must(generate(&drafted, b.drafting, b.tokenizer, prompt.ids, (int64_t)prompt.n, &o, &e), &e);
        assert_int_equal(plain.tokens.n, drafted.tokens.n);
        assert_memory_equal(plain.tokens.ids, drafted.tokens.ids, plain.tokens.n * sizeof *plain.tokens.ids);
        if (s.is_fixed) assert_true(s.accepted > 0 && s.accepted < s.drafted);
        assert_int_equal(s.rounds + s.accepted + 1, plain.tokens.n);
        free(plain.tokens.ids);
        free(drafted.tokens.ids);
    }
    free(prompt.ids);
    teardown(&b);
}

/* What is drafted follows what pays. */
static void drafting_stops_where_it_does_not_pay(void **state)
{
    (void)state;
    struct speculation s;
    int64_t drafted[3] = { 0 };
    double seconds[3] = { 0 }, plain = 0;
    for (int kind = 0; kind < 3; kind++) { /* drafts right never, half of the time, always */
        speculation_init(&s, 4);
        plain = 0;
        for (int64_t n = 0; n < 4000;) {
            int k = speculation_choose(&s), right = 0;
            while (right < k && sample_uniform(7, (uint64_t)(n * 8 + right)) < 0.5 * kind) right++;
            double cost = 1 + 0.45 * k;
            speculation_learn(&s, k, right, cost);
            drafted[kind] += k;
            seconds[kind] += cost;
            plain += right + 1;
            n += right + 1;
        }
        printf("note: drafts right in %d %%: %.3f of the time without\n", 50 * kind, seconds[kind] / plain);
        assert_true(seconds[kind] <= 1.02 * plain);
    }
    assert_true(drafted[0] < 100);
    assert_true(seconds[2] < 0.62 * plain); /* four at a time: 2.8 for 5 tokens */
    assert_true(drafted[2] > 2800);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(drafts_change_no_bit),
        cmocka_unit_test(sampled_tokens_have_the_distribution),
        cmocka_unit_test(a_seed_gives_the_same_text_with_drafts),
        cmocka_unit_test(drafting_stops_where_it_does_not_pay),
        cmocka_unit_test(drafts_change_no_bit_of_prompts),
    };
    const struct CMUnitTest on_a_gpu[] = { cmocka_unit_test(drafts_change_no_bit_on_a_gpu),
                                           cmocka_unit_test(drafts_change_no_bit_of_prompts_on_a_gpu) };
    const char *device = getenv("QUENCH_DEVICE");
    if (device && strcmp(device, "cuda") == 0) return cmocka_run_group_tests(on_a_gpu, NULL, NULL);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
