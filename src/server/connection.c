/* One connection: requests in, one after the other, answers out. A request's phases each have a clock that
 * connection_tick looks at; bytes that the client does not read are bounded by not pumping the exchange. */
#include "base/clock.h"
#include "server/server_struct.h"
#include <event2/buffer.h>
#include <event2/bufferevent_ssl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>

enum {
    READ_AHEAD = 64 << 10,   /* of what a client sends before its turn */
    OUTPUT_MOST = 256 << 10, /* bytes not read by the client with which an exchange is not asked for more */
    OUTPUT_LOW = 64 << 10,   /* it is again */
    UNSENT_MOST = 128 << 10, /* the same inside the kernel */
    BODY_RATE = 16 << 10,    /* bytes a second, at least: a body, ... */
    SEND_RATE = 1 << 10,     /* ... an answer */
    BODY_SHARE = 16          /* all bodies together, in bodies of the largest size */
};
static const double LINGER_SECONDS = 2;

static void advance(struct connection *c);
static void on_output(struct evbuffer *buffer, const struct evbuffer_cb_info *info, void *ctx);

static size_t unread(const struct connection *c)
{
    return evbuffer_get_length(bufferevent_get_output(c->events));
}

static void enter(struct connection *c, enum phase phase)
{
    c->phase = phase;
    c->since = clock_seconds();
}

static void free_body(struct connection *c)
{
    c->server->body_bytes -= c->body_room;
    free(c->body);
    c->body = NULL;
    c->body_bytes = c->body_room = 0;
}

bool connection_is_answering(const struct connection *c)
{
    return c->job || c->exchange;
}

static void end_exchange(struct connection *c)
{
    if (!connection_is_answering(c)) return;
    if (c->job) c->job->connection = NULL; /* what comes of it is freed when it comes */
    exchange_free(c->exchange);
    c->job = NULL;
    c->exchange = NULL;
    c->server->n_exchanges--;
}

static void forget_request(struct connection *c)
{
    end_exchange(c);
    free_body(c);
    free(c->head);
    free(c->headers);
    c->head = NULL;
    c->headers = NULL;
    c->request = (struct http_request){ 0 };
    c->chunks = (struct http_chunks){ 0 };
    c->route = NULL;
    c->argument = c->origin = NULL;
    c->request_id[0] = 0;
    c->scanned = 0;
    c->refused = c->head_sent = c->streams = c->aborted = false;
    c->status = 0;
    c->sent_bytes = 0;
    c->crash_place = 0;
    c->seen_tokens = 0;
    c->seen_at = c->first_token = 0;
    c->prompt_counted = false;
}

void connection_close(struct connection *c)
{
    struct server *s = c->server;
    if (connection_is_answering(c)) account_request(c, true);
    forget_request(c);
    *(c->previous ? &c->previous->next : &s->connections) = c->next;
    if (c->next) c->next->previous = c->previous;
    *(c->is_admin ? &s->n_admin : &s->n_connections) -= 1;
    evbuffer_remove_cb(bufferevent_get_output(c->events), on_output, c);
    bufferevent_free(c->events);
    free(c);
}

bool connection_is_idle(const struct connection *c)
{
    return c->phase == PHASE_HEAD && evbuffer_get_length(bufferevent_get_input(c->events)) == 0 &&
           unread(c) == 0;
}

bool connection_is_quiet(const struct connection *c)
{
    return connection_is_idle(c) || c->phase == PHASE_LINGER;
}

/* Writing. */

static void put_date(struct evbuffer *out)
{
    char date[64];
    time_t now = time(NULL);
    struct tm tm;
    gmtime_r(&now, &tm);
    strftime(date, sizeof date, "%a, %d %b %Y %H:%M:%S GMT", &tm);
    evbuffer_add_printf(out, "Date: %s\r\n", date);
}

/* bytes < 0: in chunks, or to the connection's end for HTTP/1.0. */
static void send_head(struct connection *c, int status, const char *type, const char *extra, int64_t bytes)
{
    struct evbuffer *out = bufferevent_get_output(c->events);
    if (c->server->draining || c->refused) c->request.keep_alive = false;
    if (bytes < 0 && c->request.version == 0) c->request.keep_alive = false;
    evbuffer_add_printf(out, "HTTP/1.1 %d %s\r\n", status, http_reason(status));
    put_date(out);
    if (type) evbuffer_add_printf(out, "Content-Type: %s\r\n", type);
    if (status == 204)
        ;
    else if (bytes >= 0)
        evbuffer_add_printf(out, "Content-Length: %lld\r\n", (long long)bytes);
    else if (c->request.version == 1)
        evbuffer_add_printf(out, "Transfer-Encoding: chunked\r\n");
    if (bytes < 0) evbuffer_add_printf(out, "Cache-Control: no-cache\r\nX-Accel-Buffering: no\r\n");
    const char *session = c->exchange ? exchange_session_id(c->exchange) : NULL;
    if (c->request_id[0]) evbuffer_add_printf(out, "X-Request-Id: %s\r\n", c->request_id);
    if (session) evbuffer_add_printf(out, "X-Session-Id: %s\r\n", session);
    if (c->exchange && !c->aborted && exchange_retry_after(c->exchange))
        evbuffer_add_printf(out, "Retry-After: %d\r\n", limits_retry_after(c->server));
    answer_cors(c, out);
    if (extra) evbuffer_add_printf(out, "%s", extra);
    if (!c->request.keep_alive) evbuffer_add_printf(out, "Connection: close\r\n");
    evbuffer_add_printf(out, "\r\n");
    c->head_sent = true;
    c->status = status;
}

/* What the kernel takes at once needs no buffer, and no look at whether it may be written. */
static size_t write_now(struct connection *c, const struct iovec *pieces, int n)
{
    struct msghdr m = { .msg_iov = (struct iovec *)(uintptr_t)pieces, .msg_iovlen = (size_t)n };
    if (unread(c) > 0 || bufferevent_openssl_get_ssl(c->events)) return 0;
    ssize_t sent = sendmsg(bufferevent_getfd(c->events), &m, MSG_DONTWAIT | MSG_NOSIGNAL);
    return sent > 0 ? (size_t)sent : 0; /* a fault comes again when the rest is written */
}

static void put(struct connection *c, const struct iovec *pieces, int n)
{
    size_t sent = write_now(c, pieces, n);
    for (int i = 0; i < n; i++) {
        size_t skip = sent < pieces[i].iov_len ? sent : pieces[i].iov_len;
        sent -= skip;
        if (skip < pieces[i].iov_len)
            evbuffer_add(bufferevent_get_output(c->events), (const char *)pieces[i].iov_base + skip,
                         pieces[i].iov_len - skip);
    }
}

static void send_chunk(struct connection *c, const char *bytes, size_t n)
{
    char length[24];
    bool framed = c->request.version == 1;
    if (n == 0) return;
    struct iovec pieces[] = { { length, (size_t)snprintf(length, sizeof length, "%zx\r\n", n) },
                              { (char *)(uintptr_t)bytes, n },
                              { (char *)"\r\n", 2 } };
    put(c, pieces + !framed, framed ? 3 : 1);
    c->sent_bytes += n;
    c->heard = clock_seconds();
}

/* The answer is in the output: on to the next request, or to the end. */
static void finish(struct connection *c)
{
    bool keep = c->request.keep_alive;
    account_request(c, c->aborted);
    forget_request(c);
    c->first = false;
    enter(c, keep ? PHASE_HEAD : PHASE_FLUSH);
}

void connection_answer(struct connection *c, int status, const char *type, const char *extra,
                       const char *body, size_t bytes)
{
    send_head(c, status, type, extra, (int64_t)bytes);
    if (strcmp(c->request.method, "HEAD") != 0) {
        evbuffer_add(bufferevent_get_output(c->events), body, bytes);
        c->sent_bytes += bytes;
    }
    finish(c);
}

void connection_error(struct connection *c, int status, const char *extra, const char *message)
{
    enum api_route shape = c->route ? c->route->api : API_MODELS;
    const char *type = status == 401   ? "authentication_error"
                       : status == 403 ? "permission_error"
                       : status == 404 ? "not_found_error"
                       : status == 429 ? "rate_limit_error"
                       : status == 503 ? "overloaded_error"
                       : status >= 500 ? "api_error"
                                       : "invalid_request_error";
    char *body = api_error(shape, status, type, NULL, message);
    connection_answer(c, status, "application/json", extra, body ? body : "", body ? strlen(body) : 0);
    free(body);
}

/* A request that cannot be read on: what follows it on the connection means nothing. */
static void refuse(struct connection *c, int status, const char *message)
{
    c->refused = true;
    connection_error(c, status, status == 503 ? "Retry-After: 1\r\n" : NULL, message);
}

/* The exchange. */

static void pump_stream(struct connection *c, const char *bytes, size_t n, bool done)
{
    if (!c->head_sent)
        send_head(c, exchange_status(c->exchange), "text/event-stream; charset=utf-8", NULL, -1);
    send_chunk(c, bytes, n);
    if (!done) return;
    if (c->request.version == 1) evbuffer_add(bufferevent_get_output(c->events), "0\r\n\r\n", 5);
    finish(c);
}

static void pump(struct connection *c)
{
    size_t n = 0;
    bool done = false;
    if (c->unread_since > 0 && unread(c) > OUTPUT_MOST) return;
    exchange_among(c->exchange, c->server->n_exchanges);
    const char *bytes = exchange_pump(c->exchange, &n, &done);
    account_tokens(c, clock_seconds(), n > 0);
    if (exchange_status(c->exchange) == 0) return;
    c->streams = exchange_is_stream(c->exchange);
    if (c->streams)
        pump_stream(c, bytes, n, done);
    else if (done)
        connection_answer(c, exchange_status(c->exchange), "application/json", NULL, bytes, n);
}

void connection_pump(struct connection *c)
{
    if (!c->exchange) return;
    pump(c);
    if (!c->exchange) advance(c); /* to what was sent behind that request */
}

void connection_abort(struct connection *c, int status, const char *message)
{
    c->aborted = true;
    if (!c->head_sent) {
        c->refused = true;
        connection_error(c, status, status == 503 ? "Retry-After: 1\r\n" : NULL, message);
        return;
    }
    char *error = api_error(c->route->api, status, status == 503 ? "overloaded_error" : NULL, NULL, message);
    if (c->route->api == API_MESSAGES) send_chunk(c, "event: error\n", 13);
    send_chunk(c, "data: ", 6);
    send_chunk(c, error ? error : "{}", error ? strlen(error) : 2);
    send_chunk(c, "\n\n", 2);
    if (c->request.version == 1) evbuffer_add(bufferevent_get_output(c->events), "0\r\n\r\n", 5);
    free(error);
    account_request(c, true);
    forget_request(c);
    enter(c, PHASE_FLUSH);
}

/* What there is to read is in the job, which has the body from now on. */
static struct job *make_job(struct connection *c)
{
    struct job *job = calloc(1, sizeof *job);
    if (!job) return NULL;
    *job = (struct job){ .connection = c,
                         .api = c->server->api,
                         .route = c->route->api,
                         .argument = strdup(c->argument),
                         .body = c->body ? c->body : strdup(""),
                         .bytes = c->body_bytes,
                         .room = c->body_room,
                         .caller = c->caller };
    strcpy(job->request_id, c->request_id);
    job->caller.request_id = job->request_id;
    c->body = NULL;
    c->body_bytes = c->body_room = 0;
    return job;
}

static void dispatch(struct connection *c)
{
    c->begun = c->heard = clock_seconds();
    if (c->route->kind == ROUTE_ADMIN) {
        admin_answer(c);
        return;
    }
    if (c->route->kind != ROUTE_API) {
        answer_local(c);
        return;
    }
    struct job *job = make_job(c);
    if (!job || !job->argument || !job->body || !workers_give(c->server->workers, job)) {
        c->server->body_bytes -= job ? job->room : 0;
        job_free(job);
        connection_error(c, 503, "Retry-After: 1\r\n", "too many requests at once");
        return;
    }
    c->job = job;
    account_state(c, "preparing");
    c->server->n_exchanges++;
    enter(c, PHASE_ANSWER);
}

void connection_take(struct connection *c, struct exchange *x)
{
    char message[LIMITS_MESSAGE] = "out of memory", extra[40];
    int status = 503;
    c->job = NULL;
    c->exchange = x;
    const char *id = x ? exchange_request_id(x) : NULL;
    if (id) snprintf(c->request_id, sizeof c->request_id, "%s", id);
    if (x && limits_allow_tokens(c, &status, message)) {
        account_state(c, "prefill");
        connection_pump(c);
        return;
    }
    snprintf(extra, sizeof extra, "Retry-After: %d\r\n", limits_retry_after(c->server));
    exchange_free(x);
    c->exchange = NULL;
    c->server->n_exchanges--;
    connection_error(c, status, extra, message);
    advance(c);
}

/* Reading. */

/* Room for n bytes more and a NUL. False, and answered: all bodies together are too large. */
static bool body_reserve(struct connection *c, size_t n)
{
    size_t room = c->body_room ? c->body_room : 4096;
    while (room < c->body_bytes + n + 1) room *= 2;
    if (room == c->body_room) return true;
    size_t more = room - c->body_room;
    char *grown = NULL;
    if (c->server->body_bytes + more <= BODY_SHARE * c->server->limits.body_bytes)
        grown = realloc(c->body, room);
    if (!grown) {
        refuse(c, 503, "too many large requests at once");
        return false;
    }
    c->body = grown;
    c->body_room = room;
    c->server->body_bytes += more;
    return true;
}

static bool body_add(struct connection *c, const char *bytes, size_t n)
{
    if (n == 0) return true;
    if (!body_reserve(c, n)) return false;
    memcpy(c->body + c->body_bytes, bytes, n);
    c->body_bytes += n;
    c->body[c->body_bytes] = 0;
    return true;
}

/* Each returns whether the body is complete. */
static bool read_chunks(struct connection *c)
{
    struct evbuffer *in = bufferevent_get_input(c->events);
    for (;;) {
        struct http_fault fault = { 0 };
        struct evbuffer_iovec piece;
        const char *data;
        size_t taken, n;
        if (evbuffer_peek(in, -1, NULL, &piece, 1) < 1) return false;
        enum http_state state = http_chunks_read(&c->chunks, piece.iov_base, piece.iov_len, &taken, &data, &n,
                                                 &c->server->limits, &fault);
        if (state == HTTP_FAULT) {
            refuse(c, fault.status, fault.text);
            return false;
        }
        if (!body_add(c, data, n)) return false;
        evbuffer_drain(in, taken);
        if (state == HTTP_DONE) return true;
    }
}

static bool read_length(struct connection *c)
{
    struct evbuffer *in = bufferevent_get_input(c->events);
    size_t left = (size_t)c->request.content_length - c->body_bytes, have = evbuffer_get_length(in);
    if (have > left) have = left;
    if (have > 0 && !body_reserve(c, have)) return false;
    if (have > 0) {
        evbuffer_remove(in, c->body + c->body_bytes, have);
        c->body_bytes += have;
        c->body[c->body_bytes] = 0;
    }
    return have == left;
}

/* The head is here: who asks for what. */
static void begin(struct connection *c)
{
    bool has_body = c->request.chunked || c->request.content_length > 0;
    c->begun = clock_seconds();
    if (!(c->is_admin ? admin_admit(c) : answer_admit(c))) return;
    if (!has_body) {
        dispatch(c);
        return;
    }
    if (c->request.expects_continue && evbuffer_get_length(bufferevent_get_input(c->events)) == 0)
        evbuffer_add_printf(bufferevent_get_output(c->events), "HTTP/1.1 100 Continue\r\n\r\n");
    enter(c, PHASE_BODY);
}

/* Empty lines before a request are no part of it; RFC 9112, 2.2. */
static void skip_empty_lines(struct evbuffer *in)
{
    char two[2];
    while (evbuffer_copyout(in, two, 2) == 2 && two[0] == '\r' && two[1] == '\n') evbuffer_drain(in, 2);
}

/* Whether a whole head was there. */
static bool read_head(struct connection *c)
{
    struct evbuffer *in = bufferevent_get_input(c->events);
    const struct http_limits *l = &c->server->limits;
    struct http_fault fault = { 0 };
    if (c->scanned == 0) skip_empty_lines(in);
    size_t have = evbuffer_get_length(in), most = have < l->header_bytes ? have : l->header_bytes;
    if (have == 0) return false;
    if (c->scanned == 0) c->since = clock_seconds();
    const char *data = (const char *)evbuffer_pullup(in, (ev_ssize_t)most);
    size_t n = data ? http_head_length(data, most, &c->scanned, l, &fault) : 0;
    if (n == 0) {
        if (fault.status) refuse(c, fault.status, fault.text);
        return false;
    }
    c->head = malloc(n + 1);
    c->headers = calloc((size_t)l->headers, sizeof *c->headers);
    if (!c->head || !c->headers) {
        refuse(c, 503, "out of memory");
        return false;
    }
    evbuffer_remove(in, c->head, n);
    c->head[n] = 0;
    if (http_parse_head(&c->request, c->headers, c->head, n, l, &fault)) {
        begin(c);
    } else {
        /* half-read fields are not to be logged or trusted */
        c->request = (struct http_request){ .version = 1 };
        refuse(c, fault.status, fault.text);
    }
    return true;
}

/* As far as the bytes that are here go. */
static void advance(struct connection *c)
{
    for (;;) {
        if (c->phase == PHASE_HEAD) {
            if (unread(c) > OUTPUT_MOST) return; /* who does not read answers gets no more */
            if (!read_head(c)) break;
        } else if (c->phase == PHASE_BODY) {
            bool whole = c->request.chunked ? read_chunks(c) : read_length(c);
            if (!whole) break;
            dispatch(c);
        } else
            break;
    }
    if (c->phase == PHASE_FLUSH || c->phase == PHASE_LINGER) {
        struct evbuffer *in = bufferevent_get_input(c->events);
        evbuffer_drain(in, evbuffer_get_length(in));
    }
}

/* All is sent: the client reads it in peace when it is not reset by bytes that it still sends. */
static void linger(struct connection *c)
{
    int fd = bufferevent_getfd(c->events);
    if (fd >= 0 && !bufferevent_openssl_get_ssl(c->events)) shutdown(fd, SHUT_WR);
    enter(c, PHASE_LINGER);
}

static void on_read(struct bufferevent *events, void *ctx)
{
    (void)events;
    struct connection *c = ctx;
    advance(c);
    if (c->phase == PHASE_FLUSH && unread(c) == 0) linger(c);
}

static void on_write(struct bufferevent *events, void *ctx)
{
    (void)events;
    struct connection *c = ctx;
    if (c->phase == PHASE_ANSWER) connection_pump(c);
    if (c->phase == PHASE_HEAD) advance(c);
    if (c->phase == PHASE_FLUSH && unread(c) == 0) linger(c);
}

static void on_event(struct bufferevent *events, short what, void *ctx)
{
    (void)events;
    struct connection *c = ctx;
    if (what & BEV_EVENT_CONNECTED) return;
    bool only_reads = (what & BEV_EVENT_EOF) && (what & BEV_EVENT_READING);
    if (only_reads && !connection_is_answering(c) && unread(c) > 0 && c->phase != PHASE_BODY) {
        enter(c, PHASE_FLUSH); /* answered already; the client has said all it had to say */
        return;
    }
    if (connection_is_answering(c)) c->server->metrics.disconnects++;
    connection_close(c);
}

/* How long the client has not read, and how much it reads. */
static void on_output(struct evbuffer *buffer, const struct evbuffer_cb_info *info, void *ctx)
{
    struct connection *c = ctx;
    c->written += info->n_deleted;
    if (evbuffer_get_length(buffer) == 0)
        c->unread_since = 0;
    else if (c->unread_since == 0) {
        c->unread_since = clock_seconds();
        c->unread_mark = c->written;
    }
}

/* Over each send_seconds in which output waited all the time, so many bytes at least must have gone. */
static bool reads_too_slowly(struct connection *c, double now)
{
    double window = c->server->o.send_seconds;
    if (c->unread_since == 0 || now - c->unread_since <= window) return false;
    if ((double)(c->written - c->unread_mark) < SEND_RATE * window) return true;
    c->unread_since = now;
    c->unread_mark = c->written;
    return false;
}

/* How long the phase may last; 0: as long as it likes. */
static double allowed(const struct connection *c)
{
    const struct server_options *o = &c->server->o;
    switch (c->phase) {
    case PHASE_HEAD: return c->scanned > 0 || c->first ? o->header_seconds : o->idle_seconds;
    case PHASE_BODY: return o->body_seconds + (double)c->body_bytes / BODY_RATE;
    case PHASE_LINGER: return LINGER_SECONDS;
    default: return 0;
    }
}

/* Bytes of the client's that this loop had no time to read yet: it is not the client who is late. */
static bool has_more(const struct connection *c)
{
    int n = 0, fd = bufferevent_getfd(c->events);
    bool reads = c->phase == PHASE_HEAD || c->phase == PHASE_BODY;
    if (c->phase == PHASE_HEAD && c->scanned == 0 &&
        evbuffer_get_length(bufferevent_get_input(c->events)) > 0)
        return true;
    return reads && fd >= 0 && ioctl(fd, FIONREAD, &n) == 0 && n > 0;
}

static void time_out(struct connection *c)
{
    bool half = c->phase == PHASE_BODY || (c->phase == PHASE_HEAD && c->scanned > 0);
    if (!half) {
        connection_close(c);
        return;
    }
    c->server->metrics.timeouts++;
    if (c->phase == PHASE_HEAD) c->request = (struct http_request){ .version = 1 };
    refuse(c, 408, "the request took too long to arrive");
}

void connection_tick(struct connection *c, double now)
{
    if (c->phase == PHASE_HEAD && c->scanned == 0 && unread(c) > 0)
        c->since = now; /* it is not idle, it reads */
    double most = allowed(c);
    if (reads_too_slowly(c, now)) {
        c->server->metrics.slow_readers += c->exchange || c->phase == PHASE_FLUSH;
        connection_close(c);
        return;
    }
    if (most > 0 && now - c->since > most && !has_more(c)) {
        time_out(c);
        return;
    }
    if (limits_expired(c, now)) {
        c->server->metrics.expired++;
        connection_abort(c, 504, "the answer took longer than a request may (--request-timeout)");
        return;
    }
    if (c->exchange && c->streams && c->head_sent && now - c->heard >= c->server->o.comment_seconds &&
        unread(c) < OUTPUT_LOW) {
        size_t n = 0;
        const char *comment = exchange_comment(c->exchange, &n);
        send_chunk(c, comment, n);
        c->heard = now;
    }
}

static struct bufferevent *wrap(struct server *s, evutil_socket_t fd, bool is_admin)
{
    int options = BEV_OPT_CLOSE_ON_FREE | BEV_OPT_DEFER_CALLBACKS;
    if (!s->tls || is_admin) return bufferevent_socket_new(s->base, fd, options);
    SSL *ssl = SSL_new(s->tls);
    struct bufferevent *b =
        ssl ? bufferevent_openssl_socket_new(s->base, fd, ssl, BUFFEREVENT_SSL_ACCEPTING, options) : NULL;
    if (b)
        bufferevent_openssl_set_allow_dirty_shutdown(b, 1);
    else
        SSL_free(ssl);
    return b;
}

bool connection_open(struct server *s, evutil_socket_t fd, bool is_admin)
{
    struct connection *c = calloc(1, sizeof *c);
    struct bufferevent *events = c ? wrap(s, fd, is_admin) : NULL;
    if (!events) {
        free(c);
        return false;
    }
    int on = 1, unsent = UNSENT_MOST;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &unsent, sizeof unsent);
    *c = (struct connection){
        .server = s, .events = events, .next = s->connections, .first = true, .is_admin = is_admin
    };
    if (c->next) c->next->previous = c;
    s->connections = c;
    *(is_admin ? &s->n_admin : &s->n_connections) += 1;
    enter(c, PHASE_HEAD);
    bufferevent_setcb(events, on_read, on_write, on_event, c);
    bufferevent_setwatermark(events, EV_READ, 0, s->limits.header_bytes + READ_AHEAD);
    bufferevent_setwatermark(events, EV_WRITE, OUTPUT_LOW, 0);
    evbuffer_add_cb(bufferevent_get_output(events), on_output, c);
    bufferevent_enable(events, EV_READ | EV_WRITE);
    return true;
}
