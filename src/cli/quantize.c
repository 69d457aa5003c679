/* quench quantize SRC DST [--recipe NAME|FILE.yaml] --calibration FILE.jsonl */
#include "base/file.h"
#include "cli/commands.h"
#include "cli/evaluate.h"
#include "quantize/quantize.h"
#include "quantize/summary.h"
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct command command = {
    "quantize",
    "SRC DST --calibration FILE.jsonl",
    "Writes a compressed-tensors checkpoint. DST must not exist; it appears only when complete.\n"
    "Recipes: card (routed experts NVFP4, attention and shared expert FP8, the rest as it is), nvfp4 (all "
    "three\n"
    "NVFP4), fast (the card's, and DeltaNet projections and lm_head FP8), nvfp4a16 (experts only, weights "
    "only),\n"
    "or a recipe file in llm-compressor's syntax. The calibration file has one JSON object a line, with "
    "\"text\",\n"
    "\"messages\" or \"input_ids\"; recipes that measure no activations need none.",
    2,
};

/* enum quantize_method */
static const char *const methods[] = { "auto", "nearest", "four-over-six", "mse", "gptq", NULL };

struct settings {
    struct common common;
    const char *folders[2], *calibration, *recipe, *evaluate;
    int method;
    int64_t samples, length, shard_bytes, memory;
    bool dry_run;
};

/* A built-in name, or else a file; file: what the recipe then borrows from. */
static bool find_recipe(const struct recipe **out, struct recipe_file *file, const struct settings *s,
                        struct err *e)
{
    *out = recipe_builtin(s->recipe);
    if (*out) return true;
    if (!strpbrk(s->recipe, "./") && !file_exists(s->recipe))
        return err_set(
            e, ERR_ARGUMENT,
            "--recipe: expected card, nvfp4, fast, nvfp4a16 or the path of a .yaml file, found '%s'",
            s->recipe);
    *out = &file->recipe;
    return recipe_load(file, s->recipe, e) || err_note(e, "--recipe");
}

static bool check(const struct settings *s, const struct recipe *recipe, struct err *e)
{
    if (!s->calibration && recipe_measures(recipe))
        return err_set(e, ERR_ARGUMENT, "--calibration FILE.jsonl is needed: recipe %s measures activations",
                       s->recipe);
    if (s->samples < 1 || s->length < 1 || s->shard_bytes < 1 || s->memory < 1)
        return err_set(
            e, ERR_ARGUMENT,
            "--num-calibration-samples, --max-seq-length, --max-shard-size and --max-memory must be "
            "above 0");
    return true;
}

/* Evaluation. */

enum { CTX = 512 };

struct evaluator {
    const struct settings *settings;
    struct backend *backend;
    const struct report *report;
    struct evaluation result;
};

/* What can be said against the text is said before the long work. */
static bool check_text(const struct settings *s, struct err *e)
{
    struct tokenizer *t = NULL;
    struct token_list tokens = { 0 };
    if (!s->evaluate) return true;
    bool ok = tokenizer_load(&t, s->folders[0], e) && evaluate_tokens(&tokens, t, s->evaluate, e);
    if (ok && tokens.n < 2)
        ok = err_set(e, ERR_ARGUMENT, "%s: one token cannot be scored, two are the least", s->evaluate);
    tokenizer_free(t);
    free(tokens.ids);
    return ok || err_note(e, "--evaluate");
}

static bool compare(struct comparison *c, const struct evaluator *v, const char *folder, struct err *e)
{
    const char *source = v->settings->folders[0], *text = v->settings->evaluate;
    struct perplexity_options o = { .ctx = CTX, .kv = KV_F32, .report = v->report };
    struct opened base = { 0 }, other = { 0 };
    struct token_list tokens = { 0 };
    bool ok = common_open(&base, NULL, source, v->backend, v->report, e) &&
              evaluate_tokens(&tokens, base.tokenizer, text, e) &&
              common_open(&other, NULL, folder, v->backend, v->report, e) &&
              evaluate_same_tokens(&tokens, other.tokenizer, text, source, folder, e) &&
              perplexity_compare(c, &base.model, &other.model, tokens.ids, (int64_t)tokens.n, &o, e);
    free(tokens.ids);
    common_close(&base);
    common_close(&other);
    return ok;
}

static bool evaluate(void *ctx, struct evaluation *out, const char *folder, struct err *e)
{
    struct evaluator *v = ctx;
    struct comparison c = { 0 };
    if (!compare(&c, v, folder, e)) return err_note(e, "--evaluate");
    v->result = (struct evaluation){ .text = v->settings->evaluate,
                                     .kv_cache = common_kv_name(KV_F32),
                                     .ctx = CTX,
                                     .tokens = c.base.tokens,
                                     .chunks = c.base.chunks,
                                     .scored = c.base.scored,
                                     .source_perplexity = c.base.perplexity,
                                     .perplexity = c.other.perplexity,
                                     .ratio = c.ratio,
                                     .ratio_low = c.ratio_low,
                                     .ratio_high = c.ratio_high,
                                     .kld = c.kld,
                                     .same_top = c.same_top };
    *out = v->result;
    return true;
}

/* Output. */

static void print_error(const char *format, int64_t matrices, const struct quantize_error *x)
{
    if (matrices)
        printf("  %-8s %8lld matrices, relative error %.2f %%, %.2f dB (worst %.2f %%: %s)\n", format,
               (long long)matrices, 100 * x->mean, x->snr, 100 * x->worst, x->worst_module);
}

static void print_worst(const struct quantize_result *r)
{
    puts("\nfurthest from the source (|W - packed W| / |W|)");
    for (int i = 0; i < r->n_worst; i++)
        printf("  %8.3f %%  %6.2f dB  %-11s  %s\n", 100 * r->worst[i].error, r->worst[i].snr,
               scheme_name(r->worst[i].scheme), r->worst[i].module);
}

static void print_coverage(const struct quantize_result *r)
{
    const struct quantize_coverage *c = &r->coverage;
    if (!c->experts) return;
    printf("experts     all %lld calibrated on %lld tokens each; of these the router sent an expert %lld at "
           "least, %lld at most, median %lld\n",
           (long long)c->experts, (long long)r->tokens, (long long)c->minimum, (long long)c->maximum,
           (long long)c->median);
    if (c->few) printf("            %lld got fewer than %d:", (long long)c->few, SUMMARY_FEW_TOKENS);
    for (int64_t i = 0; i < c->few && i < QUANTIZE_FEWEST; i++)
        printf("%s layer %d expert %d (%lld)", i ? "," : "", c->fewest[i].layer, c->fewest[i].expert,
               (long long)c->fewest[i].tokens);
    if (c->few > QUANTIZE_FEWEST) printf(" and %lld more", (long long)c->few - QUANTIZE_FEWEST);
    if (c->few) putchar('\n');
}

static void print_evaluation(const struct evaluation *v)
{
    printf("perplexity  %.4f -> %.4f, %+.3f %% [%+.3f, %+.3f] over %lld chunks of %s; kld %.6f nats a token, "
           "same top %.3f %%\n",
           v->source_perplexity, v->perplexity, 100 * (v->ratio - 1), 100 * (v->ratio_low - 1),
           100 * (v->ratio_high - 1), (long long)v->chunks, v->text, v->kld, 100 * v->same_top);
}

static void print_text(const struct settings *s, const struct quantize_result *r, const struct evaluator *v)
{
    char in[32], out[32], peak[32];
    printf("%s -> %s, recipe %s, method %s\n", s->folders[0], s->folders[1], s->recipe,
           quantize_method_name((enum quantize_method)s->method));
    if (r->tokens)
        printf("  calibrated on %lld tokens of %lld samples in %.1f s on %s\n", (long long)r->tokens,
               (long long)r->samples, r->calibrate_seconds, v->backend->name);
    print_error("NVFP4", r->nvfp4_matrices, &r->nvfp4_error);
    if (r->gptq_matrices) printf("           %8lld of them by gptq\n", (long long)r->gptq_matrices);
    print_error("FP8", r->fp8_matrices, &r->fp8_error);
    printf("  %-8s %8lld tensors; %lld linear modules listed as ignored\n", "copied",
           (long long)r->copied_tensors, (long long)r->ignored_modules);
    printf("  %s -> %s in %lld file%s, %.1f s in all; every source tensor is accounted for\n",
           common_bytes(in, sizeof in, r->bytes_in), common_bytes(out, sizeof out, r->bytes_out),
           (long long)r->shards, r->shards == 1 ? "" : "s", r->seconds);
    print_worst(r);
    putchar('\n');
    print_coverage(r);
    if (s->evaluate) print_evaluation(&v->result);
    if (r->device_bytes)
        printf("GPU memory  %s planned at most\n", common_bytes(in, sizeof in, r->device_bytes));
    printf("memory      %s at most\nmore        README.md by layer, quantization_report.json by matrix\n",
           common_bytes(peak, sizeof peak, r->peak_bytes));
}

static json_t *number(double x)
{
    return isfinite(x) ? json_real(x) : json_null();
}

static json_t *json_worst(const struct quantize_result *r)
{
    json_t *list = json_array();
    for (int i = 0; i < r->n_worst; i++)
        json_array_append_new(list, json_pack("{s:o, s:s, s:f, s:o}", "module",
                                              common_json_path(r->worst[i].module), "scheme",
                                              scheme_name(r->worst[i].scheme), "relative_error",
                                              r->worst[i].error, "snr_db", number(r->worst[i].snr)));
    return list;
}

static json_t *json_coverage(const struct quantize_coverage *c)
{
    json_t *fewest = json_array();
    if (!c->experts) {
        json_decref(fewest);
        return json_null();
    }
    for (int64_t i = 0; i < c->few && i < QUANTIZE_FEWEST; i++)
        json_array_append_new(fewest,
                              json_pack("{s:i, s:i, s:I}", "layer", c->fewest[i].layer, "expert",
                                        c->fewest[i].expert, "tokens", (json_int_t)c->fewest[i].tokens));
    return json_pack("{s:I, s:I, s:I, s:I, s:I, s:o}", "experts", (json_int_t)c->experts, "routed_min",
                     (json_int_t)c->minimum, "routed_median", (json_int_t)c->median, "routed_max",
                     (json_int_t)c->maximum, "few", (json_int_t)c->few, "fewest", fewest);
}

static json_t *json_evaluation(const struct evaluation *v)
{
    return json_pack("{s:o, s:I, s:I, s:I, s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "text",
                     common_json_path(v->text), "tokens", (json_int_t)v->tokens, "chunks",
                     (json_int_t)v->chunks, "scored_tokens", (json_int_t)v->scored, "source_perplexity",
                     v->source_perplexity, "perplexity", v->perplexity, "ratio", v->ratio, "ratio_low",
                     v->ratio_low, "ratio_high", v->ratio_high, "kld", v->kld, "same_top", v->same_top);
}

static void print_json(const struct settings *s, const struct quantize_result *r, const struct evaluator *v)
{
    json_t *o = json_pack(
        "{s:o, s:o, s:o, s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:f, s:f, s:f, s:f, s:I, "
        "s:I, s:o, "
        "s:o}",
        "source", common_json_path(s->folders[0]), "destination", common_json_path(s->folders[1]), "recipe",
        common_json_path(s->recipe), "method", quantize_method_name((enum quantize_method)s->method),
        "gptq_matrices", (json_int_t)r->gptq_matrices, "nvfp4_matrices", (json_int_t)r->nvfp4_matrices,
        "fp8_matrices", (json_int_t)r->fp8_matrices, "copied_tensors", (json_int_t)r->copied_tensors,
        "ignored_modules", (json_int_t)r->ignored_modules, "samples", (json_int_t)r->samples, "tokens",
        (json_int_t)r->tokens, "bytes_in", (json_int_t)r->bytes_in, "bytes_out", (json_int_t)r->bytes_out,
        "shards", (json_int_t)r->shards, "nvfp4_error", r->nvfp4_error.mean, "fp8_error", r->fp8_error.mean,
        "calibrate_seconds", r->calibrate_seconds, "seconds", r->seconds, "peak_memory_bytes",
        (json_int_t)r->peak_bytes, "device_memory_bytes", (json_int_t)r->device_bytes, "worst", json_worst(r),
        "coverage", json_coverage(&r->coverage));
    if (s->evaluate) json_object_set_new(o, "evaluation", json_evaluation(&v->result));
    json_dumpf(o, stdout, JSON_COMPACT);
    putchar('\n');
    json_decref(o);
}

/* The command was repeated after its end. */
static void print_finished(const struct settings *s)
{
    json_t *o = json_pack("{s:o, s:b}", "destination", common_json_path(s->folders[1]), "was_finished", 1);
    if (s->common.json)
        json_dumpf(o, stdout, JSON_COMPACT), putchar('\n');
    else
        printf("%s: complete, written by an earlier run of this command; nothing was done\n", s->folders[1]);
    json_decref(o);
}

static void duration(char out[32], double seconds)
{
    if (seconds < 90)
        snprintf(out, 32, "%.*f s", seconds < 10, seconds);
    else if (seconds < 5400)
        snprintf(out, 32, "%.0f min", seconds / 60);
    else
        snprintf(out, 32, "%.1f h", seconds / 3600);
}

static double longer(double a, double b)
{
    return a > b ? a : b;
}

static void print_plan(const struct settings *s, const struct quantize_forecast *f)
{
    char a[32], b[32], c[32];
    printf("%s -> %s, recipe %s, method %s: the plan; nothing is written\n", s->folders[0], s->folders[1],
           s->recipe, methods[s->method]);
    for (int i = SCHEME_NONE + 1; i < N_SCHEMES; i++)
        if (f->matrices[i])
            printf("  %-11s %8lld matrices\n", scheme_name((enum scheme)i), (long long)f->matrices[i]);
    printf("  %-11s %8lld tensors\n", "copied", (long long)f->copied_tensors);
    printf("  size        %s -> %s in %lld file%s; up to %s of disk while running\n",
           common_bytes(a, sizeof a, f->bytes_in), common_bytes(b, sizeof b, f->bytes_out),
           (long long)f->shards, f->shards == 1 ? "" : "s", common_bytes(c, sizeof c, f->disk_bytes));
    printf("  memory      up to %s, limit %s\n", common_bytes(a, sizeof a, f->memory_bytes),
           common_bytes(b, sizeof b, (uint64_t)s->memory));
    if (f->device_bytes) printf("  GPU memory  up to %s\n", common_bytes(a, sizeof a, f->device_bytes));
    duration(a, f->calibrate_seconds + longer(f->read_seconds, f->pack_seconds));
    duration(b, f->pack_seconds);
    duration(c, f->read_seconds);
    printf("  time        about %s: packing %s, beside it reading %s", a, b, c);
    if (f->tokens) {
        duration(a, f->calibrate_seconds);
        printf(", before it calibration on %lld tokens %s", (long long)f->tokens, a);
    }
    printf("\n              estimated from short probes of this machine; a slower disk to write to takes "
           "longer\n");
}

static void print_plan_json(const struct settings *s, const struct quantize_forecast *f)
{
    json_t *matrices = json_object();
    for (int i = SCHEME_NONE + 1; i < N_SCHEMES; i++)
        if (f->matrices[i])
            json_object_set_new(matrices, scheme_name((enum scheme)i), json_integer(f->matrices[i]));
    json_t *o = json_pack(
        "{s:o, s:o, s:o, s:b, s:o, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:f, s:f, s:f}", "source",
        common_json_path(s->folders[0]), "destination", common_json_path(s->folders[1]), "recipe",
        common_json_path(s->recipe), "dry_run", 1, "matrices", matrices, "copied_tensors",
        (json_int_t)f->copied_tensors, "tokens", (json_int_t)f->tokens, "bytes_in", (json_int_t)f->bytes_in,
        "bytes_out", (json_int_t)f->bytes_out, "shards", (json_int_t)f->shards, "disk_bytes",
        (json_int_t)f->disk_bytes, "memory_bytes", (json_int_t)f->memory_bytes, "read_seconds",
        f->read_seconds, "pack_seconds", f->pack_seconds, "calibrate_seconds", f->calibrate_seconds);
    json_dumpf(o, stdout, JSON_COMPACT);
    putchar('\n');
    json_decref(o);
}

static bool plan(const struct settings *s, const struct quantize_options *o, struct err *e)
{
    struct quantize_forecast f;
    if (!quantize_dry_run(o, &f, e)) return false;
    (s->common.json ? print_plan_json : print_plan)(s, &f);
    return true;
}

static bool run(const struct settings *s, struct err *e)
{
    struct report report = common_report(&s->common);
    struct backend b = { 0 };
    struct quantize_result r = { 0 };
    struct recipe_file file = { 0 };
    const struct recipe *recipe;
    struct evaluator v = { s, &b, &report, { 0 } };
    bool ok = find_recipe(&recipe, &file, s, e) && check(s, recipe, e) && check_text(s, e) &&
              common_backend(&b, &s->common, e);
    struct quantize_options o = { .source = s->folders[0],
                                  .destination = s->folders[1],
                                  .calibration = s->calibration,
                                  .recipe = recipe,
                                  .method = (enum quantize_method)s->method,
                                  .num_calibration_samples = s->samples,
                                  .max_seq_length = s->length,
                                  .max_shard_bytes = (uint64_t)s->shard_bytes,
                                  .max_memory = (uint64_t)s->memory,
                                  .threads = (int)s->common.threads,
                                  .backend = &b,
                                  .version = cli_version,
                                  .evaluate = s->evaluate ? evaluate : NULL,
                                  .evaluate_ctx = &v,
                                  .report = &report };
    ok = ok && (s->dry_run ? plan(s, &o, e) : quantize_run(&o, &r, e));
    if (!ok || s->dry_run)
        ;
    else if (r.was_finished)
        print_finished(s);
    else if (s->common.json)
        print_json(s, &r, &v);
    else
        print_text(s, &r, &v);
    backend_destroy(&b);
    recipe_file_deinit(&file);
    return ok;
}

int cli_quantize(int argc, char **argv)
{
    struct settings s = {
        .recipe = "card", .samples = 64, .length = 2048, .shard_bytes = 5000000000, .memory = 8000000000
    };
    const struct flag flags[] = {
        { "--recipe", 0, FLAG_TEXT, &s.recipe, "NAME", "card (default), nvfp4, fast, nvfp4a16 or a YAML file",
          NULL },
        { "--method", 0, FLAG_CHOICE, &s.method, "auto|nearest|four-over-six|mse|gptq",
          "how NVFP4 codes are chosen, same format and size: auto (default) takes mse or gptq by samples "
          "held out, "
          "nearest is the reference tool's",
          methods },
        { "--calibration", 0, FLAG_TEXT, &s.calibration, "FILE", "JSONL of text, messages or input_ids",
          NULL },
        { "--num-calibration-samples", 0, FLAG_INT, &s.samples, "N", "lines used (default 64)", NULL },
        { "--max-seq-length", 0, FLAG_INT, &s.length, "N", "tokens used of each (default 2048)", NULL },
        { "--max-shard-size", 0, FLAG_INT, &s.shard_bytes, "BYTES", "of an output file (default 5000000000)",
          NULL },
        { "--evaluate", 0, FLAG_TEXT, &s.evaluate, "TEXT",
          "score source and result on this UTF-8 text (card rule, chunks of 512) for the model card", NULL },
        { "--max-memory", 0, FLAG_INT, &s.memory, "BYTES",
          "refuse a run that may need more (default 8000000000)", NULL },
        { "--dry-run", 0, FLAG_SWITCH, &s.dry_run, NULL, "print the plan and what it takes; write nothing",
          NULL },
        COMMON_FLAGS(s.common),
        FLAGS_END,
    };
    int status;
    struct err e = { 0 };
    if (!common_parse(&command, flags, argc, argv, s.folders, &status)) return status;
    return run(&s, &e) ? 0 : common_fail(&command, &e);
}
