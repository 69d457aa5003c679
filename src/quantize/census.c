/* Takes the plan and the folder, gives yes or the first thing that is wrong. */
#include "quantize/census.h"
#include <math.h>
#include <stdio.h>
#include <string.h>

static bool same_kind(const struct tensor *a, const struct tensor *b)
{
    return a->dtype == b->dtype && a->n_dims == b->n_dims && a->bytes == b->bytes &&
           memcmp(a->shape, b->shape, (size_t)a->n_dims * sizeof *a->shape) == 0;
}

static bool ends_in(const char *name, const char *end)
{
    size_t n = strlen(name), m = strlen(end);
    return n >= m && strcmp(name + n - m, end) == 0;
}

static bool check_global(const struct tensor *t, struct err *e)
{
    float x;
    memcpy(&x, t->data, sizeof x);
    return (isfinite(x) && x > 0) ||
           err_set(e, ERR_FORMAT, "tensor '%s': the scale is %g", t->name, (double)x);
}

static bool check_outputs(const struct plan *p, const struct checkpoint *c, struct err *e)
{
    if (c->n_tensors != p->n_outputs)
        return err_set(e, ERR_FORMAT, "%zu tensors, %zu were planned", c->n_tensors, p->n_outputs);
    for (size_t i = 0; i < p->n_outputs; i++) {
        const struct tensor *want = &p->outputs[i], *have = checkpoint_find(c, want->name);
        if (!have) return err_set(e, ERR_FORMAT, "tensor '%s' is missing", want->name);
        if (!same_kind(have, want))
            return err_set(e, ERR_FORMAT, "tensor '%s' is not of the planned type and shape", want->name);
        if (ends_in(want->name, "_global_scale") && !check_global(have, e)) return false;
    }
    return true;
}

static const struct tensor *find_part(const struct checkpoint *c, const struct matrix *m, const char *suffix)
{
    char name[640];
    snprintf(name, sizeof name, "%s%s", m->module, suffix);
    return checkpoint_find(c, name);
}

static bool check_matrix(const struct plan *p, const struct checkpoint *c, const struct matrix *m,
                         struct err *e)
{
    static const char global[] = ".weight_global_scale";
    enum scheme found = quantization_scheme(c->quantization, m->module, "Linear");
    bool nvfp4 = scheme_is_nvfp4(m->scheme);
    if (found != m->scheme)
        return err_set(e, ERR_FORMAT, "module '%s' was packed as %s, config.json says %s", m->module,
                       scheme_name(m->scheme), scheme_name(found));
    if (!find_part(c, m, nvfp4 ? ".weight_packed" : ".weight") || !find_part(c, m, ".weight_scale") ||
        (nvfp4 && !find_part(c, m, global)) ||
        (m->scheme == SCHEME_NVFP4 && !find_part(c, m, ".input_global_scale")) ||
        (m->scheme == SCHEME_FP8 && !find_part(c, m, ".input_scale")))
        return err_set(e, ERR_FORMAT, "module '%s': a part is missing", m->module);
    if (m->partner == SIZE_MAX) return true;
    const struct tensor *a = find_part(c, m, global), *b = find_part(c, &p->matrices[m->partner], global);
    return (b && memcmp(a->data, b->data, sizeof(float)) == 0) ||
           err_set(e, ERR_FORMAT, "module '%s': its weight_global_scale is not its partner's", m->module);
}

/* Every element of a source tensor is in exactly one matrix, or the tensor was copied under its own name. */
static bool check_source(const struct plan *p, const struct checkpoint *source, const struct checkpoint *c,
                         struct err *e)
{
    if (p->n_jobs != source->n_tensors)
        return err_set(e, ERR_FORMAT, "%zu of %zu source tensors were planned", p->n_jobs, source->n_tensors);
    for (size_t i = 0; i < p->n_jobs; i++) {
        const struct job *j = &p->jobs[i];
        const struct tensor *copy = checkpoint_find(c, j->source->name);
        int64_t weights = 0;
        for (size_t k = j->first; k < j->first + j->n; k++)
            weights += p->matrices[k].rows * p->matrices[k].cols;
        if (j->n > 0 ? weights != tensor_elements(j->source) : !copy || !same_kind(copy, j->source))
            return err_set(e, ERR_FORMAT, "source tensor '%s' is not all there", j->source->name);
    }
    return true;
}

/* What was copied must read as unquantized. */
static bool check_copies(const struct plan *p, const struct checkpoint *c, struct err *e)
{
    char module[512];
    for (size_t i = 0; i < p->n_jobs; i++) {
        const char *name = p->jobs[i].source->name;
        if (p->jobs[i].n > 0 || !ends_in(name, ".weight")) continue;
        snprintf(module, sizeof module, "%.*s", (int)(strlen(name) - strlen(".weight")), name);
        enum scheme s = quantization_scheme(c->quantization, module, "");
        if (s != SCHEME_NONE)
            return err_set(e, ERR_FORMAT, "module '%s' was copied, config.json says %s", module,
                           scheme_name(s));
    }
    return true;
}

bool census(const struct plan *p, const struct checkpoint *source, const char *folder, struct err *e)
{
    struct checkpoint c;
    if (!checkpoint_open(&c, folder, e)) return err_note(e, "census");
    bool ok = check_outputs(p, &c, e) && check_source(p, source, &c, e) && check_copies(p, &c, e);
    for (size_t i = 0; ok && i < p->n_matrices; i++) ok = check_matrix(p, &c, &p->matrices[i], e);
    checkpoint_close(&c);
    return ok || err_note(e, "census of %s", folder);
}
