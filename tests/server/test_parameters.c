/* All parameters of requests together, on the demo model: a request has one answer, to the last digit of its
 * log-probabilities, whatever is drafted, alone and among others, whole and streamed. */
#include "server/api.h"
#include "server/json_at.h"
#include "support/models.h"
#include "support/sanitized.h"
#include <unistd.h>

enum { MOST_DRAFTS = 2, TOGETHER = 24, CONTEXT = 1024, CHOICES_MOST = 6 };

/* Its own model too: a backend belongs to one thread. */
struct service {
    struct loaded loaded;
    struct engine *engine;
    struct scheduler *scheduler;
    struct api *api;
};

struct served {
    struct tokenizer *tokenizer;
    struct chat_template *template;
    uint32_t *known;
    struct service of[MOST_DRAFTS + 1]; /* by drafts */
};

/* Tokens that have a text. */
static void find_known(struct served *x, int64_t n_vocab)
{
    size_t n;
    if (x->known) return;
    x->known = calloc((size_t)(n_vocab + 31) / 32, sizeof *x->known);
    for (int32_t id = 0; id < n_vocab; id++) {
        tokenizer_bytes(x->tokenizer, id, &n);
        if (n > 0) x->known[id / 32] |= 1u << id % 32;
    }
}

static void start(struct served *x, int drafts)
{
    static const char *const names[] = { "demo" };
    struct service *v = &x->of[drafts];
    struct err e = { 0 };
    struct engine_options g = { .context = CONTEXT, .sequences = 8, .snapshots = 16, .drafts = drafts };
    load_model(&v->loaded, "models/demo", &(struct backend_options){ .device = DEVICE_CPU, .threads = 1 });
    must(model_bind_mtp(&v->loaded.model, true, &e), &e);
    must(engine_create(&v->engine, &v->loaded.model, &g, &e), &e);
    find_known(x, v->loaded.checkpoint.config.vocab_size);
    struct scheduler_options s = {
        .engine = v->engine, .model = &v->loaded.model, .known = x->known, .fixed_drafts = true
    };
    must(scheduler_create(&v->scheduler, &s, &e), &e);
    struct api_options a = { .scheduler = v->scheduler,
                             .tokenizer = x->tokenizer,
                             .chat_template = x->template,
                             .config = &v->loaded.checkpoint.config,
                             .dir = "models/demo",
                             .served_names = names,
                             .n_served_names = 1,
                             .max_model_len = CONTEXT };
    must(api_create(&v->api, &a, &e), &e);
}

static void load(struct served *x)
{
    struct err e = { 0 };
    must(tokenizer_load(&x->tokenizer, "models/demo", &e), &e);
    must(chat_template_load(&x->template, "models/demo", &e), &e);
    for (int k = 0; k <= MOST_DRAFTS; k++) start(x, k);
}

static void unload(struct served *x)
{
    for (int k = 0; k <= MOST_DRAFTS; k++) {
        api_free(x->of[k].api);
        scheduler_free(x->of[k].scheduler);
        engine_free(x->of[k].engine);
        unload_model(&x->of[k].loaded);
    }
    free(x->known);
    chat_template_free(x->template);
    tokenizer_free(x->tokenizer);
}

/* Requests. */

static uint64_t seed;

static int below(int n)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (int)((seed >> 33) % (uint64_t)n);
}

static bool chance(int percent)
{
    return below(100) < percent;
}

/* One of: a name, what it may be. %d: a token's id. */
static const char *const optional[][2] = {
    { "presence_penalty", "1.5" },
    { "presence_penalty", "-0.5" },
    { "frequency_penalty", "0.7" },
    { "repetition_penalty", "1.3" },
    { "repetition_penalty", "0.9" },
    { "stop", "\" the\"" },
    { "stop", "[\"a\",\"is\"]" },
    { "stop", "[\"e \",\"\\n\",\".\"]" },
    { "stop_token_ids", "[%d,%d,13]" },
    { "include_stop_str_in_output", "true" },
    { "ignore_eos", "true" },
    { "min_tokens", "7" },
    { "logit_bias", "{\"%d\":5,\"%d\":-100}" },
    { "logit_bias", "{\"%d\":-3,\"11\":2.5}" },
    { "allowed_token_ids",
      "[%d,%d,10,11,12,13,14,15,16,17,18,19,20,30,40,50,60,70,80,90,100,264,265,266,267,268,269]" },
    { "bad_words", "[\"the\",\"capital of\",\"a\"]" },
    { "logprob_token_ids", "[%d,%d]" },
    { "prompt_logprobs", "1" },
    { "return_token_ids", "true" },
    { "skip_special_tokens", "false" },
    { "n", "3" },
    { "repetition_detection", "{\"max_pattern_size\":6,\"min_count\":2}" },
    { "truncate_prompt_tokens", "9" },
    { "cache_salt", "\"s\"" },
};
static const char *const forms[] = {
    "\"response_format\":{\"type\":\"json_object\"}",
    "\"response_format\":{\"type\":\"json_schema\",\"json_schema\":{\"name\":\"a\",\"schema\":{\"type\":"
    "\"object\","
    "\"properties\":{\"a\":{\"type\":\"string\",\"maxLength\":12},\"b\":{\"enum\":[1,2,true]},\"c\":{"
    "\"type\":"
    "\"array\",\"items\":{\"type\":\"integer\"},\"maxItems\":3}},\"required\":[\"a\",\"b\"]}}}",
    "\"structured_outputs\":{\"regex\":\"[A-Z][a-z]{2,9}( [a-z]{1,6}){0,4}[.!]\"}",
    "\"structured_outputs\":{\"choice\":[\"Oslo\",\"Helsinki is the one\",\"Rome\"]}",
    "\"response_format\":{\"type\":\"structural_tag\",\"triggers\":[\"is\",\"a\"],\"structures\":[{\"begin\":"
    "\"is \",\"schema\":"
    "{\"type\":\"array\",\"items\":{\"type\":\"integer\"},\"maxItems\":2},\"end\":\".\"}]}",
    "\"guided_grammar\":\"root ::= word (\\\", \\\" word){1,3}\\nword ::= [a-z]+\"",
};
static const char *const prompts[] = { "What is the capital of Finland?", "Count from 1 to 9.", "Say hello.",
                                       "List three colours, in a sentence of your own." };
static const char tools[] =
    "\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"get_weather\",\"parameters\":{\"type\":"
    "\"object\",\"properties\":{\"city\":{\"type\":\"string\",\"maxLength\":20},\"days\":{\"type\":"
    "\"integer\"}},\"required\":[\"city\"]}}}]";

static void add(char *body, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsprintf(body + strlen(body), format, args);
    va_end(args);
}

static void add_sampling(char *body)
{
    static const char *const temperatures[] = { "0", "0.6", "1", "1.4" };
    add(body, ",\"temperature\":%s,\"seed\":%d", temperatures[below(4)], below(1000));
    if (chance(30)) add(body, ",\"top_p\":0.%d", 5 + below(5));
    if (chance(30)) add(body, ",\"top_k\":%d", below(30) - 1);
    if (chance(15)) add(body, ",\"min_p\":0.05");
}

static void add_optional(char *body, bool is_chat)
{
    for (int n = below(6); n > 0; n--) {
        const char *const *o = optional[below(sizeof optional / sizeof *optional)];
        char name[60];
        snprintf(name, sizeof name, "\"%s\":", o[0]);
        if (strstr(body, name) || (strcmp(o[0], "n") == 0 && chance(50))) continue;
        if (strcmp(o[0], "truncate_prompt_tokens") == 0 && is_chat) continue;
        add(body, ",%s", name);
        int32_t first = 300 + below(1500), second = 20 + below(280);
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
        add(body, o[1], first, second);
#pragma GCC diagnostic pop
    }
}

static void add_chat(char *body)
{
    static const char *const thinking[] = { "\"reasoning_effort\":\"none\"", "\"reasoning_effort\":\"low\"",
                                            "\"thinking_token_budget\":5", "\"thinking_token_budget\":0" };
    static const char *const choices[] = {
        "\"auto\"", "\"required\"", "\"none\"",
        "{\"type\":\"function\",\"function\":{\"name\":\"get_weather\"}}"
    };
    bool with_tools = chance(30);
    add(body, "\"messages\":[{\"role\":\"user\",\"content\":\"%s\"}]",
        with_tools && chance(70) ? "What is the weather in Oslo?" : prompts[below(4)]);
    if (chance(80)) add(body, ",%s", thinking[below(4)]);
    if (chance(40)) add(body, ",\"logprobs\":true,\"top_logprobs\":%d", below(4));
    if (with_tools) add(body, ",%s,\"tool_choice\":%s", tools, choices[below(4)]);
    if (with_tools && chance(30)) add(body, ",\"parallel_tool_calls\":false");
}

/* is_chat says which route. */
static void random_body(char *body, bool *is_chat)
{
    *is_chat = chance(70);
    strcpy(body, "{");
    if (*is_chat) {
        add_chat(body);
    } else {
        add(body, "\"prompt\":[\"%s\",\"The first\"]", prompts[below(4)]);
        if (chance(40)) add(body, ",\"logprobs\":%d", below(4));
        if (chance(20)) add(body, ",\"echo\":true");
    }
    add(body, ",\"max_tokens\":%d", 8 + below(50));
    add_sampling(body);
    add_optional(body, *is_chat);
    if (chance(35)) add(body, ",%s", forms[below(6)]);
}

/* Answers. */

static struct exchange *ask(struct api *a, const char *body, bool is_chat)
{
    const struct api_caller caller = { .request_id = "r", .owner = 1 };
    return exchange_create(a, is_chat ? API_CHAT_COMPLETIONS : API_COMPLETIONS, NULL, body, strlen(body),
                           &caller);
}

/* Appends what there is to say; true: all is said. */
static bool pump(struct exchange *e, char **all, size_t *n)
{
    size_t bytes;
    bool done;
    const char *part = exchange_pump(e, &bytes, &done);
    *all = realloc(*all, *n + bytes + 1);
    memcpy(*all + *n, part, bytes);
    *n += bytes;
    (*all)[*n] = 0;
    return done;
}

/* The answer as JSON, without what speaks of time and drafts. */
static json_t *essence(const char *text)
{
    json_t *r = fixture_parse(text), *usage = json_object_get(r, "usage");
    json_object_del(r, "created");
    json_object_del(json_object_get(usage, "prompt_tokens_details"), "cached_tokens");
    json_object_del(json_object_get(usage, "completion_tokens_details"), "accepted_prediction_tokens");
    json_object_del(json_object_get(usage, "completion_tokens_details"), "rejected_prediction_tokens");
    return r;
}

static json_t *answer(struct api *a, const char *body, bool is_chat)
{
    struct exchange *e = ask(a, body, is_chat);
    char *all = NULL;
    size_t n = 0;
    while (!pump(e, &all, &n)) usleep(50);
    exchange_free(e);
    json_t *r = essence(all);
    free(all);
    return r;
}

static void check_same(const json_t *want, json_t *got, const char *how, const char *body)
{
    if (!json_equal(want, got)) {
        char *a = json_dumps(want, JSON_COMPACT), *b = json_dumps(got, JSON_COMPACT);
        size_t at = 0;
        while (a[at] == b[at]) at++;
        at = at > 60 ? at - 60 : 0;
        fail_msg("%s: %s\n  wanted ...%.300s\n  found  ...%.300s", how, body, a + at, b + at);
    }
    json_decref(got);
}

/* What the pieces of a stream add up to, of each choice: text, reasoning, arguments, scores and how it ended.
 */
static void check_stream(struct api *a, const char *body, bool is_chat, json_t *want)
{
    static char text[CHOICES_MOST][20000];
    char streamed[4000];
    size_t n = 0, scores[CHOICES_MOST] = { 0 };
    for (int i = 0; i < CHOICES_MOST; i++) text[i][0] = 0;
    snprintf(streamed, sizeof streamed, "{\"stream\":true,\"stream_interval\":%d,%s", 1 + below(3), body + 1);
    struct exchange *e = ask(a, streamed, is_chat);
    char *all = NULL, *rest;
    while (!pump(e, &all, &n)) usleep(50);
    exchange_free(e);
    if (json_object_get(want, "error")) {
        json_decref(fixture_parse(strncmp(all, "data: ", 6) == 0 ? strtok_r(all + 6, "\n", &rest) : all));
        free(all);
        return;
    }
    const char *ends[CHOICES_MOST] = { NULL };
    json_t *kept = json_array();
    for (char *line = strtok_r(all, "\n", &rest); line; line = strtok_r(NULL, "\n", &rest)) {
        if (strcmp(line, "data: [DONE]") == 0) break;
        json_t *v = fixture_parse(line + 6), *c = at(v, "choices.0");
        json_array_append_new(kept, v);
        int64_t i = json_integer_value(at(c, "index"));
        if (at(c, "delta.content") || at(c, "text"))
            strcat(text[i], text_at(c, is_chat ? "delta.content" : "text"));
        scores[i] += json_array_size(at(c, is_chat ? "logprobs.content" : "logprobs.tokens"));
        if (json_is_string(at(c, "finish_reason"))) ends[i] = text_at(c, "finish_reason");
    }
    json_t *c;
    size_t i;
    json_array_foreach(json_object_get(want, "choices"), i, c)
    {
        json_t *content = at(c, is_chat ? "message.content" : "text");
        if (json_is_string(content) && strcmp(text[i], json_string_value(content)) != 0)
            fail_msg("streamed: %s\n  wanted %s\n  found  %s", body, json_string_value(content), text[i]);
        assert_non_null(ends[i]);
        assert_string_equal(ends[i], text_at(c, "finish_reason"));
        assert_int_equal(scores[i], json_array_size(at(c, is_chat ? "logprobs.content" : "logprobs.tokens")));
    }
    json_decref(kept);
    free(all);
}

struct asked {
    char body[3000];
    bool is_chat;
    json_t *want;
};

/* All at once through one scheduler. */
static void check_together(struct api *a, const struct asked *all, const char *how)
{
    struct exchange *e[TOGETHER];
    char *text[TOGETHER] = { NULL };
    size_t n[TOGETHER] = { 0 };
    int left = TOGETHER;
    for (int i = 0; i < TOGETHER; i++) e[i] = ask(a, all[i].body, all[i].is_chat);
    while (left > 0) {
        for (int i = 0; i < TOGETHER; i++) {
            if (!e[i] || !pump(e[i], &text[i], &n[i])) continue;
            exchange_free(e[i]);
            e[i] = NULL;
            left--;
        }
        usleep(50);
    }
    for (int i = 0; i < TOGETHER; i++) {
        check_same(all[i].want, essence(text[i]), how, all[i].body);
        free(text[i]);
    }
}

static void test_parameters(void **state)
{
    struct served *x = *state;
    static struct asked all[TOGETHER];
    const char *many = getenv("QUENCH_PARAMETERS");
    int rounds = many ? (atoi(many) + TOGETHER - 1) / TOGETHER : SANITIZED ? 1 : 4;
    int64_t good = 0, drafted = 0;
    struct scheduler_stats stats;
    seed = getenv("QUENCH_SEED") ? strtoull(getenv("QUENCH_SEED"), NULL, 10) : 11;
    for (int round = 0; round < rounds; round++) {
        for (int i = 0; i < TOGETHER; i++) {
            struct asked *q = &all[i];
            random_body(q->body, &q->is_chat);
            strcat(q->body, "}");
            q->want = answer(x->of[0].api, q->body, q->is_chat);
            good += json_object_get(q->want, "error") == NULL;
            check_same(q->want, answer(x->of[1].api, q->body, q->is_chat), "one draft", q->body);
            check_same(q->want, answer(x->of[2].api, q->body, q->is_chat), "two drafts", q->body);
            if (!strstr(q->body, "prompt_logprobs"))
                check_stream(x->of[below(3)].api, q->body, q->is_chat, q->want);
        }
        for (int k = 0; k <= MOST_DRAFTS; k++) {
            char how[40];
            snprintf(how, sizeof how, "%d drafts, among others", k);
            check_together(x->of[k].api, all, how);
        }
        for (int i = 0; i < TOGETHER; i++) json_decref(all[i].want);
    }
    scheduler_stats(x->of[2].scheduler, &stats);
    drafted = stats.accepted;
    print_message("%d requests, %lld of them answered, the others refused; %lld drafts taken\n",
                  rounds * TOGETHER, (long long)good, (long long)drafted);
    assert_true(good > rounds * TOGETHER / 2 && drafted > 12 * rounds);
}

int main(void)
{
    static struct served x;
    load(&x);
    const struct CMUnitTest tests[] = { cmocka_unit_test_prestate(test_parameters, &x) };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    unload(&x);
    return failed;
}
