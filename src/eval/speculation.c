#include "eval/speculation.h"
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct measuring {
    const struct speculation_options *o;
    struct speculation_result *r;
    struct engine *plain, *drafting;
};

static bool create_engines(struct measuring *m, int64_t longest, struct err *e)
{
    const struct speculation_options *o = m->o;
    struct engine_options options = { .context = longest + o->max_tokens, .kv = o->kv };
    struct engine_options both = options;
    both.sequences = 2;
    both.drafts = o->drafts;
    if (o->fits && !o->fits(o->ctx, &both, e)) return false;
    if (!engine_create(&m->plain, o->model, &options, e)) return false;
    options.drafts = o->drafts;
    return engine_create(&m->drafting, o->model, &options, e);
}

static bool same(const struct token_list *a, const struct token_list *b)
{
    return a->n == b->n && (a->n == 0 || memcmp(a->ids, b->ids, a->n * sizeof *a->ids) == 0);
}

/* Whichever goes first may find the caches colder: they take turns. */
static bool run_prompt(struct measuring *m, const struct token_list *prompt, struct err *e)
{
    const struct speculation_options *o = m->o;
    struct speculation_result *r = m->r;
    struct generation g = { .max_tokens = o->max_tokens,
                            .stop_tokens = o->stop_tokens,
                            .n_stop_tokens = o->n_stop_tokens };
    struct generated out[2] = { 0 };
    bool ok = true;
    for (int i = 0; ok && i < 2; i++) {
        int which = (int)((r->prompts + i) % 2);
        g.speculation = which ? &r->speculation : NULL;
        ok = generate(&out[which], which ? m->drafting : m->plain, o->tokenizer, prompt->ids,
                      (int64_t)prompt->n, &g, e);
    }
    r->prompts++;
    r->prompt_tokens += (int64_t)prompt->n;
    r->tokens += (int64_t)out[0].tokens.n;
    r->plain_seconds += out[0].decode_seconds;
    r->seconds += out[1].decode_seconds;
    r->plain_prefill_seconds += out[0].prefill_seconds;
    r->prefill_seconds += out[1].prefill_seconds;
    r->different += !same(&out[0].tokens, &out[1].tokens);
    free(out[0].tokens.ids);
    free(out[1].tokens.ids);
    return ok;
}

static bool read_prompt(struct token_list *list, const struct tokenizer *t, const char *line, struct err *e)
{
    json_error_t fault;
    json_t *o = json_loads(line, 0, &fault);
    const char *text = json_string_value(json_object_get(o, "prompt"));
    bool ok = text ? tokenizer_encode(t, list, text, strlen(text), 0, e)
                   : err_set(e, ERR_FORMAT, "expected an object with a string \"prompt\"%s%s", o ? "" : ": ",
                             o ? "" : fault.text);
    json_decref(o);
    return ok;
}

static bool each_prompt(struct measuring *m, FILE *f,
                        bool (*work)(struct measuring *m, const struct token_list *prompt, int64_t *longest,
                                     struct err *e),
                        int64_t *longest, struct err *e)
{
    char *line = NULL;
    size_t size = 0;
    int64_t n = 0;
    bool ok = true;
    rewind(f);
    while (ok && (m->o->max_prompts == 0 || n < m->o->max_prompts) && getline(&line, &size, f) >= 0) {
        struct token_list prompt = { 0 };
        ok = read_prompt(&prompt, m->o->tokenizer, line, e) &&
             (prompt.n > 0 || err_set(e, ERR_FORMAT, "the prompt is empty")) && work(m, &prompt, longest, e);
        if (!ok) err_note(e, "line %lld", (long long)n + 1);
        free(prompt.ids);
        n++;
    }
    free(line);
    return ok;
}

static bool note_length(struct measuring *m, const struct token_list *prompt, int64_t *longest, struct err *e)
{
    (void)m, (void)e;
    if ((int64_t)prompt->n > *longest) *longest = (int64_t)prompt->n;
    return true;
}

static bool measure(struct measuring *m, const struct token_list *prompt, int64_t *longest, struct err *e)
{
    (void)longest;
    return run_prompt(m, prompt, e);
}

bool speculation_measure(struct speculation_result *r, const struct speculation_options *o, struct err *e)
{
    *r = (struct speculation_result){ 0 };
    struct measuring m = { .o = o, .r = r };
    int64_t longest = 0;
    speculation_init(&r->speculation, o->drafts);
    r->speculation.is_fixed = o->is_fixed;
    FILE *f = fopen(o->prompts, "r");
    if (!f) return err_errno(e, o->prompts);
    bool ok = (each_prompt(&m, f, note_length, &longest, e) &&
               (longest > 0 || err_set(e, ERR_FORMAT, "no prompts")) && create_engines(&m, longest, e) &&
               each_prompt(&m, f, measure, &longest, e)) ||
              err_note(e, "%s", o->prompts);
    fclose(f);
    engine_free(m.plain);
    engine_free(m.drafting);
    return ok;
}
