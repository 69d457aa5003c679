/* The MTP head against an outside implementation in double (tools/make_mtp_golden.py): its rows for a text's
 * hidden states, and what it guesses from its own rows. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "support/models.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = 79, TOKENS = 80 };

#define EXACT 1e-3 /* relative, of rows by weights as stored */

struct fixture {
    struct loaded loaded;
    struct safetensors text, mtp;
    struct step *step;
    struct layer_state state;
    struct mat hidden; /* [TOKENS] the golden's, in the backend's memory */
    int32_t pages[2];
};

static const void *values(const struct safetensors *f, const char *name)
{
    const struct tensor *t = safetensors_find(f, name);
    assert_non_null(t);
    return t->data;
}

static void setup(struct fixture *f, const struct backend_options *o, bool packed)
{
    struct err e = { 0 };
    *f = (struct fixture){ .pages = { 1, 0 } };
    load_model(&f->loaded, "models/demo", o);
    struct model *m = &f->loaded.model;
    const struct backend *b = &f->loaded.backend;
    must(model_bind_mtp(m, packed, &e), &e);
    must(safetensors_open(&f->text, "tests/golden/demo/golden_text.safetensors", &e), &e);
    must(safetensors_open(&f->mtp, "tests/golden/demo/golden_mtp.safetensors", &e), &e);
    must(layer_state_create(&f->state, m, m->config->n_layers, KV_F32, 2, 1, &e), &e);
    must(step_create(&f->step, m, TOKENS, 4, 128, &e), &e);
    int64_t width = m->config->hidden_size;
    uint64_t bytes = TOKENS * (uint64_t)width * sizeof(float);
    void *memory;
    must(b->ops->memory_create(b->queue, &memory, bytes, &e), &e);
    const float *all = values(&f->text, "hidden_80");
    b->ops->upload(b->queue, memory, all + m->config->n_layers * TOKENS * width, bytes);
    f->hidden = mat_of(memory, TOKENS, width);
}

static void teardown(struct fixture *f)
{
    const struct backend *b = &f->loaded.backend;
    b->ops->memory_free(b->queue, f->hidden.data);
    step_free(f->step);
    layer_state_free(&f->state, &f->loaded.model);
    safetensors_close(&f->text);
    safetensors_close(&f->mtp);
    unload_model(&f->loaded);
}

/* Rows [first, first + n) of the text: the token after each, its position. */
static void text_rows(const struct fixture *f, struct row *rows, int64_t *index, int64_t first, int64_t n)
{
    const int32_t *ids = values(&f->text, "ids");
    for (int64_t i = 0; i < n; i++) {
        int32_t p = (int32_t)(first + i);
        rows[i] = (struct row){ .token = ids[first + i + 1], .position = { p, p, p } };
        index[i] = first + i;
    }
}

static double check_row(const struct fixture *f, struct mat m, const char *name, int64_t t, double most)
{
    struct err e = { 0 };
    const struct backend *b = &f->loaded.backend;
    must(b->ops->wait(b->queue, &e), &e);
    const float *want = (const float *)values(&f->mtp, name) + t * m.cols;
    double d = 0, w = 0;
    float *got = malloc((size_t)m.cols * sizeof *got);
    b->ops->download(b->queue, got, m.data, (uint64_t)m.cols * sizeof *got);
    for (int64_t i = 0; i < m.cols; i++) {
        d += ((double)got[i] - want[i]) * ((double)got[i] - want[i]);
        w += (double)want[i] * want[i];
    }
    free(got);
    double error = sqrt(d / w);
    if (!(error <= most)) fail_msg("%s, row %d on %s: relative error %g", name, (int)t, b->name, error);
    return error;
}

static struct mat guess(struct fixture *f, const struct row *rows, const int64_t *index, int64_t past,
                        int64_t n, struct mat hidden)
{
    struct span span = { .n = n, .past = past, .pages = f->pages };
    return step_mtp(f->step, &(struct step_rows){ rows, n, &span, 1, false }, hidden, index, &f->state);
}

/* Every row a step of its own, and from it one guess on, which the next row's keys and values replace. */
static void check_rows(const struct backend_options *o, bool packed)
{
    struct fixture f;
    setup(&f, o, packed);
    const int32_t *first = values(&f.mtp, "first"), *second = values(&f.mtp, "second");
    double worst = 0, most = packed ? 0.3 : EXACT;
    int same = 0;
    for (int64_t t = 0; t < ROWS; t++) {
        struct row row;
        int64_t index;
        int32_t token;
        text_rows(&f, &row, &index, t, 1);
        struct mat m = guess(&f, &row, &index, t, 1, f.hidden);
        worst = fmax(worst, check_row(&f, m, "rows", t, most));
        step_draft(f.step, &token, m, &(int64_t){ 0 }, 1);
        same += token == first[t];
        row = (struct row){ .token = first[t], .position = { (int)t + 1, (int)t + 1, (int)t + 1 } };
        m = guess(&f, &row, &(int64_t){ 0 }, t + 1, 1, m);
        worst = fmax(worst, check_row(&f, m, "guesses", t, most));
        step_draft(f.step, &token, m, &(int64_t){ 0 }, 1);
        same += token == second[t];
    }
    printf("note: %s on %s: worst relative error %.1e; %d of %d guesses are the golden's\n",
           packed ? "in four bits" : "as stored", f.loaded.backend.name, worst, same, 2 * ROWS);
    assert_true(same > 2 * ROWS * 3 / 4);
    teardown(&f);
}

static void rows_match_the_golden(void **state)
{
    (void)state;
    check_rows(&(struct backend_options){ .device = DEVICE_CPU }, false);
    check_rows(&(struct backend_options){ .device = DEVICE_CPU, .isa = CPU_ISA_GENERIC }, false);
    check_rows(&(struct backend_options){ .device = DEVICE_REF }, false);
}

static void rows_in_four_bits_are_near(void **state)
{
    (void)state;
    check_rows(&(struct backend_options){ .device = DEVICE_CPU, .rounded = true }, true);
    check_rows(&(struct backend_options){ .device = DEVICE_REF }, true);
}

/* Rows that were only remembered serve those after as well as rows that guessed. */
static void rows_need_only_be_remembered(void **state)
{
    (void)state;
    struct fixture f;
    setup(&f, &(struct backend_options){ .device = DEVICE_CPU }, false);
    static const int64_t pieces[] = { 1, 7, 30, 2, 39 };
    int64_t done = 0;
    for (int i = 0; i < 5; i++) {
        struct row rows[TOKENS];
        int64_t index[TOKENS], n = pieces[i];
        struct span span = { .n = n, .past = done, .pages = f.pages };
        text_rows(&f, rows, index, done, n);
        step_mtp_see(f.step, &(struct step_rows){ rows, n, &span, 1, false }, f.hidden, index, &f.state);
        text_rows(&f, rows, index, done + n - 1, 1);
        check_row(&f, guess(&f, rows, index, done + n - 1, 1, f.hidden), "rows", done + n - 1, EXACT);
        text_rows(&f, rows, index, done, n); /* and all at once */
        check_row(&f, guess(&f, rows, index, done, n, f.hidden), "rows", done + n - 1, EXACT);
        done += n;
    }
    assert_int_equal(done, ROWS);
    teardown(&f);
}

static void a_model_without_a_head_says_so(void **state)
{
    (void)state;
    struct loaded l;
    struct err e = { 0 };
    load_model(&l, "tests/golden/shapes/tied", &(struct backend_options){ .device = DEVICE_CPU });
    assert_false(model_bind_mtp(&l.model, true, &e));
    assert_int_equal(e.code, ERR_UNSUPPORTED);
    assert_non_null(strstr(e.text, "no MTP head to draft with"));
    unload_model(&l);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rows_match_the_golden),
        cmocka_unit_test(rows_in_four_bits_are_near),
        cmocka_unit_test(rows_need_only_be_remembered),
        cmocka_unit_test(a_model_without_a_head_says_so),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
