/* Perplexity: the counting of chunks, the sum of losses against an outside implementation's, and a comparison
 * of two models against the same quantities computed here in double from plain logits. */
#include "checkpoint/temp.h"
#include "eval/perplexity.h"
#include "support/models.h"
#include "tokenizer/tokenizer.h"
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static const char demo[] = "models/demo";
static const char golden_path[] = "tests/golden/demo/golden_text.safetensors";
static const struct backend_options cpu = { .device = DEVICE_CPU };

static void chunks_are_counted_by_the_rule(void **state)
{
    (void)state;
    static const struct {
        int64_t n, ctx, max_chunks, chunks, scored;
    } cases[] = {
        { 297053, 512, 0, 581, 296472 }, /* the card's own figures */
        { 493007, 512, 0, 963, 492044 },
        { 386164, 512, 0, 755, 385409 },
        { 1024, 512, 0, 2, 1022 }, /* no tail, one token that only counts as text, the shortest chunk */
        { 1025, 512, 0, 2, 1022 },
        { 1026, 512, 0, 3, 1023 },
        { 1027, 512, 0, 3, 1024 },
        { 1535, 512, 0, 3, 1532 },
        { 2, 512, 0, 1, 1 },
        { 511, 512, 0, 1, 510 },
        { 5, 2, 0, 2, 2 },
        { 1026, 512, 1, 1, 511 }, /* of at most so many chunks */
        { 1026, 512, 2, 2, 1022 },
        { 1026, 512, 3, 3, 1023 },
        { 1026, 512, 4, 3, 1023 },
        { 1025, 512, 3, 2, 1022 },
        { 100, 512, 1, 1, 99 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int64_t chunks, scored;
        perplexity_count(cases[i].n, cases[i].ctx, cases[i].max_chunks, &chunks, &scored);
        assert_int_equal(chunks, cases[i].chunks);
        assert_int_equal(scored, cases[i].scored);
    }
}

struct golden {
    struct safetensors file;
    const int32_t *ids;
    const float *nll; /* of ids[i + 1] */
    int64_t n;
};

static void golden_open(struct golden *g)
{
    struct err e = { 0 };
    must(safetensors_open(&g->file, golden_path, &e), &e);
    const struct tensor *ids = safetensors_find(&g->file, "ids"), *nll = safetensors_find(&g->file, "nll");
    assert_non_null(ids);
    assert_non_null(nll);
    g->ids = (const int32_t *)(const void *)ids->data;
    g->nll = (const float *)(const void *)nll->data;
    g->n = ids->shape[0];
    assert_int_equal(g->n, 700);
    assert_int_equal(nll->shape[0], 699);
}

static void assert_near(double got, double want, double relative)
{
    if (!(fabs(got - want) <= relative * fabs(want))) fail_msg("expected %.9g, found %.9g", want, got);
}

static void losses_agree_with_the_golden(void **state)
{
    (void)state;
    struct golden g;
    struct loaded l;
    struct err e = { 0 };
    struct perplexity_result r;
    double want = 0;
    golden_open(&g);
    load_model(&l, demo, &cpu);
    for (int64_t i = 0; i < g.n - 1; i++) want += (double)g.nll[i];
    must(perplexity_run(&r, &l.model, g.ids, g.n, &(struct perplexity_options){ .ctx = 1024 }, &e), &e);
    assert_int_equal(r.tokens, 700);
    assert_int_equal(r.chunks, 1);
    assert_int_equal(r.scored, 699);
    assert_near(r.nll, want, 1e-5);
    assert_near(r.perplexity, exp(want / 699), 1e-4);

    /* the first chunk of a text has the same past as the text itself */
    want = 0;
    for (int64_t i = 0; i < 99; i++) want += (double)g.nll[i];
    struct perplexity_options first = { .ctx = 100, .max_chunks = 1 };
    must(perplexity_run(&r, &l.model, g.ids, g.n, &first, &e), &e);
    assert_int_equal(r.scored, 99);
    assert_near(r.nll, want, 1e-5);
    unload_model(&l);
    safetensors_close(&g.file);
}

/* One chunk, so that most tokens look far back: within twice what was measured of f32's. */
static void losses_by_dtype_of_the_cache(void **state)
{
    static const double most[KV_DTYPES] = { [KV_BF16] = 1.7e-4, [KV_FP8] = 4.1e-3, [KV_INT8] = 1.1e-3 };
    struct golden g;
    struct loaded l;
    struct err e = { 0 };
    double plain = 0;
    (void)state;
    golden_open(&g);
    load_model(&l, demo, &cpu);
    for (int d = 0; d < KV_DTYPES; d++) {
        struct perplexity_options o = { .ctx = 1024, .kv = (enum kv_dtype)d };
        struct perplexity_result r;
        must(perplexity_run(&r, &l.model, g.ids, g.n, &o, &e), &e);
        if (d == KV_F32) plain = r.perplexity;
        assert_near(r.perplexity, plain, most[d]);
    }
    unload_model(&l);
    safetensors_close(&g.file);
}

/* A chunk is scored as if it were alone: the whole is the sum of texts of one chunk each. */
static void chunks_start_from_nothing(void **state)
{
    (void)state;
    struct golden g;
    struct loaded l;
    struct err e = { 0 };
    struct perplexity_result all, one;
    struct perplexity_options o = { .ctx = 97 };
    double sum = 0;
    golden_open(&g);
    load_model(&l, demo, &cpu);
    must(perplexity_run(&all, &l.model, g.ids, g.n, &o, &e), &e);
    assert_int_equal(all.chunks, 8);
    for (int64_t i = 0; i < g.n; i += 97) {
        int64_t n = g.n - i < 97 ? g.n - i : 97;
        must(perplexity_run(&one, &l.model, g.ids + i, n, &o, &e), &e);
        sum += one.nll;
    }
    assert_near(all.nll, sum, 1e-12);
    unload_model(&l);
    safetensors_close(&g.file);
}

static void a_model_equals_itself(void **state)
{
    (void)state;
    struct golden g;
    struct loaded l;
    struct err e = { 0 };
    struct comparison c;
    struct perplexity_options o = { .ctx = 128 };
    golden_open(&g);
    load_model(&l, demo, &cpu);
    must(perplexity_compare(&c, &l.model, &l.model, g.ids, g.n, &o, &e), &e);
    assert_true(c.delta == 0 && c.ratio == 1 && c.same_top == 1);
    assert_true(fabs(c.kld) <= 1e-7);
    assert_true(c.ratio_low <= 1 && c.ratio_high >= 1);
    assert_int_equal(c.base.scored, 694);
    assert_true(c.base.nll == c.other.nll);
    unload_model(&l);
    safetensors_close(&g.file);
}

static void link_or_copy(const struct temp *t, const char *name, bool copy)
{
    struct err e = { 0 };
    char from[PATH_MAX], real[PATH_MAX];
    snprintf(from, sizeof from, "%s/%s", demo, name);
    if (copy) {
        must(file_copy(from, temp_path(t, name), &e), &e);
        return;
    }
    assert_non_null(realpath(from, real));
    assert_int_equal(symlink(real, temp_path(t, name)), 0);
}

/* Flips a middle bit of every third value of lm_head, in place. */
static void disturb_head(const char *path)
{
    struct safetensors s;
    struct err e = { 0 };
    must(safetensors_open(&s, path, &e), &e);
    const struct tensor *head = safetensors_find(&s, "lm_head.weight");
    assert_non_null(head);
    uint64_t begin = (uint64_t)(head->data - s.map.data), bytes = head->bytes, all = s.map.bytes;
    safetensors_close(&s);
    int fd = open(path, O_RDWR);
    assert_true(fd >= 0);
    uint8_t *p = mmap(NULL, all, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    assert_true(p != MAP_FAILED);
    for (uint64_t i = 0; i + 1 < bytes; i += 6) p[begin + i] ^= 0x20;
    munmap(p, all);
    close(fd);
}

static void make_disturbed(const struct temp *t)
{
    link_or_copy(t, "config.json", false);
    link_or_copy(t, "model.safetensors.index.json", false);
    link_or_copy(t, "model-00001-of-00002.safetensors", true);
    link_or_copy(t, "model-00002-of-00002.safetensors", false);
    disturb_head(temp_path(t, "model-00001-of-00002.safetensors"));
}

/* Log-probabilities in double after every token of each chunk, [n][vocab]. */
static double *distributions(struct model *m, const int32_t *ids, int64_t n, int64_t ctx)
{
    struct engine *g;
    struct err e = { 0 };
    int64_t vocab = m->config->vocab_size;
    double *p = malloc((size_t)(n * vocab) * sizeof *p);
    must(engine_create(&g, m, &(struct engine_options){ .context = ctx }, &e), &e);
    for (int64_t i = 0; i < n; i++) {
        int handle = 0;
        const float *logits;
        if (i % ctx == 0) must(engine_open(g, &handle, &e), &e);
        must(engine_prefill(g, handle, &ids[i], 1, &logits, NULL, &e), &e);
        double sum = 0, top = (double)logits[0];
        for (int64_t k = 1; k < vocab; k++) top = fmax(top, (double)logits[k]);
        for (int64_t k = 0; k < vocab; k++) sum += exp((double)logits[k] - top);
        for (int64_t k = 0; k < vocab; k++) p[i * vocab + k] = (double)logits[k] - top - log(sum);
        if (i % ctx == ctx - 1) engine_close(g, handle);
    }
    engine_free(g);
    return p;
}

static int64_t argmax(const double *x, int64_t n)
{
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return best;
}

/* What a comparison should say, from the definition. d: difference of the losses of each chunk. */
struct expected {
    double base, other, kld, d[16];
    int64_t scored, same_top, sizes[16];
};

static void expect(struct expected *x, const double *p, const double *q, const int32_t *ids, int64_t n,
                   int64_t ctx, int64_t vocab)
{
    *x = (struct expected){ .scored = 0 };
    for (int64_t i = 0; i + 1 < n; i++) {
        if (i % ctx == ctx - 1) continue; /* its next token begins another chunk */
        const double *a = p + i * vocab, *b = q + i * vocab;
        x->base -= a[ids[i + 1]];
        x->other -= b[ids[i + 1]];
        x->d[i / ctx] += a[ids[i + 1]] - b[ids[i + 1]];
        x->sizes[i / ctx]++;
        for (int64_t k = 0; k < vocab; k++) x->kld += exp(a[k]) * (a[k] - b[k]);
        x->same_top += argmax(a, vocab) == argmax(b, vocab);
        x->scored++;
    }
}

/* Student's t, 97.5 %, for 1 to 9 degrees of freedom. Source: any table. */
static const double student[] = {
    0, 12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622
};

static void check_interval(const struct comparison *c, const struct expected *x, int64_t chunks)
{
    double mean = (x->other - x->base) / (double)x->scored, sum = 0;
    assert_near(c->ratio, exp(mean), 1e-6);
    if (chunks == 1) {
        assert_true(c->ratio_low == c->ratio && c->ratio_high == c->ratio);
        return;
    }
    for (int64_t i = 0; i < chunks; i++) sum += pow(x->d[i] - mean * (double)x->sizes[i], 2);
    double near = chunks > 4 ? 5e-4 : 0.012; /* how well the quantile is known */
    double error = sqrt((double)chunks / (double)(chunks - 1) * sum) / (double)x->scored;
    assert_near(log(c->ratio_high / c->ratio), student[chunks - 1] * error, near);
    assert_near(log(c->ratio / c->ratio_low), student[chunks - 1] * error, near);
}

static void a_comparison_says_what_the_logits_say(void **state)
{
    (void)state;
    static const int64_t ctxs[] = { 700, 350, 234, 175, 70 }; /* 1, 2, 3, 4 and 10 chunks */
    struct temp t = temp_make();
    struct golden g;
    struct loaded a, b;
    struct err e = { 0 };
    golden_open(&g);
    make_disturbed(&t);
    load_model(&a, demo, &cpu);
    load_model(&b, t.path, &cpu);
    for (size_t i = 0; i < sizeof ctxs / sizeof *ctxs; i++) {
        struct comparison c;
        struct expected x;
        int64_t vocab = a.model.config->vocab_size;
        double *p = distributions(&a.model, g.ids, g.n, ctxs[i]);
        double *q = distributions(&b.model, g.ids, g.n, ctxs[i]);
        expect(&x, p, q, g.ids, g.n, ctxs[i], vocab);
        struct perplexity_options o = { .ctx = ctxs[i] };
        must(perplexity_compare(&c, &a.model, &b.model, g.ids, g.n, &o, &e), &e);
        assert_int_equal(c.base.scored, x.scored);
        assert_near(c.base.nll, x.base, 1e-5);
        assert_near(c.other.nll, x.other, 1e-5);
        assert_true(x.kld / (double)x.scored > 1e-4); /* or the copy is not disturbed */
        assert_near(c.kld, x.kld / (double)x.scored, 1e-3);
        assert_near(c.same_top * (double)x.scored, (double)x.same_top, 1e-9);
        assert_true(x.same_top < x.scored);
        double delta = exp(x.other / (double)x.scored) - exp(x.base / (double)x.scored);
        assert_near(c.delta, delta, 1e-3);
        check_interval(&c, &x, c.base.chunks);
        printf("note: %d chunks: kld %.6f, computed here %.6f; delta %+.5f, here %+.5f\n", (int)c.base.chunks,
               c.kld, x.kld / (double)x.scored, c.delta, delta);
        free(p);
        free(q);
    }
    unload_model(&a);
    unload_model(&b);
    temp_remove(&t);
    safetensors_close(&g.file);
}

enum { WIDE = 65536, WIDE_TOKENS = 300 };

/* A tensor as it is, or with rows of zeros added up to WIDE. */
static void write_tensor(struct safetensors_writer *w, const struct tensor *t, uint64_t wanted)
{
    struct err e = { 0 };
    must(safetensors_writer_append(w, t->data, t->bytes, &e), &e);
    uint8_t *zeros = calloc(1, wanted - t->bytes + 1);
    must(safetensors_writer_append(w, zeros, wanted - t->bytes, &e), &e);
    free(zeros);
}

/* The demo model with so many tokens that the logits of a chunk do not fit one batch. */
static void make_wide(const struct temp *t)
{
    struct checkpoint c;
    struct err e = { 0 };
    struct safetensors_writer *w;
    must(checkpoint_open(&c, demo, &e), &e);
    struct tensor *list = calloc(c.n_tensors, sizeof *list);
    for (size_t i = 0; i < c.n_tensors; i++) {
        list[i] = *c.tensors[i];
        if (list[i].shape[0] == c.config.vocab_size) list[i].shape[0] = WIDE;
    }
    must(safetensors_writer_create(&w, temp_path(t, "model.safetensors"), list, c.n_tensors, &e), &e);
    for (size_t i = 0; i < c.n_tensors; i++)
        write_tensor(w, c.tensors[i], (uint64_t)tensor_elements(&list[i]) * dtype_bytes(list[i].dtype));
    must(safetensors_writer_finish(w, &e), &e);
    json_change(c.config_json, "text_config.vocab_size", "65536");
    assert_int_equal(json_dump_file(c.config_json, temp_path(t, "config.json"), 0), 0);
    free(list);
    checkpoint_close(&c);
}

static void logits_in_batches(void **state)
{
    (void)state;
    struct temp t = temp_make();
    struct golden g;
    struct loaded l;
    struct err e = { 0 };
    struct comparison c;
    struct expected x;
    golden_open(&g);
    make_wide(&t);
    load_model(&l, t.path, &cpu);
    double *p = distributions(&l.model, g.ids, WIDE_TOKENS, WIDE_TOKENS);
    expect(&x, p, p, g.ids, WIDE_TOKENS, WIDE_TOKENS, WIDE);
    struct perplexity_options o = { .ctx = WIDE_TOKENS };
    must(perplexity_compare(&c, &l.model, &l.model, g.ids, WIDE_TOKENS, &o, &e), &e);
    assert_int_equal(c.base.scored, WIDE_TOKENS - 1);
    assert_near(c.base.nll, x.base, 1e-5);
    assert_true(c.other.nll == c.base.nll && c.same_top == 1 && fabs(c.kld) <= 1e-7);
    free(p);
    unload_model(&l);
    temp_remove(&t);
    safetensors_close(&g.file);
}

static void what_cannot_be_scored_is_an_error(void **state)
{
    (void)state;
    struct loaded l;
    struct err e = { 0 };
    struct perplexity_result r;
    struct comparison c;
    int32_t ids[] = { 1, 2048, 3 };
    load_model(&l, demo, &cpu);
    struct perplexity_options o = { .ctx = 16 };
    for (int64_t n = 0; n < 2; n++) {
        char want[80];
        snprintf(want, sizeof want, "the text has %d tokens, at least 2 are needed", (int)n);
        assert_false(perplexity_run(&r, &l.model, ids, n, &o, &e));
        assert_string_equal(e.text, want);
        assert_int_equal(e.code, ERR_ARGUMENT);
    }
    assert_false(perplexity_run(&r, &l.model, ids, 3, &o, &e));
    assert_string_equal(e.text, "models/demo: the tokenizer gives token 2048, the model has 2048");
    assert_int_equal(e.code, ERR_FORMAT);
    ids[1] = -1;
    assert_false(perplexity_run(&r, &l.model, ids, 3, &o, &e));
    assert_string_equal(e.text, "models/demo: the tokenizer gives token -1, the model has 2048");
    o.ctx = 262145;
    assert_false(perplexity_run(&r, &l.model, ids, 1, &o, &e));
    ids[1] = 2;
    assert_false(perplexity_run(&r, &l.model, ids, 3, &o, &e));
    assert_string_equal(e.text,
                        "models/demo: a context of 262145 tokens was asked for, the model allows 262144");
    assert_int_equal(e.code, ERR_LIMIT);

    struct config less = *l.model.config;
    struct model other = l.model;
    less.vocab_size--;
    other.config = &less;
    assert_false(perplexity_compare(&c, &l.model, &other, ids, 3, &o, &e));
    assert_string_equal(e.text, "models/demo has 2048 tokens, models/demo has 2047: their distributions "
                                "cannot be compared");
    assert_int_equal(e.code, ERR_ARGUMENT);
    unload_model(&l);
}

/* The whole of WikiText-2, minutes long: only when asked for. */

static size_t lines_to_lf(char *text, size_t n)
{
    size_t out = 0;
    for (size_t i = 0; i < n; i++)
        if (text[i] != '\r' || i + 1 == n || text[i + 1] != '\n')
            text[out++] = text[i] == '\r' ? '\n' : text[i];
    return out;
}

static void check_wikitext(const char *shared, const char *model, const struct perplexity_result *want,
                           double tolerance)
{
    struct loaded l;
    struct err e = { 0 };
    struct tokenizer *t;
    struct token_list list = { 0 };
    struct perplexity_result r;
    char *text, path[PATH_MAX];
    size_t bytes;
    snprintf(path, sizeof path, "%s/data/wikitext-2-raw.test.txt", shared);
    must(file_read(&text, &bytes, path, 1 << 30, &e), &e);
    load_model(&l, model, &cpu);
    must(tokenizer_load(&t, model, &e), &e);
    must(tokenizer_encode(t, &list, text, lines_to_lf(text, bytes), 0, &e), &e);
    must(perplexity_run(&r, &l.model, list.ids, (int64_t)list.n, &(struct perplexity_options){ 0 }, &e), &e);
    printf("note: %s: %d tokens, %d chunks, %d scored, perplexity %.5f, %.0f s on %s\n", model, (int)r.tokens,
           (int)r.chunks, (int)r.scored, r.perplexity, r.seconds, l.backend.name);
    assert_int_equal(r.tokens, want->tokens);
    assert_int_equal(r.chunks, want->chunks);
    assert_int_equal(r.scored, want->scored);
    assert_true(fabs(r.perplexity - want->perplexity) <= tolerance);
    free(text);
    free(list.ids);
    tokenizer_free(t);
    unload_model(&l);
}

/* The folder with the text, or NULL after saying why not. */
static const char *slow_folder(const char *what)
{
    const char *slow = getenv("QUENCH_SLOW"), *shared = shared_folder(what);
    if (shared && slow && strcmp(slow, "1") == 0) return shared;
    if (shared) printf("SKIP: %s: takes minutes, QUENCH_SLOW=1 runs it\n", what);
    return NULL;
}

static void wikitext_on_demo(void **state)
{
    (void)state;
    const char *shared = slow_folder("WikiText-2 on the demo model");
    struct perplexity_result want = { 493007, 963, 492044, 0, 48.06, 0 };
    if (!shared) skip();
    check_wikitext(shared, demo, &want, 0.02);
}

static void wikitext_on_study(void **state)
{
    (void)state;
    char model[PATH_MAX];
    const char *shared = slow_folder("WikiText-2 on the study model");
    struct perplexity_result want = { 386164, 755, 385409, 0, 113.80, 0 };
    if (!shared) skip();
    snprintf(model, sizeof model, "%s/models/study", shared);
    check_wikitext(shared, model, &want, 0.05);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(chunks_are_counted_by_the_rule),
        cmocka_unit_test(losses_agree_with_the_golden),
        cmocka_unit_test(losses_by_dtype_of_the_cache),
        cmocka_unit_test(chunks_start_from_nothing),
        cmocka_unit_test(a_model_equals_itself),
        cmocka_unit_test(a_comparison_says_what_the_logits_say),
        cmocka_unit_test(logits_in_batches),
        cmocka_unit_test(what_cannot_be_scored_is_an_error),
        cmocka_unit_test(wikitext_on_demo),
        cmocka_unit_test(wikitext_on_study),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
