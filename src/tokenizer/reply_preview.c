#include "tokenizer/reply_preview.h"
#include "tokenizer/reply_tags.h"
#include "tokenizer/utf8.h"
#include <strings.h>

enum step { STEP_NEWS, STEP_ON, STEP_WAIT };

void call_preview_deinit(struct call_preview *v)
{
    json_decref(v->seen);
    json_decref(v->current);
    *v = (struct call_preview){ 0 };
}

static enum step over(struct call_preview *v)
{
    v->state = PREVIEW_OVER;
    return STEP_WAIT;
}

/* More text, or none that could help. */
static enum step wait_or_over(struct call_preview *v, enum call_result r)
{
    return r == CALL_WAIT ? STEP_WAIT : over(v);
}

/* "<parameter=KEY>", of so many bytes. */
static enum call_result parameter_at(char key[CALL_NAME_MAX], struct span s, size_t *bytes)
{
    if (may_start(s, PARAMETER)) return CALL_WAIT;
    if (!starts(s, PARAMETER)) return CALL_NONE;
    enum call_result r = call_name(key, span_from(s, strlen(PARAMETER)), bytes);
    *bytes += strlen(PARAMETER) + 1;
    return r;
}

static enum step step_head(struct call_preview *v, struct call_news *out, struct span s, const json_t *tools)
{
    struct span inside = starts(s, OPEN) ? call_skip_blanks(span_from(s, strlen(OPEN))) : s;
    size_t n = 0;
    if (may_start(inside, FUNCTION)) return STEP_WAIT;
    if (!starts(inside, FUNCTION)) return over(v);
    enum call_result r = call_name(v->function, span_from(inside, strlen(FUNCTION)), &n);
    if (r != CALL_FOUND) return wait_or_over(v, r);
    if (!call_function(tools, v->function)) return over(v);
    struct span rest = call_skip_blanks(span_from(inside, strlen(FUNCTION) + n + 1));
    v->at = s.bytes - rest.bytes;
    r = parameter_at(v->key, rest, &n);
    if (r != CALL_FOUND) return wait_or_over(v, r);
    v->state = PREVIEW_BETWEEN;
    v->seen = json_object();
    *out = (struct call_news){ .kind = CALL_NEWS_NAME, .name = v->function };
    return STEP_NEWS;
}

static enum step text_begins(struct call_preview *v, struct call_news *out)
{
    v->kind = ARGUMENT_TEXT;
    *out = (struct call_news){ .kind = CALL_NEWS_TEXT_BEGINS, .name = v->key };
    return STEP_NEWS;
}

static enum step step_between(struct call_preview *v, struct call_news *out, struct span s,
                              const json_t *parameters)
{
    struct span rest = call_skip_blanks(span_from(s, v->at));
    size_t n = 0;
    enum call_result r = parameter_at(v->key, rest, &n);
    if (r != CALL_FOUND) return wait_or_over(v, r);
    v->is_again = json_object_get(v->seen, v->key);
    if (json_object_set_new(v->seen, v->key, json_true()) != 0) return over(v);
    v->state = PREVIEW_VALUE;
    v->value = v->at = s.bytes - rest.bytes + n;
    v->kind = v->is_again ? ARGUMENT_WHOLE : call_argument_kind(parameters, v->key);
    return v->kind == ARGUMENT_TEXT ? text_begins(v, out) : STEP_ON;
}

static bool may_end(struct span s)
{
    return may_start(s, END_PARAMETER) || may_start(s, END_FUNCTION) || may_start(s, CLOSE);
}

static bool ends(struct span s)
{
    return starts(s, END_PARAMETER) || starts(s, END_FUNCTION) || starts(s, CLOSE);
}

/* Where the first tag begins at or after `from`, with a newline before it, or what may become one. */
static size_t find_end(struct span s, size_t from)
{
    for (size_t i = from; i < s.bytes; i++) {
        struct span here = span_from(s, i), next = span_from(s, i + 1);
        if (s.at[i] == '<' && (ends(here) || may_end(here))) return i;
        if (s.at[i] != '\n') continue;
        if (ends(next) || may_end(next) || starts(next, PARAMETER) || may_start(next, PARAMETER)) return i;
    }
    return s.bytes;
}

/* "null" or "none" or the beginning of it, blanks around it. */
static bool may_be_null(struct span s)
{
    s = call_trim(s);
    return s.bytes <= 4 &&
           (strncasecmp(s.at, "null", s.bytes) == 0 || strncasecmp(s.at, "none", s.bytes) == 0);
}

/* Text before `end`, of which the newline at the beginning is no part. */
static enum step more_text(struct call_preview *v, struct call_news *out, struct span s, size_t end)
{
    size_t from = v->at + (v->at == v->value && v->at < end && s.at[v->at] == '\n');
    size_t n = from < end ? utf8_valid_prefix(s.at + from, end - from) : 0;
    if (from == end) return STEP_ON;
    if (n == 0) { /* the rest of a character may come yet */
        bool may_come = end == s.bytes && utf8_scan((const unsigned char *)s.at + from, end - from) == 0;
        return may_come ? STEP_WAIT : over(v);
    }
    v->at = from + n;
    *out = (struct call_news){ .kind = CALL_NEWS_TEXT, .text = { s.at + from, n } };
    return STEP_NEWS;
}

/* A value whose closing tag is at `end`. */
static enum step value_ends(struct call_preview *v, struct call_news *out, struct span s, size_t end,
                            const json_t *parameters)
{
    v->state = PREVIEW_BETWEEN;
    v->at = end + strlen(END_PARAMETER);
    if (v->is_again) return STEP_ON;
    *out = (struct call_news){ .kind = CALL_NEWS_TEXT_ENDS };
    if (v->kind == ARGUMENT_TEXT) return STEP_NEWS;
    json_decref(v->current);
    v->current = call_argument(parameters, v->key, (struct span){ s.at + v->value, end - v->value });
    if (!v->current) return over(v);
    *out = (struct call_news){ .kind = CALL_NEWS_VALUE, .name = v->key, .value = v->current };
    return STEP_NEWS;
}

static enum step step_value(struct call_preview *v, struct call_news *out, struct span s,
                            const json_t *parameters)
{
    size_t end = find_end(s, v->at), n = 0;
    char key[CALL_NAME_MAX];
    if (v->kind == ARGUMENT_TEXT_OR_NULL && !may_be_null((struct span){ s.at + v->value, end - v->value }))
        return text_begins(v, out);
    if (v->kind == ARGUMENT_TEXT) {
        enum step step = more_text(v, out, s, end);
        if (step != STEP_ON) return step;
    }
    if (v->kind == ARGUMENT_WHOLE) v->at = end;
    struct span tag = span_from(s, end);
    if (tag.bytes && tag.at[0] == '\n') tag = span_from(tag, 1);
    if (tag.bytes == 0 || may_end(tag) || may_start(tag, PARAMETER)) return STEP_WAIT;
    if (!starts(tag, END_PARAMETER)) return over(v);
    struct span behind = call_skip_blanks(span_from(tag, strlen(END_PARAMETER)));
    enum call_result r = parameter_at(key, behind, &n);
    if (r != CALL_FOUND) return wait_or_over(v, r);
    return value_ends(v, out, s, s.bytes - tag.bytes, parameters);
}

bool call_preview_next(struct call_preview *v, struct call_news *out, struct span s, const json_t *tools)
{
    enum step step;
    do {
        const json_t *parameters = json_object_get(call_function(tools, v->function), "parameters");
        switch (v->state) {
        case PREVIEW_HEAD: step = step_head(v, out, s, tools); break;
        case PREVIEW_BETWEEN: step = step_between(v, out, s, parameters); break;
        case PREVIEW_VALUE: step = step_value(v, out, s, parameters); break;
        default: step = STEP_WAIT; break;
        }
    } while (step == STEP_ON);
    return step == STEP_NEWS;
}
