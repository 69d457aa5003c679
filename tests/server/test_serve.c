/* quench serve over real sockets: answers, keys, framing, limits, the log, TLS. test_faults.c has clients
 * that do harm. QUENCH_KEYS=1: the whole matrix of requests without a key; `make soak` sets it. */
#include "server/serving.h"
#include "support/sanitized.h"
#include <openssl/ssl.h>
#include <sys/un.h>

static struct reply reply;
static struct temp temp;

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

/* Defaults of sampling: the checkpoint's, or vLLM's neutral ones, and where answers end in either case. */
static void test_generation_config(void **state)
{
    (void)state;
    struct serving s;
    START(&s, "--max-num-seqs", "1");
    assert_int_equal(get(&s, &reply, "/v1/models"), 200);
    assert_non_null(strstr(reply.body, "\"top_k\":20"));
    serving_stop(&s);
    START(&s, "--max-num-seqs", "1", "--generation-config", "vllm", "--verify", "--deterministic",
          "--cpu-mask", "avx2");
    assert_int_equal(get(&s, &reply, "/v1/models"), 200);
    assert_null(strstr(reply.body, "\"top_k\":20"));
    assert_non_null(strstr(reply.body, "\"temperature\":1"));
    assert_int_equal(post(&s, &reply, CHAT, QUESTION "}"), 200);
    assert_non_null(strstr(reply.body, "\"finish_reason\":\"stop\""));
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
    const char *request = post_text(COMPLETIONS, "", SANITIZED ? LONG(200) "}" : LONG(2000) "}");
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

/* Until a stream has begun to answer; what it says stays to be read. */
static void await_token(int fd)
{
    char text[4096];
    for (double until = clock_seconds() + 20; clock_seconds() < until; usleep(10000)) {
        ssize_t n = recv(fd, text, sizeof text - 1, MSG_PEEK | MSG_DONTWAIT);
        text[n > 0 ? n : 0] = 0;
        if (strstr(text, "data: ")) return;
    }
    fail_msg("no token: %s", text);
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
    for (int i = 0; i < 2; i++) await_token(fds[i]); /* none of their prompts' tokens count any more */
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
    await_load(&s, "\"running\":1,\"waiting\":0"); /* so that two below are not those of before */
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
    bool whole = getenv("QUENCH_KEYS");
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
        cmocka_unit_test(test_generation_config),
        cmocka_unit_test(test_queue),
        cmocka_unit_test(test_key_limits),
        cmocka_unit_test(test_queued_tokens),
        cmocka_unit_test(test_request_timeout),
        cmocka_unit_test(test_log),
        cmocka_unit_test(test_comments),
        cmocka_unit_test(test_unix_socket),
        cmocka_unit_test(test_answers),
        cmocka_unit_test(test_framing),
        cmocka_unit_test(test_keys),
        cmocka_unit_test(test_origins),
        cmocka_unit_test(test_limits),
        cmocka_unit_test(test_tls),
    };
    signal(SIGPIPE, SIG_IGN);
    const char *only = getenv("QUENCH_ONLY"); /* a test by name */
    if (only) cmocka_set_test_filter(only);
    return cmocka_run_group_tests(tests, make_temp, remove_temp);
}
