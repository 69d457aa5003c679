/* Takes a conversation as JSON, gives the text the model was trained on: a head with the tools and the system
 * message, one block per message, and the start of the answer. Content is trimmed everywhere; reasoning of
 * turns before the last real question is left out. Source: Qwen3.6 chat_template.jinja. */
#include "tokenizer/chat.h"
#include <assert.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char TOOLS_A[] = "# Tools\n\nYou have access to the following functions:\n\n<tools>";
static const char TOOLS_B[] =
    "\n</tools>\n\n"
    "If you choose to call a function ONLY reply in the following format with NO suffix:\n\n"
    "<tool_call>\n"
    "<function=example_function_name>\n"
    "<parameter=example_parameter_1>\n"
    "value_1\n"
    "</parameter>\n"
    "<parameter=example_parameter_2>\n"
    "This is the value for the second parameter\n"
    "that can span\n"
    "multiple lines\n"
    "</parameter>\n"
    "</function>\n"
    "</tool_call>\n\n"
    "<IMPORTANT>\n"
    "Reminder:\n"
    "- Function calls MUST follow the specified format: an inner <function=...></function> block must be "
    "nested within "
    "<tool_call></tool_call> XML tags\n"
    "- Required parameters MUST be specified\n"
    "- You may provide optional reasoning for your function call in natural language BEFORE the function "
    "call, but NOT "
    "after\n"
    "- If there is no function call available, answer the question like normal with your current knowledge "
    "and do not "
    "tell the user about function calls\n"
    "</IMPORTANT>";

/* Growing text. After a failed allocation it swallows what follows; the one check is at the end. */
struct text {
    char *data;
    size_t used, size;
    bool failed;
};

/* Borrowed bytes. */
struct span {
    const char *at;
    size_t bytes;
};

struct render {
    struct text out;
    struct text content; /* the last content that had to be put together */
    long images, videos; /* seen so far in the whole conversation */
    const struct chat_options *options;
    struct err *e;
};

static bool text_reserve(struct text *t, size_t more)
{
    if (t->failed) return false;
    if (more < t->size - t->used) return true; /* one byte stays for the NUL */
    size_t size = t->size < 1024 ? 1024 : t->size;
    while (size - t->used <= more && size <= SIZE_MAX / 2) size *= 2;
    char *data = size - t->used > more ? realloc(t->data, size) : NULL;
    if (!data) {
        t->failed = true;
        return false;
    }
    t->data = data;
    t->size = size;
    return true;
}

static void put(struct text *t, struct span s)
{
    if (!text_reserve(t, s.bytes)) return;
    if (s.bytes) memcpy(t->data + t->used, s.at, s.bytes);
    t->used += s.bytes;
}

static void puts_to(struct text *t, const char *s)
{
    put(t, (struct span){ s, strlen(s) });
}

static struct span string_span(const json_t *string)
{
    return (struct span){ json_string_value(string), json_string_length(string) };
}

/* Bytes of the whitespace character (in the sense of str.strip) at the start of s, or 0. */
static size_t space_bytes(struct span s)
{
    static const char wide[][4] = { "\xc2\x85",     "\xc2\xa0",     "\xe1\x9a\x80", "\xe2\x80\xa8",
                                    "\xe2\x80\xa9", "\xe2\x80\xaf", "\xe2\x81\x9f", "\xe3\x80\x80" };
    if (s.bytes == 0) return 0;
    unsigned char c = (unsigned char)s.at[0];
    if (c < 0x80) return c == ' ' || (c >= 0x09 && c <= 0x0d) || (c >= 0x1c && c <= 0x1f);
    for (size_t i = 0; i < sizeof wide / sizeof *wide; i++) {
        size_t n = strlen(wide[i]);
        if (s.bytes >= n && memcmp(s.at, wide[i], n) == 0) return n;
    }
    bool is_general = s.bytes >= 3 && memcmp(s.at, "\xe2\x80", 2) == 0; /* U+2000 to 200A */
    return is_general && (unsigned char)s.at[2] >= 0x80 && (unsigned char)s.at[2] <= 0x8a ? 3 : 0;
}

/* Bytes of the whitespace character at the end of s, or 0. UTF-8 synchronizes itself: no tail of another
 * character looks like one of these. */
static size_t space_bytes_at_end(struct span s)
{
    for (size_t n = 1; n <= 3 && n <= s.bytes; n++)
        if (space_bytes((struct span){ s.at + s.bytes - n, n }) == n) return n;
    return 0;
}

static struct span trim(struct span s)
{
    for (size_t n; (n = space_bytes(s)) > 0;) s = (struct span){ s.at + n, s.bytes - n };
    for (size_t n; (n = space_bytes_at_end(s)) > 0;) s.bytes -= n;
    return s;
}

static struct span strip_newlines_left(struct span s)
{
    while (s.bytes && s.at[0] == '\n') s = (struct span){ s.at + 1, s.bytes - 1 };
    return s;
}

static struct span strip_newlines_right(struct span s)
{
    while (s.bytes && s.at[s.bytes - 1] == '\n') s.bytes--;
    return s;
}

static const char *find_first(struct span s, const char *what)
{
    return s.bytes ? memmem(s.at, s.bytes, what, strlen(what)) : NULL;
}

/* What follows the last `what` in s; all of s without one. */
static struct span after_last(struct span s, const char *what)
{
    size_t n = strlen(what);
    for (const char *p; (p = find_first(s, what));)
        s = (struct span){ p + n, s.bytes - (size_t)(p - s.at) - n };
    return s;
}

static bool starts_with(struct span s, const char *what)
{
    size_t n = strlen(what);
    return s.bytes >= n && memcmp(s.at, what, n) == 0;
}

static bool ends_with(struct span s, const char *what)
{
    size_t n = strlen(what);
    return s.bytes >= n && memcmp(s.at + s.bytes - n, what, n) == 0;
}

static void put_json_string(struct text *t, struct span s)
{
    static const char escaped[] = "\"\\\n\r\t\b\f", letter[] = "\"\\nrtbf";
    puts_to(t, "\"");
    for (size_t i = 0, begin = 0; i <= s.bytes; i++) {
        unsigned char c = i < s.bytes ? (unsigned char)s.at[i] : 0;
        if (i < s.bytes && c >= 0x20 && c != '"' && c != '\\') continue;
        put(t, (struct span){ s.at + begin, i - begin });
        begin = i + 1;
        if (i == s.bytes) break;
        const char *known = c ? strchr(escaped, c) : NULL;
        char code[8];
        if (known)
            snprintf(code, sizeof code, "\\%c", letter[known - escaped]);
        else
            snprintf(code, sizeof code, "\\u%04x", c);
        puts_to(t, code);
    }
    puts_to(t, "\"");
}

/* Adds one to the last digit of "-1.2345e+06"; false where the carry passes the first digit. */
static bool next_digit_up(char *number)
{
    char *p = strchr(number, 'e') - 1;
    for (; *p == '9' || *p == '.'; p--) {
        if (p == number || p[-1] == '-') return false;
        if (*p == '9') *p = '0';
    }
    ++*p;
    return true;
}

/* The fewest significant digits that read back as x, in exponent form. Above a power of two the neighbour is
 * twice as far as below it: there the shortest number that reads back may be the one after the correctly
 * rounded. */
static void shortest_digits(char *out, size_t size, double x)
{
    for (int precision = 0; precision < 17; precision++) {
        snprintf(out, size, "%.*e", precision, x);
        if (strtod(out, NULL) == x || (next_digit_up(out) && strtod(out, NULL) == x)) return;
    }
}

/* Python's repr of a finite float: shortest_digits, positional from 1e-4 to below 1e16, where powers of two
 * have so few digits that rounding x to them gives the same. */
static void put_json_real(struct text *t, double x)
{
    char digits[32], positional[48];
    shortest_digits(digits, sizeof digits, x);
    const char *mark = strchr(digits, 'e'), *point = strchr(digits, '.');
    assert(mark);
    int exponent = atoi(mark + 1), decimals = (point ? (int)(mark - point) - 1 : 0) - exponent;
    if (exponent < -4 || exponent >= 16) {
        puts_to(t, digits);
        return;
    }
    snprintf(positional, sizeof positional, "%.*f", decimals > 1 ? decimals : 1, x);
    puts_to(t, positional);
}

static void put_json(struct text *t, const json_t *value);

static void put_json_members(struct text *t, const json_t *object)
{
    json_t *o = (json_t *)object; /* iterators are not const-correct */
    puts_to(t, "{");
    for (void *it = json_object_iter(o); it; it = json_object_iter_next(o, it)) {
        if (it != json_object_iter(o)) puts_to(t, ", ");
        const char *key = json_object_iter_key(it);
        put_json_string(t, (struct span){ key, strlen(key) });
        puts_to(t, ": ");
        put_json(t, json_object_iter_value(it));
    }
    puts_to(t, "}");
}

static void put_json_items(struct text *t, const json_t *array)
{
    puts_to(t, "[");
    for (size_t i = 0; i < json_array_size(array); i++) {
        if (i > 0) puts_to(t, ", ");
        put_json(t, json_array_get(array, i));
    }
    puts_to(t, "]");
}

/* Recursion is as deep as the parser allowed the document to be. */
static void put_json(struct text *t, const json_t *value)
{
    char number[32];
    switch (json_typeof(value)) {
    case JSON_OBJECT: put_json_members(t, value); break;
    case JSON_ARRAY: put_json_items(t, value); break;
    case JSON_STRING: put_json_string(t, string_span(value)); break;
    case JSON_INTEGER:
        snprintf(number, sizeof number, "%" JSON_INTEGER_FORMAT, json_integer_value(value));
        puts_to(t, number);
        break;
    case JSON_REAL: put_json_real(t, json_real_value(value)); break;
    case JSON_TRUE: puts_to(t, "true"); break;
    case JSON_FALSE: puts_to(t, "false"); break;
    case JSON_NULL: puts_to(t, "null"); break;
    }
}

static bool refuse(struct render *r, const char *why)
{
    return err_set(r->e, ERR_ARGUMENT, "%s", why);
}

static bool is_string(const json_t *value, const char *text)
{
    size_t n = strlen(text);
    return json_string_length(value) == n && n > 0 && memcmp(json_string_value(value), text, n) == 0;
}

static bool has_role(const json_t *message, const char *role)
{
    return is_string(json_object_get(message, "role"), role);
}

/* The template's `key in item`: for a bare string, which no client should send, it looks for a substring. */
static bool is_in(const char *key, const json_t *item)
{
    if (json_is_string(item)) return find_first(string_span(item), key) != NULL;
    return json_object_get(item, key) != NULL;
}

enum content_use {
    CONTENT_SYSTEM, /* images and videos are refused */
    CONTENT_PEEK,   /* looked at, not shown: nothing is counted */
    CONTENT_SHOWN
};

static void put_visual(struct render *r, enum content_use use, const char *name, long *counter,
                       const char *pad)
{
    char label[48];
    if (use == CONTENT_SHOWN) ++*counter;
    snprintf(label, sizeof label, "%s %ld: ", name, *counter);
    if (r->options->add_vision_id) puts_to(&r->content, label);
    puts_to(&r->content, pad);
}

static bool put_item(struct render *r, enum content_use use, const json_t *item)
{
    const json_t *type = json_object_get(item, "type"), *text = json_object_get(item, "text");
    if (is_in("image", item) || is_in("image_url", item) || is_string(type, "image")) {
        if (use == CONTENT_SYSTEM) return refuse(r, "System message cannot contain images.");
        put_visual(r, use, "Picture", &r->images, "<|vision_start|><|image_pad|><|vision_end|>");
        return true;
    }
    if (is_in("video", item) || is_string(type, "video")) {
        if (use == CONTENT_SYSTEM) return refuse(r, "System message cannot contain videos.");
        put_visual(r, use, "Video", &r->videos, "<|vision_start|><|video_pad|><|vision_end|>");
        return true;
    }
    /* The template prints "None" for a null text and nothing for a bare string with "text" inside: refused
     * here. */
    if (!json_is_string(text)) return refuse(r, "Unexpected item type in content.");
    put(&r->content, string_span(text));
    return true;
}

/* The message's content as trimmed text, borrowed until the next call or as long as the message. */
static bool read_content(struct span *out, struct render *r, enum content_use use, const json_t *message)
{
    const json_t *content = json_object_get(message, "content");
    *out = (struct span){ "", 0 };
    if (!content || json_is_null(content)) return true;
    if (json_is_string(content)) {
        *out = trim(string_span(content));
        return true;
    }
    if (!json_is_array(content)) return refuse(r, "Unexpected content type.");
    r->content.used = 0;
    for (size_t i = 0; i < json_array_size(content); i++)
        if (!put_item(r, use, json_array_get(content, i))) return false;
    if (r->content.used) *out = trim((struct span){ r->content.data, r->content.used });
    return true;
}

static bool render_head(struct render *r, const json_t *messages, const json_t *tools)
{
    const json_t *first = json_array_get(messages, 0);
    struct span system = { "", 0 };
    bool has_system = has_role(first, "system"), has_tools = json_array_size(tools) > 0;
    if (has_system && !read_content(&system, r, CONTENT_SYSTEM, first)) return false;
    if (!has_system && !has_tools) return true;
    puts_to(&r->out, "<|im_start|>system\n");
    if (has_tools) {
        puts_to(&r->out, TOOLS_A);
        for (size_t i = 0; i < json_array_size(tools); i++) {
            puts_to(&r->out, "\n");
            put_json(&r->out, json_array_get(tools, i));
        }
        puts_to(&r->out, TOOLS_B);
        if (system.bytes) puts_to(&r->out, "\n\n");
    }
    put(&r->out, system);
    puts_to(&r->out, "<|im_end|>\n");
    return true;
}

/* Index of the last user message that is not just the result of a tool. */
static bool find_last_question(size_t *index, struct render *r, const json_t *messages)
{
    for (size_t i = json_array_size(messages); i-- > 0;) {
        const json_t *m = json_array_get(messages, i);
        struct span content;
        if (!has_role(m, "user")) continue;
        if (!read_content(&content, r, CONTENT_PEEK, m)) return false;
        *index = i;
        if (!starts_with(content, "<tool_response>") || !ends_with(content, "</tool_response>")) return true;
    }
    return refuse(r, "No user query found in messages.");
}

/* Separates the reasoning of an assistant turn from *content, where it may be embedded. */
static struct span take_reasoning(struct span *content, const json_t *message)
{
    const json_t *own = json_object_get(message, "reasoning_content");
    if (json_is_string(own)) return trim(string_span(own));
    struct span all = *content;
    const char *end = find_first(all, "</think>");
    if (!end) return (struct span){ "", 0 };
    *content = strip_newlines_left(after_last(all, "</think>"));
    struct span before = strip_newlines_right((struct span){ all.at, (size_t)(end - all.at) });
    return trim(strip_newlines_left(after_last(before, "<think>")));
}

static void put_parameter(struct text *out, const char *key, const json_t *value)
{
    puts_to(out, "<parameter=");
    puts_to(out, key);
    puts_to(out, ">\n");
    if (json_is_string(value))
        put(out, string_span(value));
    else
        put_json(out, value);
    puts_to(out, "\n</parameter>\n");
}

static bool render_tool_call(struct render *r, const json_t *call)
{
    const json_t *inner = json_object_get(call, "function"), *function = inner ? inner : call;
    const json_t *name = json_object_get(function, "name"),
                 *arguments = json_object_get(function, "arguments");
    if (!json_is_string(name)) return refuse(r, "A tool call needs a function name.");
    if (arguments && !json_is_object(arguments)) return refuse(r, "Can only get item pairs from a mapping.");
    puts_to(&r->out, "<tool_call>\n<function=");
    put(&r->out, string_span(name));
    puts_to(&r->out, ">\n");
    json_t *o = (json_t *)arguments; /* iterators are not const-correct */
    for (void *it = json_object_iter(o); it; it = json_object_iter_next(o, it))
        put_parameter(&r->out, json_object_iter_key(it), json_object_iter_value(it));
    puts_to(&r->out, "</function>\n</tool_call>");
    return true;
}

static bool render_assistant(struct render *r, const json_t *message, struct span content,
                             bool shows_reasoning)
{
    struct span reasoning = take_reasoning(&content, message);
    puts_to(&r->out, "<|im_start|>assistant\n");
    if (shows_reasoning) {
        puts_to(&r->out, "<think>\n");
        put(&r->out, reasoning);
        puts_to(&r->out, "\n</think>\n\n");
    }
    put(&r->out, content);
    const json_t *calls = json_object_get(message, "tool_calls");
    for (size_t i = 0; i < json_array_size(calls); i++) {
        if (i > 0)
            puts_to(&r->out, "\n");
        else if (trim(content).bytes)
            puts_to(&r->out, "\n\n");
        if (!render_tool_call(r, json_array_get(calls, i))) return false;
    }
    puts_to(&r->out, "<|im_end|>\n");
    return true;
}

/* Results of tools in a row share one user turn. A result that opens the conversation gets none: so the
 * template. */
static void render_tool_result(struct render *r, const json_t *messages, size_t i, struct span content)
{
    bool is_last = i + 1 == json_array_size(messages);
    if (i > 0 && !has_role(json_array_get(messages, i - 1), "tool")) puts_to(&r->out, "<|im_start|>user");
    puts_to(&r->out, "\n<tool_response>\n");
    put(&r->out, content);
    puts_to(&r->out, "\n</tool_response>");
    if (is_last || !has_role(json_array_get(messages, i + 1), "tool")) puts_to(&r->out, "<|im_end|>\n");
}

static bool render_message(struct render *r, const json_t *messages, size_t i, size_t last_question)
{
    const json_t *m = json_array_get(messages, i);
    struct span content;
    if (has_role(m, "system") && i == 0) return true; /* in the head */
    if (!read_content(&content, r, CONTENT_SHOWN, m)) return false;
    if (has_role(m, "system")) return refuse(r, "System message must be at the beginning.");
    if (has_role(m, "assistant"))
        return render_assistant(r, m, content, r->options->preserve_thinking || i > last_question);
    if (has_role(m, "user")) {
        puts_to(&r->out, "<|im_start|>user\n");
        put(&r->out, content);
        puts_to(&r->out, "<|im_end|>\n");
        return true;
    }
    if (!has_role(m, "tool")) return refuse(r, "Unexpected message role.");
    render_tool_result(r, messages, i, content);
    return true;
}

static bool render_all(struct render *r, const json_t *messages, const json_t *tools)
{
    size_t last_question = 0;
    if (json_array_size(messages) == 0) return refuse(r, "No messages provided.");
    if (!render_head(r, messages, tools) || !find_last_question(&last_question, r, messages)) return false;
    for (size_t i = 0; i < json_array_size(messages); i++)
        if (!render_message(r, messages, i, last_question)) return false;
    if (!r->options->add_generation_prompt) return true;
    puts_to(&r->out, "<|im_start|>assistant\n<think>\n");
    if (r->options->thinking == CHAT_THINKING_OFF) puts_to(&r->out, "\n</think>\n\n");
    return true;
}

bool chat_render(char **text, size_t *bytes, const json_t *messages, const json_t *tools,
                 const struct chat_options *o, struct err *e)
{
    struct render r = { .options = o, .e = e };
    *text = NULL;
    *bytes = 0;
    bool ok = render_all(&r, messages, tools);
    if (!text_reserve(&r.out, 0) || r.content.failed) ok = err_memory(e, "a rendered chat", r.out.used);
    free(r.content.data);
    if (!ok) {
        free(r.out.data);
        return false;
    }
    r.out.data[r.out.used] = 0;
    *text = r.out.data;
    *bytes = r.out.used;
    return true;
}
