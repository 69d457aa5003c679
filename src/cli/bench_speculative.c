#include "cli/bench_speculative.h"
#include "cli/plan.h"
#include "eval/speculation.h"
#include <stdio.h>

static double share(int64_t part, int64_t whole)
{
    return whole ? (double)part / (double)whole : 0;
}

static void print_json(const struct bench_speculative *b, const struct backend *backend,
                       const struct speculation_result *r)
{
    const struct speculation *s = &r->speculation;
    json_t *places = json_array();
    for (int i = 0; i < s->most; i++)
        json_array_append_new(places, json_real(share(s->right[i], s->tried[i])));
    json_t *o = json_pack(
        "{s:o, s:s, s:I, s:I, s:I, s:i, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:I, s:I, s:f, s:o, s:b}", "model",
        common_json_path(b->model), "device", backend->name, "prompts", (json_int_t)r->prompts,
        "prompt_tokens", (json_int_t)r->prompt_tokens, "tokens", (json_int_t)r->tokens,
        "num_speculative_tokens", s->most, "plain_ts", (double)r->tokens / r->plain_seconds, "speculative_ts",
        (double)r->tokens / r->seconds, "speedup", r->plain_seconds / r->seconds, "plain_seconds",
        r->plain_seconds, "speculative_seconds", r->seconds, "plain_prefill_seconds",
        r->plain_prefill_seconds, "speculative_prefill_seconds", r->prefill_seconds, "drafted",
        (json_int_t)s->drafted, "accepted", (json_int_t)s->accepted, "mean_accepted_length",
        speculation_mean_length(s), "acceptance", places, "same_text", r->different == 0);
    json_dumpf(o, stdout, JSON_COMPACT);
    putchar('\n');
    json_decref(o);
}

static void print_text(const struct backend *backend, const struct speculation_result *r)
{
    const struct speculation *s = &r->speculation;
    printf("%lld prompts of %lld tokens, %lld generated, on %s\n", (long long)r->prompts,
           (long long)r->prompt_tokens, (long long)r->tokens, backend->name);
    printf("without     %9.1f tokens/s\n", (double)r->tokens / r->plain_seconds);
    printf("with        %9.1f tokens/s, %.2f times; prompts in %.2f times the time\n",
           (double)r->tokens / r->seconds, r->plain_seconds / r->seconds,
           r->prefill_seconds / r->plain_prefill_seconds);
    printf("drafts      %lld, %lld accepted; tokens a step %.2f; by place", (long long)s->drafted,
           (long long)s->accepted, speculation_mean_length(s));
    for (int i = 0; i < s->most; i++)
        if (s->tried[i]) printf(" %.1f %%", 100 * share(s->right[i], s->tried[i]));
    printf("\ntext        %s\n", r->different ? "DIFFERS" : "the same");
}

static bool measure(const struct bench_speculative *b, struct opened *o, const struct backend *backend,
                    int drafts, const struct report *report, struct err *e)
{
    int32_t eos[16];
    int n_eos = 0;
    struct speculation_result r;
    struct plan_fits fits = { &o->checkpoint, backend, NULL, b->common->quiet };
    struct speculation_options options = { .model = &o->model,
                                           .tokenizer = o->tokenizer,
                                           .prompts = b->prompts,
                                           .max_tokens = b->max_tokens,
                                           .drafts = drafts,
                                           .kv = common_kv_dtype(b->common, backend),
                                           .stop_tokens = eos,
                                           .report = report,
                                           .fits = plan_fits,
                                           .ctx = &fits };
    if (!common_bind_mtp(o, drafts, e) || !checkpoint_eos_tokens(&o->checkpoint, eos, 16, &n_eos, e))
        return false;
    options.n_stop_tokens = n_eos;
    if (!speculation_measure(&r, &options, e)) return false;
    if (b->json)
        print_json(b, backend, &r);
    else
        print_text(backend, &r);
    return r.different == 0 || err_set(e, ERR_FORMAT, "%lld of %lld texts differ with drafts",
                                       (long long)r.different, (long long)r.prompts);
}

bool bench_speculative(const struct bench_speculative *b, struct err *e)
{
    struct report report = common_report(b->common);
    struct backend backend = { 0 };
    struct opened o = { 0 };
    int drafts;
    if (!b->prompts)
        return err_set(e, ERR_ARGUMENT,
                       "--speculative-config: --prompts FILE.jsonl is needed too, acceptance "
                       "means nothing on random tokens");
    if (!common_drafts(&drafts, b->common, b->model, e)) return false;
    if (!drafts)
        return err_set(e, ERR_ARGUMENT,
                       "--prompts: --speculative-config is needed too, for what is compared");
    bool ok = common_start(&backend, &o, b->common, b->model, e) && common_bind(&o, &backend, &report, e) &&
              measure(b, &o, &backend, drafts, &report, e);
    common_close(&o);
    backend_destroy(&backend);
    return ok;
}
