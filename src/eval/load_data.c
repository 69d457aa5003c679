#include "eval/load_data.h"
#include "base/doc.h"
#include "base/file.h"
#include "engine/sample.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    SHAREGPT_TOKENS_MIN = 4,
    SHAREGPT_PROMPT_MAX = 1024,
    SHAREGPT_TOTAL_MAX = 2048,
    LINES_OUTPUT_TOKENS = 256
};
static const size_t FILE_BYTES_MAX = (size_t)2 << 30;

static const char *const words[] = {
    "the",   "of",     "and",    "to",    "in",    "is",      "that",    "for",    "it",    "as",    "with",
    "was",   "on",     "be",     "by",    "this",  "are",     "from",    "at",     "which", "have",  "or",
    "an",    "not",    "you",    "all",   "can",   "one",     "has",     "but",    "had",   "more",  "their",
    "time",  "will",   "its",    "about", "out",   "up",      "into",    "them",   "only",  "some",  "then",
    "other", "these",  "two",    "may",   "like",  "new",     "over",    "such",   "now",   "after", "first",
    "also",  "any",    "people", "most",  "where", "must",    "through", "back",   "years", "way",   "well",
    "down",  "just",   "good",   "each",  "those", "how",     "great",   "little", "own",   "make",  "day",
    "under", "found",  "long",   "world", "still", "between", "life",    "should", "here",  "year",  "take",
    "home",  "school", "part",   "high",  "small", "place",
};
enum { N_WORDS = sizeof words / sizeof *words };

static int64_t draw(uint64_t seed, uint64_t *counter, int64_t n)
{
    return (int64_t)(sample_uniform(seed, (*counter)++) * (double)n);
}

static void write_words(FILE *f, int64_t n, bool first, uint64_t seed, uint64_t *counter)
{
    for (int64_t i = 0; i < n; i++)
        fprintf(f, "%s%s", first && i == 0 ? "" : " ", words[draw(seed, counter, N_WORDS)]);
}

/* Around `n`, uniform. */
static int64_t length_near(int64_t n, double ratio, uint64_t seed, uint64_t *counter)
{
    int64_t low = (int64_t)((double)n * (1 - ratio)), high = (int64_t)((double)n * (1 + ratio));
    low = low < 1 ? 1 : low;
    return low >= high ? low : low + draw(seed, counter, high - low + 1);
}

static bool random_prompt(struct load_prompt *p, const struct load_data_options *o, uint64_t *counter,
                          struct err *e)
{
    size_t bytes;
    uint64_t shared = 0; /* all prefixes are the same words */
    int64_t own = length_near(o->input_tokens, o->range_ratio, o->seed, counter);
    *p = (struct load_prompt){ .prompt_tokens = o->prefix_tokens + own,
                               .output_tokens =
                                   length_near(o->output_tokens, o->range_ratio, o->seed, counter) };
    FILE *f = open_memstream(&p->text, &bytes);
    if (!f) return err_memory(e, "prompt", 0);
    write_words(f, o->prefix_tokens, true, o->seed + 1, &shared);
    write_words(f, own, o->prefix_tokens == 0, o->seed, counter);
    return fclose(f) == 0 || err_memory(e, "prompt", bytes);
}

static bool make_random(struct load_data *d, const struct load_data_options *o, struct err *e)
{
    uint64_t counter = 0;
    for (; d->n < o->n; d->n++)
        if (!random_prompt(&d->items[d->n], o, &counter, e)) return false;
    return true;
}

static bool count_tokens(int64_t *n, const struct tokenizer *t, const char *text, struct err *e)
{
    struct token_list l = { 0 };
    bool ok = tokenizer_encode(t, &l, text, strlen(text), TOKENIZE_DATA, e);
    *n = (int64_t)l.n;
    free(l.ids);
    return ok;
}

static bool is_usable(int64_t in, int64_t out, const struct load_data_options *o)
{
    return in >= SHAREGPT_TOKENS_MIN && (o->output_tokens || out >= SHAREGPT_TOKENS_MIN) &&
           in <= SHAREGPT_PROMPT_MAX && in + out <= SHAREGPT_TOTAL_MAX;
}

static bool take_conversation(struct load_data *d, const json_t *item, const struct load_data_options *o,
                              struct err *e)
{
    const json_t *turns = json_object_get(item, "conversations");
    const char *ask = json_string_value(json_object_get(json_array_get(turns, 0), "value")),
               *reply = json_string_value(json_object_get(json_array_get(turns, 1), "value"));
    int64_t in = -1, out = o->output_tokens;
    if (!ask || !reply) return true;
    if (o->tokenizer) {
        if (!count_tokens(&in, o->tokenizer, ask, e)) return false;
        if (!out && !count_tokens(&out, o->tokenizer, reply, e)) return false;
        if (!is_usable(in, out, o)) return true;
    }
    struct load_prompt *p = &d->items[d->n];
    *p = (struct load_prompt){ .text = strdup(ask), .prompt_tokens = in, .output_tokens = out };
    if (!p->text) return err_memory(e, "prompt", strlen(ask));
    d->n++;
    return true;
}

/* Fisher-Yates. */
static bool shuffled(size_t **out, size_t n, uint64_t seed, struct err *e)
{
    uint64_t counter = 0;
    size_t *order = calloc(n ? n : 1, sizeof *order);
    if (!order) return err_memory(e, "order", n * sizeof *order);
    for (size_t i = 0; i < n; i++) {
        size_t k = (size_t)draw(seed, &counter, (int64_t)i + 1);
        order[i] = order[k];
        order[k] = i;
    }
    *out = order;
    return true;
}

static bool read_sharegpt(struct load_data *d, const struct load_data_options *o, struct err *e)
{
    json_t *all;
    size_t *order = NULL;
    if (!o->tokenizer && !o->output_tokens)
        return err_set(e, ERR_ARGUMENT,
                       "lengths of ShareGPT's answers need a tokenizer or a fixed number of output tokens");
    if (!doc_load(&all, o->path, FILE_BYTES_MAX, e)) return false;
    size_t n = json_array_size(all);
    bool ok = json_is_array(all) || err_set(e, ERR_FORMAT, "%s: expected an array of conversations", o->path);
    ok = ok && shuffled(&order, n, o->seed, e);
    for (size_t i = 0; ok && i < n && d->n < o->n; i++)
        ok = take_conversation(d, json_array_get(all, order[i]), o, e) ||
             err_note(e, "%s: conversation %zu", o->path, order[i] + 1);
    free(order);
    json_decref(all);
    return ok;
}

static bool take_line(struct load_data *d, const char *text, size_t bytes, const struct load_data_options *o,
                      struct err *e)
{
    json_t *v;
    if (!doc_parse(&v, text, bytes, e)) return false;
    const json_t *prompt = json_object_get(v, "prompt");
    json_t *messages = json_object_get(v, "messages");
    struct load_prompt *p = &d->items[d->n];
    *p = (struct load_prompt){ .prompt_tokens = -1, .output_tokens = LINES_OUTPUT_TOKENS };
    bool ok = json_is_string(prompt) || json_array_size(messages) ||
              err_set(e, ERR_FORMAT, "expected \"prompt\", a string, or \"messages\", an array");
    ok = ok && doc_int_or(&p->output_tokens, v, "", "output_tokens", 1, 1 << 24, e);
    if (o->output_tokens) p->output_tokens = o->output_tokens;
    if (ok && json_is_string(prompt)) {
        p->text = strdup(json_string_value(prompt));
        ok = p->text || err_memory(e, "prompt", json_string_length(prompt));
    } else if (ok)
        p->messages = json_incref(messages);
    if (ok) d->n++;
    json_decref(v);
    return ok;
}

static bool read_lines(struct load_data *d, const struct load_data_options *o, struct err *e)
{
    FILE *f = fopen(o->path, "r");
    if (!f) return err_errno(e, o->path);
    char *line = NULL;
    size_t size = 0;
    ssize_t n;
    bool ok = true;
    for (long long number = 1; ok && d->n < o->n && (n = getline(&line, &size, f)) > 0; number++)
        if (line[strspn(line, " \t\r\n")])
            ok = take_line(d, line, (size_t)n, o, e) || err_note(e, "%s: line %lld", o->path, number);
    if (ok && ferror(f)) ok = err_errno(e, o->path);
    free(line);
    fclose(f);
    return ok;
}

bool load_data_create(struct load_data *d, const struct load_data_options *o, struct err *e)
{
    static bool (*const makers[])(struct load_data *, const struct load_data_options *,
                                  struct err *) = { make_random, read_sharegpt, read_lines };
    *d = (struct load_data){ .items = calloc((size_t)o->n, sizeof *d->items) };
    if (!d->items) return err_memory(e, "prompts", (uint64_t)o->n * sizeof *d->items);
    if (makers[o->kind](d, o, e) && (d->n > 0 || err_set(e, ERR_FORMAT, "%s: no usable prompt", o->path)))
        return true;
    load_data_free(d);
    return false;
}

void load_data_free(struct load_data *d)
{
    for (int64_t i = 0; i < d->n; i++) {
        free(d->items[i].text);
        json_decref(d->items[i].messages);
    }
    free(d->items);
    *d = (struct load_data){ 0 };
}

static json_t *messages_of(const struct load_prompt *p)
{
    if (p->messages) return json_incref(p->messages);
    return json_pack("[{s:s, s:s}]", "role", "user", "content", p->text);
}

char *load_data_body(const struct load_prompt *p, const char *model, bool chat, const json_t *extra)
{
    if (!chat && !p->text) return NULL;
    json_t *o =
        json_pack("{s:s, s:b, s:{s:b}}", "model", model, "stream", 1, "stream_options", "include_usage", 1);
    int failed = chat ? json_object_set_new(o, "messages", messages_of(p))
                      : json_object_set_new(o, "prompt", json_string(p->text));
    failed |=
        json_object_set_new(o, chat ? "max_completion_tokens" : "max_tokens", json_integer(p->output_tokens));
    if (extra) failed |= json_object_update(o, (json_t *)extra);
    char *text = failed ? NULL : json_dumps(o, JSON_COMPACT);
    json_decref(o);
    return text;
}
