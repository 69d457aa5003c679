/* Reads a JSONL file line by line until enough samples are there. */
#include "quantize/samples.h"
#include "base/doc.h"
#include "tokenizer/chat.h"
#include "tokenizer/tokenizer.h"
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A line is held whole; a book is 1 MB, and no sample needs more than its first max_tokens. */
enum { LINE_BYTES_MAX = 256 << 20 };

struct loader {
    struct samples *samples;
    const struct samples_options *options;
    struct tokenizer *tokenizer; /* made at the first line that needs it, as is the template */
    struct chat_template *template;
    struct token_list list; /* of the current line */
    int64_t empty;
};

static bool add_text(struct loader *l, const char *text, size_t bytes, struct err *e)
{
    if (!l->tokenizer && !tokenizer_load(&l->tokenizer, l->options->model, e)) return false;
    return tokenizer_encode(l->tokenizer, &l->list, text, bytes, 0, e);
}

static bool add_messages(struct loader *l, const json_t *messages, const json_t *tools, struct err *e)
{
    char *text;
    size_t bytes;
    struct chat_options options = { .add_generation_prompt = false };
    if (!l->template && !chat_template_load(&l->template, l->options->model, e)) return false;
    if (!chat_render(&text, &bytes, l->template, messages, tools, &options, e))
        return err_note(e, "messages");
    bool ok = add_text(l, text, bytes, e);
    free(text);
    return ok;
}

static bool add_ids(struct loader *l, const json_t *ids, struct err *e)
{
    size_t n = json_array_size(ids);
    if (!json_is_array(ids)) return err_set(e, ERR_FORMAT, "input_ids: expected an array of integers");
    int32_t *grown = realloc(l->list.ids, (n + 1) * sizeof *grown);
    if (!grown) return err_memory(e, "input_ids", n * sizeof *grown);
    l->list.ids = grown;
    l->list.capacity = n + 1;
    for (l->list.n = 0; l->list.n < n; l->list.n++) {
        const json_t *v = json_array_get(ids, l->list.n);
        json_int_t id = json_integer_value(v);
        if (!json_is_integer(v) || id < 0 || id >= l->options->vocab_size)
            return err_set(e, ERR_FORMAT, "input_ids[%zu]: expected an integer from 0 to %" PRId64, l->list.n,
                           l->options->vocab_size - 1);
        l->list.ids[l->list.n] = (int32_t)id;
    }
    return true;
}

static bool add_value(struct loader *l, const json_t *line, struct err *e)
{
    const json_t *v;
    if (!json_is_object(line)) return err_set(e, ERR_FORMAT, "expected an object");
    if ((v = json_object_get(line, "input_ids"))) return add_ids(l, v, e);
    if ((v = json_object_get(line, "messages"))) return add_messages(l, v, json_object_get(line, "tools"), e);
    if (!(v = json_object_get(line, "text")))
        return err_set(e, ERR_FORMAT, "none of 'text', 'messages' and 'input_ids'");
    if (!json_is_string(v)) return err_set(e, ERR_FORMAT, "text: expected a string");
    return add_text(l, json_string_value(v), json_string_length(v), e);
}

static bool check_ids(const struct loader *l, struct err *e)
{
    for (size_t i = 0; i < l->list.n; i++)
        if (l->list.ids[i] < 0 || l->list.ids[i] >= l->options->vocab_size)
            return err_set(e, ERR_FORMAT,
                           "the tokenizer gives id %" PRId32 "; config.json has vocab_size %" PRId64,
                           l->list.ids[i], l->options->vocab_size);
    return true;
}

/* Appends the first max_tokens of the line. */
static bool keep_sample(struct loader *l, struct err *e)
{
    struct samples *s = l->samples;
    if (l->list.n == 0) {
        l->empty++;
        return true;
    }
    int64_t n = (int64_t)l->list.n < l->options->max_tokens ? (int64_t)l->list.n : l->options->max_tokens;
    size_t need = (size_t)(s->n_tokens + n);
    if (need > s->tokens_capacity) {
        int32_t *tokens = realloc(s->tokens, 2 * need * sizeof *tokens);
        if (!tokens) return err_memory(e, "calibration tokens", 2 * need * sizeof *tokens);
        s->tokens = tokens;
        s->tokens_capacity = 2 * need;
    }
    memcpy(s->tokens + s->n_tokens, l->list.ids, (size_t)n * sizeof *s->tokens);
    s->n_tokens += n;
    s->begin[++s->n] = s->n_tokens;
    if (n > s->longest) s->longest = n;
    return true;
}

static bool take_line(struct loader *l, const char *text, size_t bytes, struct err *e)
{
    json_t *line;
    if (strspn(text, " \t\r\n") == bytes) return true;
    if (bytes > LINE_BYTES_MAX)
        return err_set(e, ERR_LIMIT, "%zu bytes in a line, at most %d", bytes, LINE_BYTES_MAX);
    if (!doc_parse(&line, text, bytes, e)) return false;
    l->list.n = 0;
    bool ok = add_value(l, line, e) && check_ids(l, e) && keep_sample(l, e);
    json_decref(line);
    return ok;
}

static bool read_lines(struct loader *l, FILE *f, struct err *e)
{
    char *text = NULL;
    size_t capacity = 0;
    ssize_t bytes = 0;
    bool ok = true;
    for (int64_t at = 1; ok && l->samples->n < l->options->n; at++) {
        bytes = getline(&text, &capacity, f);
        if (bytes < 0) break;
        ok = take_line(l, text, (size_t)bytes, e) || err_note(e, "line %" PRId64, at);
    }
    if (ok && bytes < 0 && ferror(f)) ok = err_errno(e, "read");
    free(text);
    return ok;
}

static bool check_number(const struct loader *l, struct err *e)
{
    const struct samples_options *o = l->options;
    int64_t n = l->samples->n;
    if (n == 0)
        return err_set(e, ERR_FORMAT, "no samples%s", l->empty ? ": every line is empty once tokenized" : "");
    if (l->empty)
        report_warn(o->report, "%s: %" PRId64 " sample%s without tokens skipped", o->path, l->empty,
                    l->empty == 1 ? "" : "s");
    if (n < o->n)
        report_warn(o->report, "%s: %" PRId64 " calibration samples asked for, %" PRId64 " found", o->path,
                    o->n, n);
    return true;
}

bool samples_load(struct samples *s, const struct samples_options *o, struct err *e)
{
    struct loader l = { .samples = s, .options = o };
    *s = (struct samples){ .begin = calloc((size_t)o->n + 1, sizeof *s->begin) };
    if (!s->begin) return err_memory(e, "calibration samples", (uint64_t)o->n * sizeof *s->begin);
    FILE *f = fopen(o->path, "re");
    bool ok = f ? (read_lines(&l, f, e) && check_number(&l, e)) || err_note(e, "%s", o->path)
                : err_errno(e, o->path);
    if (f) fclose(f);
    tokenizer_free(l.tokenizer);
    chat_template_free(l.template);
    free(l.list.ids);
    if (!ok) samples_deinit(s);
    return ok;
}

void samples_deinit(struct samples *s)
{
    free(s->tokens);
    free(s->begin);
    *s = (struct samples){ 0 };
}
