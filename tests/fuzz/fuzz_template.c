/* Input: a template, rendered with a conversation in which every kind of value stands. It is refused with a
 * message, or it gives text or a message, within a few MB of memory. */
#include "tokenizer/jinja/jinja.h"
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static const char conversation[] =
    "[{\"role\":\"system\",\"content\":\" be brief \"},{\"role\":\"user\",\"content\":[{\"type\":\"image\"},"
    "{\"type\":\"text\",\"text\":\"K\u00f6ln \u2028\"}]},{\"role\":\"assistant\",\"content\":null,"
    "\"reasoning_content\":\"why\",\"tool_calls\":[{\"function\":{\"name\":\"f\",\"arguments\":{\"a\":1,"
    "\"b\":[2.5,"
    "true,null,{\"c\":\"\\u0000\"}]}}}]},{\"role\":\"tool\",\"content\":\"4\"},"
    "{\"role\":\"user\",\"content\":\"<think>x</think>y\"}]";

static void require(bool claim)
{
    if (!claim) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static json_t *messages;
    static const struct jinja_limits limits = { .memory = 4 << 20, .steps = 20000 };
    struct jinja *t;
    struct err e = { 0 };
    char *text;
    size_t n;
    if (!messages) messages = json_loads(conversation, JSON_ALLOW_NUL, NULL);
    require(messages);
    const struct jinja_variable variables[] = { { "messages", messages },
                                                { "tools", json_array_get(messages, 1) },
                                                { "add_generation_prompt", json_true() },
                                                { "s",
                                                  json_object_get(json_array_get(messages, 0), "content") } };
    if (!jinja_create(&t, (const char *)data, bytes, &e)) {
        require(e.code != ERR_NONE && e.text[0] && !t);
        return 0;
    }
    if (jinja_render(&text, &n, t, variables, 4, &limits, &e))
        require(text && n <= limits.memory && text[n] == 0);
    else
        require(e.code != ERR_NONE && !text);
    free(text);
    jinja_free(t);
    return 0;
}
