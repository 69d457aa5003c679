/* Input: a byte that says how the rest is cut and whether it begins in reasoning, then generated text. The
 * events' texts are the input, and the same events come when the text arrives at once. */
#include "tokenizer/reply.h"
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static const char tools_text[] = "[{\"function\":{\"name\":\"f\",\"parameters\":{\"properties\":{\"i\":{"
                                 "\"type\":\"integer\"},\"x\":{\"type\":"
                                 "\"number\"},\"b\":{\"type\":\"boolean\"},\"o\":{\"type\":\"object\"},\"s\":"
                                 "{\"type\":[\"null\",\"string\"]},\"n\":"
                                 "{\"anyOf\":[{\"type\":\"null\"},"
                                 "{\"type\":\"array\"}]}}}}}]";

/* The kinds of events, one byte of text each but for calls, and how far the texts have come. */
struct seen {
    const uint8_t *text;
    size_t n, bytes;
    uint8_t *kinds;
    json_t *ahead;     /* what came of a call before it, name by name; NULL: nothing */
    char text_of[256]; /* the parameter whose text comes in parts */
    size_t n_ahead;    /* bytes of it, of all calls */
};

static void require(bool claim)
{
    if (!claim) abort();
}

static void take_ahead(struct seen *s, const struct reply_event *e)
{
    const json_t *text = json_object_get(s->ahead, s->text_of);
    require(e->bytes == 0 && (e->kind == REPLY_CALL_BEGINS) == !s->ahead);
    s->n_ahead += e->part_bytes + (e->kind != REPLY_ARGUMENT_PART);
    if (e->kind == REPLY_CALL_BEGINS) {
        s->ahead = json_object();
    } else if (e->kind == REPLY_ARGUMENT) {
        require(strlen(e->name) < sizeof s->text_of && !json_object_get(s->ahead, e->name));
        strcpy(s->text_of, e->name);
        json_object_set_new(s->ahead, e->name, e->value ? json_deep_copy(e->value) : json_string(""));
    } else if (e->kind == REPLY_ARGUMENT_PART) {
        size_t n = json_string_length(text);
        char *all = malloc(n + e->part_bytes);
        require(all && e->part_bytes > 0);
        memcpy(all, json_string_value(text), n);
        memcpy(all + n, e->part, e->part_bytes);
        require(json_object_set_new(s->ahead, s->text_of, json_stringn(all, n + e->part_bytes)) == 0);
        free(all);
    }
}

/* What came ahead is how the arguments begin: all but the last value whole, a text perhaps not to its end. */
static void check_ahead(struct seen *s, const json_t *arguments)
{
    void *at = json_object_iter((json_t *)arguments);
    const char *key;
    json_t *value;
    json_object_foreach(s->ahead, key, value)
    {
        const json_t *whole = json_object_iter_value(at);
        require(at && strcmp(json_object_iter_key(at), key) == 0);
        require(json_equal(value, whole) ||
                (strcmp(key, s->text_of) == 0 && json_string_length(value) <= json_string_length(whole) &&
                 memcmp(json_string_value(value), json_string_value(whole), json_string_length(value)) == 0));
        at = json_object_iter_next((json_t *)arguments, at);
    }
    json_decref(s->ahead);
    s->ahead = NULL;
}

static void take(void *ctx, const struct reply_event *e)
{
    struct seen *s = ctx;
    if (e->kind > REPLY_CALL) {
        take_ahead(s, e);
        return;
    }
    if (e->kind == REPLY_CALL) check_ahead(s, e->arguments);
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
    require(reply_finish(p, &e) && s->n == s->bytes && !s->ahead);
    reply_free(p);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static json_t *tools;
    if (!tools) tools = json_loads(tools_text, 0, NULL);
    if (bytes < 2) return 0;
    struct seen once = { .text = data + 1, .bytes = bytes - 1, .kinds = malloc(bytes) };
    struct seen cut = { .text = data + 1, .bytes = bytes - 1, .kinds = malloc(bytes) };
    require(tools && once.kinds && cut.kinds);
    parse(&once, tools, data[0] & 1, bytes);
    parse(&cut, tools, data[0] & 1, 1 + data[0] / 2 % 64);
    require(memcmp(once.kinds, cut.kinds, bytes - 1) == 0 && once.n_ahead == cut.n_ahead);
    free(once.kinds);
    free(cut.kinds);
    return 0;
}
