/* Input: which route, which scripted answer, in pieces of how many events; then the body. What comes is whole
 * JSON, or a stream of events whose data are, whatever the body; nothing is left behind. */
#include "../server/fake_scheduler.h"
#include "base/doc.h"
#include "server/api.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static struct scheduler scheduler;
static struct api *api;
static struct tokenizer *tokenizer;

static void require(bool claim)
{
    if (!claim) abort();
}

static void set_up(void)
{
    static struct config config;
    static struct chat_template *template;
    static const char *const names[] = { "demo" };
    struct err e = { 0 };
    json_t *root = NULL;
    require(tokenizer_load(&tokenizer, "models/demo", &e) &&
            chat_template_load(&template, "models/demo", &e) &&
            doc_load(&root, "models/demo/config.json", 1 << 20, &e) && config_parse(&config, root, &e));
    json_decref(root);
    const struct api_options o = { .scheduler = &scheduler,
                                   .tokenizer = tokenizer,
                                   .chat_template = template,
                                   .config = &config,
                                   .dir = "models/demo",
                                   .served_names = names,
                                   .n_served_names = 1,
                                   .max_model_len = 512,
                                   .max_n = 4,
                                   .store_bytes = 1 << 16,
                                   .store_seconds = 1e6 };
    require(api_create(&api, &o, &e));
}

static void script(unsigned which)
{
    static const char call[] = "x\n</think>\n\ny<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n"
                               "</function>\n</tool_call>";
    static const char *const texts[] = { "a</think>b c", "</think>\n\n{\"a\": 1}", call,
                                         "\xe2\x82\xac<think></think><function=f></function>" };
    struct token_list list = { 0 };
    struct err e;
    const char *text = texts[which % 4];
    require(tokenizer_encode(tokenizer, &list, text, strlen(text), 0, &e));
    memcpy(scheduler.tokens, list.ids, list.n * sizeof *list.ids);
    scheduler.n_tokens = (int)list.n;
    scheduler.tokens[scheduler.n_tokens++] = tokenizer_find(tokenizer, "<|im_end|>");
    free(list.ids);
    scheduler.room = which & 16 ? 1 : -1;
    scheduler.fail_at = which & 32 ? 2 : -1;
}

static void check_json(const char *text, size_t n)
{
    struct err e;
    json_t *root;
    require(doc_parse(&root, text, n, &e));
    json_decref(root);
}

/* [event: NAME\n]data: JSON\n\n, again and again */
static void check_events(const char *text, size_t n)
{
    while (n > 0) {
        const char *end = memmem(text, n, "\n\n", 2), *at = text;
        require(end);
        if (memcmp(at, "event: ", 7) == 0) at = (const char *)memchr(at, '\n', n) + 1;
        require(memcmp(at, "data: ", 6) == 0);
        at += 6;
        if (end - at != 6 || memcmp(at, "[DONE]", 6) != 0) check_json(at, (size_t)(end - at));
        n -= (size_t)(end - text) + 2;
        text = end + 2;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    const struct api_caller caller = { .request_id = "r" };
    bool done = false;
    if (!api) set_up();
    if (bytes < 2) return 0;
    script(data[1]);
    scheduler.piece = data[1] >> 6;
    struct exchange *x = exchange_create(api, (enum api_route)(data[0] % (API_SERVER_INFO + 1)), "demo",
                                         (const char *)data + 2, bytes - 2, &caller);
    require(x);
    for (int i = 0; !done; i++) {
        size_t n;
        require(i < 100000);
        /* A queue that is full empties. */
        if (i > 0 && data[1] & 16) scheduler.room = 1;
        const char *text = exchange_pump(x, &n, &done);
        if (exchange_is_stream(x))
            check_events(text, n);
        else if (n > 0)
            check_json(text, n);
        require(!done || n > 0 || exchange_is_stream(x));
    }
    int status = exchange_status(x);
    require(status == 200 || status == 400 || status == 404 || status == 413 || status == 500 ||
            status == 503);
    exchange_free(x);
    require(scheduler.open == 0);
    return 0;
}
