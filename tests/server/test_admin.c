/* The operator's listener of quench serve: who may ask there, what it does to requests that run, wait or
 * come, and that nothing of it is at the public port. */
#include "server/serving.h"
#include <sys/stat.h>
#include <sys/un.h>

#define KEY     "Authorization: Bearer operator-key\r\n"
#define API_KEY "Authorization: Bearer user-key\r\n"

static struct reply reply;
static struct temp temp;

/* The operator's listener as a server of its own. */
static struct serving admin_of(struct serving *s)
{
    struct serving a = { 0 };
    const char *at = strstr(s->said, "administration at http://127.0.0.1:");
    assert_non_null(at);
    a.port = atoi(strrchr(strtok(strdupa(at), "\n"), ':') + 1);
    assert_true(a.port > 0 && a.port != s->port);
    return a;
}

static int say(const struct serving *s, const char *method, const char *path, const char *headers)
{
    char text[1024];
    snprintf(text, sizeof text, "%s %s HTTP/1.1\r\nHost: a\r\n%sConnection: close\r\n\r\n", method, path,
             headers);
    return ask(s, &reply, text);
}

static const struct {
    const char *method, *path;
} routes[] = { { "GET", "/requests" }, { "POST", "/requests/a/cancel" },  { "POST", "/pause" },
               { "POST", "/resume" },  { "POST", "/reset_prefix_cache" }, { "POST", "/reload" } };
enum { ROUTES = sizeof routes / sizeof *routes };

static void test_keys(void **state)
{
    (void)state;
    static const char *const methods[] = {
        "GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "get", "PATCH"
    };
    static const char *const wrong[] = { "",
                                         API_KEY,
                                         "x-api-key: operator-key\r\n",
                                         "Authorization: operator-key\r\n",
                                         "Authorization: Basic operator-key\r\n",
                                         "Authorization: Bearer\r\n",
                                         "Authorization: Bearer \r\n",
                                         "Authorization: Bearer operator-ke\r\n",
                                         "Authorization: Bearer operator-key2\r\n",
                                         "Authorization: Bearer OPERATOR-KEY\r\n",
                                         "Cookie: key=operator-key\r\n",
                                         KEY API_KEY };
    static const char *const paths[] = { "/requests",
                                         "/requests/a/cancel",
                                         "/requests/",
                                         "/pause",
                                         "/resume",
                                         "/reset_prefix_cache",
                                         "/reload",
                                         "/",
                                         "/health",
                                         "/ready",
                                         "/metrics",
                                         "/v1/models",
                                         "/v1/chat/completions",
                                         "/nothing" };
    static const char *const odd[] = { "/pause/",
                                       "//pause",
                                       "/./pause",
                                       "/x/../pause",
                                       "/%70ause",
                                       "/pause%00",
                                       "/PAUSE",

                                       "/requests/../pause",
                                       "/requests/",
                                       "/requests/a",
                                       "/requests//cancel",
                                       "/requests/a/cancel/",
                                       "/v1/models",
                                       "/metrics",
                                       "/" };
    struct serving s;
    int asked = 0;
    START(&s, "--api-key", "user-key", "--admin-listen", "0", "--admin-key", "operator-key", "--max-num-seqs",
          "1", "--request-log", temp_path(&temp, "log"));
    struct serving a = admin_of(&s);
    for (size_t p = 0; p < sizeof paths / sizeof *paths; p++)
        for (size_t m = 0; m < sizeof methods / sizeof *methods; m++)
            for (size_t k = 0; k < sizeof wrong / sizeof *wrong; k++, asked++) {
                int status = say(&a, methods[m], paths[p], wrong[k]);
                if (!status) sscanf(reply.bytes, "HTTP/1.1 %d", &status); /* a HEAD's has no body */
                /* two Authorization headers are refused before they are read */
                if (status != 401 && status != 400 && status != 501)
                    fail_msg("%d for %s %s %s", status, methods[m], paths[p], wrong[k]);
                assert_null(strstr(reply.bytes, "operator"));
            }
    printf("note: %d requests without the operator's key, none answered\n", asked);
    for (size_t i = 0; i < sizeof odd / sizeof *odd; i++) {
        int status = say(&a, "POST", odd[i], KEY);
        if (status != 404 && status != 405 && status != 400) fail_msg("%d for POST %s", status, odd[i]);
    }
    assert_int_equal(say(&a, "GET", "/pause", KEY), 405);
    assert_int_equal(say(&a, "POST", "/pause", KEY "Origin: http://127.0.0.1\r\n"), 403);
    assert_int_equal(ask(&a, &reply, post_text("/pause", KEY, "{}")), 400);
    /* nothing of it at the public port, with the user's key, the operator's or both */
    for (int i = 0; i < ROUTES; i++) {
        assert_int_equal(say(&s, routes[i].method, routes[i].path, API_KEY), 404);
        assert_int_equal(say(&s, routes[i].method, routes[i].path, KEY), 401);
        assert_int_equal(say(&s, routes[i].method, routes[i].path, ""), 401);
    }
    assert_int_equal(say(&s, "GET", "/ready", ""), 200); /* nobody has paused it */
    assert_int_equal(say(&a, "GET", "/requests", KEY), 200);
    assert_non_null(strstr(reply.body, "\"requests\":[]"));
    serving_stop(&s);
    assert_null(strstr(s.said, "operator-key"));
    char *log;
    size_t n;
    struct err e = { 0 };
    assert_true(file_read(&log, &n, temp_path(&temp, "log"), 64 << 20, &e));
    assert_null(strstr(log, "operator-key"));
    assert_non_null(strstr(log, "\"path\":\"/requests\",\"status\":200"));
    free(log);
}

/* What it does not start with; each says why. */
static void test_start(void **state)
{
    (void)state;
    char longer[200];
    memset(longer, 'a', sizeof longer);
    longer[0] = '/';
    longer[sizeof longer - 1] = 0;
    const struct {
        const char *words[8], *says;
    } cases[] = {
        { { "--admin-listen", "0" }, "--admin-listen needs a key of its own" },
        { { "--admin-key", "a" }, "--admin-key needs --admin-listen" },
        { { "--admin-key", "a", "--admin-listen", "0", "--api-key", "a" }, "must be another one" },
        { { "--admin-key", "a", "--admin-listen", "65536" }, "65536 is no port" },
        { { "--admin-key", "a", "--admin-listen", "999999999999999999999" }, "is no port" },
        { { "--admin-key", "a b", "--admin-listen", "0" }, "--admin-key: byte 1 of a key is not printable" },
        { { "--admin-key", "a", "--admin-listen", longer }, "--admin-listen: a path of at most" },
        { { "--admin-key", "a", "--admin-listen", "/nowhere/at/all" }, "--admin-listen /nowhere/at/all" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct serving s;
        serving_spawn(&s, cases[i].words);
        int status = serving_wait(&s, 30);
        if ((status != 1 && status != 2) || !strstr(s.said, cases[i].says))
            fail_msg("exit status %d: %s", status, s.said);
    }
    struct serving s; /* off where nobody asks for it */
    START(&s, "--max-num-seqs", "1");
    assert_null(strstr(s.said, "administration"));
    for (int i = 0; i < ROUTES; i++) assert_int_equal(say(&s, routes[i].method, routes[i].path, ""), 404);
    serving_stop(&s);
}

static int begin(const struct serving *s, const char *headers, const char *body)
{
    const char *text = post_text(COMPLETIONS, headers, body);
    int fd = dial(s);
    assert_true(send_bytes(fd, text, strlen(text)));
    return fd;
}

static void await_requests(const struct serving *a, const char *text)
{
    for (double until = clock_seconds() + 20; clock_seconds() < until; usleep(5000)) {
        assert_int_equal(say(a, "GET", "/requests", KEY), 200);
        if (strstr(reply.body, text)) return;
    }
    fail_msg("not %s: %s", text, reply.body);
}

/* What runs and what waits goes on to its end; what comes is told to come again. */
static void test_pause(void **state)
{
    (void)state;
    struct serving s;
    START(&s, "--admin-listen", "0", "--admin-key", "operator-key", "--max-num-seqs", "1",
          "--no-enable-prefix-caching");
    struct serving a = admin_of(&s);
    int descriptors = serving_descriptors(&s);
    int runs = begin(&s, "X-Request-Id: runs\r\n", LONG(600) ",\"stream\":true}");
    await_requests(&a, "\"id\":\"runs\"");
    int waits = begin(&s, "X-Request-Id: waits\r\n", LONG(20) "}");
    await_requests(&a, "\"id\":\"waits\"");
    assert_int_equal(say(&a, "POST", "/pause", KEY), 200);
    assert_non_null(strstr(reply.body, "\"paused\":true"));
    assert_int_equal(get(&s, &reply, "/ready"), 503);
    assert_non_null(strstr(reply.body, "\"paused\""));
    assert_int_equal(get(&s, &reply, "/health"), 200);
    assert_int_equal(post(&s, &reply, CHAT, QUESTION "}"), 503);
    assert_non_null(strstr(reply.head, "\r\nRetry-After: "));
    assert_non_null(strstr(reply.body, "paused by its operator"));
    assert_int_equal((int)metric(&s, "quench:paused"), 1);
    reply.n = reply.used = 0;
    assert_int_equal(receive(&reply, runs, 60), 200);
    assert_non_null(strstr(reply.body, "\"finish_reason\":\"length\""));
    assert_non_null(strstr(reply.body, "data: [DONE]"));
    reply.n = reply.used = 0;
    assert_int_equal(receive(&reply, waits, 60), 200);
    close(runs);
    close(waits);
    assert_int_equal(say(&a, "POST", "/resume", KEY), 200);
    assert_int_equal(say(&a, "POST", "/resume", KEY), 200);
    assert_int_equal(get(&s, &reply, "/ready"), 200);
    assert_int_equal(post(&s, &reply, CHAT, QUESTION "}"), 200);
    check_idle(&s, descriptors);
    check_no_pages(&s);
    /* a paused server drains as any other */
    assert_int_equal(say(&a, "POST", "/pause", KEY), 200);
    serving_stop(&s);
}

static void test_cancel(void **state)
{
    (void)state;
    struct serving s;
    char path[64];
    START(&s, "--admin-listen", "0", "--admin-key", "operator-key", "--api-key", "user-key", "--max-num-seqs",
          "2", "--no-enable-prefix-caching", "--request-log", temp_path(&temp, "cancelled"));
    struct serving a = admin_of(&s);
    int stream = begin(&s, API_KEY "X-Request-Id: stream.1\r\n", LONG(100000) ",\"stream\":true}");
    await_requests(&a, "\"decode\"");
    int whole = begin(&s, API_KEY "X-Request-Id: whole:2\r\n", LONG(100000) "}");
    for (char *at = NULL; !at || !strstr(at + 1, "\"decode\""); at = strstr(reply.body, "\"decode\""))
        await_requests(&a, "\"decode\""); /* both have a token */
    int queued = begin(&s, API_KEY "X-Request-Id: third\r\n", LONG(300) "}");
    await_requests(&a, "\"waiting\"");
    json_t *all = json_loads(reply.body, 0, NULL), *list = json_object_get(all, "requests"), *one;
    size_t i;
    assert_int_equal(json_array_size(list), 3);
    json_array_foreach(list, i, one)
    {
        assert_string_equal(json_string_value(json_object_get(one, "path")), COMPLETIONS);
        assert_int_equal(strlen(json_string_value(json_object_get(one, "key"))), 16);
        assert_true(json_number_value(json_object_get(one, "seconds")) >= 0);
    }
    json_decref(all);
    assert_null(strstr(reply.body, "Count")); /* the prompt */
    assert_null(strstr(reply.body, "user-key"));
    assert_int_equal(say(&a, "POST", "/requests/stream.1/cancel", KEY), 200);
    assert_non_null(strstr(reply.body, "\"cancelled\":1"));
    assert_int_equal(say(&a, "POST", "/requests/whole:2/cancel", KEY), 200);
    static const char *const unknown[] = { "stream.1", "stream", "whole:22", "", "third/x", "%74hird" };
    for (i = 0; i < sizeof unknown / sizeof *unknown; i++) {
        snprintf(path, sizeof path, "/requests/%s/cancel", unknown[i]);
        assert_int_equal(say(&a, "POST", path, KEY), 404);
    }
    reply.n = reply.used = 0;
    assert_int_equal(receive(&reply, stream, 10), 200);
    assert_non_null(strstr(reply.body, "cancelled by the server's operator"));
    reply.n = reply.used = 0;
    assert_int_equal(receive(&reply, whole, 10), 403);
    assert_non_null(strstr(reply.body, "cancelled by the server's operator"));
    reply.n = reply.used = 0;
    assert_int_equal(receive(&reply, queued, 60), 200);
    close(stream);
    close(whole);
    close(queued);
    await_requests(&a, "\"requests\":[]");
    serving_stop(&s);
    /* each has one line in the log, with how it ended */
    char *log;
    size_t n;
    struct err e = { 0 };
    assert_true(file_read(&log, &n, temp_path(&temp, "cancelled"), 1 << 20, &e));
    static const char *const ids[] = { "\"id\":\"stream.1\"", "\"id\":\"whole:2\"", "\"id\":\"third\"" };
    static const char *const ends[] = { "abort", "abort", "length" };
    static const int statuses[] = { 200, 403, 200 };
    for (i = 0; i < 3; i++) {
        char *at = strstr(log, ids[i]);
        assert_non_null(at);
        assert_null(strstr(at + 1, ids[i]));
        while (at > log && at[-1] != '\n') at--;
        json_t *line = json_loads(at, JSON_DISABLE_EOF_CHECK, NULL);
        assert_string_equal(json_string_value(json_object_get(line, "finish")), ends[i]);
        assert_int_equal(json_integer_value(json_object_get(line, "status")), statuses[i]);
        assert_true(json_integer_value(json_object_get(line, "answer_tokens")) > 0);
        assert_true(json_integer_value(json_object_get(line, "sent_bytes")) > 0);
        json_decref(line);
    }
    free(log);
}

/* Of a conversation's second turn. */
static int cached_tokens(const struct serving *s)
{
    static const char second[] =
        "{\"max_tokens\":4,\"messages\":[{\"role\":\"user\",\"content\":\"Tell me of the sea, the tides, the "
        "moon that pulls them, and the boats that wait for them in every harbour from here to the north.\"},"
        "{\"role\":\"assistant\",\"content\":\"The sea rises and falls twice a day.\"},"
        "{\"role\":\"user\",\"content\":\"Why?\"}]}";
    assert_int_equal(post(s, &reply, CHAT, second), 200);
    const char *at = strstr(reply.body, "\"cached_tokens\":");
    return at ? atoi(at + 16) : 0;
}

static int files_in(const char *folder)
{
    int n = 0;
    DIR *d = opendir(folder);
    assert_non_null(d);
    for (struct dirent *x; (x = readdir(d));) n += strstr(x->d_name, ".kv") != NULL;
    closedir(d);
    return n;
}

static void test_reset(void **state)
{
    (void)state;
    struct serving s;
    const char *folder = temp_path(&temp, "prefixes");
    START(&s, "--admin-listen", "0", "--admin-key", "operator-key", "--max-num-seqs", "2", "--host-cache",
          "64M", "--disk-cache", folder);
    struct serving a = admin_of(&s);
    for (int round = 0; round < 3; round++) {
        assert_int_equal(cached_tokens(&s), 0);
        assert_true(cached_tokens(&s) > 0);
        for (double until = clock_seconds() + 10; files_in(folder) == 0; usleep(10000))
            assert_true(clock_seconds() < until);
        assert_int_equal(say(&a, "POST", "/reset_prefix_cache", KEY), 200);
        for (double until = clock_seconds() + 10; files_in(folder) > 0; usleep(10000))
            assert_true(clock_seconds() < until);
    }
    serving_stop(&s);
}

/* What a config.json led to is not found by a server with another one. */
static void test_overrides(void **state)
{
    (void)state;
    struct serving s;
    const char *folder = temp_path(&temp, "overridden");
    static const char yarn[] =
        "{\"text_config\":{\"rope_parameters\":{\"rope_type\":\"yarn\",\"factor\":4.0}}}";
    static const struct {
        const char *flag, *value;
        bool finds;
    } rounds[] = { { "--rope-yarn", "0", false },    { "--rope-yarn", "4", false },
                   { "--hf-overrides", yarn, true }, { "--rope-yarn", "2", false },
                   { "--rope-yarn", "0", true },     { "--rope-yarn", "4", true } };
    for (size_t i = 0; i < sizeof rounds / sizeof *rounds; i++) {
        START(&s, "--max-num-seqs", "2", "--disk-cache", folder, rounds[i].flag, rounds[i].value);
        int before = files_in(folder);
        assert_int_equal(cached_tokens(&s) > 0, rounds[i].finds);
        for (double until = clock_seconds() + 10; !rounds[i].finds && files_in(folder) == before;
             usleep(10000))
            assert_true(clock_seconds() < until);
        serving_stop(&s);
    }
}

/* A picture behind words that nobody has said before. */
static void show_picture(const struct serving *s, const char *folder, int i)
{
    char body[PATH_MAX + 512];
    snprintf(body, sizeof body,
             "{\"max_tokens\":4,\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":"
             "\"%d\"},{\"type\":\"image_url\",\"image_url\":{\"url\":\"file://%s/rgb.png\"}}]}]}",
             i, folder);
    assert_int_equal(post(s, &reply, CHAT, body), 200);
}

static void test_reset_pictures(void **state)
{
    (void)state;
    struct serving s;
    char folder[PATH_MAX];
    assert_non_null(realpath("tests/golden/images", folder));
    for (int cached = 0; cached < 2; cached++) {
        START(&s, "--admin-listen", "0", "--admin-key", "operator-key", "--max-num-seqs", "2",
              "--allowed-local-media-path", folder, "--mm-processor-cache-gb", cached ? "0.001" : "0");
        struct serving a = admin_of(&s);
        assert_true((strstr(s.said, "encoder cache") != NULL) == cached);
        for (int i = 0; i < 6; i++) {
            show_picture(&s, folder, i);
            assert_int_equal((int)metric(&s, "vllm:mm_cache_queries_total"), cached ? i + 1 : 0);
            assert_int_equal((int)metric(&s, "vllm:mm_cache_hits_total"), cached ? i - i / 3 : 0);
            assert_true((metric(&s, "quench:mm_cache_bytes") > 0) == cached);
            if (i % 3 == 2) assert_int_equal(say(&a, "POST", "/reset_prefix_cache", KEY), 200);
        }
        serving_stop(&s);
    }
}

static void test_reload(void **state)
{
    (void)state;
    struct serving s;
    static const char again[] = "Authorization: Bearer second-key\r\n";
    temp_text(&temp, "keys", "user-key\n");
    START(&s, "--admin-listen", "0", "--admin-key", "operator-key", "--max-num-seqs", "1", "--api-key-file",
          temp_path(&temp, "keys"));
    struct serving a = admin_of(&s);
    assert_int_equal(say(&s, "GET", "/version", API_KEY), 200);
    temp_text(&temp, "keys", "second-key\n");
    assert_int_equal(say(&s, "GET", "/version", again), 401);
    assert_int_equal(say(&a, "POST", "/reload", KEY), 200);
    assert_int_equal(say(&s, "GET", "/version", API_KEY), 401);
    assert_int_equal(say(&s, "GET", "/version", again), 200);
    temp_text(&temp, "keys", "a key with blanks\n");
    assert_int_equal(say(&a, "POST", "/reload", KEY), 500);
    assert_non_null(strstr(reply.body, "--api-key-file"));
    assert_null(strstr(reply.body, "blanks"));
    assert_int_equal(say(&s, "GET", "/version", again), 200);
    serving_stop(&s);
}

/* A socket that only its owner can open, whatever the umask; and a public port that is full is no obstacle.
 */
static void test_unix_socket(void **state)
{
    (void)state;
    struct serving s;
    struct stat st;
    struct sockaddr_un un = { .sun_family = AF_UNIX };
    static const char *const heads[] = { "", KEY };
    snprintf(un.sun_path, sizeof un.sun_path, "%s", temp_path(&temp, "operator"));
    mode_t usual = umask(0);
    START(&s, "--admin-listen", un.sun_path, "--admin-key", "operator-key", "--max-num-seqs", "1",
          "--max-connections", "2");
    umask(usual);
    assert_int_equal(stat(un.sun_path, &st), 0);
    assert_true(S_ISSOCK(st.st_mode));
    assert_int_equal(st.st_mode & 0777, 0600);
    int full[4];
    for (int i = 0; i < 4; i++) full[i] = dial(&s);
    for (int i = 0; i < 2; i++) {
        char text[256];
        int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        assert_int_equal(connect(fd, (struct sockaddr *)&un, sizeof un), 0);
        snprintf(text, sizeof text, "GET /requests HTTP/1.1\r\nHost: a\r\n%s\r\n", heads[i]);
        send_bytes(fd, text, strlen(text));
        reply.n = reply.used = 0;
        assert_int_equal(receive(&reply, fd, 10), i ? 200 : 401);
        close(fd);
    }
    for (int i = 0; i < 4; i++) close(full[i]);
    serving_stop(&s);
    assert_int_equal(access(un.sun_path, F_OK), -1);
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
        cmocka_unit_test(test_keys),           cmocka_unit_test(test_start),
        cmocka_unit_test(test_pause),          cmocka_unit_test(test_cancel),
        cmocka_unit_test(test_overrides),      cmocka_unit_test(test_reset),
        cmocka_unit_test(test_reset_pictures), cmocka_unit_test(test_reload),
        cmocka_unit_test(test_unix_socket),
    };
    signal(SIGPIPE, SIG_IGN);
    const char *only = getenv("QUENCH_ONLY");
    if (only) cmocka_set_test_filter(only);
    return cmocka_run_group_tests(tests, make_temp, remove_temp);
}
