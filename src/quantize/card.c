/* A summary as a model card, in the order in which people read one. */
#include "quantize/card.h"
#include "quantize/markdown.h"
#include "quantize/record.h"
#include "quantize/yaml.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SERVE_CONTEXT = 32768, CARD_FEW_ROWS = 8 };

/* Front matter. */

static bool has_text(const json_t *list, const char *text)
{
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *have = json_string_value(json_array_get(list, i));
        if (have && strcmp(have, text) == 0) return true;
    }
    return false;
}

/* The source's tags and ours. */
static json_t *tags(const struct summary *s, const json_t *front)
{
    const json_t *old = json_object_get(front, "tags");
    json_t *list = json_is_array(old) ? json_copy((json_t *)(uintptr_t)old) : json_array();
    const char *const ours[] = {
        summary_matrices(s, true) ? "nvfp4" : NULL,
        summary_matrices(s, false) ? "fp8" : NULL,
        "compressed-tensors",
        "quench",
    };
    if (json_is_string(old)) json_array_append(list, (json_t *)(uintptr_t)old);
    for (size_t i = 0; i < sizeof ours / sizeof *ours; i++)
        if (ours[i] && !has_text(list, ours[i])) json_array_append_new(list, json_string(ours[i]));
    return list;
}

/* "ORG/NAME" of "https://huggingface.co/ORG/NAME/blob/main/LICENSE" where NAME is the source's; else NULL. */
static json_t *linked_name(const struct summary *s, const json_t *front)
{
    static const char hub[] = "https://huggingface.co/";
    const char *link = json_string_value(json_object_get(front, "license_link"));
    if (!link || strncmp(link, hub, strlen(hub)) != 0) return NULL;
    link += strlen(hub);
    size_t org = strcspn(link, "/"), n = strlen(s->source_name);
    if (org == 0 || link[org] != '/' || strncmp(link + org + 1, s->source_name, n) != 0) return NULL;
    const char *end = link + org + 1 + n;
    return *end == 0 || *end == '/' ? json_stringn(link, (size_t)(end - link)) : NULL;
}

/* The source's name on a hub: known when it lies in a hub's cache or its licence's link says it. Else what
 * its card calls its base, which may be the source itself or what that was made from: then no relation is
 * claimed. Else its folder's name has to do. */
static void put_base(json_t *o, const struct summary *s, const json_t *front)
{
    json_t *linked = linked_name(s, front), *named = json_object_get(front, "base_model");
    bool is_source = linked || !named || strchr(s->source_name, '/');
    json_object_set_new(o, "base_model",
                        linked      ? linked
                        : is_source ? json_string(s->source_name)
                                    : json_incref(named));
    if (is_source) json_object_set_new(o, "base_model_relation", json_string("quantized"));
}

static bool put_front(FILE *f, const struct summary *s, const json_t *front, struct err *e)
{
    static const char *const kept[] = { "license",  "license_name", "license_link",
                                        "language", "library_name", "pipeline_tag" };
    char *text = NULL;
    size_t bytes;
    json_t *o = json_object();
    for (size_t i = 0; i < sizeof kept / sizeof *kept; i++) {
        json_t *value = json_object_get(front, kept[i]);
        if (value) json_object_set(o, kept[i], value);
    }
    put_base(o, s, front);
    json_object_set_new(o, "quantized_by", json_string(s->run.version));
    json_object_set_new(o, "tags", tags(s, front));
    bool ok = yaml_write(&text, &bytes, o, e);
    if (ok) fprintf(f, "---\n%s---\n\n", text);
    free(text);
    json_decref(o);
    return ok;
}

/* Sections. */

/* "23.45 GB"; decimal. */
static const char *size(char out[32], uint64_t bytes)
{
    static const char *const units[] = { "kB", "MB", "GB" };
    double x = (double)bytes / 1000;
    int unit = 0;
    for (; x >= 1000 && unit < 2; unit++) x /= 1000;
    snprintf(out, 32, "%.2f %s", x, units[unit]);
    return out;
}

/* Digits in groups of three. */
static const char *grouped(char out[32], int64_t x)
{
    char digits[24];
    int n = snprintf(digits, sizeof digits, "%lld", (long long)x), k = 0;
    for (int i = 0; i < n; i++) {
        if (i > 0 && (n - i) % 3 == 0) out[k++] = ',';
        out[k++] = digits[i];
    }
    out[k] = 0;
    return out;
}

static void put_title(FILE *f, const struct summary *s)
{
    char formats[32], count[32];
    summary_formats(s, formats);
    fputs("# ", f);
    markdown_text(f, s->source_name);
    fprintf(f, ", %s\n\n", formats);
    markdown_text(f, s->source_name);
    fprintf(f, " in %s, written by %s in the compressed-tensors format. Nothing of the source is left out: ",
            formats, s->run.version);
    fprintf(f, "%s matrices are packed, ", grouped(count, (int64_t)s->run.plan->n_matrices));
    fprintf(f, "%s tensors are the source's, byte for byte", grouped(count, s->copied));
    if (s->draft) fprintf(f, ", the %lld of the MTP head among them", (long long)s->draft);
    fputs(".\n\n", f);
}

static const char *activations(enum scheme scheme)
{
    switch (scheme) {
    case SCHEME_NVFP4: return "NVFP4, group scales at run time under a measured scale";
    case SCHEME_FP8_DYNAMIC: return "FP8, one scale a token at run time";
    case SCHEME_FP8: return "FP8 under a measured scale";
    case SCHEME_FP8_BLOCK: return "FP8, a scale for a token's 128 columns at run time";
    case SCHEME_NONE:
    case SCHEME_NVFP4A16:
    case SCHEME_FP8A16:
    case N_SCHEMES: break;
    }
    return "as they are";
}

static const char *weights(enum scheme scheme)
{
    if (scheme_is_nvfp4(scheme)) return "E2M1, an E4M3 scale for 16 columns, an F32 scale";
    return scheme == SCHEME_FP8         ? "E4M3, one BF16 scale"
           : scheme == SCHEME_FP8_BLOCK ? "E4M3, a BF16 scale for 128 x 128"
                                        : "E4M3, a BF16 scale a row";
}

static void put_recipe(FILE *f, const struct summary *s)
{
    char *name = summary_name(s->run.recipe->name), n[32], bytes[32];
    fputs("## What is in which format\n\nRecipe ", f);
    markdown_code(f, name ? name : "?", false);
    fprintf(f, ", method `%s`. `recipe.yaml` says it in full, `config.json` to readers.\n\n", s->run.method);
    fputs("| scheme | weights | activations | matrices | bits a weight | size |\n"
          "|---|---|---|---:|---:|---:|\n",
          f);
    for (int i = 0; i < N_SCHEMES; i++) {
        const struct summary_errors *x = &s->errors[i];
        if (x->matrices)
            fprintf(f, "| %s | %s | %s | %s | %.2f | %s |\n", scheme_name((enum scheme)i),
                    weights((enum scheme)i), activations((enum scheme)i), grouped(n, x->matrices),
                    8 * (double)x->bytes / (double)x->weights, size(bytes, x->bytes));
    }
    fprintf(f, "| as in the source | | | %s tensors | | %s |\n\n", grouped(n, s->copied),
            size(bytes, (uint64_t)s->copied_bytes));
    fprintf(f, "| | size of tensors |\n|---|---:|\n| source | %s |\n", size(bytes, s->bytes_in));
    fprintf(f, "| this checkpoint | %s (%.1f %%) |\n\n", size(bytes, s->bytes_out),
            100 * (double)s->bytes_out / (double)s->bytes_in);
    free(name);
}

static void put_serve(FILE *f, const struct summary *s)
{
    int64_t context = s->run.plan->config->max_position_embeddings;
    fputs("## Use\n\nIn this folder, with vLLM:\n\n```\nvllm serve .", f);
    fprintf(f, " --max-model-len %lld", (long long)(context < SERVE_CONTEXT ? context : SERVE_CONTEXT));
    if (s->draft) fputs(" --speculative-config '{\"method\":\"mtp\",\"num_speculative_tokens\":1}'", f);
    fputs("\n```\n\nwith quench:\n\n```\nquench generate . -p \"Once upon a time\"\n"
          "quench verify .\n```\n\n",
          f);
}

static void put_calibration(FILE *f, const struct summary *s)
{
    char n[32], m[32];
    fputs("## Calibration\n\n", f);
    if (!summary_is_calibrated(s)) {
        fputs("None: no scale of this checkpoint depends on activations.\n\n", f);
        return;
    }
    markdown_code(f, s->calibration_name, false);
    fprintf(f, ": %s samples of at most %s tokens, ", grouped(n, s->run.samples),
            grouped(m, s->run.max_seq_length));
    fprintf(f, "%s tokens in all, each sample a sequence of its own. ",
            grouped(n, s->run.calibration->tokens));
    fputs("Every expert saw every token; every input scale is measured", f);
    if (s->n_zero)
        fprintf(f, ", but %s matrices only ever saw zeros, theirs is a default", grouped(n, s->n_zero));
    fputs(". How many tokens the router itself sent to an expert:\n\n"
          "| | minimum | median | maximum |\n|---|---:|---:|---:|\n",
          f);
    fprintf(f, "| all layers | %s |", grouped(n, (int64_t)s->routed.low));
    fprintf(f, " %s | %s |\n\n", grouped(n, (int64_t)s->routed.median), grouped(m, (int64_t)s->routed.high));
}

static void put_few_row(FILE *f, const struct summary *s, int layer)
{
    int shown = 0, n = s->run.calibration->n_experts;
    fprintf(f, "| %d | %d of %d |", layer, s->layers[layer].n_few, n);
    for (int k = 0; k < n && shown < CARD_FEW_ROWS; k++)
        if (summary_routed(s, layer, k) < SUMMARY_FEW_TOKENS)
            fprintf(f, "%s %d (%lld)", shown++ ? "," : "", k, (long long)summary_routed(s, layer, k));
    if (s->layers[layer].n_few > shown) fprintf(f, " and %d more", s->layers[layer].n_few - shown);
    fputs(" |\n", f);
}

static void put_coverage(FILE *f, const struct summary *s)
{
    if (!summary_is_calibrated(s)) return;
    if (s->n_few == 0) {
        fprintf(f, "The router sent at least %d tokens to every expert.\n\n", SUMMARY_FEW_TOKENS);
        return;
    }
    fprintf(f,
            "The router sent fewer than %d tokens to these; their scales rest on tokens that other experts "
            "would have served:\n\n| layer | experts | which (tokens) |\n|---:|---:|---|\n",
            SUMMARY_FEW_TOKENS);
    for (int i = 0; i < s->run.plan->config->n_layers; i++)
        if (s->layers[i].n_few) put_few_row(f, s, i);
    fputc('\n', f);
}

static void put_decibels(FILE *f, double difference, double total)
{
    double snr = summary_snr(difference, total);
    if (isfinite(snr))
        fprintf(f, " %.2f |", snr);
    else
        fputs(" exact |", f);
}

static void put_errors(FILE *f, const struct summary *s)
{
    const struct plan *p = s->run.plan;
    char n[32];
    fputs("## What packing changed\n\nRelative error: \\|W - packed W\\| / \\|W\\|, Frobenius norms. "
          "`" RECORD_FILE
          "` has it for every matrix.\n\n| scheme | matrices | mean error | worst error | SNR, dB |\n"
          "|---|---:|---:|---:|---:|\n",
          f);
    for (int i = 0; i < N_SCHEMES; i++) {
        const struct summary_errors *x = &s->errors[i];
        if (!x->matrices) continue;
        fprintf(f, "| %s | %s | %.3f %% | %.3f %% |", scheme_name((enum scheme)i), grouped(n, x->matrices),
                100 * x->mean, 100 * x->worst);
        put_decibels(f, x->difference, x->total);
        fputc('\n', f);
    }
    if (s->n_far)
        fprintf(f, "\nMatrices below %g dB, more than rounding explains: %s.\n", SUMMARY_SNR_LOW,
                grouped(n, s->n_far));
    fputs("\nThe worst:\n\n| module | scheme | error | SNR, dB |\n|---|---|---:|---:|\n", f);
    for (int i = 0; i < s->n_worst; i++) {
        const struct matrix_result *r = &s->run.results[s->worst[i]];
        fputs("| ", f);
        markdown_code(f, p->matrices[s->worst[i]].module, true);
        fprintf(f, " | %s | %.3f %% |", scheme_name(p->matrices[s->worst[i]].scheme), 100 * summary_error(r));
        put_decibels(f, r->difference, r->total);
        fputc('\n', f);
    }
    fputc('\n', f);
}

static void put_layer(FILE *f, const struct summary *s, int i)
{
    const struct summary_layer *l = &s->layers[i];
    bool linear = s->run.plan->config->layer_kinds[i] == LAYER_LINEAR_ATTENTION;
    fprintf(f, "| %d | %s |", i, linear ? "DeltaNet" : "attention");
    for (int k = 0; k < N_SCHEMES; k++) {
        if (s->errors[k].matrices == 0) continue;
        if (l->errors[k].matrices)
            fprintf(f, " %.3f / %.3f |", 100 * l->errors[k].mean, 100 * l->errors[k].worst);
        else
            fputs(" |", f);
    }
    if (summary_is_calibrated(s)) {
        for (int k = INPUT_MIXER; k < INPUT_EXPERT; k++) fprintf(f, " %.4g |", l->inputs[k]);
        fprintf(f, " %.4g to %.4g |", l->experts.low, l->experts.high);
        fprintf(f, " %.0f / %.0f / %.0f |", l->routed.low, l->routed.median, l->routed.high);
    }
    fputc('\n', f);
}

static void put_layers(FILE *f, const struct summary *s)
{
    int columns = 0;
    bool calibrated = summary_is_calibrated(s);
    fprintf(f, "## Layers\n\nErrors in %%, mean / worst.%s\n\n| layer | mixer |",
            calibrated
                ? " Then the largest input \\|x\\| of calibration in front of: the mixer's projections, its "
                  "output projection, the MoE block, the shared expert's down_proj, the routed experts' "
                  "down_proj; last, tokens the router sent to an expert, minimum / median / maximum."
                : "");
    for (int k = 0; k < N_SCHEMES; k++)
        if (s->errors[k].matrices) {
            fprintf(f, " %s |", scheme_name((enum scheme)k));
            columns++;
        }
    if (calibrated) {
        fputs(" mixer | mixer out | MoE | shared down | expert down | tokens |", f);
        columns += 6;
    }
    fputs("\n|---:|---|", f);
    for (int k = 0; k < columns; k++) fputs("---:|", f);
    fputc('\n', f);
    for (int i = 0; i < s->run.plan->config->n_layers; i++) put_layer(f, s, i);
    fputc('\n', f);
}

static void put_evaluation(FILE *f, const struct summary *s, const struct evaluation *v)
{
    char n[32], chunks[32], bytes[32], formats[32], *text = summary_name(v->text);
    fputs("## Perplexity\n\nText ", f);
    markdown_code(f, text ? text : "?", false);
    fprintf(f, ": %s tokens in %s chunks", grouped(n, v->tokens), grouped(chunks, v->chunks));
    fprintf(f,
            " of %lld, each from an empty state, the first token of a chunk not scored; %s scored; KV cache "
            "%s.\n\n",
            (long long)v->ctx, grouped(n, v->scored), v->kv_cache);
    summary_formats(s, formats);
    fputs("| | size of tensors | perplexity | delta | % | 95 % interval, paired over chunks |\n"
          "|---|---:|---:|---:|---:|---|\n",
          f);
    fprintf(f, "| source | %s | %.4f | | | |\n", size(bytes, s->bytes_in), v->source_perplexity);
    fprintf(f, "| %s | %s | %.4f | %+.4f | %+.3f |", formats, size(bytes, s->bytes_out), v->perplexity,
            v->perplexity - v->source_perplexity, 100 * (v->ratio - 1));
    if (v->chunks > 1)
        fprintf(f, " %+.3f %% to %+.3f %%", 100 * (v->ratio_low - 1), 100 * (v->ratio_high - 1));
    fputs(" |\n\n", f);
    fprintf(f,
            "KL divergence from the source %.6f nats a token; the same most likely token at %.3f %% of "
            "positions. Measured by `quench perplexity --against`.\n\n",
            v->kld, 100 * v->same_top);
    free(text);
}

static void put_licence(FILE *f, const json_t *front)
{
    const json_t *named = json_object_get(front, "license_name");
    const char *licence = json_string_value(named ? named : json_object_get(front, "license"));
    fputs("## Licence\n\nThat of the source", f);
    if (licence) {
        fputs(": ", f);
        markdown_text(f, licence);
    } else {
        fputs(", whose card does not name it in its front matter", f);
    }
    fputs(". The source's own card, where it has one, is `README.source.md`.\n", f);
}

bool card_text(char **text, size_t *bytes, const struct summary *s, const json_t *front,
               const struct evaluation *evaluation, struct err *e)
{
    *text = NULL;
    FILE *f = open_memstream(text, bytes);
    if (!f) return err_memory(e, "model card", 0);
    bool ok = put_front(f, s, front, e);
    put_title(f, s);
    if (evaluation) put_evaluation(f, s, evaluation);
    put_serve(f, s);
    put_recipe(f, s);
    put_calibration(f, s);
    put_coverage(f, s);
    put_errors(f, s);
    put_layers(f, s);
    put_licence(f, front);
    if (ferror(f)) ok = ok && err_memory(e, "model card", 0);
    if (fclose(f) != 0) ok = ok && err_memory(e, "model card", 0);
    if (ok) return true;
    free(*text);
    *text = NULL;
    return false;
}
