#include "server/conversation.h"
#include "base/clock.h"
#include "base/doc.h"
#include "server/fetch.h"
#include "server/video.h"
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

enum { IMAGES_DEFAULT_MAX = 16, MESSAGES_MAX = 100000 };

void prompt_text_deinit(struct prompt_text *p)
{
    free(p->ids);
    free(p->text);
    free(p->pictures);
    for (int i = 0; i < p->n_fetched; i++) free(p->fetched[i]);
    free(p->fetched);
    *p = (struct prompt_text){ 0 };
}

/* A thread that fetches makes no exchange meanwhile: one stays free, and a request has its time and its
 * bytes. */
enum { FETCHING_MAX = 2, FETCH_SECONDS = 10, FETCH_BYTES_MAX = 20 << 20 };

/* By file:// URL, or by any other one, which takes time. */
static bool get_here(struct prompt_text *p, const struct api *a, const char *url, bool is_file, struct err *e)
{
    const struct fetch_rules rules = { a->o.media_hosts, a->o.n_media_hosts };
    size_t bytes, most = FETCH_BYTES_MAX - p->fetched_bytes;
    if (p->fetch_until == 0) p->fetch_until = clock_seconds() + FETCH_SECONDS;
    char **grown = realloc(p->fetched, (size_t)(p->n_fetched + 1) * sizeof *grown), **out;
    if (!grown) return err_memory(e, "images", sizeof *grown);
    p->fetched = grown;
    out = &grown[p->n_fetched];
    if (!(is_file ? local_media_data_url(out, &bytes, a->o.local_media, url, most, e)
                  : fetch_data_url(out, &bytes, &rules, url, most, p->fetch_until, e)))
        return false;
    p->n_fetched++;
    p->fetched_bytes += bytes;
    return true;
}

static bool read_picture(struct prompt_text *p, const struct api *a, const char *url, const char *param,
                         struct fault *f)
{
    struct err e = { 0 };
    if (!a->o.local_media)
        return fault_set(
            f, param,
            "%s: no files of this machine are read: expected a data: URL with base64 content; a server "
            "started with --allowed-local-media-path reads those below one folder",
            param);
    return get_here(p, a, url, true, &e) ||
           fault_set(f, param, "%s: the image cannot be read: %s", param, e.text);
}

static bool fetch_picture(struct prompt_text *p, const struct api *a, const char *url, const char *param,
                          struct fault *f)
{
    atomic_int *n = &((struct api *)a)->n_fetching;
    struct err e = { 0 };
    if (a->o.n_media_hosts == 0)
        return fault_set(
            f, param,
            "%s: images are fetched from nowhere: expected a data: URL with base64 content; a server "
            "started with --allowed-media-domains fetches from the hosts it names",
            param);
    bool free_thread = atomic_fetch_add(n, 1) < FETCHING_MAX;
    bool ok = free_thread && get_here(p, a, url, false, &e);
    atomic_fetch_sub(n, 1);
    if (!free_thread)
        return fault_status(f, 503, NULL, "images of %d other requests are being fetched; try again",
                            FETCHING_MAX);
    if (!ok && e.code == ERR_BUSY) return fault_status(f, 503, NULL, "%s: %s; try again", param, e.text);
    return ok || fault_set(f, param, "%s: the image cannot be fetched: %s", param, e.text);
}

int conversation_images_most(const struct api *a)
{
    int most = a->o.max_images;
    return most == 0 ? IMAGES_DEFAULT_MAX : most < 0 ? 0 : most;
}

/* Only data: URLs reach image_load, which would take anything else for a path. */
static bool add_picture(struct prompt_text *p, const struct api *a, const char *url, const char *param,
                        struct fault *f)
{
    int max = conversation_images_most(a);
    if (!a->o.config->has_vision) return fault_set(f, param, "%s: the served model takes no images", param);
    bool is_file = strncasecmp(url, "file:", 5) == 0;
    bool by_url = is_file || strncasecmp(url, "http:", 5) == 0 || strncasecmp(url, "https:", 6) == 0;
    if (!by_url && strncmp(url, "data:", 5) != 0)
        return fault_set(f, param, "%s: expected a data: URL with base64 content", param);
    if (p->n_pictures - p->n_videos >= max)
        return fault_set(f, param, "%s: more than %d images in a request", param, max);
    const char **grown = realloc(p->pictures, (size_t)(p->n_pictures + 1) * sizeof *grown);
    if (!grown) return fault_memory(f);
    p->pictures = grown;
    if (by_url && !(is_file ? read_picture : fetch_picture)(p, a, url, param, f)) return false;
    grown[p->n_pictures++] = by_url ? p->fetched[p->n_fetched - 1] : url;
    return true;
}

/* {"image_url": {"url": ...}}, {"image_url": "..."} */
static bool image_part(struct prompt_text *p, const struct api *a, const json_t *part, const char *param,
                       struct fault *f)
{
    const json_t *image = json_object_get(part, "image_url");
    struct param at;
    if (!json_is_string(image)) {
        param_set(&at, "%s.image_url.url", param);
        image = json_object_get(image, "url");
    } else {
        param_set(&at, "%s.image_url", param);
    }
    if (!json_is_string(image)) return fields_wrong(f, at.text, "a data: URL", image);
    return add_picture(p, a, json_string_value(image), at.text, f);
}

static json_t *text_part(const json_t *text)
{
    return json_pack("{s:s, s:O}", "type", "text", "text", text);
}

/* One part of a message's content into `parts`. */
static bool content_part(json_t *parts, struct prompt_text *p, const struct api *a, const json_t *part,
                         const char *param, struct fault *f)
{
    if (json_is_string(part)) return json_array_append_new(parts, text_part(part)) == 0 || fault_memory(f);
    if (!json_is_object(part)) return fields_wrong(f, param, "an object with a type", part);
    const char *type = json_string_value(json_object_get(part, "type"));
    if (!type)
        type = json_object_get(part, "text")        ? "text"
               : json_object_get(part, "image_url") ? "image_url"
               : json_object_get(part, "video_url") ? "video_url"
                                                    : "";
    if (strcmp(type, "text") == 0 || strcmp(type, "refusal") == 0) {
        const json_t *text = json_object_get(part, type);
        if (!json_is_string(text)) {
            struct param at;
            param_set(&at, "%s.%s", param, type);
            return fields_wrong(f, at.text, "a string", text);
        }
        return json_array_append_new(parts, text_part(text)) == 0 || fault_memory(f);
    }
    if (strcmp(type, "image_url") == 0)
        return image_part(p, a, part, param, f) &&
               (json_array_append_new(parts, json_pack("{s:s}", "type", "image")) == 0 || fault_memory(f));
    if (strcmp(type, "video_url") == 0)
        return video_part(p, a, part, param, f) &&
               (json_array_append_new(parts, json_pack("{s:s}", "type", "video")) == 0 || fault_memory(f));
    return fault_set(f, param, "%s: expected a part of type text, image_url or video_url, found \"%.40s\"",
                     param, type);
}

static bool content_of(json_t *message, struct prompt_text *p, const struct api *a, const json_t *content,
                       const char *param, struct fault *f)
{
    if (!content || json_is_null(content))
        return json_object_set_new(message, "content", json_null()) == 0 || fault_memory(f);
    if (json_is_string(content))
        return json_object_set(message, "content", (json_t *)content) == 0 || fault_memory(f);
    if (!json_is_array(content)) return fields_wrong(f, param, "a string or an array of parts", content);
    json_t *parts = json_array();
    if (json_object_set_new(message, "content", parts) != 0) return fault_memory(f);
    for (size_t i = 0; i < json_array_size(content); i++) {
        struct param at;
        param_set(&at, "%s[%zu]", param, i);
        if (!content_part(parts, p, a, json_array_get(content, i), at.text, f)) return false;
    }
    return true;
}

/* Arguments travel as a JSON text; templates want the object. */
static bool arguments_of(json_t **out, const json_t *given, const char *param, struct fault *f)
{
    struct err e = { 0 };
    *out = NULL;
    if (!given || json_is_null(given) || (json_is_string(given) && json_string_length(given) == 0))
        *out = json_object();
    else if (json_is_object(given))
        *out = json_incref((json_t *)given);
    else if (!json_is_string(given))
        return fields_wrong(f, param, "a JSON object as a string", given);
    else if (!doc_parse(out, json_string_value(given), json_string_length(given), &e))
        return fault_set(f, param, "%s: %s", param, e.text);
    if (json_is_object(*out)) return true;
    bool made = *out;
    fields_wrong(f, param, "a JSON object as a string", *out);
    json_decref(*out);
    *out = NULL;
    return made ? false : fault_memory(f);
}

static bool tool_call(json_t *calls, const json_t *call, const char *param, struct fault *f)
{
    const json_t *function = json_object_get(call, "function"), *name = json_object_get(function, "name");
    struct param at;
    json_t *arguments;
    if (!json_is_object(function)) {
        param_set(&at, "%s.function", param);
        return fields_wrong(f, at.text, "an object", function);
    }
    param_set(&at, "%s.function.name", param);
    if (!json_is_string(name)) return fields_wrong(f, at.text, "a string", name);
    param_set(&at, "%s.function.arguments", param);
    if (!arguments_of(&arguments, json_object_get(function, "arguments"), at.text, f)) return false;
    return json_array_append_new(calls, json_pack("{s:s, s:{s:O, s:o}}", "type", "function", "function",
                                                  "name", name, "arguments", arguments)) == 0 ||
           fault_memory(f);
}

static bool tool_calls(json_t *message, const json_t *calls, const char *param, struct fault *f)
{
    if (!calls || json_is_null(calls)) return true;
    if (!json_is_array(calls)) return fields_wrong(f, param, "an array", calls);
    json_t *list = json_array();
    if (json_object_set_new(message, "tool_calls", list) != 0) return fault_memory(f);
    for (size_t i = 0; i < json_array_size(calls); i++) {
        struct param at;
        param_set(&at, "%s[%zu]", param, i);
        if (!tool_call(list, json_array_get(calls, i), at.text, f)) return false;
    }
    return true;
}

/* An assistant's reasoning under its two names. */
static bool reasoning_of(json_t *message, const json_t *given, const char *param, struct fault *f)
{
    static const char *const names[] = { "reasoning_content", "reasoning" };
    for (int i = 0; i < 2; i++) {
        const json_t *text = json_object_get(given, names[i]);
        struct param at;
        if (!text || json_is_null(text)) continue;
        param_set(&at, "%s.%s", param, names[i]);
        if (!json_is_string(text)) return fields_wrong(f, at.text, "a string", text);
        return json_object_set(message, "reasoning_content", (json_t *)text) == 0 || fault_memory(f);
    }
    return true;
}

/* A system message behind another one at the beginning is more of the same: templates take only one. */
static bool join_system(json_t *messages, json_t *message, struct fault *f)
{
    json_t *last = json_array_get(messages, json_array_size(messages) - 1);
    json_t *parts = json_array(),
           *from[2] = { json_object_get(last, "content"), json_object_get(message, "content") };
    bool ok = parts;
    for (int i = 0; ok && i < 2; i++) {
        if (i > 0)
            ok = json_array_append_new(parts, json_pack("{s:s, s:s}", "type", "text", "text", "\n\n")) == 0;
        if (json_is_string(from[i]))
            ok = ok && json_array_append_new(parts, text_part(from[i])) == 0;
        else if (json_is_array(from[i]))
            ok = ok && json_array_extend(parts, from[i]) == 0;
    }
    ok = ok && json_object_set(last, "content", parts) == 0;
    json_decref(parts);
    return ok || fault_memory(f);
}

static bool is_role(const json_t *message, const char *role)
{
    const char *text = json_string_value(json_object_get(message, "role"));
    return text && strcmp(text, role) == 0;
}

static bool add_message(json_t *messages, struct prompt_text *p, const struct api *a, const json_t *given,
                        const char *param, struct fault *f)
{
    static const char *const roles[] = { "system", "developer", "user", "assistant", "tool" };
    const char *role = json_string_value(json_object_get(given, "role"));
    struct param at;
    size_t i = 0, n = sizeof roles / sizeof *roles;
    while (role && i < n && strcmp(role, roles[i]) != 0) i++;
    param_set(&at, "%s.role", param);
    if (!role) return fields_wrong(f, at.text, "a string", json_object_get(given, "role"));
    if (i == n)
        return fault_set(f, at.text,
                         "%s: expected system, developer, user, assistant or tool, found \"%.40s\"", at.text,
                         role);
    json_t *message = json_pack("{s:s}", "role", i == 1 ? "system" : role);
    if (!message) return fault_memory(f);
    param_set(&at, "%s.content", param);
    bool ok = content_of(message, p, a, json_object_get(given, "content"), at.text, f);
    if (ok && i == 3) {
        param_set(&at, "%s.tool_calls", param);
        ok = reasoning_of(message, given, param, f) &&
             tool_calls(message, json_object_get(given, "tool_calls"), at.text, f);
    }
    bool joins = i <= 1 && json_array_size(messages) == 1 && is_role(json_array_get(messages, 0), "system");
    if (ok && joins)
        ok = join_system(messages, message, f);
    else if (ok)
        ok = json_array_append(messages, message) == 0 || fault_memory(f);
    json_decref(message);
    return ok;
}

bool conversation_messages(json_t **out, struct prompt_text *p, const struct api *a, const json_t *body,
                           struct fault *f)
{
    const json_t *given = json_object_get(body, "messages");
    *out = NULL;
    if (!json_is_array(given)) return fields_wrong(f, "messages", "an array", given);
    if (json_array_size(given) == 0) return fault_set(f, "messages", "messages: expected at least one");
    if (json_array_size(given) > MESSAGES_MAX)
        return fault_set(f, "messages", "messages: expected at most %d, found %zu", MESSAGES_MAX,
                         json_array_size(given));
    json_t *messages = json_array();
    if (!messages) return fault_memory(f);
    for (size_t i = 0; i < json_array_size(given); i++) {
        struct param at;
        const json_t *message = json_array_get(given, i);
        param_set(&at, "messages[%zu]", i);
        if (json_is_object(message) ? add_message(messages, p, a, message, at.text, f)
                                    : fields_wrong(f, at.text, "an object", message))
            continue;
        json_decref(messages);
        return false;
    }
    *out = messages;
    return true;
}

static bool check_tool(const json_t *tool, const char *param, struct fault *f)
{
    const json_t *function = json_object_get(tool, "function"), *name = json_object_get(function, "name");
    const json_t *parameters = json_object_get(function, "parameters");
    const char *type = json_string_value(json_object_get(tool, "type"));
    struct param at;
    param_set(&at, "%s.type", param);
    if (!type || strcmp(type, "function") != 0)
        return fault_set(f, at.text, "%s: expected \"function\", found \"%.40s\"", at.text,
                         type ? type : "nothing");
    param_set(&at, "%s.function.name", param);
    if (!json_is_string(name) || json_string_length(name) == 0)
        return fields_wrong(f, at.text, "a name", name);
    if (strpbrk(json_string_value(name), "<>\n") ||
        strlen(json_string_value(name)) != json_string_length(name))
        return fault_set(f, at.text, "%s: a name cannot have <, > or line ends inside", at.text);
    param_set(&at, "%s.function.parameters", param);
    if (parameters && !json_is_null(parameters) && !json_is_object(parameters))
        return fields_wrong(f, at.text, "a JSON schema", parameters);
    return true;
}

bool conversation_tools(const json_t **out, const json_t *body, struct fault *f)
{
    const struct fields in = { body, "", f };
    const char *choice = json_string_value(json_object_get(body, "tool_choice"));
    const json_t *tools = NULL;
    *out = NULL;
    if (!fields_array(&in, "tools", &tools)) return false;
    for (size_t i = 0; i < json_array_size(tools); i++) {
        struct param at;
        param_set(&at, "tools[%zu]", i);
        if (!check_tool(json_array_get(tools, i), at.text, f)) return false;
    }
    if (json_array_size(tools) > 0 && !(choice && strcmp(choice, "none") == 0)) *out = tools;
    return true;
}

/* Where the text of the last message ends in the rendered prompt. Source: transformers,
 * apply_chat_template with continue_final_message. */
static bool cut_at_final_message(char *text, size_t *bytes, const json_t *messages, struct fault *f)
{
    static const char param[] = "continue_final_message";
    const json_t *content =
        json_object_get(json_array_get(messages, json_array_size(messages) - 1), "content");
    if (json_is_array(content))
        content = json_object_get(json_array_get(content, json_array_size(content) - 1), "text");
    const char *final = json_is_string(content) ? json_string_value(content) : "";
    size_t n = json_string_length(content), blanks = 0, stripped;
    while (blanks < n && strchr(" \t\r\n\f\v", final[blanks]) && final[blanks]) blanks++;
    final += blanks;
    n -= blanks;
    stripped = n;
    while (stripped > 0 && strchr(" \t\r\n\f\v", final[stripped - 1]) && final[stripped - 1]) stripped--;
    if (stripped == 0) return fault_set(f, param, "%s: the last message has no text to go on from", param);
    for (size_t at = *bytes >= stripped ? *bytes - stripped + 1 : 0; at-- > 0;) {
        if (memcmp(text + at, final, stripped) != 0) continue;
        *bytes = at + (*bytes - at >= n && memcmp(text + at, final, n) == 0 ? n : stripped);
        text[*bytes] = 0;
        return true;
    }
    return fault_set(f, param, "%s: the chat template changes the last message", param);
}

/* Whether the last turn has a <think> that is open. */
static bool is_in_reasoning(const struct api *a, const struct prompt_text *p)
{
    static const char open[] = "<think>\n";
    size_t n = strlen(open);
    if (a->think < 0 || a->think_end < 0)
        return p->bytes >= n && memcmp(p->text + p->bytes - n, open, n) == 0;
    for (int64_t i = p->n - 1; i >= 0; i--) {
        if (p->ids[i] == a->think) return true;
        if (p->ids[i] == a->think_end || p->ids[i] == a->im_start) return false;
    }
    return false;
}

bool conversation_prompt(struct prompt_text *out, const struct api *a, const json_t *body,
                         const struct params *p, struct fault *f)
{
    const struct chat_options o = { .add_generation_prompt = p->add_generation_prompt,
                                    .thinking = p->thinking,
                                    .preserve_thinking = p->preserve_thinking,
                                    .add_vision_id = p->add_vision_id,
                                    .documents = p->documents };
    json_t *messages;
    const json_t *tools;
    char *text = NULL;
    size_t bytes = 0;
    struct err e = { 0 };
    if (!conversation_tools(&tools, body, f) || !conversation_messages(&messages, out, a, body, f))
        return false;
    bool ok = chat_render(&text, &bytes, a->o.chat_template, messages, tools, &o, &e) ||
              fault_from_err(f, "messages", &e);
    ok = ok && (!p->continue_final_message || cut_at_final_message(text, &bytes, messages, f)) &&
         video_places(&text, &bytes, out, a, body, f) && prompt_from_text(out, a, text, bytes, "messages", f);
    free(text);
    json_decref(messages);
    if (ok) out->in_reasoning = is_in_reasoning(a, out);
    return ok;
}

bool prompt_from_text(struct prompt_text *out, const struct api *a, const char *text, size_t bytes,
                      const char *param, struct fault *f)
{
    struct token_list list = { 0 };
    struct err e = { 0 };
    bool ok = tokenizer_encode(a->o.tokenizer, &list, text, bytes, 0, &e) || fault_from_err(f, param, &e);
    for (size_t i = 0; ok && i < list.n; i++)
        if (list.ids[i] >= a->o.config->vocab_size)
            ok = fault_status(f, 500, NULL, "the tokenizer gives token %d, the model has %" PRId64,
                              list.ids[i], a->o.config->vocab_size);
    char *copy = ok ? malloc(bytes + 1) : NULL;
    if (ok && !copy) ok = fault_memory(f);
    if (!ok) {
        free(list.ids);
        return false;
    }
    memcpy(copy, text, bytes);
    copy[bytes] = 0;
    out->text = copy;
    out->bytes = bytes;
    out->ids = list.ids;
    out->n = (int64_t)list.n;
    return true;
}

bool prompt_fit(struct prompt_text *out, const struct api *a, const struct params *p, const char *field,
                struct fault *f)
{
    int64_t limit = a->o.max_model_len, answer = p->max_tokens >= 0 ? p->max_tokens : 1;
    if (p->truncate >= 0 && out->n > p->truncate) {
        if (out->n_pictures)
            return fault_set(f, "truncate_prompt_tokens",
                             "truncate_prompt_tokens: a prompt with images cannot be cut");
        if (!p->truncate_right)
            memmove(out->ids, out->ids + out->n - p->truncate, (size_t)p->truncate * sizeof *out->ids);
        out->n = p->truncate;
    }
    if (out->n == 0) return fault_set(f, field, "the prompt has no tokens");
    if (out->n <= limit - answer) return true;
    fault_status(f, 400, "context_length_exceeded",
                 "the context holds %" PRId64 " tokens: %" PRId64 " of the prompt and %s%" PRId64
                 " to generate are %" PRId64 "; shorten the prompt%s",
                 limit, out->n, p->max_tokens >= 0 ? "" : "at least ", answer, out->n + answer,
                 p->max_tokens > 1 ? " or ask for fewer tokens" : "");
    param_set(&f->param, "%s", out->n >= limit ? field : "max_tokens");
    return false;
}
