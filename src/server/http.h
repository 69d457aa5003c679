/* HTTP/1.1 requests out of bytes: strict, incremental, with limits. What two programs could read in two ways
 * (bare line feeds, folded lines, blanks before a colon, two lengths, a length and chunks) is refused. Knows
 * neither sockets nor routes. Source: RFC 9110, RFC 9112. */
#ifndef SERVER_HTTP_H
#define SERVER_HTTP_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct http_limits {
    size_t header_bytes; /* of the request line and all headers */
    int headers;
    size_t body_bytes;
};

struct http_header {
    const char *name, *value; /* NUL-terminated; names in lower case */
};

enum { HTTP_METHOD_MAX = 16, HTTP_HEADERS_MAX = 1000 };

struct http_request {
    char method[HTTP_METHOD_MAX + 1];
    const char *path;  /* as sent: starts with '/', printable ASCII, nothing is decoded */
    const char *query; /* behind the '?', or NULL */
    int version;       /* 0: HTTP/1.0, 1: HTTP/1.1 */
    struct http_header *headers;
    int n_headers;
    bool keep_alive, chunked, expects_continue;
    uint64_t content_length; /* 0 without; without meaning when chunked */
};

/* Why a request was refused: a status and a sentence without what the client sent. */
struct http_fault {
    int status;
    const char *text;
};

enum http_state { HTTP_NEEDS_MORE, HTTP_DONE, HTTP_FAULT };

/* Bytes of the request head at the beginning of data, the empty line included; 0: not there yet. *fault is
 * set when it can no longer become one (too long, say). `scanned` is what was looked at before, 0 at first.
 */
size_t http_head_length(const char *data, size_t bytes, size_t *scanned, const struct http_limits *l,
                        struct http_fault *fault);

/* Parses a head of exactly `bytes`, which is overwritten; the request's pointers lie in it. headers: room for
 * l->headers. */
bool http_parse_head(struct http_request *r, struct http_header *headers, char *head, size_t bytes,
                     const struct http_limits *l, struct http_fault *fault);
/* The value of a header that occurs once; NULL: it is absent or repeated. name in lower case. */
const char *http_header(const struct http_request *r, const char *name);

/* A body in chunks. Zeroed at first. */
struct http_chunks {
    int state;
    uint64_t left;  /* of the chunk's data */
    size_t line;    /* bytes of the line being read */
    size_t trailer; /* bytes of trailers so far */
    uint64_t total; /* data so far */
};
/* Reads from data what it can, up to `bytes`: *taken is how much, and *out, *n the data in it (perhaps none).
 * To be called again with the rest until it takes nothing or is done. */
enum http_state http_chunks_read(struct http_chunks *c, const char *data, size_t bytes, size_t *taken,
                                 const char **out, size_t *n, const struct http_limits *l,
                                 struct http_fault *fault);

const char *http_reason(int status); /* "Not Found" */
/* %XX decoded in place of `text`; false for half escapes, NUL and what is not UTF-8. */
bool http_percent_decode(char *text);
#endif
