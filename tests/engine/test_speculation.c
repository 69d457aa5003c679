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
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

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
    must(model_bind_mtp(&b->loaded.model, &e), &e);
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
    r->run = (struct engine_run){ r->draft.handle, r->rows, n, left <= 0 };
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

static void drafts_change_no_bit(void **state)
{
    (void)state;
    check_own(&(struct backend_options){ .device = DEVICE_CPU, .threads = 2, .rounded = true }, 5);
    check_own(&(struct backend_options){ .device = DEVICE_CPU, .isa = CPU_ISA_AVX2 }, 5);
    check_own(&(struct backend_options){ .device = DEVICE_CPU, .isa = CPU_ISA_GENERIC, .rounded = true }, 2);
    check_own(&(struct backend_options){ .device = DEVICE_REF }, 2);
}

static void check_instructions(const char *model, const char *shared)
{
    enum { PROMPTS = 200 };
    struct bench b;
    char path[512], line[1 << 16];
    int n = 0;
    snprintf(path, sizeof path, "%s/data/instructions.jsonl", shared);
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    snprintf(path, sizeof path, "%s/models/%s", shared, model);
    setup(&b, path, &(struct backend_options){ .device = DEVICE_CPU, .rounded = true });
    for (; n < PROMPTS && fgets(line, sizeof line, f); n++) {
        json_t *o = json_loads(line, 0, NULL);
        check_prompt(&b, json_string_value(json_object_get(o, "prompt")));
        json_decref(o);
    }
    assert_int_equal(n, PROMPTS);
    printf("note: %s, %d prompts: %d logits equal, %d of %d drafts right\n", model, n, (int)b.compared,
           (int)b.right, (int)b.tried);
    teardown(&b);
    fclose(f);
}

static void drafts_change_no_bit_of_200_prompts(void **state)
{
    (void)state;
    const char *shared = shared_folder("speculation on instruction prompts");
    if (!shared) skip();
    check_instructions("demo", shared);
    check_instructions("study", shared);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(drafts_change_no_bit),
        cmocka_unit_test(drafts_change_no_bit_of_200_prompts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
