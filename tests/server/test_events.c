/* How many tokens an event of a stream has: what --stream-interval and a request's stream_interval say, or as
 * time goes; and that nothing of the answer depends on it. */
#include "server/api_fixture.h"
#include "base/clock.h"
#include <math.h>
#include <time.h>

#define USER    "\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]"
#define LETTERS "abcdefghijklmnopqrstuvwxy"

/* Each API's body, and where the text of its events is. */
static const struct {
    enum api_route route;
    const char *body, *path;
} apis[] = {
    { API_COMPLETIONS, "{\"prompt\":\"q\",\"max_tokens\":50,\"stream\":true", "choices.0.text" },
    { API_CHAT_COMPLETIONS, "{\"stream\":true," USER, "choices.0.delta.content" },
    { API_RESPONSES, "{\"stream\":true,\"input\":\"hi\"", "data.delta" },
    { API_MESSAGES, "{\"stream\":true,\"max_tokens\":50," USER, "data.delta.text" },
};
enum { APIS = sizeof apis / sizeof *apis };

/* What the events of one stream say, and how many say some of it. */
static int texts(char *all, json_t *events, const char *path)
{
    int n = 0;
    size_t i;
    json_t *e;
    *all = 0;
    json_array_foreach(events, i, e)
    {
        const char *part = json_string_value(at(e, path));
        if (!part || !*part) continue;
        strcat(all, part);
        n++;
    }
    return n;
}

static json_t *ask(struct fixture *x, int api, const char *more)
{
    char body[400];
    snprintf(body, sizeof body, "%s%s}", apis[api].body, more);
    return fixture_stream(x, apis[api].route, body);
}

/* One token each, whose text is certain as it comes. */
static void script_letters(struct fixture *x, int api)
{
    fixture_script(x, api == 0 || apis[api].route == API_MESSAGES ? "\x01" LETTERS : "</think>\x01" LETTERS);
    x->scheduler.piece = 1;
}

static void test_interval(void **state)
{
    struct fixture *x = *state;
    int letters = (int)strlen(LETTERS);
    char all[200];
    for (int api = 0; api < APIS; api++)
        for (int every = 1; every <= 32; every += every < 4 ? 1 : 7) {
            x->options.stream_interval = every;
            fixture_api(x);
            script_letters(x, api);
            json_t *r = ask(x, api, "");
            int n = texts(all, r, apis[api].path);
            assert_string_equal(all, LETTERS);
            /* the first at once, then groups; </think> is a token, too */
            int groups = 1 + (letters - 1 + every - 1) / every;
            if (n < groups || n > groups + 1) fail_msg("%s, every %d: %d events", apis[api].path, every, n);
            json_decref(r);
        }
}

/* What a request says goes before what the server was started with. */
static void test_request(void **state)
{
    struct fixture *x = *state;
    char all[200];
    x->options.stream_interval = 1000;
    fixture_api(x);
    for (int api = 0; api < 2; api++) {
        script_letters(x, api);
        json_t *r = ask(x, api, ",\"stream_interval\":1");
        assert_int_equal(texts(all, r, apis[api].path), strlen(LETTERS));
        json_decref(r);
        r = ask(x, api, "");
        assert_int_equal(texts(all, r, apis[api].path), 2);
        json_decref(r);
    }
}

/* Scores and ids of all tokens are in the events that have their texts. */
static void test_scores(void **state)
{
    struct fixture *x = *state;
    for (int every = 0; every <= 7; every++) {
        char more[80];
        size_t scores = 0, ids = 0, i;
        json_t *e;
        x->options.stream_interval = every;
        fixture_api(x);
        script_letters(x, 0);
        snprintf(more, sizeof more, ",\"logprobs\":1,\"return_token_ids\":true");
        json_t *r = ask(x, 0, more);
        json_array_foreach(r, i, e)
        {
            size_t n = json_array_size(at(e, "choices.0.logprobs.tokens"));
            const char *text = json_string_value(at(e, "choices.0.text"));
            if (text && *text)
                assert_true(n == strlen(text) || n == strlen(text) + 1); /* and the stop token */
            scores += n;
            ids += json_array_size(at(e, "choices.0.token_ids"));
        }
        assert_int_equal(scores, x->scheduler.n_tokens);
        assert_int_equal(ids, x->scheduler.n_tokens);
        json_decref(r);
    }
}

/* A stop string that spans events ends the text where it begins, however much waits. */
static void test_stop(void **state)
{
    struct fixture *x = *state;
    char all[200];
    for (int api = 0; api < 2; api++)
        for (int every = 0; every <= 9; every++) {
            x->options.stream_interval = every;
            fixture_api(x);
            script_letters(x, api);
            json_t *r = ask(x, api, ",\"stop\":[\"klmno\"]");
            texts(all, r, apis[api].path);
            assert_string_equal(all, "abcdefghij");
            json_t *last = json_array_get(r, json_array_size(r) - 2);
            assert_string_equal(text_at(last, "choices.0.finish_reason"), "stop");
            assert_string_equal(text_at(last, "choices.0.stop_reason"), "klmno");
            json_decref(r);
        }
}

/* One pump, and how many bytes it gave. */
static size_t pump(struct exchange *e)
{
    size_t n;
    bool done;
    exchange_pump(e, &n, &done);
    assert_false(done);
    return n;
}

/* Without a number: the first text at once; what comes soon after waits, but not for long, and not for more
 * tokens. */
static void test_time(void **state)
{
    struct fixture *x = *state;
    static const char body[] = "{\"prompt\":\"q\",\"stream\":true}";
    const struct api_caller caller = { .request_id = "r" };
    x->options.stream_interval = 0;
    fixture_api(x);
    script_letters(x, 0);
    struct exchange *e = exchange_create(x->api, API_COMPLETIONS, NULL, body, sizeof body - 1, &caller);
    assert_true(exchange_due(e) == 0);
    assert_true(pump(e) > 0);
    assert_true(exchange_due(e) == 0);
    double begin = clock_seconds();
    size_t second = pump(e);
    double due = exchange_due(e);
    if (clock_seconds() - begin < 0.01) { /* else this machine slept meanwhile */
        assert_int_equal(second, 0);
        assert_true(due > begin && due < begin + 0.08);
    }
    x->scheduler.piece = -1; /* nothing more comes */
    for (int i = 0; i < 1000 && exchange_due(e) > clock_seconds(); i++)
        nanosleep(&(struct timespec){ 0, 1000000 }, NULL);
    assert_true(second > 0 || pump(e) > 0);
    assert_true(exchange_due(e) == 0);
    exchange_free(e);
}

static double look(struct fixture *x, const char *body)
{
    const struct api_caller caller = { .request_id = "r" };
    script_letters(x, 0);
    struct exchange *e = exchange_create(x->api, API_COMPLETIONS, NULL, body, strlen(body), &caller);
    exchange_among(e, 64);
    assert_true(exchange_look(e) == 0);
    pump(e);
    double at = exchange_look(e);
    exchange_free(e);
    return at;
}

/* When the loop looks again: before the next tick only where a token may end the answer, or is counted. */
static void test_look(void **state)
{
    struct fixture *x = *state;
    x->options.stream_interval = 0;
    fixture_api(x);
    for (int i = 0; i < 5; i++) {
        double begin = clock_seconds();
        assert_true(look(x, "{\"prompt\":\"q\",\"stream\":true}") > begin);
        double end = clock_seconds();
        assert_true(look(x, "{\"prompt\":\"q\",\"stream\":true}") <= clock_seconds() + 0.040001);
        assert_true(look(x, "{\"prompt\":\"q\",\"stream\":true,\"stop\":\"zz\"}") <= clock_seconds());
        assert_true(look(x, "{\"prompt\":\"q\",\"stream\":true,\"stream_interval\":2}") >= end);
        assert_true(look(x, "{\"prompt\":\"q\",\"stream\":true,\"stream_interval\":2}") <= clock_seconds());
    }
}

/* The fewer streams, the sooner, and all of them at the same ticks. */
static void test_share(void **state)
{
    struct fixture *x = *state;
    static const char body[] = "{\"prompt\":\"q\",\"stream\":true}";
    static const struct {
        int64_t streams;
        double seconds;
    } among[] = { { 1, 0.000625 }, { 8, 0.005 }, { 64, 0.04 }, { 10000, 0.04 } };
    const struct api_caller caller = { .request_id = "r" };
    x->options.stream_interval = 0;
    fixture_api(x);
    for (size_t i = 0; i < sizeof among / sizeof *among; i++) {
        script_letters(x, 0);
        struct exchange *e = exchange_create(x->api, API_COMPLETIONS, NULL, body, sizeof body - 1, &caller);
        exchange_among(e, among[i].streams);
        double begin = clock_seconds();
        assert_true(pump(e) > 0);
        double first = clock_seconds();
        pump(e);
        double due = exchange_due(e);
        if (due > 0) { /* else this machine slept meanwhile */
            double ticks = due / among[i].seconds;
            assert_true(due > begin && due <= first + 1.001 * among[i].seconds);
            assert_true(fabs(ticks - round(ticks)) < 1e-3);
        }
        exchange_free(e);
    }
}

#define TEST(f) cmocka_unit_test_setup_teardown(f, fixture_setup, fixture_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = { TEST(test_interval), TEST(test_request), TEST(test_scores),
                                        TEST(test_stop),     TEST(test_time),    TEST(test_look),
                                        TEST(test_share) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
