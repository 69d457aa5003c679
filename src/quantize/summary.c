/* Takes plan, results and calibration; gives sums, ranges and ranks. */
#include "quantize/summary.h"
#include "quantize/mtp.h"
#include "tokenizer/utf8.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

double summary_error(const struct matrix_result *r)
{
    return r->total > 0 ? sqrt(r->difference / r->total) : 0;
}

double summary_snr(double difference, double total)
{
    return difference > 0 ? 10 * log10(total / difference) : INFINITY;
}

int64_t summary_routed(const struct summary *s, int layer, int expert)
{
    const struct calibration *c = s->run.calibration;
    return c->routed[(int64_t)layer * c->n_experts + expert];
}

/* Names. */

static const char *replacement(char out[4])
{
    memcpy(out, "\xef\xbf\xbd", 4);
    return out;
}

static char *clean(const char *text, size_t n)
{
    char *out = malloc(3 * n + 1), bad[4];
    size_t used = 0;
    while (out && n > 0) {
        int length = utf8_scan((const unsigned char *)text, n);
        bool control = length == 1 && ((unsigned char)*text < 0x20 || *text == 0x7f);
        bool sound = length > 0 && !control;
        size_t taken = length > 0   ? (size_t)length
                       : length < 0 ? (size_t)-length
                                    : n,
               put = sound ? taken : 3;
        memcpy(out + used, sound ? text : replacement(bad), put);
        used += put;
        text += taken;
        n -= taken;
    }
    if (out) out[used] = 0;
    return out;
}

char *summary_name(const char *path)
{
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/') n--;
    size_t begin = n;
    while (begin > 0 && path[begin - 1] != '/') begin--;
    return begin == n ? clean(path, n) : clean(path + begin, n - begin);
}

/* ".../models--ORG--NAME/snapshots/REVISION" is where Hugging Face's tools keep ORG/NAME. */
static char *cache_name(const char *path)
{
    static const char mark[] = "/models--", end[] = "/snapshots/";
    const char *begin = strstr(path, mark), *stop = begin ? strstr(begin, end) : NULL, *dashes;
    if (!stop) return NULL;
    begin += strlen(mark);
    dashes = strstr(begin, "--");
    if (!dashes || dashes >= stop || memchr(begin, '/', (size_t)(stop - begin))) return NULL;
    char *out = clean(begin, (size_t)(stop - begin));
    char *at = out ? strstr(out, "--") : NULL;
    if (at) {
        *at = '/';
        memmove(at + 1, at + 2, strlen(at + 2) + 1);
    }
    return out;
}

static char *source_name(const char *path)
{
    char *real = realpath(path, NULL), *name = cache_name(real ? real : path);
    if (!name) name = summary_name(real ? real : path);
    free(real);
    return name;
}

int64_t summary_matrices(const struct summary *s, bool nvfp4)
{
    int64_t n = 0;
    for (int i = 0; i < N_SCHEMES; i++)
        n += scheme_is_nvfp4((enum scheme)i) == nvfp4 ? s->errors[i].matrices : 0;
    return n;
}

void summary_formats(const struct summary *s, char out[32])
{
    bool nvfp4 = summary_matrices(s, true) > 0, fp8 = summary_matrices(s, false) > 0;
    snprintf(out, 32, "%s%s%s", nvfp4 ? "NVFP4" : "", nvfp4 && fp8 ? " + " : "", fp8 ? "FP8" : "");
}

/* Errors. */

static void add_matrix(struct summary_errors *x, const struct summary_run *run, size_t index)
{
    const struct matrix *m = &run->plan->matrices[index];
    const struct matrix_result *r = &run->results[index];
    double error = summary_error(r);
    x->matrices++;
    x->weights += m->rows * m->cols;
    x->mean += (error - x->mean) / (double)x->matrices;
    x->difference += r->difference;
    x->total += r->total;
    if (x->matrices > 1 && !(error > x->worst)) return;
    x->worst = error;
    x->worst_matrix = index;
}

static void rank(struct summary *s, size_t index)
{
    const struct matrix_result *results = s->run.results;
    double error = summary_error(&results[index]);
    int at = s->n_worst;
    while (at > 0 && error > summary_error(&results[s->worst[at - 1]])) at--;
    if (at == SUMMARY_WORST) return;
    int last = s->n_worst < SUMMARY_WORST ? s->n_worst++ : SUMMARY_WORST - 1;
    memmove(&s->worst[at + 1], &s->worst[at], (size_t)(last - at) * sizeof *s->worst);
    s->worst[at] = index;
}

/* outputs: the first of the matrix's; returns the first of the next. */
static const struct tensor *add_bytes(struct summary *s, const struct matrix *m, const struct tensor *outputs)
{
    for (int n = plan_outputs_of(m->scheme); n > 0; n--, outputs++) {
        s->errors[m->scheme].bytes += outputs->bytes;
        if (m->layer >= 0) s->layers[m->layer].errors[m->scheme].bytes += outputs->bytes;
    }
    return outputs;
}

static void add_results(struct summary *s)
{
    for (size_t i = 0; i < s->run.plan->n_matrices; i++) {
        const struct matrix *m = &s->run.plan->matrices[i];
        add_matrix(&s->errors[m->scheme], &s->run, i);
        if (m->layer >= 0) add_matrix(&s->layers[m->layer].errors[m->scheme], &s->run, i);
        rank(s, i);
        s->n_far += summary_snr(s->run.results[i].difference, s->run.results[i].total) < SUMMARY_SNR_LOW;
        s->n_zero += scheme_measures(m->scheme) && s->run.results[i].input == 0;
    }
}

static void count_tensors(struct summary *s)
{
    const struct plan *p = s->run.plan;
    const struct tensor *out = p->outputs;
    for (size_t i = 0; i < p->n_jobs; i++) {
        const struct job *j = &p->jobs[i];
        s->bytes_in += j->source->bytes;
        for (size_t k = j->first; k < j->first + j->n; k++) out = add_bytes(s, &p->matrices[k], out);
        if (j->n > 0) continue;
        out++;
        s->copied++;
        s->copied_bytes += (int64_t)j->source->bytes;
        s->draft += mtp_is_name(j->source->name);
    }
    for (size_t i = 0; i < p->n_outputs; i++) s->bytes_out += p->outputs[i].bytes;
}

/* Ranges. */

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* Sorts the values. */
static struct summary_range range_of(double *x, int64_t n)
{
    if (n == 0) return (struct summary_range){ 0 };
    qsort(x, (size_t)n, sizeof *x, compare);
    return (struct summary_range){ x[0], x[(n - 1) / 2], x[n - 1] };
}

/* scratch: [n_layers][n_experts]. */
static void add_calibration(struct summary *s, double *scratch)
{
    const struct calibration *c = s->run.calibration;
    int64_t n = c->n_experts, all = n * c->n_layers;
    for (int i = 0; i < c->n_layers; i++) {
        struct summary_layer *l = &s->layers[i];
        for (int k = INPUT_MIXER; k < INPUT_EXPERT; k++)
            l->inputs[k] = (double)calibration_input(c, i, (enum module_input)k, -1);
        for (int k = 0; k < n; k++) scratch[k] = (double)calibration_input(c, i, INPUT_EXPERT, k);
        l->experts = range_of(scratch, n);
        for (int k = 0; k < n; k++) {
            scratch[k] = (double)summary_routed(s, i, k);
            l->n_few += scratch[k] < SUMMARY_FEW_TOKENS;
        }
        l->routed = range_of(scratch, n);
        s->n_few += l->n_few;
    }
    for (int64_t i = 0; i < all; i++) scratch[i] = (double)c->routed[i];
    s->routed = range_of(scratch, all);
}

bool summary_create(struct summary *s, const struct summary_run *run, struct err *e)
{
    const struct config *config = run->plan->config;
    size_t layers = (size_t)config->n_layers, experts = (size_t)config->n_experts;
    bool calibrated = run->calibration->tokens > 0;
    *s = (struct summary){ .run = *run };
    double *scratch = malloc((layers * experts + 1) * sizeof *scratch);
    s->layers = calloc(layers + 1, sizeof *s->layers);
    s->source_name = source_name(run->source);
    if (calibrated) s->calibration_name = summary_name(run->calibration_file);
    if (!scratch || !s->layers || !s->source_name || (calibrated && !s->calibration_name)) {
        free(scratch);
        summary_deinit(s);
        return err_memory(e, "summary", layers * experts * sizeof *scratch);
    }
    count_tensors(s);
    add_results(s);
    if (calibrated) add_calibration(s, scratch);
    free(scratch);
    return true;
}

void summary_deinit(struct summary *s)
{
    free(s->source_name);
    free(s->calibration_name);
    free(s->layers);
    *s = (struct summary){ 0 };
}
