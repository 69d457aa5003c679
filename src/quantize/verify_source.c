/* The checkpoint against the BF16 one it was made from: every source tensor is there bit for bit, or as
 * matrices that decode to nearly the same numbers. */
#include "base/pool.h"
#include "base/pages.h"
#include "quantize/verify_steps.h"
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NAME_BYTES = 640 };

/* 3 % of relative squared error: round-to-nearest NVFP4 has 0.8 to 1.0 %, FP8 0.07 %. Above the second bound
 * a matrix is not a rounding of the source: half a scale too small is just there. */
static const double ERROR_WARN = 0.17320508, ERROR_FAULT = 0.5;

/* One matrix of the source and the module that stands for it. */
struct pair {
    const struct tensor *source;
    int64_t first; /* its first element in the source tensor */
    const struct stored *stored;
    float *rows;  /* [threads][2][cols] */
    double *sums; /* [rows][3]: squares of the difference, of the source, of what was decoded */
};

struct comparison {
    struct verify_steps *v;
    struct checkpoint source;
    struct pool *pool;
    float *rows;
    double *sums;
    int64_t rows_bytes, sums_bytes; /* grown as needed */
};

static void compare_row(void *ctx, int64_t r, int thread)
{
    const struct pair *p = ctx;
    int64_t cols = p->stored->part.cols;
    float *x = p->rows + 2 * thread * cols, *y = x + cols;
    double difference = 0, source = 0, decoded = 0;
    stored_widen(x, p->source, p->first + r * cols, cols);
    stored_row(y, p->stored, r);
    for (int64_t i = 0; i < cols; i++) {
        double d = (double)x[i] - (double)y[i];
        difference += d * d;
        source += (double)x[i] * x[i];
        decoded += (double)y[i] * y[i];
    }
    p->sums[3 * r] = difference;
    p->sums[3 * r + 1] = source;
    p->sums[3 * r + 2] = decoded;
}

static bool reserve(struct comparison *c, int64_t rows, int64_t cols, struct err *e)
{
    int64_t row_bytes = 2 * pool_threads(c->pool) * cols * (int64_t)sizeof *c->rows;
    int64_t sum_bytes = 3 * rows * (int64_t)sizeof *c->sums;
    if (row_bytes > c->rows_bytes) {
        free(c->rows);
        c->rows = malloc((size_t)row_bytes);
        c->rows_bytes = c->rows ? row_bytes : 0;
    }
    if (sum_bytes > c->sums_bytes) {
        free(c->sums);
        c->sums = malloc((size_t)sum_bytes);
        c->sums_bytes = c->sums ? sum_bytes : 0;
    }
    return (row_bytes <= c->rows_bytes && sum_bytes <= c->sums_bytes) ||
           err_memory(e, "comparison", (uint64_t)(row_bytes + sum_bytes));
}

static void remember(struct verify_result *r, const char *module, enum scheme scheme, double error)
{
    int at = r->n_worst;
    r->compared[scheme]++;
    r->mean_error[scheme] += (error - r->mean_error[scheme]) / (double)r->compared[scheme];
    while (at > 0 && !(error <= r->worst[at - 1].error)) at--; /* a NaN goes in front */
    if (at == VERIFY_WORST) return;
    int last = r->n_worst < VERIFY_WORST ? r->n_worst++ : VERIFY_WORST - 1;
    memmove(&r->worst[at + 1], &r->worst[at], (size_t)(last - at) * sizeof *r->worst);
    r->worst[at] = (struct verify_error){ .scheme = scheme, .error = error };
    snprintf(r->worst[at].module, sizeof r->worst[at].module, "%s", module);
}

/* norm: of what was decoded over the source's. */
static void judge(struct verify_steps *v, const struct stored *s, double error, double norm)
{
    char detail[NAME_BYTES + 100];
    bool fault = !(error <= ERROR_FAULT), reversed = s->part.global && stored_global(s) < 1 && norm > 100;
    if (error <= ERROR_WARN) return;
    snprintf(detail, sizeof detail, "%.3g %%, %.3g times the norm, %s", 100 * error, norm, s->name);
    findings_add(
        &v->result->findings,
        &(struct finding_note){
            .step = VERIFY_SOURCE,
            .is_fault = fault,
            .what = reversed
                        ? s->part.multiplies
                              ? "weights decode to many times the source's: weight_scale_2 is stored as "
                                "its reciprocal"
                              : "weights decode to many times the source's: weight_global_scale is stored "
                                "as its reciprocal"
                    : fault ? "weights decode to something else than the source's"
                            : "weights are further from the source's than rounding explains (17 %)",
            .name = s->name,
            .measure = error,
            .detail = detail });
}

/* rows x cols elements of a source tensor from `first` on against a module of the checkpoint. */
static bool compare(struct comparison *c, const struct tensor *source, int64_t first, int64_t rows,
                    int64_t cols, struct stored *s, struct err *e)
{
    struct verify_steps *v = c->v;
    double total[3] = { 0 };
    if (s->unsound) return true; /* said already */
    if (s->part.rows != rows || s->part.cols != cols) {
        verify_steps_note(v, VERIFY_SOURCE, true, s->name, "matrices do not have the source's shape");
        return true;
    }
    if (!reserve(c, rows, cols, e)) return false;
    struct pair p = { source, first, s, c->rows, c->sums };
    pool_run(c->pool, rows, compare_row, &p);
    for (int64_t i = 0; i < 3 * rows; i++) total[i % 3] += c->sums[i];
    double error = total[0] == 0 ? 0 : sqrt(total[0] / total[1]);
    if (s->part.storage != STORED_PLAIN || error > 0) remember(v->result, s->name, s->scheme, error);
    judge(v, s, error, sqrt(total[2] / total[1]));
    pages_release(s->part.codes->data, s->part.codes->bytes);
    return true;
}

static bool module_of(char module[NAME_BYTES], const char *tensor)
{
    size_t n = strlen(tensor), end = strlen(".weight");
    if (n <= end || n - end >= NAME_BYTES || strcmp(tensor + n - end, ".weight") != 0) return false;
    snprintf(module, NAME_BYTES, "%.*s", (int)(n - end), tensor);
    return true;
}

/* A tensor under its own name: the same bytes, or, where it is a linear module, another number format. */
static bool check_same(struct comparison *c, const struct tensor *a, const struct tensor *b, struct err *e)
{
    struct verify_steps *v = c->v;
    char module[NAME_BYTES];
    struct stored s;
    bool shape =
        a->n_dims == b->n_dims && memcmp(a->shape, b->shape, (size_t)a->n_dims * sizeof *a->shape) == 0;
    if (a->dtype != b->dtype && a->n_dims == 2 && stored_is_plain(a) && module_of(module, a->name) &&
        stored_get(&s, &v->model, module) && s.part.codes == b)
        return compare(c, a, 0, a->shape[0], a->shape[1], &s, e);
    if (!shape)
        verify_steps_note(v, VERIFY_SOURCE, true, a->name, "tensors do not have the source's shape");
    else if (a->dtype != b->dtype)
        verify_steps_note(v, VERIFY_SOURCE, false, a->name, "tensors are of another type than the source's");
    else if (memcmp(a->data, b->data, (size_t)a->bytes) != 0)
        verify_steps_note(v, VERIFY_SOURCE, true, a->name, "unquantized tensors differ from the source's");
    pages_release(b->data, b->bytes);
    return true;
}

static bool check_fused(struct comparison *c, const struct tensor *t, size_t stem, bool gate_up,
                        struct err *e)
{
    char module[NAME_BYTES];
    struct stored s;
    int first_part = gate_up ? PART_GATE : PART_DOWN, parts = gate_up ? 2 : 1;
    int64_t rows = t->shape[1] / parts, cols = t->shape[2];
    for (int64_t i = 0; i < t->shape[0]; i++)
        for (int part = 0; part < parts; part++) {
            snprintf(module, sizeof module, "%.*s.%" PRId64 ".%s", (int)stem, t->name, i,
                     expert_part_name[first_part + part]);
            if (!stored_get(&s, &c->v->model, module))
                verify_steps_note(c->v, VERIFY_SOURCE, true, module, "matrices of the source are missing");
            else if (!compare(c, t, (i * parts + part) * rows * cols, rows, cols, &s, e))
                return false;
        }
    return true;
}

static bool check_tensor(struct comparison *c, const struct tensor *t, struct err *e)
{
    char module[NAME_BYTES];
    struct stored s;
    size_t stem;
    bool gate_up;
    const struct tensor *same = checkpoint_find(&c->v->model, t->name);
    if (same) return check_same(c, t, same, e);
    if (t->n_dims == 3 && stored_is_plain(t) && module_is_fused(t->name, &stem, &gate_up))
        return check_fused(c, t, stem, gate_up, e);
    if (t->n_dims == 2 && stored_is_plain(t) && module_of(module, t->name) &&
        stored_get(&s, &c->v->model, module))
        return compare(c, t, 0, t->shape[0], t->shape[1], &s, e);
    verify_steps_note(c->v, VERIFY_SOURCE, true, t->name, "tensors of the source are missing");
    return true;
}

static bool check_tensors(struct comparison *c, struct err *e)
{
    uint64_t done = 0, total = 0;
    for (size_t i = 0; i < c->source.n_tensors; i++) total += c->source.tensors[i]->bytes;
    for (size_t i = 0; i < c->source.n_tensors; i++) {
        const struct tensor *t = c->source.tensors[i];
        if (!check_tensor(c, t, e)) return false;
        pages_release(t->data, t->bytes);
        done += t->bytes;
        report_progress(c->v->options->report, "source", done, total);
    }
    return true;
}

bool verify_steps_source(struct verify_steps *v, struct err *e)
{
    struct comparison c = { .v = v };
    int threads = v->options->threads ? v->options->threads : pool_default_threads();
    if (!checkpoint_open(&c.source, v->options->source, e)) return err_note(e, "--source");
    bool ok = pool_create(&c.pool, threads, e) && check_tensors(&c, e);
    v->result->steps[VERIFY_SOURCE].done = ok;
    v->result->steps[VERIFY_SOURCE].n = (int64_t)c.source.n_tensors;
    pool_free(c.pool);
    free(c.rows);
    free(c.sums);
    checkpoint_close(&c.source);
    return ok;
}
