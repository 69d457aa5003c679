#include "tokenizer/reply.h"
#include "tokenizer/reply_preview.h"
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

static const char THINK[] = "<think>", END_THINK[] = "</think>", CALL[] = "<tool_call>",
                  FUNCTION[] = "<function=";

enum state { STATE_BEGIN, STATE_REASONING, STATE_CONTENT, STATE_CALL };

struct reply {
    struct reply_options options;
    enum state state;
    bool has_text;      /* of the kind that the state collects */
    bool follows_think; /* newlines come before the content */
    int calls;
    char *data; /* what came and was not handed out: [begin, end) */
    size_t begin, end, capacity;
    size_t blanks;             /* STATE_CALL: in front of it */
    struct call_search search; /* STATE_CALL */
    struct call_preview preview;
    struct err *e;
};

bool reply_create(struct reply **out, const struct reply_options *o, struct err *e)
{
    struct reply *p = *out = calloc(1, sizeof *p);
    if (!p) return err_memory(e, "a reply", sizeof *p);
    p->options = *o;
    p->state = o->in_reasoning ? STATE_BEGIN : STATE_CONTENT;
    return true;
}

void reply_free(struct reply *p)
{
    if (!p) return;
    call_preview_deinit(&p->preview);
    free(p->data);
    free(p);
}

int reply_calls(const struct reply *p)
{
    return p->calls;
}

static struct span held(const struct reply *p)
{
    return (struct span){ p->data + p->begin, p->end - p->begin };
}

/* Hands out the first n bytes of what is held. */
static void hand_out(struct reply *p, enum reply_kind kind, size_t n)
{
    if (n == 0) return;
    const struct reply_event event = { .kind = kind, .text = p->data + p->begin, .bytes = n };
    p->options.event(p->options.ctx, &event);
    p->begin += n;
    if (kind != REPLY_MARK) p->has_text = true;
}

static void change(struct reply *p, enum state state)
{
    p->state = state;
    p->has_text = false;
}

enum match { MATCH_NO, MATCH_MAYBE, MATCH_YES }; /* maybe: more text will tell */

static enum match match(struct span s, const char *marker)
{
    size_t n = strlen(marker);
    if (s.bytes >= n) return memcmp(s.at, marker, n) == 0 ? MATCH_YES : MATCH_NO;
    return s.bytes == 0 || memcmp(s.at, marker, s.bytes) == 0 ? MATCH_MAYBE : MATCH_NO;
}

/* <tool_call>, blanks, <function= */
static enum match match_call_in_reasoning(struct span s)
{
    enum match m = match(s, CALL);
    if (m != MATCH_YES) return m;
    return match(call_skip_blanks(span_from(s, strlen(CALL))), FUNCTION);
}

static enum match better(enum match a, enum match b)
{
    return a > b ? a : b;
}

static enum match match_end_of_reasoning(struct span s)
{
    return better(match(s, END_THINK), match_call_in_reasoning(s));
}

static enum match match_call(struct span s)
{
    return better(match(s, CALL), match(s, FUNCTION));
}

/* Where the first marker begins, or what may become one when more comes; s.bytes without. */
static size_t find_marker(enum match *found, struct span s, enum match (*matches)(struct span), bool final)
{
    for (size_t i = 0; i < s.bytes; i++) {
        const char *next = memchr(s.at + i, '<', s.bytes - i);
        if (!next) break;
        i = (size_t)(next - s.at);
        *found = matches(span_from(s, i));
        if (*found == MATCH_YES || (*found == MATCH_MAYBE && !final)) return i;
    }
    *found = MATCH_NO;
    return s.bytes;
}

static size_t without_end(struct span s, size_t n, const char *blanks)
{
    while (n > 0 && strchr(blanks, s.at[n - 1]) && s.at[n - 1]) n--;
    return n;
}

static size_t newlines(struct span s)
{
    size_t n = 0;
    while (n < s.bytes && s.at[n] == '\n') n++;
    return n;
}

/* Each step returns whether another one is to follow; false waits for more text. */
static bool step_begin(struct reply *p, bool final)
{
    enum match m = match(held(p), THINK);
    if (m == MATCH_MAYBE && !final) return false;
    if (m == MATCH_YES) hand_out(p, REPLY_MARK, strlen(THINK));
    change(p, STATE_REASONING);
    return true;
}

static bool step_reasoning(struct reply *p, bool final)
{
    enum match found;
    if (!p->has_text) hand_out(p, REPLY_MARK, newlines(held(p)));
    struct span s = held(p);
    size_t at = find_marker(&found, s, match_end_of_reasoning, final), text = without_end(s, at, "\n");
    hand_out(p, REPLY_REASONING, text);
    if (found != MATCH_YES) {
        if (final) hand_out(p, REPLY_MARK, held(p).bytes);
        return false;
    }
    hand_out(p, REPLY_MARK, at - text);
    if (match(held(p), END_THINK) == MATCH_YES) hand_out(p, REPLY_MARK, strlen(END_THINK));
    change(p, STATE_CONTENT);
    p->follows_think = true;
    return true;
}

static bool step_content(struct reply *p, bool final)
{
    enum match found;
    if (p->follows_think && !p->has_text) hand_out(p, REPLY_MARK, newlines(held(p)));
    struct span s = held(p);
    size_t at = find_marker(&found, s, match_call, final), text = without_end(s, at, " \t\r\n");
    hand_out(p, REPLY_CONTENT, text);
    if (found != MATCH_YES) {
        /* Blanks behind a call are nobody's; those that end the content belong to it. */
        if (final) hand_out(p, p->has_text || p->calls == 0 ? REPLY_CONTENT : REPLY_MARK, held(p).bytes);
        return false;
    }
    p->blanks = at - text;
    p->state = STATE_CALL;
    p->search = (struct call_search){ 0 };
    call_preview_deinit(&p->preview);
    return true;
}

static void hand_out_call(struct reply *p, const struct call *c)
{
    hand_out(p, REPLY_MARK, p->blanks);
    const struct reply_event event = { .kind = REPLY_CALL,
                                       .text = p->data + p->begin,
                                       .bytes = c->bytes,
                                       .name = c->name,
                                       .arguments = c->arguments,
                                       .is_cut = c->is_cut };
    p->options.event(p->options.ctx, &event);
    p->begin += c->bytes;
    p->calls++;
    p->follows_think = false;
    change(p, STATE_CONTENT);
}

/* What is certain of a call of which s has come. */
static void hand_out_preview(struct reply *p, struct span s)
{
    static const enum reply_kind kinds[] = { REPLY_CALL_BEGINS, REPLY_ARGUMENT, REPLY_ARGUMENT,
                                             REPLY_ARGUMENT_PART, REPLY_ARGUMENT_ENDS };
    struct call_news news;
    while (call_preview_next(&p->preview, &news, s, p->options.tools)) {
        const struct reply_event event = { .kind = kinds[news.kind],
                                           .name = news.name,
                                           .value = news.value,
                                           .part = news.text.at,
                                           .part_bytes = news.text.bytes };
        p->options.event(p->options.ctx, &event);
    }
}

static bool step_call(struct reply *p, bool final)
{
    struct call c = { 0 };
    struct span s = span_from(held(p), p->blanks);
    switch (call_find(&c, &p->search, s, p->options.tools, final, p->e)) {
    case CALL_WAIT: hand_out_preview(p, s); return false;
    case CALL_FAILED: return false;
    case CALL_FOUND:
        hand_out_preview(p, (struct span){ s.at, c.bytes });
        hand_out_call(p, &c);
        break;
    case CALL_NONE:
        hand_out(p, REPLY_CONTENT, p->blanks + 1); /* and its first character; the rest is looked at anew */
        p->state = STATE_CONTENT;
        break;
    }
    call_preview_deinit(&p->preview);
    call_deinit(&c);
    return true;
}

static bool step(struct reply *p, bool final)
{
    switch (p->state) {
    case STATE_BEGIN: return step_begin(p, final);
    case STATE_REASONING: return step_reasoning(p, final);
    case STATE_CONTENT: return step_content(p, final);
    default: return step_call(p, final);
    }
}

bool reply_feed(struct reply *p, const char *text, size_t bytes, struct err *e)
{
    if (bytes == 0) return true;
    if (p->begin) memmove(p->data, p->data + p->begin, p->end - p->begin);
    p->end -= p->begin;
    p->begin = 0;
    if (p->capacity - p->end < bytes) {
        size_t capacity = 2 * (p->end + bytes);
        char *grown = realloc(p->data, capacity);
        if (!grown) return err_memory(e, "a reply", capacity);
        p->data = grown;
        p->capacity = capacity;
    }
    memcpy(p->data + p->end, text, bytes);
    p->end += bytes;
    struct err own = { 0 };
    p->e = &own;
    while (step(p, false)) continue;
    p->e = NULL;
    return own.code == ERR_NONE || err_set(e, own.code, "%s", own.text);
}

bool reply_finish(struct reply *p, struct err *e)
{
    struct err own = { 0 };
    p->e = &own;
    while (p->begin < p->end && step(p, true)) continue;
    p->e = NULL;
    return own.code == ERR_NONE || err_set(e, own.code, "%s", own.text);
}
