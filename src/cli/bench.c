/* quench bench MODEL [-p 512] [-n 128] [-d 0] [-b 1] [-t N] [-r 5] [-o md|csv|json|jsonl] */
#include "base/clock.h"
#include "base/file.h"
#include "base/pool.h"
#include "cli/bench_print.h"
#include "cli/bench_serve.h"
#include "cli/bench_speculative.h"
#include "cli/commands.h"
#include "cli/common.h"
#include "cli/plan.h"
#include "eval/synthetic.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>

static const char PURPOSE[] =
    "Tokens a second for prompts (pp) and generation (tg), the bytes that had to move for each, and their "
    "share of the\n"
    "read bandwidth measured in the same run. MODEL is a checkpoint, or with --synthetic a shape: "
    "35b-a3b[:layers=N]\n"
    "[:format=card|fast|bf16|nvfp4|nvfp4a16], whose random weights are made in memory. Values with commas "
    "give one test\n"
    "each, all combinations; 0 leaves a kind of test out. Sequences at a depth have seen noise: nothing is "
    "computed for it.";
static const struct command command = { "bench", "MODEL", PURPOSE, 1 };

static const char *const formats[] = { "md", "csv", "json", "jsonl", NULL }; /* enum bench_format */
enum { VALUES_MAX = 64, TEXT_BYTES_MAX = 1 << 30 };

struct values {
    int64_t items[VALUES_MAX];
    int n;
};

struct settings {
    struct common common;
    const char *model, *content, *prompt_file;
    struct text_list prompts, gens, pairs, depths, sequences, threads;
    int format;
    int64_t repetitions, step_rows;
    bool synthetic, profile;
};

/* What the lists say. */
struct matrix {
    struct values prompts, gens, pairs, depths, sequences, threads;
};

/* Whole numbers between commas; several flags add up. An empty list stands for `missing`. */
static bool parse_values(struct values *v, const char *flag, const struct text_list *l, const char *missing,
                         int64_t min, int64_t max, struct err *e)
{
    v->n = 0;
    for (int i = 0; i < (l->n ? l->n : 1); i++) {
        const char *text = l->n ? l->items[i] : missing, *p = text;
        while (*p) {
            char *end;
            errno = 0;
            long long x = strtoll(p, &end, 10);
            if (end == p || errno != 0 || (*end && *end != ',') || (*end && !end[1]) || x < min || x > max)
                return err_set(e, ERR_ARGUMENT, "%s: expected whole numbers from %lld to %lld, found '%s'",
                               flag, (long long)min, (long long)max, text);
            if (v->n == VALUES_MAX)
                return err_set(e, ERR_ARGUMENT, "%s: at most %d values", flag, VALUES_MAX);
            v->items[v->n++] = x;
            p = *end ? end + 1 : end;
        }
    }
    return true;
}

static bool parse_all(struct matrix *m, const struct settings *s, struct err *e)
{
    const int64_t most = 1 << 24;
    char threads[16];
    snprintf(threads, sizeof threads, "%d", pool_default_threads());
    bool only_pairs = s->pairs.n && !s->prompts.n && !s->gens.n;
    if (!parse_values(&m->prompts, "-p", &s->prompts, only_pairs ? "0" : "512", 0, most, e) ||
        !parse_values(&m->gens, "-n", &s->gens, only_pairs ? "0" : "128", 0, most, e) ||
        !parse_values(&m->pairs, "-pg", &s->pairs, "", 1, most, e) ||
        !parse_values(&m->depths, "-d", &s->depths, "0", 0, most, e) ||
        !parse_values(&m->sequences, "-b", &s->sequences, "1", 1, 4096, e) ||
        !parse_values(&m->threads, "--threads", &s->threads, threads, 1, 1024, e))
        return false;
    if (m->pairs.n % 2) return err_set(e, ERR_ARGUMENT, "-pg: expected pairs PROMPT,GENERATED");
    if (s->repetitions < 1 || s->repetitions > 100000)
        return err_set(e, ERR_ARGUMENT, "-r: expected 1 to 100000, found %lld", (long long)s->repetitions);
    if (s->step_rows < 1 || s->step_rows > 1 << 16)
        return err_set(e, ERR_ARGUMENT, "-ub: expected 1 to 65536, found %lld", (long long)s->step_rows);
    if (s->synthetic && s->content)
        return err_set(e, ERR_ARGUMENT, "--content: a synthetic model has no tokenizer");
    if (s->synthetic && (s->common.overrides || s->common.rope_yarn != 0))
        return err_set(e, ERR_ARGUMENT,
                       "--hf-overrides and --rope-yarn: of a checkpoint, not of --synthetic");
    return true;
}

/* The checkpoint, from files or made up, and the text as tokens. */
struct source {
    struct checkpoint opened;
    struct synthetic synthetic;
    const struct checkpoint *checkpoint; /* one of the two */
    struct token_list tokens;
};

static bool load_content(struct source *o, const struct settings *s, struct err *e)
{
    struct tokenizer *tokenizer;
    char *text;
    size_t bytes;
    if (!s->content) return true;
    if (!tokenizer_load(&tokenizer, s->model, e)) return false;
    bool ok = file_read(&text, &bytes, s->content, TEXT_BYTES_MAX, e);
    if (ok) {
        ok = tokenizer_encode(tokenizer, &o->tokens, text, bytes, 0, e) &&
             (o->tokens.n > 0 || err_set(e, ERR_FORMAT, "the text is empty"));
        for (size_t i = 0; ok && i < o->tokens.n; i++)
            ok = o->tokens.ids[i] < o->checkpoint->config.vocab_size ||
                 err_set(e, ERR_FORMAT, "the tokenizer gives token %d, the model has %lld", o->tokens.ids[i],
                         (long long)o->checkpoint->config.vocab_size);
        if (!ok) err_note(e, "%s", s->content);
        free(text);
    }
    tokenizer_free(tokenizer);
    return ok;
}

static bool open_source(struct source *o, const struct settings *s, struct err *e)
{
    *o = (struct source){ .checkpoint = &o->opened };
    if (s->synthetic) o->checkpoint = &o->synthetic.synth.checkpoint;
    return (s->synthetic ? synthetic_create(&o->synthetic, s->model, e)
                         : common_checkpoint(&o->opened, &s->common, s->model, e)) &&
           load_content(o, s, e);
}

static void close_source(struct source *o)
{
    free(o->tokens.ids);
    checkpoint_close(&o->opened);
    synthetic_destroy(&o->synthetic);
}

/* In the order of the table. */
static bool each_test(const struct matrix *m,
                      bool (*body)(void *ctx, const struct bench_test *t, struct err *e), void *ctx,
                      struct err *e)
{
    for (int d = 0; d < m->depths.n; d++)
        for (int b = 0; b < m->sequences.n; b++) {
            struct bench_test tests[3 * VALUES_MAX];
            int n = 0, sequences = (int)m->sequences.items[b];
            int64_t depth = m->depths.items[d];
            for (int i = 0; i < m->prompts.n; i++)
                tests[n++] = (struct bench_test){ m->prompts.items[i], 0, depth, sequences };
            for (int i = 0; i < m->gens.n; i++)
                tests[n++] = (struct bench_test){ 0, m->gens.items[i], depth, sequences };
            for (int i = 0; i < m->pairs.n; i += 2)
                tests[n++] =
                    (struct bench_test){ m->pairs.items[i], m->pairs.items[i + 1], depth, sequences };
            for (int i = 0; i < n; i++)
                if (tests[i].n_prompt + tests[i].n_gen > 0 && !body(ctx, &tests[i], e)) return false;
        }
    return true;
}

/* Memory is looked at before weights are loaded: of the test with the most tokens a plan is printed. */
struct planning {
    const struct settings *s;
    const struct checkpoint *checkpoint;
    const struct backend *backend;
    struct bench_test largest;
};

static bool plan_test(void *ctx, const struct bench_test *t, struct err *e)
{
    struct planning *p = ctx;
    struct engine_options o = bench_engine(t, p->s->step_rows, common_kv_dtype(&p->s->common, p->backend)),
                          most = bench_engine(&p->largest, p->s->step_rows, o.kv);
    if (o.context * o.sequences > most.context * most.sequences) p->largest = *t;
    return plan_device(p->checkpoint, p->backend, &o, NULL, true, e);
}

static bool plan_tests(const struct settings *s, const struct matrix *m, const struct checkpoint *c,
                       const struct backend *b, struct err *e)
{
    struct planning p = { s, c, b, { 0 } };
    if (!each_test(m, plan_test, &p, e)) return false;
    struct engine_options o = bench_engine(&p.largest, s->step_rows, common_kv_dtype(&s->common, b));
    return plan_device(c, b, &o, NULL, s->common.quiet, e);
}

/* One thread count's backend with the model on it. */
struct loaded {
    struct backend backend, trace;
    struct model model;
    struct read_speed *speed;
};

static bool load(struct loaded *l, const struct source *o, const struct settings *s, const struct matrix *m,
                 int threads, const struct report *report, struct err *e)
{
    struct common common = s->common;
    common.threads = threads;
    *l = (struct loaded){ 0 };
    return read_speed_create(&l->speed, threads, e) && common_backend(&l->backend, &common, e) &&
           plan_tests(s, m, o->checkpoint, &l->backend, e) && trace_create(&l->trace, &l->backend, e) &&
           model_init(&l->model, o->checkpoint, &l->trace, report, e) && model_bind_all(&l->model, e) &&
           bench_label(&l->model, e);
}

static void unload(struct loaded *l)
{
    read_speed_free(l->speed);
    model_deinit(&l->model);
    trace_destroy(&l->trace);
    backend_destroy(&l->backend);
}

struct running {
    struct bench_printer *printer;
    const struct bench_setting *setting;
    const struct bench_options *options;
};

static bool run_test(void *ctx, const struct bench_test *t, struct err *e)
{
    const struct running *r = ctx;
    struct bench_result result;
    if (!bench_run(&result, t, r->options, e)) return false;
    bench_printer_add(r->printer, r->setting, t, &result);
    bench_result_deinit(&result);
    return true;
}

static bool run_threads(struct bench_printer *p, const struct source *o, const struct settings *s,
                        const struct matrix *m, int threads, struct err *e)
{
    struct report report = common_report(&s->common);
    struct loaded l;
    double start = clock_seconds();
    if (!load(&l, o, s, m, threads, &report, e)) {
        unload(&l);
        return false;
    }
    enum kv_dtype kv = common_kv_dtype(&s->common, &l.backend);
    struct bench_setting setting = { .model = s->model,
                                     .backend = &l.backend,
                                     .threads = threads,
                                     .kv = common_kv_name(kv),
                                     .activations = common_activations[s->common.fp4],
                                     .step_rows = s->step_rows,
                                     .load_seconds = clock_seconds() - start,
                                     .content = s->content };
    bench_setting_count(&setting, o->checkpoint);
    struct bench_options options = { .model = &l.model,
                                     .speed = l.speed,
                                     .tokens = o->tokens.ids,
                                     .n_tokens = (int64_t)o->tokens.n,
                                     .kv = kv,
                                     .step_rows = s->step_rows,
                                     .repetitions = (int)s->repetitions,
                                     .profile = s->profile,
                                     .report = &report };
    bool ok = each_test(m, run_test, &(struct running){ p, &setting, &options }, e);
    unload(&l);
    return ok;
}

static bool compare_drafting(const struct settings *s, struct err *e)
{
    struct matrix m;
    if (!parse_all(&m, s, e)) return false;
    if (s->synthetic) return err_set(e, ERR_ARGUMENT, "--prompts: a synthetic model has no tokenizer");
    struct common common = s->common;
    common.threads = m.threads.items[0];
    return bench_speculative(&(struct bench_speculative){ .common = &common,
                                                          .model = s->model,
                                                          .prompts = s->prompt_file,
                                                          .max_tokens = m.gens.items[0],
                                                          .json = s->common.json || s->format != BENCH_MD },
                             e);
}

static bool run(const struct settings *s, struct err *e)
{
    struct matrix m;
    struct source o = { 0 };
    struct bench_printer p;
    enum bench_format format = s->common.json ? BENCH_JSON : (enum bench_format)s->format;
    if (s->prompt_file || s->common.speculative) return compare_drafting(s, e);
    bool ok = parse_all(&m, s, e) && open_source(&o, s, e);
    if (!bench_printer_init(&p, format)) ok = ok && err_memory(e, "results", 0);
    for (int i = 0; ok && i < m.threads.n; i++) ok = run_threads(&p, &o, s, &m, (int)m.threads.items[i], e);
    if (ok)
        bench_printer_end(&p);
    else
        json_decref(p.results);
    close_source(&o);
    return ok;
}

int cli_bench(int argc, char **argv)
{
    if (argc > 0 && strcmp(argv[0], "serve") == 0) return bench_serve(argc - 1, argv + 1);
    struct settings s = { .common.inputs = 1, .repetitions = 5, .step_rows = 512 };
    const struct flag flags[] = {
        { "--n-prompt", 'p', FLAG_LIST, &s.prompts, "N,...", "tokens of a prompt (default 512)", NULL },
        { "--n-gen", 'n', FLAG_LIST, &s.gens, "N,...", "tokens generated (default 128)", NULL },
        { "-pg", 0, FLAG_LIST, &s.pairs, "PP,TG", "a prompt and then generation, timed together", NULL },
        { "--n-depth", 'd', FLAG_LIST, &s.depths, "N,...", "tokens seen before (default 0)", NULL },
        { "--batch-size", 'b', FLAG_LIST, &s.sequences, "N,...", "sequences that run together (default 1)",
          NULL },
        { "-ub", 0, FLAG_INT, &s.step_rows, "N", "most rows of a step (default 512)", NULL },
        { "--threads", 't', FLAG_LIST, &s.threads, "N,...",
          "threads (default: this process's share of the machine)", NULL },
        { "--repetitions", 'r', FLAG_INT, &s.repetitions, "N", "samples of each test (default 5)", NULL },
        { "--output", 'o', FLAG_CHOICE, &s.format, "md|csv|json|jsonl", "what to print (default md)",
          formats },
        { "--content", 0, FLAG_TEXT, &s.content, "FILE",
          "a text whose tokens are used, so that routing is real (default: random ids)", NULL },
        { "--synthetic", 0, FLAG_SWITCH, &s.synthetic, NULL, "MODEL is a shape; weights are random", NULL },
        { "--prompts", 0, FLAG_TEXT, &s.prompt_file, "FILE",
          "JSON lines with \"prompt\": continue each greedily, up to -n tokens, without drafts and with them",
          NULL },
        COMMON_SPECULATIVE_FLAG(s.common),
        { "--profile", 0, FLAG_SWITCH, &s.profile, NULL, "time each operation in one more repetition", NULL },
        COMMON_OVERRIDES_FLAGS(s.common),
        COMMON_KV_FLAG(s.common),
        COMMON_ACTIVATIONS_FLAGS(s.common),
        { "--device", 0, FLAG_CHOICE, &s.common.device, "auto|cpu|cuda|ref",
          "where to compute (auto: a GPU where there is one)", common_devices },
        { "--cpu-mask", 0, FLAG_CHOICE, &s.common.mask, "best|generic|avx2|avx512|avx512bf16|amx",
          "use at most these instructions", common_masks },
        { "--quiet", 0, FLAG_SWITCH, &s.common.quiet, NULL, "no progress, no notes", NULL },
        { "--json", 0, FLAG_SWITCH, &s.common.json, NULL, "the same as -o json", NULL },
        FLAGS_END,
    };
    int status;
    struct err e = { 0 };
    if (!common_parse(&command, flags, argc, argv, &s.model, &status)) return status;
    return run(&s, &e) ? 0 : common_fail(&command, &e);
}
