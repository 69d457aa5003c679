/* quench serve over real sockets: answers, keys, framing, limits, faults of clients, signals, TLS. After each
 * server's life its gauges and descriptors are back where they were. Larger counts by environment:
 * QUENCH_MALFORMED, QUENCH_DISCONNECTS, QUENCH_SLOW, QUENCH_SIGTERMS, QUENCH_STREAMS, and QUENCH_KEYS=1 for
 * the whole matrix. `make soak` sets them. */
#include "server/serving.h"
#include "num/random.h"
#include <jansson.h>
#include <openssl/ssl.h>
#include <pthread.h>
#include <sys/resource.h>
#include <sys/un.h>

#define START(s, ...) serving_start(s, (const char *const[]){ __VA_ARGS__, NULL })
#define QUESTION                                                                                             \
    "{\"model\":\"models/demo\",\"messages\":[{\"role\":\"user\",\"content\":\"What is the capital of "      \
    "Finland?\"}],\"temperature\":0,\"chat_template_kwargs\":{\"enable_thinking\":false}"
/* An answer that goes on for so many tokens. */
#define LONG(n)                                                                                              \
    "{\"model\":\"models/"                                                                                   \
    "demo\",\"prompt\":\"Count\",\"temperature\":0,\"ignore_eos\":true,\"max_tokens\":" #n
#define CHAT_PATH        "/v1/chat/completions"
#define COMPLETIONS_PATH "/v1/completions"
static const char CHAT[] = CHAT_PATH, COMPLETIONS[] = COMPLETIONS_PATH;

static struct reply reply;
static struct temp temp;

static int64_t count_of(const char *variable, int64_t usual)
{
    const char *text = getenv(variable);
    return text ? atoll(text) : usual;
}

/* The server does nothing any more and holds what an idle one holds. */
static void check_idle(const struct serving *s, int descriptors)
{
    double until = clock_seconds() + 20, connections = -1;
    int now = -1;
    while (clock_seconds() < until) {
        connections = metric(s, "quench:connections"); /* the one that asks */
        now = serving_descriptors(s);
        if (connections == 1 && metric(s, "vllm:num_requests_running") == 0 && now <= descriptors) break;
        usleep(50000);
    }
    assert_int_equal((int)connections, 1);
    assert_int_equal((int)metric(s, "quench:exchanges"), 0);
    assert_int_equal((int)metric(s, "quench:body_bytes"), 0);
    assert_int_equal((int)metric(s, "vllm:num_requests_running"), 0);
    assert_int_equal((int)metric(s, "vllm:num_requests_waiting"), 0);
    if (now > descriptors) fail_msg("%d descriptors, %d at first", now, descriptors);
}

/* Pages and states that nothing but a prefix cache could hold: without one, none. */
static void check_no_pages(const struct serving *s)
{
    assert_int_equal((int)metric(s, "quench:kv_pages_used"), 0);
    assert_int_equal((int)metric(s, "quench:states_used"), 0);
}

static const char *string_at(json_t *o, const char *a, const char *b, const char *c)
{
    json_t *choice = json_array_get(json_object_get(o, a), 0);
    return json_string_value(c ? json_object_get(json_object_get(choice, b), c) : json_object_get(choice, b));
}

/* The texts of all deltas of a stream that ends in [DONE]. */
static void join_stream(char *out, const char *body, bool chat)
{
    *out = 0;
    bool done = false;
    for (const char *line = body; line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL) {
        if (strncmp(line, "data: ", 6) != 0) continue;
        done = strncmp(line + 6, "[DONE]", 6) == 0;
        if (done) continue;
        json_t *o = json_loadb(line + 6, strcspn(line + 6, "\n"), 0, NULL);
        assert_non_null(o);
        const char *text =
            chat ? string_at(o, "choices", "delta", "content") : string_at(o, "choices", "text", NULL);
        strcat(out, text ? text : "");
        json_decref(o);
    }
    assert_true(done);
}

static void test_answers(void **state)
{
    (void)state;
    struct serving s;
    char text[4096];
    START(&s, "--served-model-name", "models/demo", "demo", "--trust-remote-code", "--max-num-seqs=4");
    int descriptors = serving_descriptors(&s);
    assert_int_equal(get(&s, &reply, "/health"), 200);
    assert_int_equal(get(&s, &reply, "/ready"), 200);
    assert_int_equal(get(&s, &reply, "/ping"), 200);
    assert_int_equal(get(&s, &reply, "/version"), 200);
    assert_int_equal(get(&s, &reply, "/load"), 200);
    assert_int_equal(get(&s, &reply, "/v1/models"), 200);
    assert_non_null(strstr(reply.body, "\"demo\""));
    assert_int_equal(get(&s, &reply, "/v1/models/models%2Fdemo"), 200);
    assert_int_equal(get(&s, &reply, "/v1/models/other"), 404);
    assert_int_equal(get(&s, &reply, "/v1/chat/completions"), 405);
    assert_non_null(strstr(reply.head, "Allow: POST, OPTIONS"));
    assert_int_equal(post(&s, &reply, "/v1/embeddings", "{}"), 404);
    assert_non_null(strstr(reply.body, "it has no embeddings"));
    assert_int_equal(post(&s, &reply, CHAT, QUESTION "}"), 200);
    json_t *o = json_loadb(reply.body, reply.body_bytes, 0, NULL);
    assert_string_equal(string_at(o, "choices", "message", "content"), "The capital of Finland is Helsinki.");
    json_decref(o);
    assert_int_equal(post(&s, &reply, CHAT, QUESTION ",\"stream\":true}"), 200);
    assert_non_null(strstr(reply.head, "text/event-stream"));
    join_stream(text, reply.body, true);
    assert_string_equal(text, "The capital of Finland is Helsinki.");
    assert_int_equal(post(&s, &reply, CHAT, "{\"messages\":3}"), 400);
    assert_non_null(strstr(reply.body, "\"error\""));
    assert_int_equal((int)metric(&s, "http_requests_total"), (int)metric(&s, "http_requests_total"));
    assert_true(metric(&s, "vllm:generation_tokens_total") > 10);
    assert_true(metric(&s, "vllm:time_to_first_token_seconds_count") == 2);
    check_idle(&s, descriptors);
    serving_stop(&s);
}

/* More requests than may run and wait: 503, and when to come again. */
static void test_queue(void **state)
{
    (void)state;
    enum { REQUESTS = 6 };
    struct serving s;
    int fds[REQUESTS], answered = 0, refused = 0;
    START(&s, "--max-num-seqs", "1", "--max-queued", "1", "--no-enable-prefix-caching");
    int descriptors = serving_descriptors(&s);
    const char *request = post_text(COMPLETIONS, "", LONG(2000) "}");
    for (int i = 0; i < REQUESTS; i++) {
        fds[i] = dial(&s);
        assert_true(send_bytes(fds[i], request, strlen(request)));
    }
    for (int i = 0; i < REQUESTS; i++) {
        reply.n = reply.used = 0;
        int status = receive(&reply, fds[i], 60);
        answered += status == 200;
        refused += status == 503;
        if (status == 503) assert_non_null(strstr(reply.bytes, "\r\nRetry-After: "));
        close(fds[i]);
    }
    assert_int_equal(answered + refused, REQUESTS);
    assert_true(answered >= 1 && refused >= 1);
    check_idle(&s, descriptors);
    serving_stop(&s);
}

/* Until /load says so, to one with the key "two". */
static void await_load(const struct serving *s, const char *text)
{
    for (double until = clock_seconds() + 20; clock_seconds() < until; usleep(10000)) {
        ask(s, &reply, "GET /load HTTP/1.1\r\nHost: a\r\nx-api-key: two\r\n\r\n");
        if (strstr(reply.body, text)) return;
    }
    fail_msg("not %s: %s", text, reply.body);
}

/* What one key has under way and in the queue is bounded, and of no concern to another key. */
static void test_key_limits(void **state)
{
    (void)state;
    static const char *const keys[] = { "x-api-key: one\r\n", "x-api-key: two\r\n" };
    static const char messages[] =
        "{\"max_tokens\":2,\"messages\":[{\"role\":\"user\",\"content\":\"hello\"}]}";
    char words[600] = "{\"prompt\":\"", body[700];
    struct serving s;
    int fds[3];
    START(&s, "--api-key", "one", "two", "--max-num-seqs", "2", "--max-requests-per-key", "3",
          "--max-queued-tokens-per-key", "150", "--no-enable-prefix-caching");
    int descriptors = serving_descriptors(&s);
    for (int i = 0; i < 100; i++) strcat(words, "a b ");
    snprintf(body, sizeof body, "%s\",\"max_tokens\":2}", words); /* some 200 tokens */
    for (int i = 0; i < 3; i++) fds[i] = dial(&s);
    for (int i = 0; i < 2; i++) { /* they have the server to themselves */
        const char *text = post_text(COMPLETIONS, keys[0], LONG(100000) ",\"stream\":true}");
        send_bytes(fds[i], text, strlen(text));
    }
    await_load(&s, "\"running\":2,\"waiting\":0");
    /* one may wait, however long it is; with it no other one */
    const char *waits = post_text(COMPLETIONS, keys[0], body);
    send_bytes(fds[2], waits, strlen(waits));
    await_load(&s, "\"running\":2,\"waiting\":1");
    assert_int_equal(ask(&s, &reply, post_text("/v1/messages", keys[0], messages)), 429);
    assert_non_null(strstr(reply.head, "\r\nRetry-After: "));
    assert_non_null(strstr(reply.body, "\"type\":\"error\""));
    assert_non_null(strstr(reply.body, "\"rate_limit_error\""));
    assert_non_null(strstr(reply.body, "3 requests of this key"));
    close(fds[0]); /* a place for the one that waits; then there are two, and none waits */
    reply.n = reply.used = 0;
    assert_int_equal(receive(&reply, fds[2], 60), 200);
    close(fds[2]);
    fds[0] = dial(&s);
    const char *text = post_text(COMPLETIONS, keys[1], LONG(100000) ",\"stream\":true}");
    send_bytes(fds[0], text, strlen(text));
    await_load(&s, "\"running\":2,\"waiting\":0");
    fds[2] = dial(&s);
    waits = post_text(COMPLETIONS, keys[0], body);
    send_bytes(fds[2], waits, strlen(waits));
    await_load(&s, "\"running\":2,\"waiting\":1");
    assert_int_equal(ask(&s, &reply, post_text(COMPLETIONS, keys[0], body)), 429);
    assert_non_null(strstr(reply.head, "\r\nRetry-After: "));
    assert_non_null(strstr(reply.body, "--max-queued-tokens-per-key"));
    /* the other key's prompts wait for nothing but their turn */
    int other = dial(&s);
    waits = post_text(COMPLETIONS, keys[1], body);
    send_bytes(other, waits, strlen(waits));
    usleep(100000);
    for (int i = 0; i < 2; i++) close(fds[i]);
    reply.n = reply.used = 0;
    assert_int_equal(receive(&reply, other, 60), 200);
    reply.n = reply.used = 0;
    assert_int_equal(receive(&reply, fds[2], 60), 200);
    close(other);
    close(fds[2]);
    usleep(100000);
    assert_int_equal(serving_descriptors(&s), descriptors);
    serving_stop(&s);
}

/* The tokens of all prompts that wait are bounded, too. */
static void test_queued_tokens(void **state)
{
    (void)state;
    struct serving s;
    START(&s, "--max-num-seqs", "1", "--max-queued-tokens", "20", "--no-enable-prefix-caching");
    int descriptors = serving_descriptors(&s), fds[3], refused = 0;
    const char *request = post_text(COMPLETIONS, "", LONG(1000) ",\"stream\":true}");
    for (int i = 0; i < 3; i++) {
        fds[i] = dial(&s);
        send_bytes(fds[i], request, strlen(request));
        usleep(50000);
    }
    char body[400] = "{\"prompt\":\"";
    for (int i = 0; i < 20; i++) strcat(body, "a b ");
    strcat(body, "\",\"max_tokens\":1}");
    if (post(&s, &reply, COMPLETIONS, body) == 503) {
        assert_non_null(strstr(reply.head, "\r\nRetry-After: "));
        assert_non_null(strstr(reply.body, "--max-queued-tokens"));
        refused++;
    }
    for (int i = 0; i < 3; i++) {
        reply.n = reply.used = 0;
        assert_int_equal(receive(&reply, fds[i], 60), 200);
        close(fds[i]);
    }
    assert_int_equal(refused, 1);
    check_idle(&s, descriptors);
    check_no_pages(&s);
    serving_stop(&s);
}

/* An answer that takes too long ends: with a status, or where it has begun with an event. */
static void test_request_timeout(void **state)
{
    (void)state;
    struct serving s;
    START(&s, "--request-timeout", "0.5", "--max-num-seqs", "2", "--no-enable-prefix-caching");
    int descriptors = serving_descriptors(&s);
    assert_int_equal(post(&s, &reply, COMPLETIONS, LONG(100000) "}"), 504);
    assert_non_null(strstr(reply.body, "--request-timeout"));
    assert_int_equal(post(&s, &reply, COMPLETIONS, LONG(100000) ",\"stream\":true}"), 200);
    assert_non_null(strstr(reply.body, "--request-timeout"));
    assert_int_equal(post(&s, &reply, CHAT, QUESTION "}"), 200);
    assert_int_equal((int)metric(&s, "quench:expired_total"), 2);
    check_idle(&s, descriptors);
    check_no_pages(&s);
    serving_stop(&s);
}

/* The log has what a request cost and who made it, and nothing of what it said. */
static void test_log(void **state)
{
    (void)state;
    struct serving s;
    char path[PATH_MAX], *log;
    size_t n;
    struct err e = { 0 };
    static const char trace[] = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    snprintf(path, sizeof path, "%s", temp_path(&temp, "requests"));
    START(&s, "--request-log", path, "--max-num-seqs", "1");
    char headers[128];
    snprintf(headers, sizeof headers, "X-Request-Id: mine-1\r\ntraceparent: %s\r\n", trace);
    assert_int_equal(ask(&s, &reply, post_text(CHAT, headers, QUESTION "}")), 200);
    assert_non_null(strstr(reply.bytes, "X-Request-Id: mine-1\r\n"));
    assert_int_equal(
        ask(&s, &reply, post_text(CHAT, "", QUESTION ",\"request_id\":\"own-7\",\"session_id\":\"s.1\"}")),
        200);
    assert_non_null(strstr(reply.bytes, "X-Request-Id: own-7\r\n"));
    assert_non_null(strstr(reply.bytes, "X-Session-Id: s.1\r\n"));
    assert_int_equal(get(&s, &reply, "/private/path?and=query"), 404);
    assert_true(file_read(&log, &n, path, 1 << 20, &e));
    json_t *line = json_loads(log, JSON_DISABLE_EOF_CHECK, NULL);
    assert_string_equal(json_string_value(json_object_get(line, "id")), "mine-1");
    assert_string_equal(json_string_value(json_object_get(line, "trace")), trace);
    assert_string_equal(json_string_value(json_object_get(line, "path")), CHAT);
    assert_string_equal(json_string_value(json_object_get(line, "finish")), "stop");
    assert_true(json_integer_value(json_object_get(line, "prompt_tokens")) > 10);
    assert_true(json_integer_value(json_object_get(line, "answer_tokens")) > 5);
    json_decref(line);
    assert_non_null(strstr(log, "\"id\":\"own-7\""));
    assert_non_null(strstr(log, "\"session\":\"s.1\""));
    assert_non_null(strstr(log, "\"status\":404"));
    assert_null(strstr(log, "Finland"));
    assert_null(strstr(log, "Helsinki"));
    assert_null(strstr(log, "private"));
    free(log);
    /* moved away, as logrotate does */
    char old[PATH_MAX + 4];
    snprintf(old, sizeof old, "%s.1", path);
    assert_int_equal(rename(path, old), 0);
    kill(s.pid, SIGHUP);
    assert_true(serving_says(&s, "read again", 10));
    assert_int_equal(get(&s, &reply, "/health"), 200);
    assert_true(file_read(&log, &n, path, 1 << 20, &e));
    assert_non_null(strstr(log, "/health"));
    free(log);
    serving_stop(&s);
}

/* A long prompt gives comment lines until its first token. */
static void test_comments(void **state)
{
    (void)state;
    enum { WORDS = 1000 };
    struct serving s;
    START(&s, "--max-num-seqs", "1", "--comment-interval", "0.05", "--max-model-len", "32k");
    char *text = malloc(32 * WORDS), *body = malloc(32 * WORDS + 512);
    int n = sprintf(text, "{\"prompt\":\"");
    for (int i = 0; i < WORDS; i++) n += sprintf(text + n, "word %d ", i);
    sprintf(text + n, "\",\"max_tokens\":2,\"stream\":true,\"temperature\":0}");
    sprintf(body,
            "POST %s HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
            COMPLETIONS, strlen(text), text);
    if (ask(&s, &reply, body) != 200) fail_msg("%s", reply.bytes);
    assert_int_equal(reply.body[0], ':');
    assert_non_null(strstr(reply.body, "data: [DONE]"));
    free(text);
    free(body);
    serving_stop(&s);
}

static void test_unix_socket(void **state)
{
    (void)state;
    struct serving s;
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    snprintf(a.sun_path, sizeof a.sun_path, "%s", temp_path(&temp, "socket"));
    for (int i = 0; i < 2; i++) { /* the second finds the first one's socket */
        serving_spawn(&s, (const char *const[]){ "--uds", a.sun_path, "--root-path", "/llm/", NULL });
        assert_true(serving_says(&s, "ready after", 60));
        int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        assert_int_equal(connect(fd, (struct sockaddr *)&a, sizeof a), 0);
        reply.n = reply.used = 0;
        static const char request[] = "GET /llm/version HTTP/1.1\r\nHost: a\r\n\r\n";
        send_bytes(fd, request, sizeof request - 1);
        assert_int_equal(receive(&reply, fd, 10), 200);
        close(fd);
        if (i == 0) kill(s.pid, SIGKILL);
        if (i == 0) assert_int_equal(serving_wait(&s, 10), -SIGKILL);
    }
    serving_stop(&s);
    assert_int_equal(access(a.sun_path, F_OK), -1);
}

static void test_framing(void **state)
{
    (void)state;
    struct serving s;
    START(&s, "--max-num-seqs", "2");
    int fd = dial(&s), descriptors = serving_descriptors(&s);
    reply.n = reply.used = 0;
    /* several requests before the first answer, the last without keep-alive */
    char text[1 << 14];
    snprintf(text, sizeof text, "\r\n%s%s", post_text(CHAT, "X-Request-Id: first\r\n", QUESTION "}"),
             "GET /version HTTP/1.1\r\nHost: a\r\nX-Request-Id: bad id\r\n\r\n"
             "HEAD /version HTTP/1.1\r\nHost: a\r\n\r\nGET /health HTTP/1.1\r\nHost: a\r\nConnection: "
             "close\r\n\r\n");
    assert_true(send_bytes(fd, text, strlen(text)));
    assert_int_equal(receive(&reply, fd, 60), 200);
    assert_non_null(strstr(reply.bytes, "X-Request-Id: first\r\n"));
    assert_int_equal(receive(&reply, fd, 10), 200);
    assert_null(strstr(reply.head, "X-Request-Id: bad"));
    char *end = reply.bytes + reply.used;
    assert_memory_equal(reply.body, "{\"version\"", 10);
    while (!strstr(end, "\r\n\r\n")) assert_true(reply_more(&reply, fd, 10));
    reply.used = (size_t)(strstr(end, "\r\n\r\n") + 4 - reply.bytes); /* a HEAD's answer has no body */
    assert_int_equal(receive(&reply, fd, 10), 200);
    assert_true(reply.closed && is_closed_within(fd, 5));
    close(fd);

    /* a body in chunks, cut into two packets at every place */
    static const char body[] = QUESTION ",\"max_tokens\":1}";
    int n = snprintf(text, sizeof text,
                     "POST %s HTTP/1.1\r\nHost: a\r\ncontent-type: application/json; charset=utf-8\r\n"
                     "Transfer-Encoding: chunked\r\n\r\n10\r\n%.16s\r\n%zx;a=b\r\n%s\r\n0\r\nT: x\r\n\r\n",
                     CHAT, body, sizeof body - 17, body + 16);
    fd = dial(&s);
    for (int cut = 1; cut < n; cut += 7) {
        assert_true(send_bytes(fd, text, (size_t)cut));
        usleep(1000);
        assert_true(send_bytes(fd, text + cut, (size_t)(n - cut)));
        if (receive(&reply, fd, 60) != 200) fail_msg("cut at %d: %d", cut, reply.status);
    }
    n = snprintf(text, sizeof text, "%s", post_text(CHAT, "Expect: 100-continue\r\n", body));
    assert_true(send_bytes(fd, text, (size_t)n - sizeof body + 1));
    assert_int_equal(receive(&reply, fd, 10), 100);
    assert_true(send_bytes(fd, body, sizeof body - 1));
    assert_int_equal(receive(&reply, fd, 60), 200);
    close(fd);
    assert_int_equal(ask(&s, &reply, "GET /version HTTP/1.0\r\n\r\n"), 200);
    assert_true(reply.closed);
    check_idle(&s, descriptors);
    serving_stop(&s);
}

/* Keys: nothing but public routes without one, whatever the path is written like. */

static const char *const routes[] = { "/v1/chat/completions",
                                      "/v1/completions",
                                      "/v1/responses",
                                      "/v1/messages",
                                      "/v1/messages/count_tokens",
                                      "/v1/chat/completions/render",
                                      "/v1/completions/render",
                                      "/v1/models",
                                      "/v1/models/demo",
                                      "/tokenize",
                                      "/detokenize",
                                      "/tokenizer_info",
                                      "/metrics",
                                      "/version",
                                      "/load",
                                      "/server_info",
                                      "/v1/responses/resp_1",
                                      "/v1/embeddings",
                                      "/nothing" };
static const char *const methods[] = { "GET",     "POST",  "HEAD", "PUT",    "DELETE",
                                       "OPTIONS", "PATCH", "get",  "CONNECT" };
/* %s: the path without its slash. */
static const char *const spellings[] = {
    "/%s",           "//%s",          "/./%s",       "/x/../%s",    "/%s/",
    "/%s?a=/health", "/health/../%s", "/health/%s",  "/%%2f%s",     "/%s%%00",
    "/%s%%20",       "/%%2e/%s",      "http://a/%s", "/%s;/health", "/\\%s",
    "/HEALTH/../%s", "/%s.json",      "/ping?%s",    "/%s#/health", "/health%%2f..%%2f%s"
};
static const char *const credentials[] = {
    "",
    "Authorization: Bearer wrong-key\r\n",
    "Authorization: Bearer \r\n",
    "Authorization: Bearer\r\n",
    "Authorization: secret-key-1\r\n",
    "Authorization: Basic secret-key-1\r\n",
    "Authorization: Bearer secret-key\r\n",
    "Authorization: Bearer secret-key-1 \tx\r\n",
    "Authorization: Bearer SECRET-KEY-1\r\n",
    "x-api-key: secret-key-\r\n",
    "x-api-key:\r\n",
    "Cookie: key=secret-key-1\r\n",
    "Authorization: Bearer secret-key-1\r\nAuthorization: Bearer wrong\r\n"
};
#define EACH(i, list) for (size_t i = 0; i < sizeof(list) / sizeof *(list); i++)

/* Whether an answer without a key gives anything away: only what /health and /ping say to anyone. */
static bool is_refusal(const struct reply *r)
{
    if (r->status == 401 || r->status == 400 || r->status == 404 || r->status == 501) return true;
    return r->status == 200 && r->body_bytes == 0 && strstr(r->head, "Content-Length: 0\r\n");
}

static void test_keys(void **state)
{
    (void)state;
    struct serving s;
    char path[256], text[1024];
    int64_t asked = 0;
    bool whole = count_of("QUENCH_KEYS", 0) > 0;
    temp_text(&temp, "keys", "# of two people\nsecret-key-2\r\n\nsecret-key-3\n");
    START(&s, "--api-key", "secret-key-1", "secret-key-4", "--api-key-file", temp_path(&temp, "keys"),
          "--request-log", temp_path(&temp, "log"));
    int descriptors = serving_descriptors(&s);
    EACH(r, routes) EACH(m, methods) EACH(p, spellings) EACH(c, credentials)
    {
        if (!whole && c > 0 && p > 0 && (r + m + p + c) % 7)
            continue; /* all with none, all plain, a seventh of the rest */
        snprintf(path, sizeof path, spellings[p], routes[r] + 1);
        snprintf(text, sizeof text,
                 "%s %s HTTP/1.1\r\nHost: a\r\n%sConnection: close\r\nContent-Type: application/json\r\n"
                 "Content-Length: 2\r\n\r\n{}",
                 methods[m], path, credentials[c]);
        asked++;
        if (ask(&s, &reply, text) && !is_refusal(&reply)) fail_msg("%d for %s", reply.status, text);
        if (memmem(reply.bytes, reply.n, "secret-key", 10))
            fail_msg("an answer holds a key: %s", reply.bytes);
    }
    printf("note: %lld requests without a valid key, none answered but probes\n", (long long)asked);
    assert_true(asked > 4000);
    static const char *const good[] = { "Authorization: Bearer secret-key-1\r\n",
                                        "x-api-key: secret-key-2\r\n",
                                        "authorization: bearer  secret-key-3\r\n",
                                        "X-API-Key: secret-key-4\r\n" };
    EACH(g, good)
    {
        snprintf(text, sizeof text, "GET /version HTTP/1.1\r\nHost: a\r\n%s\r\n", good[g]);
        assert_int_equal(ask(&s, &reply, text), 200);
    }
    assert_int_equal(get(&s, &reply, "/health"), 200);
    assert_int_equal(get(&s, &reply, "/ready"), 200);
    assert_true(serving_descriptors(&s) <= descriptors + 1);

    /* another file, read again on SIGHUP; one without keys is not taken */
    temp_text(&temp, "keys", "another-key-5\n");
    kill(s.pid, SIGHUP);
    assert_true(serving_says(&s, "read again", 10));
    assert_int_equal(ask(&s, &reply, "GET /version HTTP/1.1\r\nHost: a\r\nx-api-key: secret-key-2\r\n\r\n"),
                     401);
    assert_int_equal(ask(&s, &reply, "GET /version HTTP/1.1\r\nHost: a\r\nx-api-key: another-key-5\r\n\r\n"),
                     200);
    temp_text(&temp, "keys", "\n");
    kill(s.pid, SIGHUP);
    assert_true(serving_says(&s, "not reloaded", 10));
    assert_int_equal(ask(&s, &reply, "GET /version HTTP/1.1\r\nHost: a\r\nx-api-key: another-key-5\r\n\r\n"),
                     200);
    serving_stop(&s);
    assert_null(strstr(s.said, "secret-key"));
    char *log;
    size_t n;
    struct err e = { 0 };
    assert_true(file_read(&log, &n, temp_path(&temp, "log"), 64 << 20, &e));
    assert_non_null(strstr(log, "\"status\":401"));
    assert_null(strstr(log, "secret-key"));
    free(log);
}

static void test_origins(void **state)
{
    (void)state;
    struct serving s;
    START(&s, "--allowed-origins", "[\"https://page.example\"]", "--max-num-seqs", "1");
    char port[64];
    snprintf(port, sizeof port, "GET /version HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n", s.port);
    const struct {
        int status;
        const char *headers;
    } cases[] = {
        { 200, "Host: a\r\nOrigin: https://page.example\r\n" },
        { 403, "Host: a\r\nOrigin: https://other.example\r\n" },
        { 403,
          "Host: evil.example\r\nOrigin: http://evil.example\r\n" }, /* a name that was made to mean us */
        { 200, "Host: 127.0.0.1:8000\r\nOrigin: http://127.0.0.1:8000\r\n" },
        { 200, "Host: localhost\r\nOrigin: http://localhost\r\n" },
        { 200, "Host: [::1]:80\r\nOrigin: http://[::1]:80\r\n" },
        { 403, "Host: localhost\r\nOrigin: null\r\n" },
    };
    EACH(i, cases)
    {
        char text[256];
        snprintf(text, sizeof text, "GET /version HTTP/1.1\r\n%s\r\n", cases[i].headers);
        if (ask(&s, &reply, text) != cases[i].status) fail_msg("%d for %s", reply.status, text);
        assert_int_equal(strstr(reply.bytes, "Access-Control-Allow-Origin: https://page.example\r\n") != NULL,
                         i == 0);
    }
    assert_int_equal(
        ask(&s, &reply,
            "OPTIONS /v1/chat/completions HTTP/1.1\r\nHost: a\r\nOrigin: https://page.example\r\n"
            "Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: authorization\r\n\r\n"),
        204);
    assert_non_null(strstr(reply.bytes, "Access-Control-Allow-Headers: authorization\r\n"));
    /* what a page can send without asking first does nothing */
    assert_int_equal(ask(&s, &reply,
                         "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: text/plain\r\n"
                         "Content-Length: 2\r\n\r\n{}"),
                     415);
    serving_stop(&s);
}

static void test_limits(void **state)
{
    (void)state;
    struct serving s;
    START(&s, "--max-header-bytes", "2K", "--max-headers", "10", "--max-body-bytes", "4k", "--header-timeout",
          "0.5", "--body-timeout", "0.5", "--idle-timeout", "1", "--max-connections", "8", "--max-num-seqs",
          "1");
    int descriptors = serving_descriptors(&s), fds[9];
    char text[5000] = "";
    memset(text, 'a', 4097);
    text[4097] = 0;
    assert_int_equal(post(&s, &reply, CHAT, text), 413);
    text[3000] = 0;
    memcpy(text, "GET /", 5);
    assert_int_equal(ask(&s, &reply, text), 431);
    int n = snprintf(text, sizeof text, "GET /health HTTP/1.1\r\nHost: a\r\n");
    for (int i = 0; i < 10; i++) n += snprintf(text + n, sizeof text - (size_t)n, "A%d: b\r\n", i);
    snprintf(text + n, sizeof text - (size_t)n, "\r\n");
    assert_int_equal(ask(&s, &reply, text), 431);
    assert_int_equal(ask(&s, &reply, "GET /health HTTP/1.1\r\nHost:"), 408);
    assert_int_equal(ask(&s, &reply,
                         "POST /tokenize HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                         "Content-Length: 20\r\n\r\n{"),
                     408);
    int fd = dial(&s);
    assert_true(is_closed_within(fd, 3)); /* says nothing at all */
    close(fd);
    fd = dial(&s);
    reply.n = reply.used = 0;
    assert_true(send_bytes(fd, "GET /health HTTP/1.1\r\nHost: a\r\n\r\n", 33));
    assert_int_equal(receive(&reply, fd, 5), 200);
    double begin = clock_seconds();
    assert_true(is_closed_within(fd, 5) && clock_seconds() - begin > 0.9); /* idle */
    close(fd);
    for (int i = 0; i < 9; i++) {
        fds[i] = dial(&s);
        usleep(5000);
    }
    reply.n = reply.used = 0;
    assert_int_equal(receive(&reply, fds[8], 5), 503);
    assert_non_null(strstr(reply.bytes, "Retry-After: 1\r\n"));
    for (int i = 0; i < 9; i++) close(fds[i]);
    check_idle(&s, descriptors);
    serving_stop(&s);
}

/* Good requests go on beside what a test does; each must be answered as by the server when it was quiet, to
 * the last digit of its scores. */
static const struct {
    const char *path, *body;
} good[] = {
    { CHAT_PATH, QUESTION "}" },
    { CHAT_PATH, QUESTION ",\"logprobs\":true,\"top_logprobs\":3}" },
    { CHAT_PATH, QUESTION ",\"stream\":true}" },
    { COMPLETIONS_PATH, "{\"prompt\":[\"The sea\",\"One, "
                        "two,\"],\"max_tokens\":12,\"temperature\":1,\"seed\":5,\"logprobs\":2}" },
};
enum { GOOD = sizeof good / sizeof *good };

struct traffic {
    const struct serving *s;
    pthread_t thread;
    _Atomic bool stop;
    int answered;
    double slowest;
    char *want[GOOD];
    struct reply reply;
};

/* What an answer says, without ids and times; of a stream its text. malloc'd. */
static char *essence(const struct reply *r)
{
    char *out = calloc(1, r->body_bytes + 1);
    const char *at = strstr(r->body, "\"choices\":");
    if (strncmp(r->body, "data: ", 6) == 0)
        join_stream(out, r->body, true);
    else if (at)
        strcpy(out, at);
    return out;
}

static char *ask_good(struct traffic *t, int i, int *status)
{
    char request[2048];
    snprintf(request, sizeof request,
             "POST %s HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
             good[i].path, strlen(good[i].body), good[i].body);
    int fd = dial(t->s);
    t->reply.n = t->reply.used = 0;
    send_bytes(fd, request, strlen(request));
    *status = receive(&t->reply, fd, 60);
    close(fd);
    return *status ? essence(&t->reply) : strdup("");
}

static void *good_traffic(void *ctx)
{
    struct traffic *t = ctx;
    for (int i = 0, status; !t->stop; i = (i + 1) % GOOD) {
        double begin = clock_seconds();
        char *got = ask_good(t, i, &status);
        bool same = status == 200 && strcmp(got, t->want[i]) == 0;
        if (!same && !t->stop)
            fprintf(stderr, "good request: %d\n%s\n instead of\n%s\n", status, got, t->want[i]);
        free(got);
        if (!same) {
            t->answered = -1000000;
            break;
        }
        t->answered++;
        if (clock_seconds() - begin > t->slowest) t->slowest = clock_seconds() - begin;
    }
    return NULL;
}

static struct traffic traffic;

static void start_traffic(const struct serving *s)
{
    int status;
    traffic.s = s;
    traffic.stop = false;
    traffic.answered = 0;
    traffic.slowest = 0;
    for (int i = 0; i < GOOD; i++) {
        free(traffic.want[i]);
        traffic.want[i] = ask_good(&traffic, i, &status);
        assert_int_equal(status, 200);
        assert_true(strlen(traffic.want[i]) > 20);
    }
    assert_int_equal(pthread_create(&traffic.thread, NULL, good_traffic, &traffic), 0);
}

static void stop_traffic(const char *beside)
{
    traffic.stop = true;
    pthread_join(traffic.thread, NULL);
    assert_true(traffic.answered > 0);
    printf("note: %s: %d good requests beside, the slowest took %.2f s\n", beside, traffic.answered,
           traffic.slowest);
}

/* Memory does not grow with what was done: between the first fifth of it, when all is warm, and the end. */
#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
enum { GROWTH_KIB_MAX = 1 << 20 }; /* they keep what was freed, for a while */
#else
enum { GROWTH_KIB_MAX = 16 << 10 };
#endif
static void check_growth(const char *of, long warm, const struct serving *s)
{
    long now = serving_resident(s);
    printf("note: %s: %ld KiB resident after a fifth of it, %ld at the end\n", of, warm, now);
    assert_true(now < warm + GROWTH_KIB_MAX);
}

/* A request with things done to it that a careless or malicious client would do. */
static size_t mutate(char *out, size_t room, uint64_t *seed)
{
    static const char *const seeds[] = {
        "POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: "
        "44\r\n\r\n"
        "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}]",
        "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nTransfer-Encoding: "
        "chunked\r\n\r\n"
        "1b\r\n{\"prompt\":[1,2],\"max_tokens\":\r\n2\r\n2}\r\n0\r\n\r\n",
        "GET /v1/models/demo?x HTTP/1.1\r\nHost: a\r\nConnection: keep-alive\r\nX-Request-Id: 1\r\n\r\n",
        "POST /v1/messages HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nx-api-key: k\r\n"
        "Expect: 100-continue\r\nContent-Length: 60\r\n\r\n"
        "{\"max_tokens\":2,\"messages\":[{\"role\":\"user\",\"content\":\"hello\"}]}",
    };
    static const char *const pieces[] = { "\r\n",
                                          "\n",
                                          "\r",
                                          "\0",
                                          ":",
                                          " ",
                                          "\t",
                                          "Content-Length: 5\r\n",
                                          "Transfer-Encoding: chunked\r\n",
                                          "0\r\n\r\n",
                                          "-1",
                                          "99999999999999999999",
                                          "HTTP/1.1",
                                          "\xff\xfe",
                                          "%00",
                                          "{",
                                          "[[[[[[[[",
                                          "\"",
                                          "\\ud800",
                                          "1e999",
                                          "Host: b\r\n",
                                          ";",
                                          "\x7f",
                                          "../" };
    const char *base = seeds[random_bits(seed) % 4];
    size_t n = strlen(base), times = 1 + random_bits(seed) % 4;
    memcpy(out, base, n);
    for (size_t i = 0; i < times; i++) {
        size_t at = random_bits(seed) % (n + 1), k;
        const char *piece = pieces[random_bits(seed) % 24];
        switch (random_bits(seed) % 5) {
        case 0: /* other bytes */
            if (at < n) out[at] = (char)random_bits(seed);
            break;
        case 1: /* put in */
            k = *piece ? strlen(piece) : 1;
            if (n + k >= room) break;
            memmove(out + at + k, out + at, n - at);
            memcpy(out + at, piece, k);
            n += k;
            break;
        case 2: /* cut out */
            k = random_bits(seed) % 8;
            if (k > n - at) k = n - at;
            memmove(out + at, out + at + k, n - at - k);
            n -= k;
            break;
        case 3: /* cut off */ n = at; break;
        default: /* again */
            if (2 * n - at >= room) break;
            memmove(out + n, out + at, n - at);
            n += n - at;
        }
    }
    return n;
}

static void test_malformed(void **state)
{
    (void)state;
    struct serving s;
    char text[4096];
    uint64_t seed = 7;
    int64_t most = count_of("QUENCH_MALFORMED", 1000), by_class[6] = { 0 }, i = 0;
    START(&s, "--header-timeout", "1", "--body-timeout", "1", "--no-enable-prefix-caching", "--max-num-seqs",
          "4");
    int descriptors = serving_descriptors(&s);
    start_traffic(&s);
    double until = clock_seconds() + (getenv("QUENCH_MALFORMED") ? 1e9 : 8);
    long warm = 0;
    for (; i < most && clock_seconds() < until; i++) {
        size_t n = mutate(text, sizeof text, &seed);
        if (i <= most / 5) warm = serving_resident(&s);
        int fd = dial(&s), status = 0;
        reply.n = reply.used = 0;
        send_bytes(fd, text, n);
        status = receive(&reply, fd, 0.02);
        if (!status) shutdown(fd, SHUT_WR); /* it may wait for more: there is none */
        for (bool first = true; first || (status && !reply.closed); first = false) {
            if (!status || !first) status = receive(&reply, fd, first ? 20 : 0.02);
            if (status == 500) fail_msg("%s after %.*s", reply.bytes, (int)n, text);
            if (status || first) by_class[status / 100]++;
        }
        shutdown(fd, SHUT_WR);
        if (!is_closed_within(fd, 20)) fail_msg("still open after %.*s", (int)n, text);
        close(fd);
    }
    stop_traffic("malformed requests");
    printf("note: %lld malformed requests: %lld answers 1xx, %lld 2xx, %lld 4xx, %lld 5xx, %lld without\n",
           (long long)i, (long long)by_class[1], (long long)by_class[2], (long long)by_class[4],
           (long long)by_class[5], (long long)by_class[0]);
    assert_true(by_class[4] > i / 4);
    check_growth("malformed requests", warm, &s);
    check_idle(&s, descriptors);
    check_no_pages(&s);
    serving_stop(&s);
}

static void test_disconnects(void **state)
{
    (void)state;
    struct serving s;
    uint64_t seed = 11;
    int64_t n = count_of("QUENCH_DISCONNECTS", 60);
    static const char *const requests[] = { LONG(400) ",\"stream\":true}", LONG(400) "}",
                                            LONG(200) ",\"n\":2,\"stream\":true}" };
    START(&s, "--no-enable-prefix-caching", "--max-num-seqs", "4");
    int descriptors = serving_descriptors(&s);
    start_traffic(&s);
    long warm = 0;
    for (int64_t i = 0; i < n; i++) {
        if (i <= n / 5) warm = serving_resident(&s);
        const char *request = post_text(COMPLETIONS, "", requests[random_bits(&seed) % 3]);
        size_t bytes = strlen(request), cut = random_bits(&seed) % 4 ? bytes : random_bits(&seed) % bytes;
        int fd = dial(&s);
        if (random_bits(&seed) % 2)
            setsockopt(fd, SOL_SOCKET, SO_LINGER, &(struct linger){ 1, 0 }, sizeof(struct linger));
        send_bytes(fd, request, cut);
        usleep(random_bits(&seed) % (random_bits(&seed) % 4 ? 20000 : 200000));
        close(fd);
    }
    stop_traffic("disconnects");
    check_growth("disconnects", warm, &s);
    check_idle(&s, descriptors);
    check_no_pages(&s);
    printf("note: %lld clients left at random moments, %.0f of them while an answer ran\n", (long long)n,
           metric(&s, "quench:disconnects_total"));
    assert_true(metric(&s, "quench:disconnects_total") > 0);
    serving_stop(&s);
}

static void test_slow_sockets(void **state)
{
    (void)state;
    struct serving s;
    int n = (int)count_of("QUENCH_SLOW", 60);
    int *fds = calloc((size_t)n, sizeof *fds);
    struct rlimit files;
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &files), 0);
    files.rlim_cur = files.rlim_max;
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &files), 0);
    START(&s, "--header-timeout", "2", "--body-timeout", "2", "--send-timeout", "2",
          "--no-enable-prefix-caching", "--max-num-seqs", "4");
    int descriptors = serving_descriptors(&s);
    long resident = serving_resident(&s);
    static const char half_head[] = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-",
                      half_body[] = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: "
                                    "application/json\r\nContent-Length: 100000\r\n\r\n{";
    for (int i = 0; i < n; i++) {
        fds[i] = dial_with(&s, 2048);
        assert_true(fds[i] >= 0);
        if (i % 3 == 0)
            send_bytes(fds[i], half_head, sizeof half_head - 1);
        else if (i % 3 == 1)
            send_bytes(fds[i], half_body, sizeof half_body - 1);
        else
            for (int k = 0; k < 300; k++) /* asks and never reads */
                send_bytes(fds[i], "GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n", 34);
    }
    start_traffic(&s);
    long most = 0;
    for (double until = clock_seconds() + 5; clock_seconds() < until; usleep(100000)) {
        long now = serving_resident(&s);
        if (now > most) most = now;
        for (int i = 0; i < n; i++)
            if (i % 3 < 2)
                send_bytes(fds[i], "x", 1); /* one byte at a time; those cut off are written to in vain */
    }
    stop_traffic("slow sockets");
    printf("note: %d slow sockets: %ld KiB resident before, %ld at most\n", n, resident, most);
    for (int i = 0; i < n; i++) close(fds[i]);
    check_idle(&s, descriptors);
    check_no_pages(&s);
    assert_true(metric(&s, "quench:timeouts_total") >= n / 2);
    free(fds);
    serving_stop(&s);
}

/* A stream whose client does not read holds no other up, and ends. */
static void test_slow_reader(void **state)
{
    (void)state;
    struct serving s;
    START(&s, "--send-timeout", "1", "--no-enable-prefix-caching", "--max-num-seqs", "2");
    int descriptors = serving_descriptors(&s), fd = dial_with(&s, 2048);
    const char *request = post_text(COMPLETIONS, "", LONG(3000) ",\"stream\":true,\"logprobs\":20}");
    assert_true(send_bytes(fd, request, strlen(request)));
    usleep(100000);
    assert_int_equal(post(&s, &reply, CHAT, QUESTION "}"), 200);
    for (double until = clock_seconds() + 60; metric(&s, "quench:slow_readers_total") < 1;) {
        assert_true(clock_seconds() < until);
        usleep(100000);
    }
    close(fd);
    check_idle(&s, descriptors);
    check_no_pages(&s);
    serving_stop(&s);
}

/* Streams that come one after the other, more than there are seats. */
enum { SEATS = 16 };
struct fair {
    int n;
    double *first, *last; /* [n] seconds from the request to its first event and to its end */
    double all;           /* until the last one's end */
};

static double percentile_99(const double *x, int n)
{
    double *copy = malloc((size_t)n * sizeof *copy), most;
    memcpy(copy, x, (size_t)n * sizeof *copy);
    for (int i = 1; i < n; i++)
        for (int k = i; k > 0 && copy[k] < copy[k - 1]; k--) {
            most = copy[k];
            copy[k] = copy[k - 1];
            copy[k - 1] = most;
        }
    most = copy[(n * 99 + 99) / 100 - 1];
    free(copy);
    return most;
}

static void run_streams(struct fair *f, const struct serving *s)
{
    struct pollfd *p = calloc((size_t)f->n, sizeof *p);
    double *begin = calloc((size_t)f->n, sizeof *begin), start = clock_seconds();
    char(*tails)[16] = calloc((size_t)f->n, sizeof *tails);
    static char piece[65536];
    int open = f->n;
    const char *request = post_text(COMPLETIONS, "", LONG(120) ",\"stream\":true}");
    memset(f->first, 0, (size_t)f->n * sizeof *f->first);
    for (int i = 0; i < f->n; i++) {
        begin[i] = clock_seconds();
        p[i] = (struct pollfd){ dial(s), POLLIN, 0 };
        assert_true(send_bytes(p[i].fd, request, strlen(request)));
    }
    while (open > 0) {
        assert_true(poll(p, (nfds_t)f->n, 60000) > 0);
        for (int i = 0; i < f->n; i++) {
            if (p[i].fd < 0 || !p[i].revents) continue;
            size_t held = strlen(tails[i]);
            memcpy(piece, tails[i], held);
            ssize_t n = recv(p[i].fd, piece + held, sizeof piece - 1 - held, 0);
            assert_true(n > 0);
            piece[held + (size_t)n] = 0;
            if (f->first[i] == 0 && strstr(piece, "data: ")) f->first[i] = clock_seconds() - begin[i];
            size_t all = held + (size_t)n, keep = all < 15 ? all : 15;
            memcpy(tails[i], piece + all - keep, keep + 1);
            if (!strstr(tails[i], "0\r\n\r\n")) continue;
            f->last[i] = clock_seconds() - begin[i];
            close(p[i].fd);
            p[i].fd = -1;
            open--;
        }
    }
    f->all = clock_seconds() - start;
    free(tails);
    free(begin);
    free(p);
}

/* Each waits for those before it and for no other: the n-th has its first token after n / seats lives of a
 * stream. And one who reads nothing takes a seat, but nobody's time. */
static void test_fair(void **state)
{
    (void)state;
    struct serving s;
    int n = (int)count_of("QUENCH_STREAMS", 96);
    struct fair quiet = { n, calloc((size_t)n, 8), calloc((size_t)n, 8), 0 },
                slow = { n, calloc((size_t)n, 8), calloc((size_t)n, 8), 0 };
    struct fair *const both[] = { &quiet, &slow };
    START(&s, "--max-num-seqs", "17", "--no-enable-prefix-caching", "--send-timeout", "600");
    int descriptors = serving_descriptors(&s), fd = -1;
    char *request = strdup(post_text(COMPLETIONS, "", LONG(100000) ",\"stream\":true,\"logprobs\":20}"));
    run_streams(&quiet, &s); /* warms up */
    for (int k = 0; k < 2; k++) {
        if (k == 1) {
            fd = dial_with(&s, 2048);
            assert_true(send_bytes(fd, request, strlen(request)));
            usleep(500000); /* by now its answer waits for it */
        }
        run_streams(both[k], &s);
    }
    for (int k = 0; k < 2; k++) {
        const struct fair *f = both[k];
        double life = 0, worst = 0;
        for (int i = 0; i < n; i++)
            if (f->last[i] - f->first[i] > life) life = f->last[i] - f->first[i];
        for (int i = 0; i < n; i++) {
            double turns = 1 + i / SEATS, share = f->first[i] / (turns * life + 0.25);
            if (share > worst) worst = share;
        }
        printf("note: %d streams for %d seats%s: %.2f s in all, first tokens after %.2f s (99 %%), one after "
               "%.2f "
               "of its turn at most\n",
               n, SEATS + 1 - k, k ? " beside one who does not read" : "", f->all, percentile_99(f->first, n),
               worst);
        assert_true(worst <= 1.5);
    }
    double more = percentile_99(slow.first, n) / percentile_99(quiet.first, n);
    printf("note: the one who does not read makes first tokens %.2f times as late, all of it %.2f times as "
           "long\n",
           more, slow.all / quiet.all);
    assert_true(more < 3 && slow.all < 3 * quiet.all); /* it would stay away for 600 s */
    close(fd);
    check_idle(&s, descriptors);
    check_no_pages(&s);
    serving_stop(&s);
    free(request);
    for (int k = 0; k < 2; k++) {
        free(both[k]->first);
        free(both[k]->last);
    }
}

/* Everything of a stream is read, the largest gap between two pieces goes to *gap. */
struct reader {
    int fd;
    double gap;
};

static void *read_stream(void *ctx)
{
    struct reader *r = ctx;
    char tail[8] = "", piece[65536];
    for (double last = clock_seconds(), now; !strstr(tail, "0\r\n\r\n"); last = now) {
        ssize_t n = recv(r->fd, piece, sizeof piece, 0);
        now = clock_seconds();
        if (n < 5) break;
        if (now - last > r->gap) r->gap = now - last;
        memcpy(tail, piece + n - 5, 5);
    }
    return NULL;
}

/* Texts of 16 MB that are cut into tokens and then refused: work of a second and more, beside the loop. */
static void test_heavy_requests(void **state)
{
    (void)state;
    enum { HEAVY = 16 << 20 };
    struct serving s;
    struct reader r = { 0 };
    pthread_t thread;
    START(&s, "--max-num-seqs", "2", "--max-model-len", "8k");
    int descriptors = serving_descriptors(&s);
    const char *request = post_text(COMPLETIONS, "", LONG(4000) ",\"stream\":true}");
    r.fd = dial(&s);
    send_bytes(r.fd, request, strlen(request));
    assert_int_equal(pthread_create(&thread, NULL, read_stream, &r), 0);
    usleep(100000);
    char *heavy = malloc(HEAVY + 256);
    int n =
        snprintf(heavy, 256,
                 "POST %s HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                 "{\"model\":\"models/demo\",\"prompt\":\"",
                 COMPLETIONS, HEAVY);
    char *body = strstr(heavy, "\r\n\r\n") + 4;
    memset(heavy + n, 'a', (size_t)(body + HEAVY - heavy - n));
    memcpy(body + HEAVY - 2, "\"}", 2);
    double slowest = 0, begin = clock_seconds();
    int fd = dial(&s);
    reply.n = reply.used = 0;
    assert_true(send_bytes(fd, heavy, (size_t)(body - heavy) + HEAVY));
    for (struct pollfd p = { fd, POLLIN, 0 }; poll(&p, 1, 0) == 0;) {
        double asked = clock_seconds();
        static struct reply other;
        assert_int_equal(get(&s, &other, "/health"), 200);
        if (clock_seconds() - asked > slowest) slowest = clock_seconds() - asked;
    }
    assert_int_equal(receive(&reply, fd, 60), 400);
    double took = clock_seconds() - begin;
    close(fd);
    free(heavy);
    pthread_join(thread, NULL);
    close(r.fd);
    printf(
        "note: %.2f s for a text of 16 MB; beside it /health took %.3f s at most, a stream paused %.3f s\n",
        took, slowest, r.gap);
    assert_true(slowest < took / 2 && r.gap < took);
    check_idle(&s, descriptors);
    serving_stop(&s);
}

static void test_sigterm(void **state)
{
    (void)state;
    enum { CLIENTS = 6 };
    int64_t n = count_of("QUENCH_SIGTERMS", 3), whole = 0, refused = 0, unconnected = 0;
    uint64_t seed = 3;
    for (int64_t k = 0; k < n; k++) {
        struct serving s;
        int fds[CLIENTS];
        START(&s, "--max-num-seqs", "4");
        for (int i = 0; i < CLIENTS; i++) {
            const char *request =
                post_text(COMPLETIONS, "", i % 2 ? LONG(60) ",\"stream\":true}" : LONG(60) "}");
            fds[i] = dial(&s);
            send_bytes(fds[i], request, strlen(request));
        }
        usleep(random_bits(&seed) % 100000);
        kill(s.pid, SIGTERM);
        assert_true(serving_says(&s, "draining", 10));
        int late = dial_with(&s, 0);
        if (late >= 0) {
            reply.n = reply.used = 0;
            send_bytes(late, "GET /ready HTTP/1.1\r\nHost: a\r\n\r\n", 32);
            int status = receive(&reply, late, 10);
            if (status && status != 503) fail_msg("ready: %d while draining", status);
            close(late);
        }
        for (int i = 0; i < CLIENTS; i++) {
            reply.n = reply.used = 0;
            int status = receive(&reply, fds[i], 60);
            if (status != 200 && status != 503) fail_msg("client %d: status %d: %s", i, status, reply.bytes);
            whole += status == 200;
            refused += status == 503;
            if (status == 200 && i % 2) assert_non_null(strstr(reply.body, "data: [DONE]"));
            close(fds[i]);
        }
        unconnected += late < 0;
        int status = serving_wait(&s, 60);
        if (status != 0) fail_msg("exit status %d: %s", status, s.said);
    }
    printf("note: %lld SIGTERMs: %lld requests finished, %lld got 503; %lld times nobody listened any more\n",
           (long long)n, (long long)whole, (long long)refused, (long long)unconnected);
}

static void test_second_signal(void **state)
{
    (void)state;
    struct serving s;
    START(&s, "--max-num-seqs", "2");
    int stream = dial(&s), plain = dial(&s);
    const char *request = post_text(COMPLETIONS, "", LONG(100000) ",\"stream\":true}");
    assert_true(send_bytes(stream, request, strlen(request)));
    request = post_text(COMPLETIONS, "", LONG(100000) "}");
    assert_true(send_bytes(plain, request, strlen(request)));
    usleep(200000);
    kill(s.pid, SIGINT);
    assert_true(serving_says(&s, "draining", 10));
    kill(s.pid, SIGINT);
    reply.n = reply.used = 0;
    assert_int_equal(receive(&reply, stream, 10),
                     200); /* its chunks end as they should, with an error inside */
    assert_non_null(strstr(reply.body, "\"error\""));
    reply.n = reply.used = 0;
    assert_int_equal(receive(&reply, plain, 10), 503);
    assert_int_equal(serving_wait(&s, 10), 1);
    close(stream);
    close(plain);
    START(&s, "--shutdown-timeout", "0.5", "--max-num-seqs", "2");
    plain = dial(&s);
    request = post_text(COMPLETIONS, "", LONG(100000) "}");
    assert_true(send_bytes(plain, request, strlen(request)));
    usleep(200000);
    kill(s.pid, SIGTERM);
    reply.n = reply.used = 0;
    assert_int_equal(receive(&reply, plain, 10), 503);
    assert_int_equal(serving_wait(&s, 10), 1);
    close(plain);
}

/* A certificate signed by its own key, made by the openssl program. */
static void make_certificate(const char *name)
{
    char command[1024];
    snprintf(command, sizeof command,
             "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=%s "
             "-keyout %s/key.pem -out %s/cert.pem 2>%s/openssl",
             name, temp.path, temp.path, temp.path);
    assert_int_equal(system(command), 0);
}

/* A request over TLS; *name: whom the certificate names. */
static int ask_tls(const struct serving *s, SSL_CTX *c, char name[64], const char *request)
{
    int fd = dial(s), n, status = 0;
    SSL *ssl = SSL_new(c);
    SSL_set_fd(ssl, fd);
    *name = 0;
    if (SSL_connect(ssl) == 1) {
        X509 *peer = SSL_get1_peer_certificate(ssl);
        X509_NAME_get_text_by_NID(X509_get_subject_name(peer), NID_commonName, name, 64);
        X509_free(peer);
        SSL_write(ssl, request, (int)strlen(request));
        size_t used = 0;
        while (used < sizeof reply.bytes - 1 &&
               (n = SSL_read(ssl, reply.bytes + used, (int)(sizeof reply.bytes - 1 - used))) > 0)
            used += (size_t)n;
        reply.bytes[used] = 0;
        sscanf(reply.bytes, "HTTP/1.1 %d", &status);
    }
    SSL_free(ssl);
    close(fd);
    return status;
}

static void test_tls(void **state)
{
    (void)state;
    struct serving s;
    char name[64], text[1 << 14];
    make_certificate("first");
    START(&s, "--ssl-certfile", temp_path(&temp, "cert.pem"), "--ssl-keyfile", temp_path(&temp, "key.pem"));
    assert_non_null(strstr(s.said, "https://127.0.0.1:"));
    SSL_CTX *c = SSL_CTX_new(TLS_client_method());
    int descriptors = serving_descriptors(&s);
    snprintf(text, sizeof text, "%s", post_text(CHAT, "Connection: close\r\n", QUESTION ",\"stream\":true}"));
    assert_int_equal(ask_tls(&s, c, name, text), 200);
    assert_string_equal(name, "first");
    assert_non_null(strstr(reply.bytes, "data: [DONE]\n\n\r\n0\r\n\r\n"));
    int fd = dial(&s); /* no TLS at all */
    send_bytes(fd, text, strlen(text));
    assert_true(is_closed_within(fd, 10));
    close(fd);
    SSL_CTX_set_max_proto_version(c, TLS1_1_VERSION);
    assert_int_equal(ask_tls(&s, c, name, text), 0);
    SSL_CTX_set_max_proto_version(c, 0);
    make_certificate("second");
    kill(s.pid, SIGHUP);
    assert_true(serving_says(&s, "read again", 10));
    assert_int_equal(ask_tls(&s, c, name, text), 200);
    assert_string_equal(name, "second");
    temp_text(&temp, "cert.pem", "no certificate");
    kill(s.pid, SIGHUP);
    assert_true(serving_says(&s, "not reloaded", 10));
    assert_int_equal(ask_tls(&s, c, name, text), 200);
    assert_string_equal(name, "second");
    usleep(300000);
    if (serving_descriptors(&s) > descriptors)
        fail_msg("%d descriptors, %d at first", serving_descriptors(&s), descriptors);
    SSL_CTX_free(c);
    serving_stop(&s);
}

static int make_temp(void **state)
{
    (void)state;
    temp = temp_make();
    return 0;
}

static int remove_temp(void **state)
{
    (void)state;
    temp_remove(&temp);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_queue),         cmocka_unit_test(test_key_limits),
        cmocka_unit_test(test_queued_tokens), cmocka_unit_test(test_request_timeout),
        cmocka_unit_test(test_log),           cmocka_unit_test(test_comments),
        cmocka_unit_test(test_unix_socket),   cmocka_unit_test(test_answers),
        cmocka_unit_test(test_framing),       cmocka_unit_test(test_keys),
        cmocka_unit_test(test_origins),       cmocka_unit_test(test_limits),
        cmocka_unit_test(test_malformed),     cmocka_unit_test(test_disconnects),
        cmocka_unit_test(test_slow_sockets),  cmocka_unit_test(test_slow_reader),
        cmocka_unit_test(test_fair),          cmocka_unit_test(test_heavy_requests),
        cmocka_unit_test(test_sigterm),       cmocka_unit_test(test_second_signal),
        cmocka_unit_test(test_tls),
    };
    signal(SIGPIPE, SIG_IGN);
    const char *only = getenv("QUENCH_ONLY"); /* a test by name, for large counts */
    if (only) cmocka_set_test_filter(only);
    return cmocka_run_group_tests(tests, make_temp, remove_temp);
}
