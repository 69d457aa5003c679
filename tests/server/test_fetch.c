/* Images by URL: which hosts are asked at all, and what is made of what they answer. */
#include "base/clock.h"
#include "server/fetch.h"
#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

/* A server on this machine: what it answers to each path. */
static const struct {
    const char *path, *answer;
    bool stays; /* open, and silent */
} answers[] = {
    { "/ok", "HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 5\r\n\r\nabcde", true },
    { "/until-close", "HTTP/1.0 200 OK\r\n\r\nabcde", false },
    { "/chunks", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n3\r\ncde\r\n0\r\n\r\n",
      false },
    { "/empty", "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", false },
    { "/redirect", "HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/ok\r\nContent-Length: 0\r\n\r\n",
      false },
    { "/absent", "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", false },
    { "/large", "HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\nabc", true },
    { "/larger", "HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\n", true },
    { "/short", "HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nabc", false },
    { "/cut-chunks", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nab", false },
    { "/bad-chunks", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nab", false },
    { "/zipped", "HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\nab", false },
    { "/coding", "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\nab", false },
    { "/negative", "HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nabcde", false },
    { "/nothing", "", false },
    { "/no-head", "HTTP/1.1 200 OK\r\nContent-", false },
    { "/no-http", "SSH-2.0-server\r\n\r\n", false },
    { "/silent", "", true },
    { "/half", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab", true },
};
enum { N_ANSWERS = sizeof answers / sizeof *answers, OPEN_MOST = 64 };

static struct host {
    int fd, port;
    pthread_t thread;
    atomic_int asked;
    char name[32]; /* as fetch_rules wants it */
} host;

static void *serve(void *unused)
{
    int open[OPEN_MOST], n_open = 0;
    (void)unused;
    for (int fd; (fd = accept(host.fd, NULL, NULL)) >= 0;) {
        char request[4096] = "", path[64] = "";
        size_t n = 0;
        ssize_t got;
        atomic_fetch_add(&host.asked, 1);
        while (!strstr(request, "\r\n\r\n") && (got = read(fd, request + n, sizeof request - 1 - n)) > 0)
            request[n += (size_t)got] = 0;
        sscanf(request, "GET %63s", path);
        for (int i = 0; i < N_ANSWERS; i++) {
            if (strcmp(path, answers[i].path) != 0) continue;
            if (write(fd, answers[i].answer, strlen(answers[i].answer)) < 0) break;
            if (answers[i].stays && n_open < OPEN_MOST) {
                open[n_open++] = fd;
                fd = -1;
            }
        }
        if (fd >= 0) close(fd);
    }
    while (n_open > 0) close(open[--n_open]);
    return NULL;
}

static int start(void **state)
{
    (void)state;
    struct sockaddr_in a = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t n = sizeof a;
    host.fd = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(host.fd, (struct sockaddr *)&a, n) != 0 || listen(host.fd, 64) != 0 ||
        getsockname(host.fd, (struct sockaddr *)&a, &n) != 0)
        return -1;
    host.port = ntohs(a.sin_port);
    snprintf(host.name, sizeof host.name, "127.0.0.1:%d", host.port);
    return pthread_create(&host.thread, NULL, serve, NULL);
}

static int stop(void **state)
{
    (void)state;
    shutdown(host.fd, SHUT_RDWR);
    pthread_join(host.thread, NULL);
    close(host.fd);
    return 0;
}

static bool fetch(char **out, const char *rule, const char *url, size_t most, double seconds, struct err *e)
{
    const struct fetch_rules rules = { &rule, rule != NULL };
    size_t bytes;
    *e = (struct err){ 0 };
    return fetch_data_url(out, &bytes, &rules, url, most, clock_seconds() + seconds, e);
}

static void test_answers(void **state)
{
    (void)state;
    static const struct {
        const char *path, *says; /* NULL: "abcde" comes */
    } cases[] = {
        { "/ok", NULL },
        { "/until-close", NULL },
        { "/chunks", NULL },
        { "/redirect", "it answers 302, and redirects are not followed" },
        { "/absent", "it answers 404" },
        { "/large", "it has more than 0.0 MB" },
        { "/larger", "it has more than" },
        { "/short", "another length" },
        { "/cut-chunks", "ends early" },
        { "/bad-chunks", "ends early" },
        { "/zipped", "compressed" },
        { "/coding", "transfer coding" },
        { "/negative", "a length that is none" },
        { "/nothing", "ends early" },
        { "/no-head", "ends early" },
        { "/no-http", "not HTTP" },
        { "/silent", "too long" },
        { "/half", "too long" },
    };
    char url[200], *out;
    struct err e;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        snprintf(url, sizeof url, "http://%s%s#part", host.name, cases[i].path);
        double begin = clock_seconds();
        bool ok = fetch(&out, host.name, url, 10000, 1, &e);
        if (clock_seconds() - begin > 3) fail_msg("%s took %g s", url, clock_seconds() - begin);
        if (ok != !cases[i].says ||
            (!ok && (!strstr(e.text, cases[i].says) || !strstr(e.text, "127.0.0.1:"))))
            fail_msg("%s: %s", cases[i].path, ok ? out : e.text);
        if (ok) assert_string_equal(out, "data:image/x;base64,YWJjZGU=");
        free(out);
    }
    /* Nobody there; and one that does not speak TLS. */
    snprintf(url, sizeof url, "https://%s/ok", host.name);
    assert_false(fetch(&out, host.name, url, 10000, 1, &e));
    assert_null(out);
    assert_false(fetch(&out, "127.0.0.1:1", "http://127.0.0.1:1/", 10000, 1, &e));
    assert_non_null(strstr(e.text, "no connection"));
}

/* With lists in which this server is not, or only by a name. PORT in the URL is its port. */
static void check_no_connection(const char *with_port)
{
    static const char *const rules[] = { NULL,        "example.invalid", "*",
                                         "localhost", "127.0.0.1",       "example.invalid:80" };
    char url[300], port[8], by_name[40], *to = url, *out;
    struct err e;
    snprintf(port, sizeof port, "%d", host.port);
    snprintf(by_name, sizeof by_name, "localhost:%d", host.port);
    for (const char *c = with_port; *c; c++) {
        bool here = strncmp(c, "PORT", 4) == 0;
        to += sprintf(to, here ? "%s" : "%.1s", here ? port : c);
        if (here) c += 3;
    }
    for (size_t r = 0; r <= sizeof rules / sizeof *rules; r++) {
        const char *rule = r < sizeof rules / sizeof *rules ? rules[r] : by_name;
        if (fetch(&out, rule, url, 10000, 1, &e)) fail_msg("%s was fetched", url);
        if (strstr(e.text, "127.0.0.1:")) fail_msg("%s tells an address: %s", url, e.text);
    }
}

/* Ways to write a host that is not listed, and to hide one: none is connected to. PORT is that of the server.
 */
static void test_hosts(void **state)
{
    (void)state;
    static const char *const urls[] = {
        "http://127.0.0.1:PORT/ok",
        "http://localhost:PORT/ok",
        "http://LOCALHOST:PORT/ok",
        "http://127.1:PORT/ok",
        "http://127.0.1:PORT/ok",
        "http://2130706433:PORT/ok",
        "http://0x7f000001:PORT/ok",
        "http://0x7f.1:PORT/ok",
        "http://0177.0.0.1:PORT/ok",
        "http://017700000001:PORT/ok",
        "http://0:PORT/ok",
        "http://0.0.0.0:PORT/ok",
        "http://127.0.0.1.:PORT/ok",
        "http://127.000.000.001:PORT/ok",
        "http://[::1]:PORT/ok",
        "http://[::ffff:127.0.0.1]:PORT/ok",
        "http://[::]:PORT/ok",
        "http://example.invalid@127.0.0.1:PORT/ok",
        "http://example.invalid:80@127.0.0.1:PORT/ok",
        "http://127.0.0.1:PORT\\@example.invalid/ok",
        "http://example.invalid\\@127.0.0.1:PORT/ok",
        "http://example.invalid\\.127.0.0.1:PORT/ok",
        "http://127.0.0.1:PORT#@example.invalid/ok",
        "http://127.0.0.1:PORT?@example.invalid/ok",
        "http://example.invalid#@127.0.0.1:PORT/ok",
        "http://127.0.0.1:PORT/ok\r\nHost: example.invalid",
        "http://127.0.0.1%3aPORT/ok",
        "http://127.0.0.1%2f@example.invalid:PORT/",
        "http://%31%32%37.0.0.1:PORT/ok",
        "http://127.0.0.1:0PORT/ok",
        "http://127.0.0.1: PORT/ok",
        "http:// 127.0.0.1:PORT/ok",
        "http:///127.0.0.1:PORT/ok",
        "http:/127.0.0.1:PORT/ok",
        "http:127.0.0.1:PORT/ok",
        "//127.0.0.1:PORT/ok",
        "HTTP://127.0.0.1:PORT/ok",
        "hTTps://127.0.0.1:PORT/ok",
        "ftp://127.0.0.1:PORT/ok",
        "gopher://127.0.0.1:PORT/ok",
        "file:///etc/passwd",
        "file://127.0.0.1:PORT/ok",
        "javascript:alert(1)",
        "http://",
        "http://:PORT/",
        "http://.:PORT/",
        "http://..:PORT/",
        "http://127.0.0.1..:PORT/ok",
        "http://example.invalid.127.0.0.1:PORT/ok",
        "http://127.0.0.1:99999/",
        "http://127.0.0.1:-1/",
        "http://127.0.0.1:PORTx/",
        "http://127.0.0.1:/ok",
        "http://127.0.0.1:PORT:PORT/ok",
        "http://\xe2\x91\xa0\xe2\x91\xa1\xe2\x91\xa6.0.0.1:PORT/ok",
        "http://127\xe3\x80\x82"
        "0.0.1:PORT/ok",
        "http://127.0.0.1\t:PORT/ok",
        "http://127.0.0.1;PORT/ok",
        "http://127.0.0.1,example.invalid:PORT/ok",
        "http://a_b.example.invalid:PORT/ok",
        "http://ip6-localhost:PORT/ok",
        "http://0x7f.0x0.0x0.0x1:PORT/ok",
        "http://127.0.0.0x1:PORT/ok",
    };
    struct err e;
    static const char *const schemes[] = { "http://", "https://", "HTTP://" };
    static const char *const hosts[] = { "127.0.0.1",  "localhost",   "LocalHost",       "127.1",
                                         "2130706433", "0x7f000001",  "0177.0.0.1",      "0.0.0.0",
                                         "0",          "[::1]",       "[::ffff:7f00:1]", "127.0.0.1.",
                                         "localhost.", "a@127.0.0.1", "%6cocalhost" };
    static const char *const tails[] = { ":PORT/ok", ":PORT", ":PORT?a=b", ":PORT#c", ":PORT/../ok" };
    int before = atomic_load(&host.asked);
    for (size_t i = 0; i < sizeof urls / sizeof *urls; i++) check_no_connection(urls[i]);
    for (size_t a = 0; a < 3; a++)
        for (size_t b = 0; b < sizeof hosts / sizeof *hosts; b++)
            for (size_t c = 0; c < 5; c++) {
                char url[100];
                snprintf(url, sizeof url, "%s%s%s", schemes[a], hosts[b], tails[c]);
                check_no_connection(url);
            }
    assert_int_equal(atomic_load(&host.asked), before);
    /* The other way round: what is listed is found however its letters are written. */
    static const struct {
        const char *rule, *url;
        bool allowed;
    } cases[] = {
        { "example.invalid", "http://EXAMPLE.invalid/a.png?b=c#d", true },
        { "Example.Invalid", "https://example.invalid", true },
        { "example.invalid", "http://example.invalid:80/", true },
        { "example.invalid", "https://example.invalid:80/", false },
        { "example.invalid", "http://example.invalid:443/", false },
        { "example.invalid:443", "http://example.invalid:443/", true },
        { "example.invalid", "http://www.example.invalid/", false },
        { "example.invalid", "http://example.invalid.evil.net/", false },
        { "example.invalid", "http://evilexample.invalid/", false },
        { "*", "https://anything.net/", true },
        { "*", "https://anything.net:22/", false },
        { "192.0.2.1", "http://192.0.2.1/", true },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct fetch_url u;
        bool by_number;
        assert_true(fetch_parse(&u, cases[i].url, &e));
        if (fetch_allows(&(struct fetch_rules){ &cases[i].rule, 1 }, &u, &by_number) != cases[i].allowed)
            fail_msg("%s for %s", cases[i].rule, cases[i].url);
        assert_false(by_number);
    }
}

/* A name server that does not answer: getaddrinfo is held (see the Makefile), for longer than the request
 * has. */
int __real_getaddrinfo(const char *node, const char *service, const struct addrinfo *hints,
                       struct addrinfo **out);
int __wrap_getaddrinfo(const char *node, const char *service, const struct addrinfo *hints,
                       struct addrinfo **out);
static atomic_int held;
static atomic_bool lets_go;

int __wrap_getaddrinfo(const char *node, const char *service, const struct addrinfo *hints,
                       struct addrinfo **out)
{
    if (!node || strcmp(node, "silent.example") != 0) return __real_getaddrinfo(node, service, hints, out);
    atomic_fetch_add(&held, 1);
    while (!lets_go) usleep(1000);
    atomic_fetch_sub(&held, 1);
    return __real_getaddrinfo("192.0.2.1", service, hints, out); /* an answer, too late */
}

static void test_silent_names(void **state)
{
    (void)state;
    char *out = NULL, url[300];
    struct err e = { 0 };
    double begin = clock_seconds();
    assert_false(fetch(&out, "silent.example", "http://silent.example/a", 1000, 0.3, &e));
    assert_non_null(strstr(e.text, "took too long"));
    assert_true(clock_seconds() - begin < 3);
    /* so many of them, and no more threads */
    for (int i = 1; i < 16; i++)
        assert_false(fetch(&out, "silent.example", "http://silent.example/a", 1000, 0.01, &e));
    e = (struct err){ 0 };
    assert_false(fetch(&out, "silent.example", "http://silent.example/a", 1000, 10, &e));
    assert_non_null(strstr(e.text, "16 other names are being looked up"));
    assert_int_equal(e.code, ERR_BUSY);
    for (double until = clock_seconds() + 20; held < 16 && clock_seconds() < until;) usleep(1000);
    assert_int_equal(held, 16);
    lets_go = true;
    for (double until = clock_seconds() + 20; held > 0 && clock_seconds() < until;) usleep(1000);
    usleep(100000);
    /* the places are free again */
    snprintf(url, sizeof url, "http://%s/ok", host.name);
    e = (struct err){ 0 };
    if (!fetch(&out, host.name, url, 10000, 5, &e)) fail_msg("%s", e.text);
    free(out);
}

static void test_addresses(void **state)
{
    (void)state;
    static const char *const private[] = { "0.0.0.0",
                                           "0.1.2.3",
                                           "10.0.0.1",
                                           "10.255.255.255",
                                           "100.64.0.1",
                                           "100.127.255.255",
                                           "127.0.0.1",
                                           "127.255.0.1",
                                           "169.254.169.254",
                                           "172.16.0.1",
                                           "172.31.255.255",
                                           "192.0.0.8",
                                           "192.0.2.1",
                                           "192.88.99.1",
                                           "192.168.0.1",
                                           "198.18.0.1",
                                           "198.19.255.255",
                                           "198.51.100.7",
                                           "203.0.113.9",
                                           "224.0.0.1",
                                           "239.1.1.1",
                                           "240.0.0.1",
                                           "255.255.255.255",
                                           "::",
                                           "::1",
                                           "::ffff:8.8.8.8",
                                           "::ffff:127.0.0.1",
                                           "64:ff9b::7f00:1",
                                           "100::1",
                                           "fc00::1",
                                           "fd12::1",
                                           "fe80::1",
                                           "fec0::1",
                                           "ff02::1",
                                           "2001::1",
                                           "2001:0:7f00:1::1",
                                           "2001:1ff::1",
                                           "2001:db8::1",
                                           "2002:7f00:1::1",
                                           "3fff:fff::1",
                                           "4000::1" };
    static const char *const public[] = {
        "1.1.1.1",         "8.8.8.8",        "9.255.255.255",        "11.0.0.0",
        "100.63.255.255",  "100.128.0.0",    "126.255.255.255",      "128.0.0.1",
        "169.253.0.1",     "172.15.255.255", "172.32.0.0",           "192.0.1.1",
        "192.167.1.1",     "192.169.0.1",    "198.17.0.1",           "198.20.0.1",
        "223.255.255.255", "2001:200::1",    "2001:4860:4860::8888", "2606:4700::1111",
        "2a00::1",         "3ffe::1"
    };
    for (size_t i = 0; i < sizeof private / sizeof *private + sizeof public / sizeof *public; i++) {
        bool is_public = i >= sizeof private / sizeof *private;
        const char *text = is_public ? public[i - sizeof private / sizeof *private] : private[i];
        struct sockaddr_in a = { .sin_family = AF_INET };
        struct sockaddr_in6 b = { .sin6_family = AF_INET6 };
        bool is_v4 = inet_pton(AF_INET, text, &a.sin_addr) == 1;
        assert_true(is_v4 || inet_pton(AF_INET6, text, &b.sin6_addr) == 1);
        if (fetch_is_public(is_v4 ? (struct sockaddr *)&a : (struct sockaddr *)&b) != is_public)
            fail_msg("%s", text);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_answers), cmocka_unit_test(test_hosts),
                                        cmocka_unit_test(test_silent_names),
                                        cmocka_unit_test(test_addresses) };
    return cmocka_run_group_tests(tests, start, stop);
}
