/* A summary in, two files and a few numbers out. */
#include "quantize/describe.h"
#include "base/file.h"
#include "quantize/card.h"
#include "quantize/front_matter.h"
#include "quantize/record.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

_Static_assert((int)QUANTIZE_WORST >= (int)SUMMARY_WORST, "the summary's worst fit a result");

/* Takes the text. */
static bool write_text(const char *folder, const char *name, char *text, size_t bytes, struct err *e)
{
    char *path = file_join(folder, name);
    bool ok = path ? file_write(path, text, bytes, e) : err_memory(e, "path", strlen(name));
    free(path);
    free(text);
    return ok;
}

bool describe_write(const char *folder, const struct summary *s, const struct evaluation *evaluation,
                    const struct report *report, struct err *e)
{
    char *text;
    size_t bytes;
    json_t *front;
    if (!record_text(&text, &bytes, s, evaluation, e) || !write_text(folder, RECORD_FILE, text, bytes, e) ||
        !front_matter_load(&front, s->run.source, report, e))
        return false;
    bool ok =
        card_text(&text, &bytes, s, front, evaluation, e) && write_text(folder, "README.md", text, bytes, e);
    json_decref(front);
    return ok;
}

/* Of the schemes of one format together. */
static void add_errors(struct quantize_error *out, int64_t *matrices, const struct summary *s, bool nvfp4)
{
    double difference = 0, total = 0;
    *out = (struct quantize_error){ 0 };
    *matrices = 0;
    for (int i = 0; i < N_SCHEMES; i++) {
        const struct summary_errors *x = &s->errors[i];
        if (x->matrices == 0 || scheme_is_nvfp4((enum scheme)i) != nvfp4) continue;
        difference += x->difference;
        total += x->total;
        *matrices += x->matrices;
        out->mean += (x->mean - out->mean) * (double)x->matrices / (double)*matrices;
        if (*matrices > x->matrices && !(x->worst > out->worst)) continue;
        out->worst = x->worst;
        snprintf(out->worst_module, sizeof out->worst_module, "%s",
                 s->run.plan->matrices[x->worst_matrix].module);
    }
    out->snr = summary_snr(difference, total);
}

static void add_few(struct quantize_coverage *c, const struct quantize_routed *x)
{
    int64_t n = c->few < QUANTIZE_FEWEST ? c->few : QUANTIZE_FEWEST, at = n;
    while (at > 0 && x->tokens < c->fewest[at - 1].tokens) at--;
    c->few++;
    if (at == QUANTIZE_FEWEST) return;
    int64_t moved = (n < QUANTIZE_FEWEST ? n : QUANTIZE_FEWEST - 1) - at;
    memmove(&c->fewest[at + 1], &c->fewest[at], (size_t)moved * sizeof *c->fewest);
    c->fewest[at] = *x;
}

static void add_coverage(struct quantize_coverage *c, const struct summary *s)
{
    const struct calibration *k = s->run.calibration;
    *c = (struct quantize_coverage){ .experts = (int64_t)k->n_layers * k->n_experts,
                                     .minimum = (int64_t)s->routed.low,
                                     .median = (int64_t)s->routed.median,
                                     .maximum = (int64_t)s->routed.high };
    for (int i = 0; i < k->n_layers; i++)
        for (int j = 0; j < k->n_experts; j++) {
            struct quantize_routed x = { i, j, summary_routed(s, i, j) };
            if (x.tokens < SUMMARY_FEW_TOKENS) add_few(c, &x);
        }
}

void describe_result(struct quantize_result *r, const struct summary *s)
{
    add_errors(&r->nvfp4_error, &r->nvfp4_matrices, s, true);
    add_errors(&r->fp8_error, &r->fp8_matrices, s, false);
    r->gptq_matrices = 0;
    for (size_t i = 0; i < s->run.plan->n_matrices; i++) r->gptq_matrices += s->run.results[i].is_gptq;
    r->n_worst = s->n_worst;
    for (int i = 0; i < s->n_worst; i++) {
        const struct matrix *m = &s->run.plan->matrices[s->worst[i]];
        const struct matrix_result *y = &s->run.results[s->worst[i]];
        r->worst[i] = (struct quantize_worst){ .scheme = m->scheme,
                                               .error = summary_error(y),
                                               .snr = summary_snr(y->difference, y->total) };
        snprintf(r->worst[i].module, sizeof r->worst[i].module, "%s", m->module);
    }
    if (summary_is_calibrated(s)) add_coverage(&r->coverage, s);
}
