/* Requests: heads and chunks from any bytes, in pieces, give what they give at once. */
#include "server/http.h"
#include <stdlib.h>
#include <string.h>

static const struct http_limits limits = { 4096, 20, 8192 };

static void check_request(const struct http_request *r)
{
    if (r->path[0] != '/' || r->n_headers > limits.headers || (r->chunked && r->content_length)) abort();
    if (r->content_length > limits.body_bytes) abort();
    for (int i = 0; i < r->n_headers; i++)
        if (!*r->headers[i].name || strpbrk(r->headers[i].name, " \t\r\n:") ||
            strpbrk(r->headers[i].value, "\r\n"))
            abort();
}

static size_t read_chunks(const char *data, size_t bytes, size_t step, char *body, enum http_state *state)
{
    struct http_chunks c = { 0 };
    struct http_fault fault = { 0 };
    size_t at = 0, n_body = 0;
    *state = HTTP_NEEDS_MORE;
    while (*state == HTTP_NEEDS_MORE && at < bytes) {
        const char *out;
        size_t n, taken, have = bytes - at < step ? bytes - at : step;
        *state = http_chunks_read(&c, data + at, have, &taken, &out, &n, &limits, &fault);
        if (taken > have || (n && (out < data || out + n > data + bytes)) || n_body + n > limits.body_bytes)
            abort();
        if (*state == HTTP_NEEDS_MORE && taken == 0) abort();
        memcpy(body + n_body, out ? out : data, n);
        n_body += n;
        at += taken;
    }
    return n_body;
}

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t bytes);
int LLVMFuzzerTestOneInput(const unsigned char *data, size_t bytes)
{
    static char once[8192], pieces[8192];
    struct http_header headers[20];
    struct http_request r;
    struct http_fault fault = { 0 }, second = { 0 };
    size_t scanned = 0, whole = 0, n = 0;
    const char *text = (const char *)data;
    for (size_t have = 0; have <= bytes && n == 0 && !fault.status; have++)
        n = http_head_length(text, have, &scanned, &limits, &fault);
    scanned = 0;
    if (!fault.status) whole = http_head_length(text, bytes, &scanned, &limits, &second);
    if (!fault.status && whole != n) abort();
    if (n > 0) {
        char *head = malloc(n + 1);
        memcpy(head, text, n);
        head[n] = 0;
        if (http_parse_head(&r, headers, head, n, &limits, &fault)) {
            check_request(&r);
            if (strstr(r.path, "%")) http_percent_decode((char *)(head + (r.path - head)));
        }
        free(head);
    }
    enum http_state a, b;
    size_t n_once = read_chunks(text + n, bytes - n, bytes + 1, once, &a),
           n_pieces = read_chunks(text + n, bytes - n, 1, pieces, &b);
    if (a != b || n_once != n_pieces || memcmp(once, pieces, n_once) != 0) abort();
    return 0;
}
