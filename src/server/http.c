#include "server/http.h"
#include "tokenizer/utf8.h"
#include <string.h>

static bool fail(struct http_fault *f, int status, const char *text)
{
    *f = (struct http_fault){ status, text };
    return false;
}

/* RFC 9110, 5.6.2. */
static bool is_token_char(unsigned char c)
{
    if ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9')) return true;
    return c && strchr("!#$%&'*+-.^_`|~", c);
}

static bool is_token(const char *s)
{
    if (!*s) return false;
    for (; *s; s++)
        if (!is_token_char((unsigned char)*s)) return false;
    return true;
}

size_t http_head_length(const char *data, size_t bytes, size_t *scanned, const struct http_limits *l,
                        struct http_fault *fault)
{
    size_t most = bytes < l->header_bytes ? bytes : l->header_bytes;
    for (size_t i = *scanned; i < most; i++) {
        if (data[i] != '\n') continue;
        if (i == 0 || data[i - 1] != '\r') {
            fail(fault, 400, "a line of the request does not end in CR LF");
            return 0;
        }
        if (i >= 3 && data[i - 2] == '\n') return i + 1;
    }
    *scanned = most;
    if (bytes >= l->header_bytes) fail(fault, 431, "the request's headers are too large");
    return 0;
}

static bool parse_version(struct http_request *r, const char *s, struct http_fault *fault)
{
    if (strncmp(s, "HTTP/", 5) != 0) return fail(fault, 400, "the request line is not METHOD PATH HTTP/1.1");
    if (strcmp(s, "HTTP/1.1") != 0 && strcmp(s, "HTTP/1.0") != 0)
        return fail(fault, 505, "only HTTP/1.1 and HTTP/1.0 are spoken here");
    r->version = s[7] - '0';
    return true;
}

/* A path, perhaps behind a scheme and an authority, which RFC 9112 3.2.2 asks servers to take. */
static bool parse_target(struct http_request *r, char *target, struct http_fault *fault)
{
    for (const unsigned char *p = (unsigned char *)target; *p; p++)
        if (*p <= ' ' || *p >= 0x7f || *p == '#')
            return fail(fault, 400, "the path holds bytes that must be percent-encoded");
    size_t scheme = strncmp(target, "http://", 7) == 0 ? 7 : strncmp(target, "https://", 8) == 0 ? 8 : 0;
    if (scheme) target = strchr(target + scheme, '/');
    if (!target || *target != '/') return fail(fault, 400, "the path does not start with '/'");
    r->path = target;
    char *query = strchr(target, '?');
    if (query) {
        *query = 0;
        r->query = query + 1;
    }
    return true;
}

static bool parse_request_line(struct http_request *r, char *line, struct http_fault *fault)
{
    static const char wrong[] = "the request line is not METHOD PATH HTTP/1.1";
    char *target = strchr(line, ' '), *version = target ? strchr(target + 1, ' ') : NULL;
    if (!version || strchr(version + 1, ' ')) return fail(fault, 400, wrong);
    *target++ = 0;
    *version++ = 0;
    if (!is_token(line)) return fail(fault, 400, wrong);
    if (strlen(line) > HTTP_METHOD_MAX) return fail(fault, 501, "the method is not known");
    strcpy(r->method, line);
    return parse_version(r, version, fault) && parse_target(r, target, fault);
}

static char *trim(char *s)
{
    while (*s == ' ' || *s == '\t') s++;
    size_t n = strlen(s);
    while (n > 0 && (s[n - 1] == ' ' || s[n - 1] == '\t')) s[--n] = 0;
    return s;
}

static bool parse_header(struct http_header *h, char *line, struct http_fault *fault)
{
    char *colon = strchr(line, ':');
    if (!colon) return fail(fault, 400, "a header has no colon");
    *colon = 0;
    if (!is_token(line)) return fail(fault, 400, "a header's name is not a word followed by a colon");
    for (char *p = line; *p; p++)
        if (*p >= 'A' && *p <= 'Z') *p = (char)(*p + 'a' - 'A');
    h->name = line;
    char *value = trim(colon + 1);
    for (const unsigned char *p = (unsigned char *)value; *p; p++)
        if ((*p < ' ' && *p != '\t') || *p == 0x7f)
            return fail(fault, 400, "a header's value holds control characters");
    h->value = value;
    return true;
}

static int count(const struct http_request *r, const char *name)
{
    int n = 0;
    for (int i = 0; i < r->n_headers; i++) n += strcmp(r->headers[i].name, name) == 0;
    return n;
}

const char *http_header(const struct http_request *r, const char *name)
{
    const char *value = NULL;
    for (int i = 0; i < r->n_headers; i++) {
        if (strcmp(r->headers[i].name, name) != 0) continue;
        if (value) return NULL;
        value = r->headers[i].value;
    }
    return value;
}

static bool equals_ignoring_case(const char *a, const char *b, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        char x = a[i];
        if (x >= 'A' && x <= 'Z') x = (char)(x + 'a' - 'A');
        if (x != b[i]) return false;
    }
    return true;
}

/* A list such as Connection's has this word; word in lower case. */
static bool lists(const char *value, const char *word)
{
    size_t len = strlen(word);
    while (*value) {
        value += strspn(value, " \t,");
        size_t n = strcspn(value, ", \t");
        if (n == len && equals_ignoring_case(value, word, n)) return true;
        value += n;
    }
    return false;
}

static bool parse_length(struct http_request *r, const char *value, const struct http_limits *l,
                         struct http_fault *fault)
{
    size_t digits = strspn(value, "0123456789");
    if (digits == 0 || value[digits]) return fail(fault, 400, "Content-Length is not a number");
    for (const char *p = value; *p; p++) {
        r->content_length = 10 * r->content_length + (uint64_t)(*p - '0');
        if (r->content_length > l->body_bytes) return fail(fault, 413, "the request's body is too large");
    }
    return true;
}

static bool parse_framing(struct http_request *r, const struct http_limits *l, struct http_fault *fault)
{
    int lengths = count(r, "content-length"), codings = count(r, "transfer-encoding");
    if (lengths + codings > 1)
        return fail(fault, 400, "more than one of Content-Length and Transfer-Encoding");
    if (codings) {
        const char *coding = http_header(r, "transfer-encoding");
        if (r->version == 0) return fail(fault, 400, "HTTP/1.0 knows no Transfer-Encoding");
        if (strlen(coding) != 7 || !equals_ignoring_case(coding, "chunked", 7))
            return fail(fault, 501, "the only Transfer-Encoding read here is chunked");
        r->chunked = true;
    }
    return !lengths || parse_length(r, http_header(r, "content-length"), l, fault);
}

static bool parse_rest(struct http_request *r, const struct http_limits *l, struct http_fault *fault)
{
    if (count(r, "host") > 1 || (r->version == 1 && !http_header(r, "host")))
        return fail(fault, 400, "a request has exactly one Host header");
    if (!parse_framing(r, l, fault)) return false;
    r->keep_alive = r->version == 1;
    for (int i = 0; i < r->n_headers; i++)
        if (strcmp(r->headers[i].name, "connection") == 0 && lists(r->headers[i].value, "close"))
            r->keep_alive = false;
    if (count(r, "expect")) {
        const char *expect = http_header(r, "expect");
        if (!expect || strlen(expect) != 12 || !equals_ignoring_case(expect, "100-continue", 12))
            return fail(fault, 417, "the only expectation met here is 100-continue");
        r->expects_continue = r->version == 1;
    }
    const char *coding = http_header(r, "content-encoding");
    if (count(r, "content-encoding") && (!coding || !equals_ignoring_case(coding, "identity", 9)))
        return fail(fault, 415, "compressed bodies are not read");
    return true;
}

bool http_parse_head(struct http_request *r, struct http_header *headers, char *head, size_t bytes,
                     const struct http_limits *l, struct http_fault *fault)
{
    *r = (struct http_request){ .headers = headers };
    if (memchr(head, 0, bytes)) return fail(fault, 400, "the request's headers hold a NUL");
    char *end = head + bytes - 2, *line = head;
    bool first = true;
    while (line < end) {
        char *stop = memchr(line, '\r', (size_t)(end - line));
        if (!stop || stop[1] != '\n') return fail(fault, 400, "a line of the request does not end in CR LF");
        *stop = 0;
        if (first && !parse_request_line(r, line, fault)) return false;
        if (!first) {
            if (r->n_headers == l->headers) return fail(fault, 431, "the request has too many headers");
            if (!parse_header(&r->headers[r->n_headers], line, fault)) return false;
            r->n_headers++;
        }
        first = false;
        line = stop + 2;
    }
    if (first) return fail(fault, 400, "the request line is not METHOD PATH HTTP/1.1");
    return parse_rest(r, l, fault);
}

/* States of http_chunks: the digits of a size, an extension behind it, ... */
enum { SIZE, EXTENSION, SIZE_LF, DATA, DATA_CR, DATA_LF, TRAILER, TRAILER_LF, END };
enum { SIZE_DIGITS_MAX = 8, EXTENSION_MAX = 256 };

static int hex(char c)
{
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return -1;
}

static bool size_ends(struct http_chunks *c, const struct http_limits *l, struct http_fault *fault)
{
    if (c->left > l->body_bytes - c->total) return fail(fault, 413, "the request's body is too large");
    c->state = c->left ? DATA : TRAILER;
    c->line = 0;
    return true;
}

static bool size_byte(struct http_chunks *c, char byte, struct http_fault *fault)
{
    int digit = hex(byte);
    if (digit >= 0) {
        if (++c->line > SIZE_DIGITS_MAX) return fail(fault, 400, "a chunk's size has too many digits");
        c->left = 16 * c->left + (uint64_t)digit;
        return true;
    }
    if (c->line == 0 || (byte != '\r' && byte != ';'))
        return fail(fault, 400, "a chunk's size is not hexadecimal");
    c->state = byte == ';' ? EXTENSION : SIZE_LF;
    c->line = 0;
    return true;
}

/* One byte outside chunks' data. */
static bool framing_byte(struct http_chunks *c, char byte, const struct http_limits *l,
                         struct http_fault *fault)
{
    switch (c->state) {
    case SIZE: return size_byte(c, byte, fault);
    case EXTENSION:
        if (++c->line > EXTENSION_MAX || byte == '\n' || !byte)
            return fail(fault, 400, "a chunk's extension is malformed or too long");
        if (byte == '\r') c->state = SIZE_LF;
        return true;
    case SIZE_LF:
        if (byte != '\n') return fail(fault, 400, "a chunk's size does not end in CR LF");
        return size_ends(c, l, fault);
    case DATA_CR:
        if (byte != '\r') return fail(fault, 400, "a chunk does not end in CR LF");
        c->state = DATA_LF;
        return true;
    case DATA_LF:
        if (byte != '\n') return fail(fault, 400, "a chunk does not end in CR LF");
        c->state = SIZE;
        c->line = 0;
        return true;
    case TRAILER:
        if (++c->trailer > l->header_bytes) return fail(fault, 431, "the request's trailers are too large");
        if (byte == '\n' || !byte) return fail(fault, 400, "a trailer does not end in CR LF");
        if (byte == '\r')
            c->state = TRAILER_LF;
        else
            c->line++;
        return true;
    default:
        if (byte != '\n') return fail(fault, 400, "a trailer does not end in CR LF");
        c->state = c->line ? TRAILER : END;
        c->line = 0;
        return true;
    }
}

enum http_state http_chunks_read(struct http_chunks *c, const char *data, size_t bytes, size_t *taken,
                                 const char **out, size_t *n, const struct http_limits *l,
                                 struct http_fault *fault)
{
    *taken = *n = 0;
    *out = NULL;
    for (; *taken < bytes && c->state != DATA && c->state != END; ++*taken)
        if (!framing_byte(c, data[*taken], l, fault)) return HTTP_FAULT;
    if (c->state == DATA && *taken < bytes) {
        size_t have = bytes - *taken;
        *out = data + *taken;
        *n = have < c->left ? have : (size_t)c->left;
        *taken += *n;
        c->left -= *n;
        c->total += *n;
        if (c->left == 0) c->state = DATA_CR;
    }
    return c->state == END ? HTTP_DONE : HTTP_NEEDS_MORE;
}

const char *http_reason(int status)
{
    static const struct {
        int status;
        const char *reason;
    } reasons[] = {
        { 100, "Continue" },
        { 200, "OK" },
        { 204, "No Content" },
        { 400, "Bad Request" },
        { 401, "Unauthorized" },
        { 403, "Forbidden" },
        { 404, "Not Found" },
        { 405, "Method Not Allowed" },
        { 408, "Request Timeout" },
        { 413, "Content Too Large" },
        { 415, "Unsupported Media Type" },
        { 417, "Expectation Failed" },
        { 422, "Unprocessable Content" },
        { 429, "Too Many Requests" },
        { 431, "Request Header Fields Too Large" },
        { 500, "Internal Server Error" },
        { 501, "Not Implemented" },
        { 503, "Service Unavailable" },
        { 504, "Gateway Timeout" },
        { 505, "HTTP Version Not Supported" },
    };
    for (size_t i = 0; i < sizeof reasons / sizeof *reasons; i++)
        if (reasons[i].status == status) return reasons[i].reason;
    return "Unknown";
}

bool http_percent_decode(char *text)
{
    char *to = text;
    for (const char *p = text; *p; p++) {
        if (*p == '%') {
            int high = hex(p[1]), low = high < 0 ? -1 : hex(p[2]);
            if (low < 0 || high + low == 0) return false;
            *to++ = (char)(16 * high + low);
            p += 2;
        } else
            *to++ = *p;
    }
    *to = 0;
    size_t n = (size_t)(to - text);
    return utf8_valid_prefix(text, n) == n;
}
