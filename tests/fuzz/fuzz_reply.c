/* Input: a byte that says how the rest is cut and whether it begins in reasoning, then generated text. The
 * events' texts are the input, and the same events come when the text arrives at once. */
#include "tokenizer/reply.h"
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static const char tools_text[] = "[{\"function\":{\"name\":\"f\",\"parameters\":{\"properties\":{\"i\":{"
                                 "\"type\":\"integer\"},\"x\":{\"type\":"
                                 "\"number\"},\"b\":{\"type\":\"boolean\"},\"o\":{\"type\":\"object\"},\"n\":"
                                 "{\"anyOf\":[{\"type\":\"null\"},"
                                 "{\"type\":\"array\"}]}}}}}]";

/* The kinds of events, one byte of text each but for calls, and how far the texts have come. */
struct seen {
    const uint8_t *text;
    size_t n, bytes;
    uint8_t *kinds;
};

static void require(bool claim)
{
    if (!claim) abort();
}

static void take(void *ctx, const struct reply_event *e)
{
    struct seen *s = ctx;
    require(e->bytes > 0 && e->bytes <= s->bytes - s->n && memcmp(s->text + s->n, e->text, e->bytes) == 0);
    require((e->kind == REPLY_CALL) == (e->name != NULL) && (!e->name || json_is_object(e->arguments)));
    memset(s->kinds + s->n, e->kind, e->bytes);
    if (e->kind == REPLY_CALL) s->kinds[s->n] = 9; /* two calls in a row are two */
    s->n += e->bytes;
}

static void parse(struct seen *s, const json_t *tools, bool in_reasoning, size_t piece)
{
    struct reply_options o = { .in_reasoning = in_reasoning, .tools = tools, .event = take, .ctx = s };
    struct reply *p;
    struct err e = { 0 };
    require(reply_create(&p, &o, &e));
    for (size_t at = 0; at < s->bytes; at += piece)
        require(reply_feed(p, (const char *)s->text + at, piece < s->bytes - at ? piece : s->bytes - at, &e));
    require(reply_finish(p, &e) && s->n == s->bytes);
    reply_free(p);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static json_t *tools;
    if (!tools) tools = json_loads(tools_text, 0, NULL);
    if (bytes < 2) return 0;
    struct seen once = { data + 1, 0, bytes - 1, malloc(bytes) },
                cut = { data + 1, 0, bytes - 1, malloc(bytes) };
    require(tools && once.kinds && cut.kinds);
    parse(&once, tools, data[0] & 1, bytes);
    parse(&cut, tools, data[0] & 1, 1 + data[0] / 2 % 64);
    require(memcmp(once.kinds, cut.kinds, bytes - 1) == 0);
    free(once.kinds);
    free(cut.kinds);
    return 0;
}
