/* HTTP requests to one server, any number at once on one thread: libevent, TLS by OpenSSL. Each request has a
 * connection of its own. */
#ifndef EVAL_LOAD_HTTP_H
#define EVAL_LOAD_HTTP_H
#include "base/err.h"
#include <event2/event.h>
#include <stddef.h>

struct load_http_options {
    const char *url;            /* http[s]://host[:port][/prefix]; borrow, as the others */
    const char *key;            /* sent as Authorization: Bearer; NULL: none */
    const char *const *headers; /* [n_headers] "NAME=VALUE" */
    int n_headers;
    bool insecure; /* any certificate will do */
};

struct load_http;
/* Finds the server and connects once: ERR_IO names what nobody answers at. The name is resolved here only. */
bool load_http_create(struct load_http **out, const struct load_http_options *o, struct err *e);
void load_http_free(struct load_http *h);                     /* NULL is fine */
struct event_base *load_http_base(const struct load_http *h); /* its loop drives the calls */

/* The caller's; the first three are set, the rest zero. Lives until `end` was called, from the loop. */
struct load_http_call {
    void *ctx;
    void (*bytes)(void *ctx, int status, const char *data, size_t n); /* of the body, as they come */
    void (*end)(void *ctx, int status, const char *error); /* error: NULL when the body is complete */
    struct load_http *http;
    struct evhttp_connection *connection;
    const char *reason;
};
/* GET without a body, else POST of JSON (copied). Not to be called from a callback of a call. */
bool load_http_start(struct load_http *h, struct load_http_call *c, const char *path, const char *body,
                     struct err *e);
/* Closes the connection of a call that has ended. Not to be called from a callback of a call. */
void load_http_close(struct load_http_call *c);

/* A whole answer; waits for it. *body is malloc'd, NUL-terminated. */
bool load_http_get(struct load_http *h, const char *path, int *status, char **body, struct err *e);
#endif
