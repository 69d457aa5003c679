#include "eval/load_http.h"
#include <event2/buffer.h>
#include <event2/bufferevent_ssl.h>
#include <event2/http.h>
#include <netdb.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum {
    TIMEOUT_SECONDS = 6 * 60 * 60, /* between two bytes: an answer may wait in a queue for long */
    ANSWER_BYTES_MAX = 64 << 20
};

struct load_http {
    struct load_http_options options;
    struct event_base *base;
    struct evhttp_uri *uri;
    SSL_CTX *tls;       /* NULL: plain */
    char address[1025]; /* NI_MAXHOST, numeric */
    char host[1100];    /* of the Host header */
    int port;
};

static bool parse_url(struct load_http *h, struct err *e)
{
    const char *url = h->options.url;
    h->uri = evhttp_uri_parse(url);
    const char *scheme = h->uri ? evhttp_uri_get_scheme(h->uri) : NULL,
               *host = scheme ? evhttp_uri_get_host(h->uri) : NULL;
    bool https = scheme && strcmp(scheme, "https") == 0;
    if (!host || !*host || (!https && strcmp(scheme, "http") != 0))
        return err_set(e, ERR_ARGUMENT, "'%s': expected http://HOST[:PORT] or https://HOST[:PORT]", url);
    h->port = evhttp_uri_get_port(h->uri);
    bool plain = h->port < 0;
    if (plain) h->port = https ? 443 : 80;
    bool v6 = strchr(host, ':') != NULL && host[0] != '[';
    int n = snprintf(h->host, sizeof h->host, "%s%s%s", v6 ? "[" : "", host, v6 ? "]" : "");
    if (!plain && n > 0 && n < (int)sizeof h->host)
        snprintf(h->host + n, sizeof h->host - (size_t)n, ":%d", h->port);
    return true;
}

static const char *bare_host(const struct load_http *h, char *out, size_t size)
{
    const char *host = evhttp_uri_get_host(h->uri);
    size_t n = strlen(host);
    if (host[0] != '[' || n < 2) return host;
    snprintf(out, size, "%.*s", (int)n - 2, host + 1);
    return out;
}

/* The first address of the name that accepts a connection. */
static bool find_server(struct load_http *h, struct err *e)
{
    char service[16], name[1025];
    struct addrinfo *all, hints = { .ai_socktype = SOCK_STREAM };
    snprintf(service, sizeof service, "%d", h->port);
    int fault = getaddrinfo(bare_host(h, name, sizeof name), service, &hints, &all);
    if (fault) return err_set(e, ERR_IO, "%s: %s", h->options.url, gai_strerror(fault));
    bool found = false;
    for (struct addrinfo *a = all; a && !found; a = a->ai_next) {
        int fd = socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        found = fd >= 0 && connect(fd, a->ai_addr, a->ai_addrlen) == 0 &&
                getnameinfo(a->ai_addr, a->ai_addrlen, h->address, sizeof h->address, NULL, 0,
                            NI_NUMERICHOST) == 0;
        if (!found) err_errno(e, "connect");
        if (fd >= 0) close(fd);
    }
    freeaddrinfo(all);
    return found || err_note(e, "%s", h->options.url);
}

static bool tls_fault(struct err *e, const char *what)
{
    char text[256];
    ERR_error_string_n(ERR_get_error(), text, sizeof text);
    return err_set(e, ERR_IO, "%s: %s", what, text);
}

static bool create_tls(struct load_http *h, struct err *e)
{
    if (strcmp(evhttp_uri_get_scheme(h->uri), "https") != 0) return true;
    h->tls = SSL_CTX_new(TLS_client_method());
    if (!h->tls || !SSL_CTX_set_default_verify_paths(h->tls)) return tls_fault(e, "TLS");
    SSL_CTX_set_min_proto_version(h->tls, TLS1_2_VERSION);
    SSL_CTX_set_verify(h->tls, h->options.insecure ? SSL_VERIFY_NONE : SSL_VERIFY_PEER, NULL);
    return true;
}

bool load_http_create(struct load_http **out, const struct load_http_options *o, struct err *e)
{
    struct load_http *h = calloc(1, sizeof *h);
    *out = NULL;
    if (!h) return err_memory(e, "HTTP client", sizeof *h);
    h->options = *o;
    h->base = event_base_new();
    if (h->base ? parse_url(h, e) && find_server(h, e) && create_tls(h, e)
                : err_set(e, ERR_MEMORY, "no event loop")) {
        *out = h;
        return true;
    }
    load_http_free(h);
    return false;
}

void load_http_free(struct load_http *h)
{
    if (!h) return;
    SSL_CTX_free(h->tls);
    if (h->uri) evhttp_uri_free(h->uri);
    if (h->base) event_base_free(h->base);
    free(h);
}

struct event_base *load_http_base(const struct load_http *h)
{
    return h->base;
}

static struct bufferevent *secure(const struct load_http *h)
{
    char name[1025];
    const char *host = bare_host(h, name, sizeof name);
    SSL *ssl = SSL_new(h->tls);
    if (!ssl) return NULL;
    SSL_set_tlsext_host_name(ssl, host);
    if (!h->options.insecure && !SSL_set1_host(ssl, host)) {
        SSL_free(ssl);
        return NULL;
    }
    struct bufferevent *b =
        bufferevent_openssl_socket_new(h->base, -1, ssl, BUFFEREVENT_SSL_CONNECTING, BEV_OPT_CLOSE_ON_FREE);
    if (b) bufferevent_openssl_set_allow_dirty_shutdown(b, 1);
    return b;
}

static void read_bytes(struct evhttp_request *r, void *ctx)
{
    struct load_http_call *c = ctx;
    struct evbuffer *in = evhttp_request_get_input_buffer(r);
    size_t n = evbuffer_get_length(in);
    const unsigned char *data = evbuffer_pullup(in, -1);
    if (data) c->bytes(c->ctx, evhttp_request_get_response_code(r), (const char *)data, n);
    evbuffer_drain(in, n);
}

static void note_fault(enum evhttp_request_error fault, void *ctx)
{
    static const char *const words[] = { [EVREQ_HTTP_TIMEOUT] = "timed out",
                                         [EVREQ_HTTP_EOF] = "the connection was closed too early",
                                         [EVREQ_HTTP_INVALID_HEADER] = "the answer is not HTTP",
                                         [EVREQ_HTTP_BUFFER_ERROR] = "reading or writing failed",
                                         [EVREQ_HTTP_REQUEST_CANCEL] = "cancelled",
                                         [EVREQ_HTTP_DATA_TOO_LONG] = "the answer is too long" };
    ((struct load_http_call *)ctx)->reason = words[fault];
}

/* Why a certificate was refused; NULL where none was. */
static const char *certificate_fault(const struct load_http_call *c)
{
    struct bufferevent *b = c->http->tls ? evhttp_connection_get_bufferevent(c->connection) : NULL;
    SSL *ssl = b ? bufferevent_openssl_get_ssl(b) : NULL;
    long fault = ssl && !c->http->options.insecure ? SSL_get_verify_result(ssl) : X509_V_OK;
    return fault == X509_V_OK ? NULL : X509_verify_cert_error_string(fault);
}

static void finish(struct evhttp_request *r, void *ctx)
{
    struct load_http_call *c = ctx;
    int status = r ? evhttp_request_get_response_code(r) : 0;
    if (status && evbuffer_get_length(evhttp_request_get_input_buffer(r))) read_bytes(r, c);
    const char *refused = status ? NULL : certificate_fault(c);
    if (refused) {
        char text[200];
        snprintf(text, sizeof text, "the server's certificate: %s (--insecure takes any)", refused);
        c->end(c->ctx, 0, text);
    } else
        c->end(c->ctx, status, status || c->reason ? c->reason : "no connection");
}

static bool add_headers(const struct load_http *h, struct evhttp_request *r, bool posts, struct err *e)
{
    struct evkeyvalq *to = evhttp_request_get_output_headers(r);
    char bearer[4096];
    const struct load_http_options *o = &h->options;
    bool ok =
        evhttp_add_header(to, "Host", h->host) == 0 && evhttp_add_header(to, "Connection", "close") == 0;
    if (posts) ok = ok && evhttp_add_header(to, "Content-Type", "application/json") == 0;
    if (o->key) {
        ok = ok && snprintf(bearer, sizeof bearer, "Bearer %s", o->key) < (int)sizeof bearer &&
             evhttp_add_header(to, "Authorization", bearer) == 0;
        if (!ok) return err_set(e, ERR_ARGUMENT, "the API key cannot be a header");
    }
    for (int i = 0; ok && i < o->n_headers; i++) {
        char name[256];
        size_t n = strcspn(o->headers[i], "=");
        snprintf(name, sizeof name, "%.*s", (int)n, o->headers[i]);
        evhttp_remove_header(to, name);
        if (!o->headers[i][n] || n >= sizeof name || evhttp_add_header(to, name, o->headers[i] + n + 1) != 0)
            return err_set(e, ERR_ARGUMENT, "'%s': expected NAME=VALUE of a header", o->headers[i]);
    }
    return ok || err_set(e, ERR_MEMORY, "no room for headers");
}

static bool send_request(struct load_http_call *c, struct evhttp_request *r, const char *path,
                         const char *body, struct err *e)
{
    struct load_http *h = c->http;
    const char *prefix = evhttp_uri_get_path(h->uri);
    size_t n = prefix ? strlen(prefix) : 0;
    while (n && prefix[n - 1] == '/') n--;
    struct evbuffer *target = evbuffer_new();
    bool ok = target && evbuffer_add_printf(target, "%.*s%s", (int)n, n ? prefix : "", path) >= 0 &&
              evbuffer_add(target, "", 1) == 0 &&
              (!body || evbuffer_add(evhttp_request_get_output_buffer(r), body, strlen(body)) == 0);
    /* takes the request over, whatever it returns */
    ok = ok && evhttp_make_request(c->connection, r, body ? EVHTTP_REQ_POST : EVHTTP_REQ_GET,
                                   (const char *)evbuffer_pullup(target, -1)) == 0;
    if (target) evbuffer_free(target);
    return ok || err_set(e, ERR_IO, "%s: the request cannot be sent", h->options.url);
}

bool load_http_start(struct load_http *h, struct load_http_call *c, const char *path, const char *body,
                     struct err *e)
{
    struct bufferevent *b = h->tls ? secure(h) : NULL;
    if (h->tls && !b) return err_set(e, ERR_MEMORY, "no TLS connection");
    c->http = h;
    c->reason = NULL;
    c->connection =
        evhttp_connection_base_bufferevent_new(h->base, NULL, b, h->address, (unsigned short)h->port);
    struct evhttp_request *r = c->connection ? evhttp_request_new(finish, c) : NULL;
    if (!r) return err_set(e, ERR_MEMORY, "no connection");
    evhttp_connection_set_timeout(c->connection, TIMEOUT_SECONDS);
    evhttp_request_set_chunked_cb(r, read_bytes);
    evhttp_request_set_error_cb(r, note_fault);
    if (add_headers(h, r, body != NULL, e)) return send_request(c, r, path, body, e);
    evhttp_request_free(r);
    return false;
}

void load_http_close(struct load_http_call *c)
{
    if (c->connection) evhttp_connection_free(c->connection);
    c->connection = NULL;
}

struct whole {
    struct load_http *http;
    struct evbuffer *body;
    int status;
    const char *error;
};

static void collect(void *ctx, int status, const char *data, size_t n)
{
    struct whole *w = ctx;
    (void)status;
    if (evbuffer_get_length(w->body) + n <= ANSWER_BYTES_MAX) evbuffer_add(w->body, data, n);
}

static void end_whole(void *ctx, int status, const char *error)
{
    struct whole *w = ctx;
    w->status = status;
    w->error = error;
    event_base_loopbreak(w->http->base);
}

bool load_http_get(struct load_http *h, const char *path, int *status, char **body, struct err *e)
{
    struct whole w = { .http = h, .body = evbuffer_new() };
    struct load_http_call c = { .ctx = &w, .bytes = collect, .end = end_whole };
    *body = NULL;
    if (!w.body) return err_set(e, ERR_MEMORY, "no buffer");
    bool ok = load_http_start(h, &c, path, NULL, e);
    if (ok) {
        event_base_dispatch(h->base);
        ok = !w.error || err_set(e, ERR_IO, "%s%s: %s", h->options.url, path, w.error);
    }
    load_http_close(&c);
    size_t n = evbuffer_get_length(w.body);
    if (ok) *body = calloc(n + 1, 1);
    if (*body) evbuffer_remove(w.body, *body, n);
    evbuffer_free(w.body);
    *status = w.status;
    return ok && (*body || err_memory(e, path, n));
}
