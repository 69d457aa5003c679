/* quench serve under clients that do harm, and fairness among those that do not, over real sockets: malformed
 * requests, clients that leave, slow ones, many streams, heavy texts, signals under load. Good requests go on
 * beside; after each server's life its gauges and descriptors are back where they were. Larger counts by
 * environment: QUENCH_MALFORMED, QUENCH_DISCONNECTS, QUENCH_SLOW, QUENCH_SIGTERMS, QUENCH_STREAMS. `make
 * soak` sets them. */
#include "server/serving.h"
#include "num/random.h"
#include "support/sanitized.h"
#include <pthread.h>
#include <sys/resource.h>

static struct reply reply;

static int64_t count_of(const char *variable, int64_t usual)
{
    const char *text = getenv(variable);
    return text ? atoll(text) : usual;
}

/* Good requests go on beside what a test does; each must be answered as by the server when it was quiet, to
 * the last digit of its scores. */
static const struct {
    const char *path, *body;
} good[] = {
    { CHAT, QUESTION "}" },
    { CHAT, QUESTION ",\"logprobs\":true,\"top_logprobs\":3}" },
    { CHAT, QUESTION ",\"stream\":true}" },
    { COMPLETIONS, "{\"prompt\":[\"The sea\",\"One, "
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
enum { GROWTH_KIB_MAX = SANITIZED ? 1 << 20 : 16 << 10 }; /* sanitizers keep what was freed, for a while */
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
    double cut = metric(&s, "quench:timeouts_total");
    if (cut < n / 2) fail_msg("%.0f of %d were cut off", cut, n);
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
    int overtaken;        /* most that came after one and had their first event before it */
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
    f->overtaken = 0;
    for (int i = 0; i < f->n; i++) {
        int before = 0;
        for (int k = i + 1; k < f->n; k++) before += begin[k] + f->first[k] < begin[i] + f->first[i];
        if (before > f->overtaken) f->overtaken = before;
    }
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
    struct fair quiet = { n, calloc((size_t)n, 8), calloc((size_t)n, 8), 0, 0 },
                slow = { n, calloc((size_t)n, 8), calloc((size_t)n, 8), 0, 0 };
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
        int late = 0;
        for (int i = 0; i < n; i++)
            if (f->last[i] - f->first[i] > life) life = f->last[i] - f->first[i];
        for (int i = 0; i < n; i++) {
            double turns = 1 + i / SEATS, share = f->first[i] / (turns * life + 0.25);
            if (share > worst) worst = share;
            late += share > 1.5;
        }
        printf("note: %d streams for %d seats%s: %.2f s in all, first tokens after %.2f s (99 %%), one after "
               "%.2f of "
               "its turn at most, overtaken by %d at most\n",
               n, SEATS + 1 - k, k ? " beside one who does not read" : "", f->all, percentile_99(f->first, n),
               worst, f->overtaken);
        assert_true(late <= n / 4); /* more than a machine that is busy with other things makes late */
    }
    double more = percentile_99(slow.first, n) / percentile_99(quiet.first, n);
    printf("note: the one who does not read makes first tokens %.2f times as late, all of it %.2f times as "
           "long\n",
           more, slow.all / quiet.all);
    assert_true(slow.all < 3 * quiet.all + 10); /* it would stay away for 600 s */
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

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_malformed),    cmocka_unit_test(test_disconnects),
        cmocka_unit_test(test_slow_sockets), cmocka_unit_test(test_slow_reader),
        cmocka_unit_test(test_fair),         cmocka_unit_test(test_heavy_requests),
        cmocka_unit_test(test_sigterm),      cmocka_unit_test(test_second_signal),
    };
    signal(SIGPIPE, SIG_IGN);
    const char *only = getenv("QUENCH_ONLY"); /* a test by name, for large counts */
    if (only) cmocka_set_test_filter(only);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
