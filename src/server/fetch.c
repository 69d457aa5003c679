#include "server/fetch.h"
#include "base/clock.h"
#include "image/data_url.h"
#include "server/http.h"
#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <netdb.h>
#include <netinet/in.h>
#include <openssl/ssl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

enum { HEAD_BYTES_MAX = 16 << 10, PATH_BYTES_MAX = 8 << 10 };

/* URLs. */

static bool wrong_url(struct err *e, const char *what)
{
    return err_set(e, ERR_ARGUMENT, "the URL has %s", what);
}

/* "127.0.0.1", and nothing that other programs also take for an address: 127.1, 0x7f000001, 2130706433. */
static bool read_host(struct fetch_url *out, const char *host, size_t n, struct err *e)
{
    struct in_addr address;
    if (n == 0 || n >= sizeof out->host) return wrong_url(e, "no host name, or a very long one");
    for (size_t i = 0; i < n; i++) {
        char c = host[i];
        if (!isalnum((unsigned char)c) && c != '.' && c != '-')
            return wrong_url(e, "a host name with other characters than letters, digits, '-' and '.'");
        out->host[i] = (char)tolower((unsigned char)c);
    }
    out->host[n] = 0;
    if (out->host[0] == '.' || out->host[n - 1] == '.' || strstr(out->host, ".."))
        return wrong_url(e, "an empty part in its host name");
    const char *dot = strrchr(out->host, '.'), *last = dot ? dot + 1 : out->host;
    out->is_address = inet_pton(AF_INET, out->host, &address) == 1;
    return out->is_address || !isdigit((unsigned char)*last) ||
           wrong_url(e, "an address that is not four decimal numbers");
}

static bool read_port(int *out, const char *text, size_t n, struct err *e)
{
    int port = 0;
    for (size_t i = 0; i < n && i < 6; i++)
        port = isdigit((unsigned char)text[i]) ? 10 * port + text[i] - '0' : 1 << 20;
    *out = port;
    return (n > 0 && n < 6 && port > 0 && port < 65536 && text[0] != '0') ||
           wrong_url(e, "a port that is none");
}

bool fetch_parse(struct fetch_url *out, const char *url, struct err *e)
{
    *out = (struct fetch_url){ 0 };
    for (const char *c = url; *c; c++)
        if (*c <= 0x20 || *c >= 0x7f || *c == '\\') return wrong_url(e, "a character that belongs in no URL");
    if (strncasecmp(url, "http://", 7) != 0 && strncasecmp(url, "https://", 8) != 0)
        return wrong_url(e, "another scheme than http or https");
    out->tls = url[4] != ':';
    const char *host = url + (out->tls ? 8 : 7);
    size_t n = strcspn(host, "/?#"), name = strcspn(host, ":");
    if (memchr(host, '@', n)) return wrong_url(e, "a user's name in it");
    if (name > n) name = n;
    out->path = host + n;
    out->path_bytes = strcspn(out->path, "#");
    out->port = out->tls ? 443 : 80;
    if (out->path_bytes > PATH_BYTES_MAX) return wrong_url(e, "a very long path");
    return read_host(out, host, name, e) &&
           (name == n || read_port(&out->port, host + name + 1, n - name - 1, e));
}

bool fetch_allows(const struct fetch_rules *r, const struct fetch_url *u, bool *by_number)
{
    char with_port[300];
    bool plain = u->port == (u->tls ? 443 : 80);
    snprintf(with_port, sizeof with_port, "%s:%d", u->host, u->port);
    *by_number = false;
    for (int i = 0; i < r->n_hosts; i++)
        if (strcasecmp(r->hosts[i], with_port) == 0) {
            *by_number = u->is_address;
            return true;
        }
    for (int i = 0; plain && i < r->n_hosts; i++)
        if (strcmp(r->hosts[i], "*") == 0 || strcasecmp(r->hosts[i], u->host) == 0) return true;
    return false;
}

/* Addresses. Source: IANA's registries of special-purpose addresses. */

static bool is_public_v4(uint32_t a)
{
    static const struct {
        uint32_t net;
        int bits;
    } special[] = {
        { 0x00000000, 8 },  { 0x0a000000, 8 },  { 0x64400000, 10 }, { 0x7f000000, 8 },  { 0xa9fe0000, 16 },
        { 0xac100000, 12 }, { 0xc0000000, 24 }, { 0xc0000200, 24 }, { 0xc0586300, 24 }, { 0xc0a80000, 16 },
        { 0xc6120000, 15 }, { 0xc6336400, 24 }, { 0xcb007100, 24 }, { 0xe0000000, 3 },
    };
    for (size_t i = 0; i < sizeof special / sizeof *special; i++)
        if (a >> (32 - special[i].bits) == special[i].net >> (32 - special[i].bits)) return false;
    return true;
}

/* Global unicast, without what leads elsewhere: 2001::/23 (Teredo, benchmarks), 2001:db8::/32, 2002::/16
 * (6to4), 3fff::/20. */
static bool is_public_v6(const uint8_t a[16])
{
    if ((a[0] & 0xe0) != 0x20) return false;
    if (a[0] == 0x20 && a[1] == 0x01 && (a[2] < 2 || (a[2] == 0x0d && a[3] == 0xb8))) return false;
    return !(a[0] == 0x20 && a[1] == 0x02) && !(a[0] == 0x3f && a[1] == 0xff && a[2] < 0x10);
}

bool fetch_is_public(const struct sockaddr *a)
{
    if (a->sa_family == AF_INET) return is_public_v4(ntohl(((const struct sockaddr_in *)a)->sin_addr.s_addr));
    return a->sa_family == AF_INET6 && is_public_v6(((const struct sockaddr_in6 *)a)->sin6_addr.s6_addr);
}

/* The connection. */

struct peer {
    int fd;
    SSL_CTX *context;
    SSL *ssl; /* NULL: without TLS */
    double until;
};

static bool failed(struct err *e, const char *what)
{
    return err_set(e, ERR_FORMAT, "%s", what);
}

static bool await(const struct peer *p, short events, struct err *e)
{
    double left = p->until - clock_seconds();
    struct pollfd f = { .fd = p->fd, .events = events };
    if (left > 0 && poll(&f, 1, (int)(left * 1000) + 1) > 0) return true;
    return failed(e, "it took too long");
}

/* A name is looked up beside the one who asks: getaddrinfo cannot be told to end, so it is left to itself
 * when the time is over. Whoever is the last to need the lookup frees it. */
struct lookup {
    pthread_mutex_t lock;
    pthread_cond_t news;
    int holders;
    bool done;
    int fault; /* of getaddrinfo */
    struct addrinfo *found;
    struct addrinfo hints;
    char host[sizeof((struct fetch_url *)NULL)->host], port[8];
};

/* Of a process, in which some may have been left. */
enum { LOOKUPS_MAX = 16 };
static atomic_int lookups;

static void let_go(struct lookup *l)
{
    pthread_mutex_lock(&l->lock);
    bool last = --l->holders == 0;
    pthread_mutex_unlock(&l->lock);
    if (!last) return;
    if (l->found) freeaddrinfo(l->found);
    pthread_cond_destroy(&l->news);
    pthread_mutex_destroy(&l->lock);
    free(l);
    atomic_fetch_sub(&lookups, 1);
}

static void *do_lookup(void *ctx)
{
    struct lookup *l = ctx;
    struct addrinfo *found = NULL;
    int fault = getaddrinfo(l->host, l->port, &l->hints, &found);
    pthread_mutex_lock(&l->lock);
    l->fault = fault;
    l->found = fault ? NULL : found;
    l->done = true;
    pthread_cond_signal(&l->news);
    pthread_mutex_unlock(&l->lock);
    let_go(l);
    return NULL;
}

static bool start_lookup(struct lookup **out, const struct fetch_url *u, struct err *e)
{
    pthread_condattr_t clock;
    pthread_t thread;
    if (atomic_fetch_add(&lookups, 1) >= LOOKUPS_MAX) {
        atomic_fetch_sub(&lookups, 1);
        return err_set(e, ERR_BUSY, "%d other names are being looked up", LOOKUPS_MAX);
    }
    struct lookup *l = *out = calloc(1, sizeof *l);
    if (!l) {
        atomic_fetch_sub(&lookups, 1);
        return err_memory(e, "a lookup", sizeof *l);
    }
    *l = (struct lookup){ .holders = 2, .hints = { .ai_socktype = SOCK_STREAM } };
    if (u->is_address) l->hints.ai_flags = AI_NUMERICHOST;
    strcpy(l->host, u->host);
    snprintf(l->port, sizeof l->port, "%d", u->port);
    pthread_mutex_init(&l->lock, NULL);
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&l->news, &clock);
    pthread_condattr_destroy(&clock);
    if (pthread_create(&thread, NULL, do_lookup, l) == 0) {
        pthread_detach(thread);
        return true;
    }
    l->holders = 1;
    let_go(l);
    return err_set(e, ERR_BUSY, "no thread can be started");
}

/* *out is the lookup's. */
static bool await_lookup(const struct addrinfo **out, struct lookup *l, double until, struct err *e)
{
    const struct timespec end = { (time_t)until, (long)(1e9 * (until - floor(until))) };
    int fault = 0;
    pthread_mutex_lock(&l->lock);
    while (!l->done && fault == 0) fault = pthread_cond_timedwait(&l->news, &l->lock, &end);
    bool done = l->done;
    *out = done ? l->found : NULL;
    pthread_mutex_unlock(&l->lock);
    return done ? l->fault == 0 || failed(e, "there is no such host") : failed(e, "it took too long");
}

static bool judge(const struct addrinfo *all, bool by_number, struct err *e)
{
    for (const struct addrinfo *a = all; a; a = a->ai_next)
        if (!by_number && !fetch_is_public(a->ai_addr))
            return err_set(e, ERR_ARGUMENT, "its address is not a public one");
    return true;
}

static bool connect_to(struct peer *p, const struct addrinfo *a, struct err *e)
{
    int fault = 0;
    socklen_t n = sizeof fault;
    p->fd = socket(a->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (p->fd < 0) return failed(e, "no connection can be made");
    if (connect(p->fd, a->ai_addr, a->ai_addrlen) != 0 && errno != EINPROGRESS)
        return failed(e, "no connection");
    return await(p, POLLOUT, e) &&
           ((getsockopt(p->fd, SOL_SOCKET, SO_ERROR, &fault, &n) == 0 && fault == 0) ||
            failed(e, "no connection"));
}

/* What SSL_... returned: whether to call it again. */
static bool again(const struct peer *p, int result, struct err *e)
{
    int why = SSL_get_error(p->ssl, result);
    if (why == SSL_ERROR_WANT_READ) return await(p, POLLIN, e);
    if (why == SSL_ERROR_WANT_WRITE) return await(p, POLLOUT, e);
    return failed(e, SSL_get_verify_result(p->ssl) != X509_V_OK ? "its certificate is not one that is trusted"
                                                                : "TLS failed");
}

static bool start_tls(struct peer *p, const struct fetch_url *u, struct err *e)
{
    int n = 0;
    p->context = SSL_CTX_new(TLS_client_method());
    if (!p->context || !SSL_CTX_set_min_proto_version(p->context, TLS1_2_VERSION) ||
        !SSL_CTX_set_default_verify_paths(p->context))
        return failed(e, "TLS cannot be set up");
    SSL_CTX_set_verify(p->context, SSL_VERIFY_PEER, NULL);
    p->ssl = SSL_new(p->context);
    if (!p->ssl || !SSL_set_fd(p->ssl, p->fd) ||
        (!u->is_address && !SSL_set_tlsext_host_name(p->ssl, u->host)) ||
        !(u->is_address ? X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(p->ssl), u->host)
                        : SSL_set1_host(p->ssl, u->host)))
        return failed(e, "TLS cannot be set up");
    while ((n = SSL_connect(p->ssl)) != 1)
        if (!again(p, n, e)) return false;
    return true;
}

static void hang_up(struct peer *p)
{
    SSL_free(p->ssl);
    SSL_CTX_free(p->context);
    if (p->fd >= 0) close(p->fd);
    *p = (struct peer){ .fd = -1, .until = p->until };
}

static bool send_all(struct peer *p, const char *text, size_t n, struct err *e)
{
    while (n > 0) {
        ssize_t sent = p->ssl ? SSL_write(p->ssl, text, (int)n) : send(p->fd, text, n, MSG_NOSIGNAL);
        bool goes_on = sent > 0          ? true
                       : p->ssl          ? again(p, (int)sent, e)
                       : errno == EAGAIN ? await(p, POLLOUT, e)
                                         : failed(e, "the connection broke");
        if (!goes_on) return false;
        text += sent > 0 ? sent : 0;
        n -= sent > 0 ? (size_t)sent : 0;
    }
    return true;
}

/* Up to n bytes; *got 0: the end. */
static bool receive(struct peer *p, char *out, size_t n, size_t *got, struct err *e)
{
    for (;;) {
        ssize_t k = p->ssl ? SSL_read(p->ssl, out, (int)n) : recv(p->fd, out, n, 0);
        *got = k > 0 ? (size_t)k : 0;
        if (k > 0) return true;
        if (p->ssl && SSL_get_error(p->ssl, (int)k) == SSL_ERROR_ZERO_RETURN) return true;
        if (p->ssl) {
            if (!again(p, (int)k, e)) return false;
        } else if (k == 0) {
            return true;
        } else if (errno != EAGAIN) {
            return failed(e, "the connection broke");
        } else if (!await(p, POLLIN, e)) {
            return false;
        }
    }
}

/* The answer. */

struct fetched {
    char *data;
    size_t n, room, body; /* body: where it begins; 0: the head is not complete */
    bool chunked, has_length;
    uint64_t length;
};

static bool too_large(size_t most, struct err *e)
{
    return err_set(e, ERR_LIMIT, "it has more than %.1f MB", (double)most / 1e6);
}

/* "name: value" of the head, into value; absent: false. */
static bool header(const struct fetched *r, const char *name, char *value, size_t size)
{
    const char *at = r->data, *end = r->data + r->body;
    size_t n = strlen(name);
    while ((at = memchr(at, '\n', (size_t)(end - at))) && (size_t)(end - ++at) > n) {
        if (strncasecmp(at, name, n) != 0 || at[n] != ':') continue;
        const char *from = at + n + 1;
        while (*from == ' ' || *from == '\t') from++;
        size_t bytes = strcspn(from, "\r\n");
        if (bytes >= size) return false;
        memcpy(value, from, bytes);
        value[bytes] = 0;
        return true;
    }
    return false;
}

static bool read_head(struct fetched *r, size_t most, struct err *e)
{
    char value[64];
    const char *end = memmem(r->data, r->n, "\r\n\r\n", 4);
    if (!end) return r->n <= HEAD_BYTES_MAX || failed(e, "what it answers has no end of headers");
    r->body = (size_t)(end - r->data) + 4;
    if (r->n < 12 || strncmp(r->data, "HTTP/1.", 7) != 0) return failed(e, "what it answers is not HTTP");
    if (strncmp(r->data + 8, " 200", 4) != 0) {
        int status = atoi(r->data + 9);
        return err_set(e, ERR_FORMAT, "it answers %d%s", status,
                       status / 100 == 3 ? ", and redirects are not followed" : "");
    }
    if (header(r, "transfer-encoding", value, sizeof value)) {
        r->chunked = strcasecmp(value, "chunked") == 0;
        return r->chunked || failed(e, "it answers in an unknown transfer coding");
    }
    if (header(r, "content-encoding", value, sizeof value) && strcasecmp(value, "identity") != 0)
        return failed(e, "it answers compressed");
    if (!header(r, "content-length", value, sizeof value)) return true;
    char *last;
    r->has_length = isdigit((unsigned char)*value);
    r->length = strtoull(value, &last, 10);
    if (!r->has_length || *last) return failed(e, "it answers with a length that is none");
    return r->length <= most || too_large(most, e);
}

/* Chunks to what they hold, in place. */
static bool join_chunks(struct fetched *r, size_t most, struct err *e)
{
    struct http_chunks c = { 0 };
    const struct http_limits limits = { .header_bytes = HEAD_BYTES_MAX, .body_bytes = most };
    struct http_fault fault = { 0 };
    size_t at = r->body, to = r->body, taken, n;
    const char *part;
    enum http_state state = HTTP_NEEDS_MORE;
    while (state == HTTP_NEEDS_MORE && at < r->n) {
        state = http_chunks_read(&c, r->data + at, r->n - at, &taken, &part, &n, &limits, &fault);
        if (n) memmove(r->data + to, part, n);
        to += n;
        at += taken;
        if (taken == 0) break;
    }
    r->n = to;
    return state == HTTP_DONE || failed(e, "what it answers ends early");
}

static bool read_reply(struct fetched *r, struct peer *p, size_t most, struct err *e)
{
    size_t got, limit = most + most / 8 + 2 * HEAD_BYTES_MAX; /* chunks have sizes of their own */
    for (;;) {
        if (r->room - r->n < 64 << 10) {
            char *grown = realloc(r->data, r->room = 2 * r->room + (128 << 10));
            if (!grown) return err_memory(e, "an image", r->room);
            r->data = grown;
        }
        if (!receive(p, r->data + r->n, 64 << 10, &got, e)) return false;
        r->n += got;
        if (r->body == 0 && !read_head(r, most, e)) return false;
        if (r->n > limit) return too_large(most, e);
        if (got == 0 || (r->has_length && r->body && r->n - r->body >= r->length)) break;
    }
    if (r->body == 0) return failed(e, "what it answers ends early");
    if (r->chunked) return join_chunks(r, most, e);
    if (r->has_length && r->n - r->body != r->length)
        return failed(e, "what it answers has another length than it says");
    return r->n - r->body <= most || too_large(most, e);
}

static bool ask(struct fetched *r, struct peer *p, const struct fetch_url *u, size_t most, struct err *e)
{
    size_t room = u->path_bytes + sizeof u->host + 200;
    char *text = malloc(room), port[8] = "";
    if (!text) return err_memory(e, "a request", room);
    if (u->port != (u->tls ? 443 : 80)) snprintf(port, sizeof port, ":%d", u->port);
    int n = snprintf(text, room,
                     "GET %s%.*s HTTP/1.1\r\nHost: %s%s\r\nAccept: image/*\r\nAccept-Encoding: identity\r\n"
                     "User-Agent: quench\r\nConnection: close\r\n\r\n",
                     u->path_bytes && *u->path == '/' ? "" : "/", (int)u->path_bytes, u->path, u->host, port);
    bool ok = send_all(p, text, (size_t)n, e) && read_reply(r, p, most, e);
    free(text);
    return ok;
}

static bool to_data_url(char **out, size_t *bytes, const struct fetched *r, struct err *e)
{
    *bytes = r->n - r->body;
    return data_url_encode(out, (const uint8_t *)r->data + r->body, *bytes, e);
}

static bool fetch_from(char **out, size_t *bytes, const struct fetch_url *u, const struct addrinfo *all,
                       size_t most, double until, struct err *e)
{
    struct peer p = { .fd = -1, .until = until };
    struct fetched r = { 0 };
    bool connected = false;
    for (const struct addrinfo *a = all; a && !connected && clock_seconds() < until; a = a->ai_next) {
        hang_up(&p);
        connected = connect_to(&p, a, e);
    }
    if (!connected && clock_seconds() >= until) failed(e, "it took too long");
    bool ok = connected && (!u->tls || start_tls(&p, u, e)) && ask(&r, &p, u, most, e) &&
              to_data_url(out, bytes, &r, e);
    hang_up(&p);
    free(r.data);
    return ok;
}

static bool fetch(char **out, size_t *bytes, const struct fetch_url *u, bool by_number, size_t most,
                  double until, struct err *e)
{
    struct lookup *l = NULL;
    const struct addrinfo *all = NULL;
    if (!start_lookup(&l, u, e)) return false;
    bool ok = await_lookup(&all, l, until, e) && judge(all, by_number, e) &&
              fetch_from(out, bytes, u, all, most, until, e);
    let_go(l);
    return ok;
}

bool fetch_data_url(char **out, size_t *bytes, const struct fetch_rules *r, const char *url, size_t bytes_max,
                    double until, struct err *e)
{
    struct fetch_url u;
    bool by_number;
    *out = NULL;
    if (!fetch_parse(&u, url, e)) return false;
    if (!fetch_allows(r, &u, &by_number))
        return err_set(e, ERR_ARGUMENT, "%s, port %d, is not one of the hosts that images are fetched from",
                       u.host, u.port);
    return fetch(out, bytes, &u, by_number, bytes_max, until, e) || err_note(e, "%s", u.host);
}
