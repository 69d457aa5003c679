/* quench perplexity MODEL --text FILE [--against OTHER] */
#include "cli/commands.h"
#include "cli/evaluate.h"
#include "cli/plan.h"
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct command command = {
    "perplexity",
    "MODEL --text FILE",
    "Perplexity of a text. Rule \"card\": consecutive chunks of --ctx tokens, each from an empty state, no "
    "BOS, first token\n"
    "of a chunk not scored, last short chunk kept. With --against, OTHER is set against MODEL on the same "
    "chunks.",
    1,
};

static const char *const rules[] = { "card", NULL };

struct settings {
    struct common common;
    const char *model, *text, *against;
    int rule;
    int64_t ctx, max_chunks;
};

static void print_text(const struct settings *s, const struct perplexity_result *r, const struct backend *b)
{
    printf("model       %s\n", s->model);
    if (s->against) printf("against     %s\n", s->against);
    printf("text        %s\nrule        %s, ctx %lld\ntokens      %lld\nchunks      %lld\nscored      %lld\n",
           s->text, rules[s->rule], (long long)s->ctx, (long long)r->tokens, (long long)r->chunks,
           (long long)r->scored);
    printf(
        "kv cache    %s\nnvfp4 input %s\nactivations %s\ndevice      %s\ntime        %.1f s, %.0f tokens/s\n",
        common_kv_name(common_kv_dtype(&s->common, b)), common_activations[s->common.fp4],
        common_inputs[s->common.inputs], b->name, r->seconds, (double)(r->scored + r->chunks) / r->seconds);
    if (!s->against) printf("perplexity  %.5f\n", r->perplexity);
}

static uint64_t disk_bytes(const struct checkpoint *c)
{
    uint64_t bytes = 0;
    for (int i = 0; i < c->n_shards; i++) bytes += c->shards[i].map.bytes;
    return bytes;
}

/* "BF16", "NVFP4 + FP8 + BF16": the formats that weights are in. */
static const char *format_name(char out[64], const struct checkpoint *c)
{
    bool nvfp4 = false, of[DTYPE_COUNT] = { false };
    for (size_t i = 0; i < c->n_tensors; i++) {
        const char *dot = strrchr(c->tensors[i]->name, '.');
        nvfp4 = nvfp4 || (dot && strcmp(dot, ".weight_packed") == 0);
        if (dot && strcmp(dot, ".weight") == 0) of[c->tensors[i]->dtype] = true;
    }
    snprintf(out, 64, "%s%s%s%s", nvfp4 || of[DTYPE_U8] ? " + NVFP4" : "", of[DTYPE_F8_E4M3] ? " + FP8" : "",
             of[DTYPE_BF16] ? " + BF16" : "", of[DTYPE_F16] ? " + F16" : "");
    return *out ? out + 3 : "F32";
}

static void print_comparison(const struct comparison *c, const struct checkpoint *base,
                             const struct checkpoint *other)
{
    char format[64], size[32];
    printf("\n%-22s %14s %12s %10s %9s\n", "format", "size on disk", "perplexity", "delta", "%");
    printf("%-22s %14s %12.4f %10s %9s\n", format_name(format, base),
           common_bytes(size, sizeof size, disk_bytes(base)), c->base.perplexity, "-", "-");
    printf("%-22s %14s %12.4f %+10.4f %+9.3f\n", format_name(format, other),
           common_bytes(size, sizeof size, disk_bytes(other)), c->other.perplexity, c->delta,
           100 * (c->ratio - 1));
    printf("\nratio       %.6f, 95 %% interval %.6f to %.6f (paired over chunks)\n"
           "kld         %.6f nats a token\nsame top    %.3f %%\n",
           c->ratio, c->ratio_low, c->ratio_high, c->kld, 100 * c->same_top);
}

static void print_json(const struct settings *s, const struct perplexity_result *r,
                       const struct comparison *c, const struct backend *b)
{
    json_t *o = json_pack(
        "{s:o, s:o, s:s, s:I, s:I, s:I, s:I, s:s, s:s, s:s, s:f, s:f}", "model", common_json_path(s->model),
        "text", common_json_path(s->text), "rule", rules[s->rule], "ctx", (json_int_t)s->ctx, "tokens",
        (json_int_t)r->tokens, "chunks", (json_int_t)r->chunks, "scored_tokens", (json_int_t)r->scored,
        "kv_cache_dtype", common_kv_name(common_kv_dtype(&s->common, b)), "nvfp4_activations",
        common_activations[s->common.fp4], "cpu_activations", common_inputs[s->common.inputs], "perplexity",
        r->perplexity, "seconds", r->seconds);
    if (c) {
        json_t *more = json_pack("{s:o, s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "against",
                                 common_json_path(s->against), "against_perplexity", c->other.perplexity,
                                 "delta", c->delta, "ratio", c->ratio, "ratio_low", c->ratio_low,
                                 "ratio_high", c->ratio_high, "kld", c->kld, "same_top", c->same_top);
        json_object_update(o, more);
        json_decref(more);
    }
    json_dumpf(o, stdout, JSON_COMPACT);
    putchar('\n');
    json_decref(o);
}

static bool check(const struct settings *s, struct err *e)
{
    if (!s->text) return err_set(e, ERR_ARGUMENT, "--text FILE is needed");
    if (s->ctx < 2 || s->ctx > 1 << 20)
        return err_set(e, ERR_ARGUMENT, "--ctx: expected 2 to 1048576, found %lld", (long long)s->ctx);
    if (s->max_chunks < 0)
        return err_set(e, ERR_ARGUMENT, "--max-chunks: expected 1 or more, found %lld",
                       (long long)s->max_chunks);
    return true;
}

static bool open_planned(struct opened *o, const struct settings *s, const char *path, struct backend *b,
                         const struct report *report, uint64_t *taken, struct err *e)
{
    struct engine_options eo = perplexity_engine(s->ctx, common_kv_dtype(&s->common, b));
    return common_open_files(o, &s->common, path, e) &&
           plan_device(&o->checkpoint, b, &eo, taken, s->common.quiet, e) && common_bind(o, b, report, e);
}

static bool run(const struct settings *s, struct err *e)
{
    struct report report = common_report(&s->common);
    struct perplexity_options o = { .ctx = s->ctx, .max_chunks = s->max_chunks, .report = &report };
    struct backend b = { 0 };
    struct opened base = { 0 }, other = { 0 };
    struct token_list tokens = { 0 };
    struct comparison c = { 0 };
    uint64_t taken = 0;
    bool ok = check(s, e) && common_backend(&b, &s->common, e);
    if (ok) o.kv = common_kv_dtype(&s->common, &b);
    ok = ok && open_planned(&base, s, s->model, &b, &report, &taken, e) &&
         evaluate_tokens(&tokens, base.tokenizer, s->text, e);
    if (ok && s->against)
        ok = open_planned(&other, s, s->against, &b, &report, &taken, e) &&
             evaluate_same_tokens(&tokens, other.tokenizer, s->text, s->model, s->against, e) &&
             perplexity_compare(&c, &base.model, &other.model, tokens.ids, (int64_t)tokens.n, &o, e);
    else if (ok)
        ok = perplexity_run(&c.base, &base.model, tokens.ids, (int64_t)tokens.n, &o, e);
    if (ok && s->common.json) {
        print_json(s, &c.base, s->against ? &c : NULL, &b);
    } else if (ok) {
        print_text(s, &c.base, &b);
        if (s->against) print_comparison(&c, &base.checkpoint, &other.checkpoint);
    }
    free(tokens.ids);
    common_close(&base);
    common_close(&other);
    backend_destroy(&b);
    return ok;
}

int cli_perplexity(int argc, char **argv)
{
    struct settings s = { .ctx = 512 };
    const struct flag flags[] = {
        { "--text", 0, FLAG_TEXT, &s.text, "FILE", "UTF-8 text to score", NULL },
        { "--against", 0, FLAG_TEXT, &s.against, "OTHER", "a second checkpoint, compared chunk by chunk",
          NULL },
        { "--rule", 0, FLAG_CHOICE, &s.rule, "card", "how the text is cut and scored", rules },
        { "--ctx", 0, FLAG_INT, &s.ctx, "N", "tokens a chunk (default 512)", NULL },
        { "--max-chunks", 0, FLAG_INT, &s.max_chunks, "N", "score only the first N chunks", NULL },
        COMMON_OVERRIDES_FLAGS(s.common),
        COMMON_KV_FLAG(s.common),
        COMMON_ACTIVATIONS_FLAGS(s.common),
        COMMON_FLAGS(s.common),
        FLAGS_END,
    };
    int status;
    struct err e = { 0 };
    if (!common_parse(&command, flags, argc, argv, &s.model, &status)) return status;
    return run(&s, &e) ? 0 : common_fail(&command, &e);
}
