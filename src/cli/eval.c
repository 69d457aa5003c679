/* quench eval MODEL --tasks FILE.jsonl [--against OTHER] */
#include "cli/commands.h"
#include "cli/common.h"
#include "cli/plan.h"
#include "eval/tasks.h"
#include <stdio.h>
#include <stdlib.h>

static const struct command command = {
    "eval",
    "MODEL --tasks FILE",
    "Puts questions with known answers to a model and counts the right ones. FILE has one JSON object a "
    "line:\n"
    "\"prompt\", \"answer\", perhaps \"system\" and \"images\" (paths or data: URLs). A prompt that begins "
    "with <|im_start|> is a whole rendered "
    "chat.\n"
    "Right is: what follows the reasoning equals the answer, whitespace at both ends aside.",
    1,
};

static const char *const thinkings[] = { "template", "off", "on", NULL };

struct settings {
    struct common common;
    const char *model, *tasks, *against;
    int thinking;
    int64_t max_tokens, max_tasks, batch;
};

/* What one model came to. */
struct outcome {
    struct task_result *results;
    int64_t right, cut;
    double score, low, high;
};

static bool run_model(struct outcome *out, const char *path, const struct tasks *t, const struct settings *s,
                      struct backend *b, const struct report *report, struct err *e)
{
    struct plan_fits fits = { NULL, b, NULL, s->common.quiet };
    struct chat_template *template = NULL;
    struct opened opened = { 0 }, *o = &opened;
    int32_t eos[16];
    int n_eos = 0;
    bool ok = common_open(o, &s->common, path, b, report, e) &&
              checkpoint_eos_tokens(&o->checkpoint, eos, 16, &n_eos, e) &&
              chat_template_load(&template, path, e);
    out->results = ok ? calloc((size_t)t->n, sizeof *out->results) : NULL;
    ok = ok && (out->results || err_memory(e, "results", (uint64_t)t->n * sizeof *out->results));
    fits.checkpoint = &o->checkpoint;
    int32_t pictures[] = { (int32_t)o->checkpoint.config.image_token,
                           (int32_t)o->checkpoint.config.video_token };
    struct tasks_options options = { .tokenizer = o->tokenizer,
                                     .template = template,
                                     .thinking = (enum chat_thinking)s->thinking,
                                     .sequences = (int)s->batch,
                                     .max_tokens = s->max_tokens,
                                     .kv = common_kv_dtype(&s->common, b),
                                     .stop_tokens = eos,
                                     .n_stop_tokens = n_eos,
                                     .never = pictures,
                                     .n_never = 2,
                                     .report = report,
                                     .fits = plan_fits,
                                     .ctx = &fits };
    ok = ok && tasks_run(out->results, t, &o->model, &options, e);
    for (int64_t i = 0; ok && i < t->n; i++) {
        out->right += out->results[i].is_right;
        out->cut += out->results[i].is_cut;
    }
    out->score = (double)out->right / (double)t->n;
    tasks_interval(&out->low, &out->high, out->right, t->n);
    chat_template_free(template);
    common_close(o);
    return ok;
}

/* Right for one model only. */
struct pairs {
    int64_t both, only_model, only_other;
};

static struct pairs pair(const struct outcome *a, const struct outcome *b, int64_t n)
{
    struct pairs p = { 0 };
    for (int64_t i = 0; i < n; i++) {
        bool x = a->results[i].is_right, y = b->results[i].is_right;
        p.both += x && y;
        p.only_model += x && !y;
        p.only_other += y && !x;
    }
    return p;
}

static void print_outcome(const char *path, const struct outcome *o, int64_t n)
{
    printf("%-42s %6lld of %lld  %6.2f %%   %.2f to %.2f %%   %lld\n", path, (long long)o->right,
           (long long)n, 100 * o->score, 100 * o->low, 100 * o->high, (long long)o->cut);
}

static void print_text(const struct settings *s, const struct outcome *o, int64_t n)
{
    printf("tasks       %s\nmax tokens  %lld\nthinking    %s\n\n", s->tasks, (long long)s->max_tokens,
           thinkings[s->thinking]);
    printf("%-42s %14s  %8s   %-16s   %s\n", "model", "right", "score", "95 % interval", "cut");
    print_outcome(s->model, &o[0], n);
    if (!s->against) return;
    print_outcome(s->against, &o[1], n);
    struct pairs p = pair(&o[0], &o[1], n);
    printf("\nboth right %lld, only %s %lld, only %s %lld, neither %lld; exact McNemar p = %.3g\n",
           (long long)p.both, s->model, (long long)p.only_model, s->against, (long long)p.only_other,
           (long long)(n - p.both - p.only_model - p.only_other), tasks_mcnemar(p.only_model, p.only_other));
}

static json_t *outcome_json(const char *path, const struct outcome *o, const struct tasks *t)
{
    json_t *wrong = json_array();
    for (int64_t i = 0; i < t->n; i++)
        if (!o->results[i].is_right)
            json_array_append_new(wrong,
                                  json_pack("{s:I, s:s, s:o, s:b}", "line", (json_int_t)t->items[i].line,
                                            "answer", t->items[i].answer, "found",
                                            json_stringn(o->results[i].text, o->results[i].bytes), "cut",
                                            o->results[i].is_cut));
    return json_pack("{s:o, s:I, s:f, s:f, s:f, s:I, s:o}", "model", common_json_path(path), "right",
                     (json_int_t)o->right, "score", o->score, "low", o->low, "high", o->high, "cut",
                     (json_int_t)o->cut, "wrong", wrong);
}

static void print_json(const struct settings *s, const struct outcome *o, const struct tasks *t)
{
    json_t *out =
        json_pack("{s:o, s:I, s:I, s:s}", "tasks", common_json_path(s->tasks), "n", (json_int_t)t->n,
                  "max_tokens", (json_int_t)s->max_tokens, "thinking", thinkings[s->thinking]);
    json_t *model = outcome_json(s->model, &o[0], t);
    json_object_update(out, model);
    json_decref(model);
    if (s->against) {
        struct pairs p = pair(&o[0], &o[1], t->n);
        json_object_set_new(out, "against", outcome_json(s->against, &o[1], t));
        json_object_set_new(out, "paired",
                            json_pack("{s:I, s:I, s:I, s:f}", "both", (json_int_t)p.both, "only_model",
                                      (json_int_t)p.only_model, "only_against", (json_int_t)p.only_other, "p",
                                      tasks_mcnemar(p.only_model, p.only_other)));
    }
    json_dumpf(out, stdout, JSON_COMPACT);
    putchar('\n');
    json_decref(out);
}

static bool check(const struct settings *s, struct err *e)
{
    if (!s->tasks) return err_set(e, ERR_ARGUMENT, "--tasks FILE is needed");
    if (s->max_tokens < 1 || s->max_tokens > 1 << 20)
        return err_set(e, ERR_ARGUMENT, "--max-tokens: expected 1 to 1048576, found %lld",
                       (long long)s->max_tokens);
    if (s->max_tasks < 0)
        return err_set(e, ERR_ARGUMENT, "--max-tasks: expected 1 or more, found %lld",
                       (long long)s->max_tasks);
    if (s->batch < 1 || s->batch > TASKS_SEQUENCES_MAX)
        return err_set(e, ERR_ARGUMENT, "--batch: expected 1 to %d, found %lld", TASKS_SEQUENCES_MAX,
                       (long long)s->batch);
    return true;
}

static bool run(const struct settings *s, struct err *e)
{
    struct report report = common_report(&s->common);
    struct backend b = { 0 };
    struct tasks t = { 0 };
    struct outcome o[2] = { 0 };
    bool ok = check(s, e) && tasks_load(&t, s->tasks, s->max_tasks, e) && common_backend(&b, &s->common, e) &&
              run_model(&o[0], s->model, &t, s, &b, &report, e) &&
              (!s->against || run_model(&o[1], s->against, &t, s, &b, &report, e));
    if (ok && s->common.json)
        print_json(s, o, &t);
    else if (ok)
        print_text(s, o, t.n);
    tasks_free_results(o[0].results, t.n);
    tasks_free_results(o[1].results, t.n);
    tasks_deinit(&t);
    backend_destroy(&b);
    return ok;
}

int cli_eval(int argc, char **argv)
{
    struct settings s = { .common.inputs = 1, .max_tokens = 256, .batch = 8 };
    const struct flag flags[] = {
        { "--tasks", 0, FLAG_TEXT, &s.tasks, "FILE", "the tasks, JSON lines", NULL },
        { "--against", 0, FLAG_TEXT, &s.against, "OTHER", "a second checkpoint, compared task by task",
          NULL },
        { "--max-tokens", 'n', FLAG_INT, &s.max_tokens, "N", "most tokens of an answer (default 256)", NULL },
        { "--max-tasks", 0, FLAG_INT, &s.max_tasks, "N", "only the first N tasks", NULL },
        { "--batch", 'b', FLAG_INT, &s.batch, "N", "tasks at a time (default 8)", NULL },
        { "--think", 0, FLAG_CHOICE, &s.thinking, "template|off|on",
          "enable_thinking of the chat template (default: as the template does)", thinkings },
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
