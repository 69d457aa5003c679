/* quench verify MODEL [--source SRC] [--text FILE] */
#include "cli/commands.h"
#include "cli/common.h"
#include "base/file.h"
#include "eval/perplexity.h"
#include "quantize/verify.h"
#include "tokenizer/utf8.h"
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static const struct command command = {
    "verify",
    "MODEL",
    "Checks a checkpoint without changing it: files and index, one format for each linear module as\n"
    "quantization_config says, shapes, every scale and FP8 code, gate and up of each expert, the MTP head. "
    "With\n"
    "--source also every weight against the one it was made from. Exit status 0: no faults.",
    1,
};

enum { CHUNK = 512, TEXT_BYTES_MAX = 1 << 30, PREFIX_BYTES = 1 << 16 };

struct settings {
    struct common common;
    const char *model, *source, *text;
};

/* Score. */

/* The first chunk's tokens. Of a long text only the beginning is tokenized: 512 tokens are in it unless they
 * have 128 bytes each. */
static bool read_tokens(struct token_list *list, const struct opened *o, const char *text, size_t bytes,
                        struct err *e)
{
    size_t valid = utf8_valid_prefix(text, bytes < PREFIX_BYTES ? bytes : PREFIX_BYTES);
    if (!tokenizer_encode(o->tokenizer, list, text, valid, 0, e)) return false;
    if (list->n > CHUNK) list->n = CHUNK;
    return true;
}

/* A text to be scored, read before the long work so that a wrong name is said at once. */
struct text {
    char *data;
    size_t bytes;
};

static bool score(struct perplexity_result *r, const char *path, const struct text *text, struct backend *b,
                  const struct report *report, struct err *e)
{
    struct opened o = { 0 };
    struct token_list tokens = { 0 };
    struct perplexity_options options = { .ctx = CHUNK, .max_chunks = 1, .report = report };
    bool ok = common_open(&o, NULL, path, b, report, e) &&
              read_tokens(&tokens, &o, text->data, text->bytes, e) &&
              perplexity_run(r, &o.model, tokens.ids, (int64_t)tokens.n, &options, e);
    free(tokens.ids);
    common_close(&o);
    return ok;
}

static int64_t vocabulary(const char *path)
{
    struct checkpoint c;
    if (!checkpoint_open(&c, path, NULL)) return 0;
    int64_t n = c.config.vocab_size;
    checkpoint_close(&c);
    return n;
}

/* A checkpoint that cannot be scored has a fault; a source that cannot is the user's mistake. One whose files
 * or layers are at fault could not be opened for it. */
static bool score_both(struct verify_result *r, const struct settings *s, const struct text *text,
                       struct backend *b, const struct report *report, struct err *e)
{
    struct perplexity_result model = { 0 }, source = { 0 };
    struct err why = { 0 };
    if (findings_count(&r->findings, VERIFY_FILES, true) + findings_count(&r->findings, VERIFY_LAYERS, true) >
        0)
        return true;
    if (s->source && !score(&source, s->source, text, b, report, e)) return false;
    bool ok = score(&model, s->model, text, b, report, &why);
    verify_score(r, model.perplexity, source.perplexity, vocabulary(s->model), ok ? NULL : why.text);
    r->steps[VERIFY_SCORE].n = model.scored;
    return true;
}

/* Output. */

static void print_steps(const struct verify_result *r)
{
    printf("%-10s %10s  %-16s %8s %10s\n", "check", "looked at", "", "faults", "warnings");
    for (int i = 0; i < VERIFY_STEPS; i++) {
        enum verify_step step = (enum verify_step)i;
        if (!r->steps[i].done) continue;
        printf("%-10s %10lld  %-16s %8lld %10lld\n", verify_name(step), (long long)r->steps[i].n,
               verify_unit(step), (long long)findings_count(&r->findings, i, true),
               (long long)findings_count(&r->findings, i, false));
    }
}

static const char *scheme_words(int scheme)
{
    return scheme == SCHEME_NONE ? "as stored" : scheme_name((enum scheme)scheme);
}

static void print_schemes(const struct verify_result *r)
{
    if (r->steps[VERIFY_MODULES].done)
        printf("\n%-12s %10s %10s %12s\n", "scheme", "modules", "compared", "mean error");
    for (int i = 0; i < VERIFY_SCHEMES; i++) {
        if (r->modules[i] == 0) continue;
        printf("%-12s %10lld", scheme_words(i), (long long)r->modules[i]);
        if (r->compared[i] > 0)
            printf(" %10lld %10.3f %%", (long long)r->compared[i], 100 * r->mean_error[i]);
        putchar('\n');
    }
    if (r->n_worst > 0) puts("\nfurthest from the source (|W - decoded| / |W|)");
    for (int i = 0; i < r->n_worst; i++)
        printf("  %9.3f %%  %-12s %s\n", 100 * r->worst[i].error, scheme_words(r->worst[i].scheme),
               r->worst[i].module);
}

static void print_findings(const struct findings *f, bool faults)
{
    for (size_t i = 0; i < f->n; i++) {
        if (f->items[i].is_fault != faults) continue;
        char *text = findings_sentence(&f->items[i]);
        printf("%s: %s: %s\n", faults ? "fault" : "warning", verify_name((enum verify_step)f->items[i].step),
               text ? text : f->items[i].what);
        free(text);
    }
}

static void print_text(const struct settings *s, const struct verify_result *r)
{
    long long faults = (long long)verify_faults(r),
              warnings = (long long)findings_count(&r->findings, -1, false);
    printf("model      %s\n", s->model);
    if (s->source) printf("source     %s\n", s->source);
    putchar('\n');
    print_steps(r);
    print_schemes(r);
    if (r->perplexity > 0)
        printf("\nperplexity of %lld tokens  %.4f", (long long)r->steps[VERIFY_SCORE].n, r->perplexity);
    if (r->source_perplexity > 0) printf(", of the source %.4f", r->source_perplexity);
    if (r->perplexity > 0) putchar('\n');
    putchar('\n');
    print_findings(&r->findings, true);
    print_findings(&r->findings, false);
    if (faults == 0)
        printf("no faults, %lld warning%s\n", warnings, warnings == 1 ? "" : "s");
    else
        printf("%lld fault%s, %lld warning%s\n", faults, faults == 1 ? "" : "s", warnings,
               warnings == 1 ? "" : "s");
}

/* Names come from a file and may be any bytes; a number that JSON does not have becomes null. */
static json_t *number(double x)
{
    return isfinite(x) ? json_real(x) : json_null();
}

static json_t *json_findings(const struct findings *f, bool faults)
{
    json_t *list = json_array();
    for (size_t i = 0; i < f->n; i++) {
        const struct finding *x = &f->items[i];
        if (x->is_fault != faults) continue;
        char *text = findings_sentence(x);
        json_array_append_new(list,
                              json_pack("{s:s, s:I, s:o}", "check", verify_name((enum verify_step)x->step),
                                        "count", (json_int_t)(x->n_names ? x->n_names : 1), "text",
                                        common_json_path(text ? text : x->what)));
        free(text);
    }
    return list;
}

static json_t *json_steps(const struct verify_result *r)
{
    json_t *list = json_array();
    for (int i = 0; i < VERIFY_STEPS; i++) {
        enum verify_step step = (enum verify_step)i;
        if (!r->steps[i].done) continue;
        json_array_append_new(list, json_pack("{s:s, s:I, s:s, s:I, s:I}", "check", verify_name(step), "n",
                                              (json_int_t)r->steps[i].n, "unit", verify_unit(step), "faults",
                                              (json_int_t)findings_count(&r->findings, i, true), "warnings",
                                              (json_int_t)findings_count(&r->findings, i, false)));
    }
    return list;
}

static json_t *json_schemes(const struct verify_result *r)
{
    json_t *all = json_object();
    for (int i = 0; i < VERIFY_SCHEMES; i++) {
        if (r->modules[i] == 0) continue;
        json_t *one = json_pack("{s:I}", "modules", (json_int_t)r->modules[i]);
        if (r->compared[i] > 0) {
            json_object_set_new(one, "compared", json_integer((json_int_t)r->compared[i]));
            json_object_set_new(one, "mean_error", number(r->mean_error[i]));
        }
        json_object_set_new(all, scheme_words(i), one);
    }
    return all;
}

static void print_json(const struct settings *s, const struct verify_result *r)
{
    json_t *worst = json_array();
    for (int i = 0; i < r->n_worst; i++)
        json_array_append_new(
            worst, json_pack("{s:o, s:s, s:o}", "module", common_json_path(r->worst[i].module), "scheme",
                             scheme_words(r->worst[i].scheme), "error", number(r->worst[i].error)));
    json_t *o =
        json_pack("{s:o, s:o, s:o, s:o, s:o, s:b}", "model", common_json_path(s->model), "checks",
                  json_steps(r), "schemes", json_schemes(r), "faults", json_findings(&r->findings, true),
                  "warnings", json_findings(&r->findings, false), "ok", verify_faults(r) == 0);
    if (s->source) {
        json_object_set_new(o, "source", common_json_path(s->source));
        json_object_set(o, "worst", worst);
    }
    if (r->steps[VERIFY_SCORE].done) json_object_set_new(o, "perplexity", number(r->perplexity));
    if (r->source_perplexity > 0) json_object_set_new(o, "source_perplexity", number(r->source_perplexity));
    json_dumpf(o, stdout, JSON_COMPACT);
    putchar('\n');
    json_decref(worst);
    json_decref(o);
}

static bool run(const struct settings *s, bool *faultless, struct err *e)
{
    struct report report = common_report(&s->common);
    struct backend b = { 0 };
    struct verify_result r = { 0 };
    struct text text = { 0 };
    bool ok = (!s->text || file_read(&text.data, &text.bytes, s->text, TEXT_BYTES_MAX, e)) &&
              common_backend(&b, &s->common, e);
    struct verify_options o = { .path = s->model,
                                .source = s->source,
                                .threads = (int)s->common.threads,
                                .backend = &b,
                                .report = &report };
    ok = ok && verify_run(&r, &o, e) && (!s->text || score_both(&r, s, &text, &b, &report, e));
    if (ok && s->common.json)
        print_json(s, &r);
    else if (ok)
        print_text(s, &r);
    *faultless = verify_faults(&r) == 0;
    verify_deinit(&r);
    free(text.data);
    backend_destroy(&b);
    return ok;
}

int cli_verify(int argc, char **argv)
{
    struct settings s = { 0 };
    const struct flag flags[] = {
        { "--source", 0, FLAG_TEXT, &s.source, "SRC", "the BF16 checkpoint it was made from", NULL },
        { "--text", 0, FLAG_TEXT, &s.text, "FILE", "score its first 512 tokens too (UTF-8)", NULL },
        COMMON_FLAGS(s.common),
        FLAGS_END,
    };
    int status;
    bool faultless;
    struct err e = { 0 };
    if (!common_parse(&command, flags, argc, argv, &s.model, &status)) return status;
    if (!run(&s, &faultless, &e)) return common_fail(&command, &e);
    return faultless ? 0 : 1;
}
