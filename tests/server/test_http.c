/* The request parser: what is taken, what is refused with which status, however the bytes come in pieces. */
#include "server/http.h"
#include "checkpoint/temp.h"

static const struct http_limits limits = { 1024, 5, 64 };

struct outcome {
    int status; /* 0: parsed, or more is needed */
    bool whole;
    struct http_request request;
    struct http_header headers[5];
    char head[4096];
};

static void parse(struct outcome *o, const char *text)
{
    struct http_fault fault = { 0 };
    size_t scanned = 0, n = 0, bytes = strlen(text);
    memset(o, 0, sizeof *o);
    for (size_t have = 1; have <= bytes && n == 0 && !fault.status; have++)
        n = http_head_length(text, have, &scanned, &limits, &fault);
    if (n > 0) {
        memcpy(o->head, text, n);
        o->whole = http_parse_head(&o->request, o->headers, o->head, n, &limits, &fault);
    }
    assert_true(!fault.status == !fault.text);
    o->status = fault.status;
}

static void test_taken(void **state)
{
    (void)state;
    struct outcome o;
    parse(&o, "POST /v1/x?q=1 HTTP/1.1\r\nHost: a\r\nX-Thing: \t two words \r\ncontent-length: 12\r\n\r\n");
    assert_true(o.whole);
    assert_string_equal(o.request.method, "POST");
    assert_string_equal(o.request.path, "/v1/x");
    assert_string_equal(o.request.query, "q=1");
    assert_string_equal(http_header(&o.request, "x-thing"), "two words");
    assert_int_equal(o.request.content_length, 12);
    assert_true(o.request.keep_alive);
    parse(&o, "GET http://host:80/health HTTP/1.1\r\nHost: host\r\nConnection: foo, Close\r\n\r\n");
    assert_true(o.whole);
    assert_string_equal(o.request.path, "/health");
    assert_false(o.request.keep_alive);
    parse(&o, "GET / HTTP/1.0\r\n\r\n");
    assert_true(o.whole && o.request.version == 0 && !o.request.keep_alive);
    parse(&o, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\nExpect: 100-continue\r\n\r\n");
    assert_true(o.whole && o.request.chunked && o.request.expects_continue);
}

static void test_refused(void **state)
{
    (void)state;
    static const struct {
        int status;
        const char *text;
    } cases[] = {
        { 400, "GET / HTTP/1.1\nHost: a\n\n" },
        { 400, "GET / HTTP/1.1\r\nHost: a\n\r\n" },
        { 400, "GET  / HTTP/1.1\r\nHost: a\r\n\r\n" },
        { 400, "GET / HTTP/1.1 \r\nHost: a\r\n\r\n" },
        { 400, "GET /\r\nHost: a\r\n\r\n" },
        { 400, "GET health HTTP/1.1\r\nHost: a\r\n\r\n" },
        { 400, "GET http://a HTTP/1.1\r\nHost: a\r\n\r\n" },
        { 400, "GET /#a HTTP/1.1\r\nHost: a\r\n\r\n" },
        { 400, "GET /\x80 HTTP/1.1\r\nHost: a\r\n\r\n" },
        { 400, "G(T / HTTP/1.1\r\nHost: a\r\n\r\n" },
        { 501, "GETGETGETGETGETGETGET / HTTP/1.1\r\nHost: a\r\n\r\n" },
        { 400, "GET / http/1.1\r\nHost: a\r\n\r\n" },
        { 505, "GET / HTTP/2.0\r\nHost: a\r\n\r\n" },
        { 505, "GET / HTTP/1.12\r\nHost: a\r\n\r\n" },
        { 400, "GET / HTTP/1.1\r\n\r\n" },
        { 400, "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n" },
        { 400, "GET / HTTP/1.1\r\nHost : a\r\n\r\n" },
        { 400, "GET / HTTP/1.1\r\n Host: a\r\n\r\n" },
        { 400, "GET / HTTP/1.1\r\nHost: a\r\nA: b\r\n c\r\n\r\n" },
        { 400, "GET / HTTP/1.1\r\nHost: a\r\nA\r\n\r\n" },
        { 400, "GET / HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n" },
        { 400, "GET / HTTP/1.1\r\nHost: a\r\nA: b\rc\r\n\r\n" },
        { 400, "GET / HTTP/1.1\r\nHost: a\r\nA: \x01\r\n\r\n" },
        { 400, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n" },
        { 400, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n" },
        { 400, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1, 1\r\n\r\n" },
        { 400, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n" },
        { 400, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\n" },
        { 400, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x1\r\n\r\n" },
        { 400, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length:\r\n\r\n" },
        { 413, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 65\r\n\r\n" },
        { 413, "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999999999\r\n\r\n" },
        { 501, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n" },
        { 501, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked;x\r\n\r\n" },
        { 400, "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" },
        { 417, "POST / HTTP/1.1\r\nHost: a\r\nExpect: tea\r\n\r\n" },
        { 415, "POST / HTTP/1.1\r\nHost: a\r\nContent-Encoding: gzip\r\n\r\n" },
        { 431, "GET / HTTP/1.1\r\nHost: a\r\nA: b\r\nA: b\r\nA: b\r\nA: b\r\nA: b\r\n\r\n" },
    };
    struct outcome o;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        parse(&o, cases[i].text);
        if (o.status != cases[i].status) fail_msg("%d for %s", o.status, cases[i].text);
    }
}

static void test_large_head(void **state)
{
    (void)state;
    struct outcome o;
    char text[2048];
    memset(text, 'a', sizeof text);
    memcpy(text, "GET / HTTP/1.1\r\nHost: a\r\nA: ", 28);
    strcpy(text + 1020, "\r\n\r\n"); /* its last byte is the limit's */
    parse(&o, text);
    assert_true(o.whole);
    text[1020] = 'a';
    strcpy(text + 1021, "\r\n\r\n");
    parse(&o, text);
    assert_int_equal(o.status, 431);
}

static void test_nul(void **state)
{
    (void)state;
    struct http_fault fault = { 0 };
    struct http_request r;
    struct http_header headers[5];
    char head[] = "GET /a\0b HTTP/1.1\r\nHost: a\r\n\r\n";
    assert_false(http_parse_head(&r, headers, head, sizeof head - 1, &limits, &fault));
    assert_int_equal(fault.status, 400);
}

/* Fed in two pieces cut at `cut`. The status of a refusal; 0: done with `body`; -1: it wants more. */
static int read_chunks(const char *text, size_t bytes, size_t cut, char *body, size_t *n_body, size_t *used)
{
    struct http_chunks c = { 0 };
    struct http_fault fault = { 0 };
    enum http_state state = HTTP_NEEDS_MORE;
    *n_body = *used = 0;
    for (int piece = 0; piece < 2 && state == HTTP_NEEDS_MORE; piece++) {
        size_t end = piece ? bytes : cut, taken = 1;
        while (state == HTTP_NEEDS_MORE && (taken > 0 && *used < end)) {
            const char *out;
            size_t n;
            state = http_chunks_read(&c, text + *used, end - *used, &taken, &out, &n, &limits, &fault);
            memcpy(body + *n_body, out ? out : "", n);
            *n_body += n;
            *used += taken;
        }
    }
    return state == HTTP_DONE ? 0 : state == HTTP_FAULT ? fault.status : -1;
}

static void test_chunks(void **state)
{
    (void)state;
    static const char text[] = "3\r\nabc\r\n0A;ext=\"1\"\r\n0123456789\r\n000\r\nTrailer: x\r\n\r\nNEXT";
    char body[64];
    size_t n, used;
    for (size_t cut = 0; cut <= sizeof text - 5; cut++) {
        assert_int_equal(read_chunks(text, sizeof text - 1, cut, body, &n, &used), 0);
        assert_int_equal(used, sizeof text - 5);
        assert_int_equal(n, 13);
        assert_memory_equal(body, "abc0123456789", 13);
    }
    for (size_t end = 0; end < sizeof text - 5; end++)
        assert_int_equal(read_chunks(text, end, end, body, &n, &used), -1);
    static const struct {
        int status;
        const char *text;
    } cases[] = {
        { 400, "-1\r\n" },
        { 400, "\r\n" },
        { 400, "3 \r\nabc" },
        { 400, "3\nabc" },
        { 400, "3\r\nabcd\r\n" },
        { 400, "3\r\nabc\n" },
        { 400, "0x3\r\nabc" },
        { 400, "000000003\r\nabc" },
        { 413, "41\r\n" },
        { 413, "FFFFFFFF\r\n" },
        { 400, "3;a\nb\r\n" },
        { 400, "0\r\nA: b\n\r\n" },
        { 413, "40\r\n0123456789012345678901234567890123456789012345678901234567890123\r\n1\r\n" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char big[128];
        int status = read_chunks(cases[i].text, strlen(cases[i].text), 1, big, &n, &used);
        if (status != cases[i].status) fail_msg("%d for %s", status, cases[i].text);
    }
}

static void test_percent(void **state)
{
    (void)state;
    char good[] = "a%2Fb%C3%A4", half[] = "a%2", nul[] = "%00", latin[] = "%e4";
    assert_true(http_percent_decode(good));
    assert_string_equal(good, "a/b\xc3\xa4");
    assert_false(http_percent_decode(half) || http_percent_decode(nul) || http_percent_decode(latin));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_taken), cmocka_unit_test(test_refused), cmocka_unit_test(test_large_head),
        cmocka_unit_test(test_nul),   cmocka_unit_test(test_chunks),  cmocka_unit_test(test_percent),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
