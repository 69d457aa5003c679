/* A summary as JSON: an object whose lists have a line for each element. */
#include "quantize/record.h"
#include <jansson.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

/* Figures that were measured, to six digits; null where there is no number. */
static json_t *figure(double x)
{
    char text[40];
    snprintf(text, sizeof text, "%.6g", x);
    return isfinite(x) ? json_real(strtod(text, NULL)) : json_null();
}

/* An f32 of the checkpoint, exact. */
static json_t *f32(float x)
{
    char text[40];
    snprintf(text, sizeof text, "%.9g", (double)x);
    return json_real(strtod(text, NULL));
}

static json_t *integer(int64_t x)
{
    return json_integer((json_int_t)x);
}

/* Takes the value. */
static void put(FILE *f, const char *before, json_t *value)
{
    fputs(before, f);
    if (!value || json_dumpf(value, f, JSON_REAL_PRECISION(15) | JSON_ENCODE_ANY) != 0) fputs("null", f);
    json_decref(value);
}

static void put_key(FILE *f, const char *key, json_t *value)
{
    fprintf(f, ",\n\"%s\": ", key);
    put(f, "", value);
}

/* Objects. */

static json_t *module(const struct summary *s, size_t index)
{
    return json_string(s->run.plan->matrices[index].module);
}

static json_t *source(const struct summary *s)
{
    return json_pack("{s:s, s:I, s:I}", "name", s->source_name, "tensors",
                     (json_int_t)s->run.checkpoint->n_tensors, "bytes", (json_int_t)s->bytes_in);
}

static json_t *result(const struct summary *s)
{
    const struct plan *p = s->run.plan;
    return json_pack("{s:I, s:I, s:I, s:I, s:I, s:I, s:I}", "tensors", (json_int_t)p->n_outputs, "bytes",
                     (json_int_t)s->bytes_out, "files", (json_int_t)s->run.shards, "copied_tensors",
                     (json_int_t)s->copied, "copied_bytes", (json_int_t)s->copied_bytes, "mtp_tensors",
                     (json_int_t)s->draft, "ignored_modules", (json_int_t)p->n_ignored);
}

static json_t *strings(const char *const *items, size_t n)
{
    json_t *list = json_array();
    for (size_t i = 0; i < n; i++) json_array_append_new(list, json_string(items[i]));
    return list;
}

static json_t *recipe(const struct summary *s)
{
    const struct recipe *r = s->run.recipe;
    char *name = summary_name(r->name);
    json_t *groups = json_array();
    for (size_t i = 0; i < r->n_groups; i++)
        json_array_append_new(groups, json_pack("{s:s, s:s, s:o}", "name", r->groups[i].name, "scheme",
                                                scheme_name(r->groups[i].scheme), "targets",
                                                strings(r->groups[i].targets, r->groups[i].n_targets)));
    json_t *o = json_pack("{s:s?, s:o, s:o}", "name", name, "groups", groups, "ignore",
                          strings(r->ignore, r->n_ignore));
    free(name);
    return o;
}

static json_t *calibration(const struct summary *s)
{
    if (!summary_is_calibrated(s)) return json_null();
    return json_pack("{s:s, s:I, s:I, s:I}", "file", s->calibration_name, "samples",
                     (json_int_t)s->run.samples, "tokens", (json_int_t)s->run.calibration->tokens,
                     "max_seq_length", (json_int_t)s->run.max_seq_length);
}

static json_t *evaluated(const struct evaluation *v)
{
    if (!v) return json_null();
    char *text = summary_name(v->text);
    json_t *o =
        json_pack("{s:s?, s:s, s:I, s:I, s:I, s:I, s:s, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o}", "text",
                  text, "rule", "card", "ctx", (json_int_t)v->ctx, "tokens", (json_int_t)v->tokens, "chunks",
                  (json_int_t)v->chunks, "scored_tokens", (json_int_t)v->scored, "kv_cache_dtype",
                  v->kv_cache, "source_perplexity", figure(v->source_perplexity), "perplexity",
                  figure(v->perplexity), "delta", figure(v->perplexity - v->source_perplexity), "ratio",
                  json_real(v->ratio), "ratio_low", json_real(v->ratio_low), "ratio_high",
                  json_real(v->ratio_high), "kld", figure(v->kld), "same_top", figure(v->same_top));
    free(text);
    return o;
}

static json_t *errors(const struct summary *s, const struct summary_errors *x)
{
    return json_pack("{s:I, s:I, s:I, s:o, s:o, s:o, s:o}", "matrices", (json_int_t)x->matrices, "weights",
                     (json_int_t)x->weights, "bytes", (json_int_t)x->bytes, "mean_relative_error",
                     figure(x->mean), "worst_relative_error", figure(x->worst), "worst",
                     module(s, x->worst_matrix), "snr_db", figure(summary_snr(x->difference, x->total)));
}

static json_t *range(const struct summary_range *r)
{
    return json_pack("{s:o, s:o, s:o}", "min", figure(r->low), "median", figure(r->median), "max",
                     figure(r->high));
}

static json_t *tokens_range(const struct summary_range *r)
{
    return json_pack("{s:I, s:I, s:I}", "min", (json_int_t)r->low, "median", (json_int_t)r->median, "max",
                     (json_int_t)r->high);
}

static json_t *all_errors(const struct summary *s, const struct summary_errors *of)
{
    json_t *o = json_object();
    for (int i = 0; i < N_SCHEMES; i++)
        if (of[i].matrices) json_object_set_new(o, scheme_name((enum scheme)i), errors(s, &of[i]));
    return o;
}

/* Lists; each element on a line of its own. */

static const char *separator(size_t i)
{
    return i ? ",\n  " : "\n  ";
}

static const char *kind_name(const struct summary *s, int layer)
{
    bool linear = s->run.plan->config->layer_kinds[layer] == LAYER_LINEAR_ATTENTION;
    return linear ? "linear_attention" : "full_attention";
}

static json_t *layer(const struct summary *s, int i)
{
    const struct summary_layer *l = &s->layers[i];
    json_t *o = json_pack("{s:i, s:s, s:o}", "layer", i, "kind", kind_name(s, i), "schemes",
                          all_errors(s, l->errors));
    if (summary_is_calibrated(s))
        json_object_set_new(o, "largest_inputs",
                            json_pack("{s:o, s:o, s:o, s:o, s:o}", "mixer", figure(l->inputs[INPUT_MIXER]),
                                      "mixer_out", figure(l->inputs[INPUT_MIXER_OUT]), "moe",
                                      figure(l->inputs[INPUT_BLOCK]), "shared_expert_down",
                                      figure(l->inputs[INPUT_SHARED]), "expert_down", range(&l->experts)));
    return o;
}

static json_t *coverage(const struct summary *s, int i)
{
    json_t *all = json_array(), *few = json_array();
    for (int k = 0; k < s->run.calibration->n_experts; k++) {
        int64_t n = summary_routed(s, i, k);
        json_array_append_new(all, integer(n));
        if (n < SUMMARY_FEW_TOKENS) json_array_append_new(few, integer(k));
    }
    return json_pack("{s:i, s:I, s:o, s:{s:i, s:o}, s:o}", "layer", i, "calibrated_tokens",
                     (json_int_t)s->run.calibration->tokens, "routed", tokens_range(&s->layers[i].routed),
                     "few", "below_tokens", SUMMARY_FEW_TOKENS, "experts", few, "routed_tokens", all);
}

static json_t *matrix(const struct summary *s, size_t i)
{
    const struct matrix *m = &s->run.plan->matrices[i];
    const struct matrix_result *r = &s->run.results[i];
    bool measured = summary_is_calibrated(s) && m->layer >= 0 && m->input != INPUT_NONE;
    return json_pack("{s:o, s:s, s:[I, I], s:o, s:o, s:o, s:o}", "module", module(s, i), "scheme",
                     scheme_name(m->scheme), "shape", (json_int_t)m->rows, (json_int_t)m->cols,
                     "relative_error", figure(summary_error(r)), "snr_db",
                     figure(summary_snr(r->difference, r->total)), "global_scale",
                     scheme_is_nvfp4(m->scheme) ? f32(r->global) : json_null(), "largest_input",
                     measured ? f32(r->input) : json_null());
}

static void put_lists(FILE *f, const struct summary *s)
{
    int n_layers = s->run.plan->config->n_layers;
    fputs(",\n\"worst\": [", f);
    for (int i = 0; i < s->n_worst; i++) put(f, separator((size_t)i), matrix(s, s->worst[i]));
    fputs("],\n\"layers\": [", f);
    for (int i = 0; i < n_layers; i++) put(f, separator((size_t)i), layer(s, i));
    fputs("],\n\"experts\": [", f);
    for (int i = 0; i < n_layers && summary_is_calibrated(s); i++)
        put(f, separator((size_t)i), coverage(s, i));
    fputs("],\n\"matrices\": [", f);
    for (size_t i = 0; i < s->run.plan->n_matrices; i++) put(f, separator(i), matrix(s, i));
    fputs("]\n}\n", f);
}

bool record_text(char **text, size_t *bytes, const struct summary *s, const struct evaluation *evaluation,
                 struct err *e)
{
    *text = NULL;
    FILE *f = open_memstream(text, bytes);
    if (!f) return err_memory(e, "report", 0);
    put(f, "{\n\"quench\": ", json_string(s->run.version));
    put_key(f, "run", json_incref((json_t *)(uintptr_t)s->run.identity));
    put_key(f, "source", source(s));
    put_key(f, "result", result(s));
    put_key(f, "recipe", recipe(s));
    put_key(f, "method", json_string(s->run.method));
    put_key(f, "calibration", calibration(s));
    put_key(f, "evaluation", evaluated(evaluation));
    put_key(f, "schemes", all_errors(s, s->errors));
    put_lists(f, s);
    bool failed = ferror(f);
    if (fclose(f) == 0 && !failed) return true;
    free(*text);
    *text = NULL;
    return err_memory(e, "report", 0);
}
