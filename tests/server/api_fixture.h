/* The APIs over the demo model's tokenizer and template and a scripted scheduler. */
#ifndef TESTS_SERVER_API_FIXTURE_H
#define TESTS_SERVER_API_FIXTURE_H
#include "server/api.h"
#include "server/fake_scheduler.h"
#include "server/json_at.h"

struct fixture {
    struct tokenizer *tokenizer;
    struct chat_template *template;
    struct config config;
    struct scheduler scheduler;
    struct api_options options;
    struct api *api;
    int status, retry_after;
    uint64_t owner; /* who asks */
    bool is_stream;
    struct exchange_account account;
};

static const char *const fixture_names[] = { "demo", "alias" };

static inline void fixture_api(struct fixture *x)
{
    struct err e = { 0 };
    api_free(x->api);
    if (!api_create(&x->api, &x->options, &e)) fail_msg("%s", e.text);
}

static inline int fixture_setup(void **state)
{
    static struct fixture x;
    struct err e = { 0 };
    json_t *root = NULL;
    x = (struct fixture){ 0 };
    x.scheduler.room = x.scheduler.fail_at = -1;
    x.owner = 7;
    if (!tokenizer_load(&x.tokenizer, "models/demo", &e) ||
        !chat_template_load(&x.template, "models/demo", &e) ||
        !doc_load(&root, "models/demo/config.json", 1 << 20, &e) || !config_parse(&x.config, root, &e))
        fail_msg("%s", e.text);
    json_decref(root);
    x.options = (struct api_options){ .scheduler = &x.scheduler,
                                      .tokenizer = x.tokenizer,
                                      .chat_template = x.template,
                                      .config = &x.config,
                                      .dir = "models/demo",
                                      .served_names = fixture_names,
                                      .n_served_names = 2,
                                      .stream_interval = 1,
                                      .max_model_len = 2048 };
    fixture_api(&x);
    *state = &x;
    return 0;
}

static inline int fixture_teardown(void **state)
{
    struct fixture *x = *state;
    api_free(x->api);
    chat_template_free(x->template);
    tokenizer_free(x->tokenizer);
    config_deinit(&x->config);
    return 0;
}

/* The scripted answer: text as the tokenizer has it, then <|im_end|>. Bytes after \x01 are one token each. */
static inline void fixture_script(struct fixture *x, const char *text)
{
    struct token_list list = { 0 };
    struct err e = { 0 };
    const char *bytes = strchr(text, 1);
    size_t n = bytes ? (size_t)(bytes - text) : strlen(text);
    if (!tokenizer_encode(x->tokenizer, &list, text, n, 0, &e)) fail_msg("%s", e.text);
    for (; bytes && *++bytes;)
        for (int32_t id = 0; id < 256; id++) {
            size_t size;
            const char *b = tokenizer_bytes(x->tokenizer, id, &size);
            if (size != 1 || *b != *bytes) continue;
            list.ids = realloc(list.ids, (list.n + 1) * sizeof *list.ids);
            list.ids[list.n++] = id;
        }
    if (list.n) memcpy(x->scheduler.tokens, list.ids, list.n * sizeof *list.ids);
    x->scheduler.n_tokens = (int)list.n;
    x->scheduler.tokens[x->scheduler.n_tokens++] = tokenizer_find(x->tokenizer, "<|im_end|>");
    free(list.ids);
}

/* The whole body of an answer; its status in x. */
static inline char *fixture_ask_at(struct fixture *x, enum api_route route, const char *argument,
                                   const char *body)
{
    const struct api_caller caller = { .request_id = "r1", .owner = x->owner, .salt = { 1, 2, 3 } };
    x->scheduler.submitted = 0;
    struct exchange *e = exchange_create(x->api, route, argument, body, strlen(body), &caller);
    assert_non_null(e);
    char *all = calloc(1, 1);
    size_t n = 0, bytes;
    bool done = false;
    for (int i = 0; !done; i++) {
        assert_true(i < 100000);
        const char *part = exchange_pump(e, &bytes, &done);
        if (bytes && !exchange_is_stream(e)) assert_true(done);
        if (bytes) assert_true(exchange_status(e) != 0);
        all = realloc(all, n + bytes + 1);
        memcpy(all + n, part, bytes);
        n += bytes;
        all[n] = 0;
    }
    x->status = exchange_status(e);
    x->retry_after = exchange_retry_after(e);
    x->is_stream = exchange_is_stream(e);
    exchange_account(e, &x->account);
    exchange_free(e);
    assert_int_equal(x->scheduler.open, 0);
    return all;
}

static inline json_t *fixture_ask(struct fixture *x, enum api_route route, const char *body)
{
    char *text = fixture_ask_at(x, route, NULL, body);
    json_t *root = fixture_parse(text);
    free(text);
    return root;
}

/* The data of a stream's events as an array; "[DONE]" as a string; names as {"event":..., "data":...} where
 * there are any. */
static inline json_t *fixture_stream(struct fixture *x, enum api_route route, const char *body)
{
    char *text = fixture_ask_at(x, route, NULL, body);
    json_t *events = json_array();
    assert_true(x->is_stream);
    for (char *at = text; *at;) {
        char *end = strstr(at, "\n\n");
        assert_non_null(end);
        *end = 0;
        char *name = strncmp(at, "event: ", 7) == 0 ? at + 7 : NULL, *data = name ? strchr(at, '\n') + 1 : at;
        if (name) data[-1] = 0;
        assert_int_equal(strncmp(data, "data: ", 6), 0);
        json_t *v = strcmp(data + 6, "[DONE]") == 0 ? json_string("[DONE]") : fixture_parse(data + 6);
        json_array_append_new(events, name ? json_pack("{s:s, s:o}", "event", name, "data", v) : v);
        at = end + 2;
    }
    free(text);
    return events;
}

/* Status, field, and a piece of the sentence. */
struct wrong {
    const char *body;
    int status;
    const char *param, *says;
};

static inline void check_wrong(struct fixture *x, enum api_route route, const struct wrong *cases, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        json_t *r = fixture_ask(x, route, cases[i].body);
        if (x->status != cases[i].status || strcmp(text_at(r, "error.param"), cases[i].param) != 0 ||
            !strstr(text_at(r, "error.message"), cases[i].says))
            fail_msg("%s:\n  %d %s: %s", cases[i].body, x->status, text_at(r, "error.param"),
                     text_at(r, "error.message"));
        assert_string_equal(x->account.finish, "error");
        assert_int_equal(x->scheduler.submitted, 0);
        json_decref(r);
    }
}

/* The prompt that the scheduler was given last. */
static inline void fixture_prompt(struct fixture *x, const char *want)
{
    char *text;
    size_t n;
    struct err e;
    assert_true(tokenizer_decode(x->tokenizer, x->scheduler.last_prompt, (size_t)x->scheduler.last.n_prompt,
                                 false, &text, &n, &e));
    assert_string_equal(text, want);
    free(text);
}

#endif
