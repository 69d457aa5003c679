#include "eval/load_stream.h"
#include "base/doc.h"
#include <stdlib.h>
#include <string.h>

enum { LINE_BYTES_MAX = 16 << 20 };

void load_answer_deinit(struct load_answer *a)
{
    free(a->error);
    free(a->itl);
    free(a->text);
    *a = (struct load_answer){ 0 };
}

void load_stream_deinit(struct load_stream *s)
{
    free(s->line);
    *s = (struct load_stream){ 0 };
}

/* Room for `more` items of `size` bytes after `used` ones. */
static bool grow(void *array, size_t *capacity, size_t used, size_t more, size_t size, struct err *e)
{
    void **to = array;
    if (used + more <= *capacity) return true;
    size_t n = 2 * (used + more);
    void *bigger = realloc(*to, n * size);
    if (!bigger) return err_memory(e, "answer", n * size);
    *to = bigger;
    *capacity = n;
    return true;
}

static bool add_text(struct load_answer *a, const json_t *piece, struct err *e)
{
    size_t n = json_string_length(piece);
    if (!n) return true;
    if (!grow(&a->text, &a->text_capacity, a->text_bytes, n + 1, 1, e)) return false;
    memcpy(a->text + a->text_bytes, json_string_value(piece), n);
    a->text_bytes += n;
    a->text[a->text_bytes] = '\0';
    return true;
}

static bool add_time(struct load_answer *a, double now, struct err *e)
{
    double since = now - a->start;
    if (a->ttft == 0) {
        a->ttft = a->latency = since;
        return true;
    }
    size_t capacity = (size_t)a->itl_capacity;
    if (!grow(&a->itl, &capacity, (size_t)a->n_itl, 1, sizeof *a->itl, e)) return false;
    a->itl_capacity = (int64_t)capacity;
    a->itl[a->n_itl++] = since - a->latency;
    a->latency = since;
    return true;
}

/* Servers call reasoning one or the other, or both; it is one text. */
static const json_t *reasoning_of(const json_t *delta)
{
    const json_t *r = json_object_get(delta, "reasoning");
    return json_string_length(r) ? r : json_object_get(delta, "reasoning_content");
}

static bool take_choice(struct load_stream *s, struct load_answer *a, const json_t *choice, double now,
                        struct err *e)
{
    const json_t *delta = json_object_get(choice, "delta"), *text = json_object_get(choice, "text");
    bool finished = json_is_string(json_object_get(choice, "finish_reason"));
    if (finished) s->is_done = true;
    const json_t *content = json_object_get(delta, "content"), *reasoning = reasoning_of(delta);
    /* a completion's text may be empty where a token is half a character */
    bool token = delta ? json_string_length(content) || json_string_length(reasoning) ||
                             json_array_size(json_object_get(delta, "tool_calls"))
                       : json_string_length(text) || (text && !finished);
    return (!token || add_time(a, now, e)) && add_text(a, text, e) && add_text(a, reasoning, e) &&
           add_text(a, content, e);
}

static void take_usage(struct load_answer *a, const json_t *usage)
{
    const json_t *in = json_object_get(usage, "prompt_tokens"),
                 *out = json_object_get(usage, "completion_tokens");
    if (json_is_integer(in)) a->prompt_tokens = json_integer_value(in);
    if (json_is_integer(out)) a->output_tokens = json_integer_value(out);
}

static bool take_event(struct load_stream *s, struct load_answer *a, const char *text, size_t n, double now,
                       struct err *e)
{
    json_t *event;
    if (n == 6 && memcmp(text, "[DONE]", 6) == 0) {
        s->is_done = true;
        return true;
    }
    if (!doc_parse(&event, text, n, e)) return err_note(e, "an event of the stream");
    const json_t *fault = json_object_get(event, "error"),
                 *choice = json_array_get(json_object_get(event, "choices"), 0);
    bool ok = true;
    if (json_is_object(fault)) {
        const char *message = json_string_value(json_object_get(fault, "message"));
        ok = err_set(e, ERR_IO, "in the stream: %s", message ? message : "an error without a message");
    }
    if (json_is_object(json_object_get(event, "usage"))) take_usage(a, json_object_get(event, "usage"));
    ok = ok && (!choice || take_choice(s, a, choice, now, e));
    json_decref(event);
    return ok;
}

static bool take_line(struct load_stream *s, struct load_answer *a, const char *line, size_t n, double now,
                      struct err *e)
{
    if (n && line[n - 1] == '\r') n--;
    if (n < 5 || memcmp(line, "data:", 5) != 0) return true;
    size_t skip = n > 5 && line[5] == ' ' ? 6 : 5;
    return take_event(s, a, line + skip, n - skip, now, e);
}

bool load_stream_push(struct load_stream *s, struct load_answer *a, const char *data, size_t n, double now,
                      struct err *e)
{
    while (n) {
        const char *end = memchr(data, '\n', n);
        size_t part = end ? (size_t)(end - data) : n;
        if (s->bytes + part > LINE_BYTES_MAX)
            return err_set(e, ERR_LIMIT, "a line of the stream is longer than 16 MiB");
        if (!end || s->bytes) {
            if (!grow(&s->line, &s->capacity, s->bytes, part, 1, e)) return false;
            memcpy(s->line + s->bytes, data, part);
            s->bytes += part;
        }
        if (!end) return true;
        bool ok = s->bytes ? take_line(s, a, s->line, s->bytes, now, e) : take_line(s, a, data, part, now, e);
        s->bytes = 0;
        if (!ok) return false;
        data += part + 1;
        n -= part + 1;
    }
    return true;
}

bool load_stream_end(const struct load_stream *s, const struct load_answer *a, struct err *e)
{
    if (!s->is_done) return err_set(e, ERR_IO, "the stream ended without a finish_reason and without [DONE]");
    return a->ttft > 0 || err_set(e, ERR_IO, "the answer has no token");
}
