/* The loop's life: bind, listen, signals, drain, end. One thread, libevent underneath; other threads reach it
 * by activating its events only. */
#include "server/server.h"
#include "base/clock.h"
#include "server/crash.h"
#include "server/server_struct.h"
#include <errno.h>
#include <event2/thread.h>
#include <math.h>
#include <netdb.h>
#include <openssl/rand.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <unistd.h>

static const struct timeval TICK = { 0, 250000 };
enum { BACKLOG = 1024, SPARE_DESCRIPTORS = 64 };
/* Once nothing runs any more, requests that are half here are still waited for so long, and those that are on
 * their way, in the kernel's queue of connections say, so long. */
static const double LAST_SECONDS = 1, QUIET_SECONDS = 0.1;
/* Between two looks at the scheduler's news while nobody waits for a first token: where steps are shorter,
 * several of them make one wake-up. */
static const double LOOK_SECONDS = 1e-3;

static void say(struct server *s, const char *text)
{
    if (s->o.note) s->o.note(s->o.ctx, text);
}

/* Connections. */

static bool drop_an_idle_one(struct server *s)
{
    struct connection *oldest = NULL;
    for (struct connection *c = s->connections; c; c = c->next)
        if (connection_is_idle(c) && !c->first && !c->is_admin && (!oldest || c->since < oldest->since))
            oldest = c;
    if (oldest) connection_close(oldest);
    return oldest;
}

/* A few bytes into a fresh socket's buffer never block. */
static void turn_away(struct server *s, evutil_socket_t fd)
{
    static const char answer[] = "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nRetry-After: "
                                 "1\r\nConnection: close\r\n\r\n";
    s->metrics.refused_connections++;
    if (!s->tls) (void)!write(fd, answer, sizeof answer - 1);
    close(fd);
}

static void on_accept(struct evconnlistener *l, evutil_socket_t fd, struct sockaddr *from, int length,
                      void *ctx)
{
    (void)l, (void)from, (void)length;
    struct server *s = ctx;
    if (s->n_connections >= s->o.max_connections && !drop_an_idle_one(s)) {
        turn_away(s, fd);
        return;
    }
    s->metrics.accepted_connections++;
    if (!connection_open(s, fd, false)) close(fd);
}

/* Out of descriptors, say: the listener would be called again at once, and for nothing. */
static void on_accept_error(struct evconnlistener *l, void *ctx)
{
    struct server *s = ctx;
    static const struct timeval later = { 0, 200000 };
    evconnlistener_disable(l);
    drop_an_idle_one(s);
    event_add(s->relisten, &later);
}

static void on_relisten(evutil_socket_t fd, short what, void *ctx)
{
    (void)fd, (void)what;
    struct server *s = ctx;
    if (s->listener) evconnlistener_enable(s->listener);
    if (s->admin) evconnlistener_enable(s->admin);
}

/* The end. */

static void abort_all(struct server *s)
{
    for (struct connection *c = s->connections; c; c = c->next)
        if (connection_is_answering(c)) {
            s->clean = false;
            connection_abort(c, 503, "the server is shutting down");
        }
}

static bool all_quiet(const struct server *s)
{
    for (const struct connection *c = s->connections; c; c = c->next)
        if (!connection_is_quiet(c)) return false;
    return true;
}

static void check_drain(struct server *s, double now)
{
    double most = s->o.shutdown_seconds > 0 ? s->o.shutdown_seconds : 0;
    if (s->n_exchanges > 0 && (s->stopping || now - s->drain_since > most)) abort_all(s);
    if (s->n_exchanges > 0) return;
    if (s->answered_since == 0) s->answered_since = now;
    double since = now - s->answered_since;
    if (since > LAST_SECONDS || (all_quiet(s) && (s->stopping || since > QUIET_SECONDS)))
        event_base_loopbreak(s->base);
}

static void drain(struct server *s)
{
    if (!s->draining && !s->stopping) {
        char text[160];
        s->drain_since = clock_seconds();
        snprintf(text, sizeof text,
                 "draining: %lld requests have up to %g seconds; a second signal stops at once",
                 (long long)s->n_exchanges, s->o.shutdown_seconds > 0 ? s->o.shutdown_seconds : 0);
        say(s, text);
    } else
        s->stopping = true;
    s->draining = true;
    check_drain(s, clock_seconds());
}

static void on_stop(evutil_socket_t fd, short what, void *ctx)
{
    (void)fd, (void)what;
    struct server *s = ctx;
    s->draining = s->stopping = true;
    check_drain(s, clock_seconds());
}

bool server_reload(struct server *s, struct err *e)
{
    struct keys keys;
    SSL_CTX *tls;
    if (!keys_load(&keys, "--api-key", s->o.keys, s->o.n_keys, s->o.key_file, e)) return false;
    keys_free(&s->keys);
    s->keys = keys;
    if (!tls_load(&tls, &s->o.tls, e)) return false;
    SSL_CTX_free(s->tls);
    s->tls = tls;
    return !s->log || request_log_reopen(s->log, e);
}

static void on_signal(evutil_socket_t number, short what, void *ctx)
{
    (void)what;
    struct server *s = ctx;
    if (number == SIGHUP) {
        struct err e = { 0 };
        bool ok = server_reload(s, &e) || err_note(&e, "SIGHUP: not reloaded, the old ones stay");
        say(s, ok ? "SIGHUP: keys, certificates and log read again" : e.text);
        return;
    }
    if (!s->api && s->o.quit) s->o.quit(s->o.ctx);
    drain(s);
}

/* News. */

static void pump_all(struct server *s)
{
    double due = INFINITY, now = clock_seconds(), look = now + 1; /* without exchanges nobody waits */
    if (!s->scheduler) return;
    scheduler_stats(s->scheduler, &s->stats);
    metrics_take_steps(&s->metrics, &s->stats);
    for (struct connection *c = s->connections, *next; c; c = next) {
        next = c->next;
        connection_pump(c);
        if (!c->exchange) continue;
        double at = exchange_due(c->exchange);
        if (at > 0) due = fmin(due, at);
        look = fmin(look, exchange_look(c->exchange));
    }
    now = clock_seconds();
    atomic_store(&s->look_at, look > 0 ? fmax(look, now + LOOK_SECONDS) : 0);
    if (due < INFINITY && !event_pending(s->due, EV_TIMEOUT, NULL)) {
        struct timeval after = { 0, due > now ? (suseconds_t)(1e6 * (due - now)) : 0 };
        event_add(s->due, &after);
    }
    if (s->draining) check_drain(s, now);
}

/* What comes after wake_is_set is cleared sets the timer again. */
static void on_wake(evutil_socket_t fd, short what, void *ctx)
{
    (void)what;
    struct server *s = ctx;
    uint64_t times;
    (void)!read(fd, &times, sizeof times);
    atomic_store(&s->wake_is_set, false);
    pump_all(s);
}

static void on_due(evutil_socket_t fd, short what, void *ctx)
{
    (void)fd, (void)what;
    pump_all(ctx);
}

/* The timer may be set for later than a first token awaited from now on: the next news sets it again. */
static void on_made(evutil_socket_t fd, short what, void *ctx)
{
    (void)fd, (void)what;
    struct server *s = ctx;
    for (struct job *job; (job = workers_take(s->workers)); job_free(job)) {
        s->body_bytes -= job->room;
        if (!job->connection) continue;
        struct exchange *x = job->exchange;
        job->exchange = NULL;
        atomic_store(&s->look_at, 0);
        atomic_store(&s->wake_is_set, false);
        connection_take(job->connection, x);
    }
    if (s->draining) check_drain(s, clock_seconds());
}

static void wake_made(void *server)
{
    event_active(((struct server *)server)->made, EV_READ, 0);
}

static void on_tick(evutil_socket_t fd, short what, void *ctx)
{
    (void)fd, (void)what;
    struct server *s = ctx;
    double now = clock_seconds();
    for (struct connection *c = s->connections, *next; c; c = next) {
        next = c->next;
        connection_tick(c, now);
    }
    if (s->draining) check_drain(s, now);
}

static void on_attach(evutil_socket_t fd, short what, void *ctx)
{
    (void)fd, (void)what;
    struct server *s = ctx;
    s->scheduler = s->pending_scheduler;
    s->api = s->pending_api;
    scheduler_stats(s->scheduler, &s->stats);
}

void server_wake(void *server, bool ended)
{
    struct server *s = server;
    if (atomic_exchange(&s->wake_is_set, true) && !ended) return;
    double at = fmax(ended ? 0 : atomic_load(&s->look_at), 1e-6); /* zero would stop the timer */
    double seconds = floor(at);
    struct itimerspec when = { .it_value = { (time_t)seconds, (long)(1e9 * (at - seconds)) } };
    timerfd_settime(s->wake_timer, TFD_TIMER_ABSTIME, &when, NULL);
}

void server_attach(struct server *s, struct api *api, struct scheduler *scheduler)
{
    s->pending_api = api;
    s->pending_scheduler = scheduler;
    event_active(s->attach, EV_READ, 0);
}

void server_stop(struct server *s)
{
    event_active(s->stop, EV_READ, 0);
}

void server_loading(struct server *s, const char *what, uint64_t done, uint64_t total)
{
    atomic_store(&s->loading, what);
    atomic_store(&s->loading_done, done);
    atomic_store(&s->loading_total, total);
}

const char *server_address(const struct server *s)
{
    return s->address;
}

const char *server_admin_address(const struct server *s)
{
    return s->admin_address;
}

/* The beginning. */

static bool is_loopback(const struct sockaddr *a)
{
    if (a->sa_family == AF_INET) {
        const struct sockaddr_in *in = (const struct sockaddr_in *)a;
        return (ntohl(in->sin_addr.s_addr) >> 24) == 127;
    }
    const struct sockaddr_in6 *in6 = (const struct sockaddr_in6 *)a;
    return a->sa_family == AF_INET6 && IN6_IS_ADDR_LOOPBACK(&in6->sin6_addr);
}

static bool check_open(const struct server *s, const struct sockaddr *a, struct err *e)
{
    if (is_loopback(a) || s->keys.n > 0 || s->o.tls.client_ca || s->o.open_bind) return true;
    return err_set(e, ERR_ARGUMENT,
                   "--host %s lets other machines connect, and no key is asked for: give --api-key or "
                   "--api-key-file, or --allow-open-bind if anyone may use this server",
                   s->o.host);
}

bool server_listen(struct evconnlistener **out, struct server *s, evconnlistener_cb accepts,
                   const struct sockaddr *a, socklen_t length, struct err *e)
{
    *out = evconnlistener_new_bind(s->base, accepts, s,
                                   LEV_OPT_REUSEABLE | LEV_OPT_CLOSE_ON_FREE | LEV_OPT_CLOSE_ON_EXEC, BACKLOG,
                                   a, (int)length);
    if (!*out) return err_errno(e, "listening");
    evconnlistener_set_error_cb(*out, on_accept_error);
    return true;
}

/* As a URL, with the port that was given. */
static bool name_address(struct server *s, struct err *e)
{
    struct sockaddr_storage a;
    socklen_t n = sizeof a;
    char host[128], port[16];
    if (getsockname(evconnlistener_get_fd(s->listener), (struct sockaddr *)&a, &n) != 0)
        return err_errno(e, "getsockname");
    int fault = getnameinfo((struct sockaddr *)&a, n, host, sizeof host, port, sizeof port,
                            NI_NUMERICHOST | NI_NUMERICSERV);
    if (fault) return err_set(e, ERR_IO, "getnameinfo: %s", gai_strerror(fault));
    bool six = strchr(host, ':');
    snprintf(s->address, sizeof s->address, "%s://%s%s%s:%s", s->tls ? "https" : "http", six ? "[" : "", host,
             six ? "]" : "", port);
    return true;
}

static bool listen_tcp(struct server *s, struct err *e)
{
    struct addrinfo hints = { .ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE | AI_NUMERICSERV }, *found;
    char port[16];
    if (!s->o.host) s->o.host = "127.0.0.1";
    snprintf(port, sizeof port, "%d", s->o.port);
    int fault = getaddrinfo(s->o.host, port, &hints, &found);
    if (fault) return err_set(e, ERR_ARGUMENT, "--host %s: %s", s->o.host, gai_strerror(fault));
    bool ok = check_open(s, found->ai_addr, e) &&
              (server_listen(&s->listener, s, on_accept, found->ai_addr, found->ai_addrlen, e) ||
               err_note(e, "%s port %d", s->o.host, s->o.port)) &&
              name_address(s, e);
    freeaddrinfo(found);
    return ok;
}

/* A socket's file that nobody listens at any more is in the way of the next. */
static void remove_stale_socket(const struct sockaddr_un *a)
{
    struct stat st;
    if (lstat(a->sun_path, &st) != 0 || !S_ISSOCK(st.st_mode)) return;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    bool answers = fd >= 0 && connect(fd, (const struct sockaddr *)a, sizeof *a) == 0;
    bool stale = fd >= 0 && !answers && errno == ECONNREFUSED;
    if (fd >= 0) close(fd);
    if (stale) unlink(a->sun_path);
}

bool server_listen_unix(struct evconnlistener **out, struct server *s, evconnlistener_cb accepts,
                        const char *path, const char *flag, struct err *e)
{
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    if (strlen(path) >= sizeof a.sun_path)
        return err_set(e, ERR_ARGUMENT, "%s: a path of at most %zu bytes is needed", flag,
                       sizeof a.sun_path - 1);
    strcpy(a.sun_path, path);
    remove_stale_socket(&a);
    return server_listen(out, s, accepts, (struct sockaddr *)&a, sizeof a, e) ||
           err_note(e, "%s %s", flag, path);
}

static bool listen_unix(struct server *s, struct err *e)
{
    snprintf(s->address, sizeof s->address, "unix:%s", s->o.uds);
    return server_listen_unix(&s->listener, s, on_accept, s->o.uds, "--uds", e);
}

static void set_defaults(struct server *s)
{
    struct server_options *o = &s->o;
    if (!o->max_header_bytes) o->max_header_bytes = 64 << 10;
    if (!o->max_headers) o->max_headers = 100;
    if (!o->max_body_bytes) o->max_body_bytes = 64 << 20;
    if (!o->max_connections) o->max_connections = 4096;
    if (o->header_seconds <= 0) o->header_seconds = 10;
    if (o->body_seconds <= 0) o->body_seconds = 30;
    if (o->idle_seconds <= 0) o->idle_seconds = 60;
    if (o->send_seconds <= 0) o->send_seconds = 30;
    if (o->comment_seconds <= 0) o->comment_seconds = 10;
    if (o->stall_seconds <= 0) o->stall_seconds = 60;
    if (o->shutdown_seconds == 0) o->shutdown_seconds = 30;
    s->limits = (struct http_limits){ o->max_header_bytes, o->max_headers, o->max_body_bytes };
}

/* Each connection is a descriptor; the rest is for files. */
static void raise_descriptors(struct server *s)
{
    struct rlimit l;
    rlim_t want = (rlim_t)s->o.max_connections + SPARE_DESCRIPTORS;
    if (getrlimit(RLIMIT_NOFILE, &l) != 0) return;
    if (l.rlim_cur < want) {
        l.rlim_cur = l.rlim_max == RLIM_INFINITY || want < l.rlim_max ? want : l.rlim_max;
        setrlimit(RLIMIT_NOFILE, &l);
    }
    if (l.rlim_cur < want)
        s->o.max_connections = l.rlim_cur > SPARE_DESCRIPTORS ? (int)(l.rlim_cur - SPARE_DESCRIPTORS) : 1;
}

static bool make_events(struct server *s, struct err *e)
{
    static const int numbers[] = { SIGTERM, SIGINT, SIGHUP };
    if (evthread_use_pthreads() != 0 || !(s->base = event_base_new())) return err_memory(e, "libevent", 0);
    s->wake_timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (s->wake_timer < 0) return err_errno(e, "a timer");
    s->wake = event_new(s->base, s->wake_timer, EV_READ | EV_PERSIST, on_wake, s);
    s->due = event_new(s->base, -1, 0, on_due, s);
    s->made = event_new(s->base, -1, EV_PERSIST, on_made, s);
    s->attach = event_new(s->base, -1, EV_PERSIST, on_attach, s);
    s->stop = event_new(s->base, -1, EV_PERSIST, on_stop, s);
    s->tick = event_new(s->base, -1, EV_PERSIST, on_tick, s);
    s->relisten = event_new(s->base, -1, 0, on_relisten, s);
    bool ok = s->wake && s->due && s->made && s->attach && s->stop && s->tick && s->relisten &&
              event_add(s->wake, NULL) == 0 && event_add(s->tick, &TICK) == 0;
    for (int i = 0; i < 3; i++) {
        s->signals[i] = evsignal_new(s->base, numbers[i], on_signal, s);
        ok = ok && s->signals[i] && event_add(s->signals[i], NULL) == 0;
    }
    signal(SIGPIPE, SIG_IGN);
    return ok || err_memory(e, "libevent", 0);
}

static void *run(void *ctx)
{
    struct server *s = ctx;
    crash_own_stack();
    event_base_loop(s->base, EVLOOP_NO_EXIT_ON_EMPTY);
    while (s->connections) connection_close(s->connections);
    workers_free(s->workers);
    s->workers = NULL;
    event_base_loop(s->base, EVLOOP_NONBLOCK); /* closed descriptors are given back in the loop */
    for (int i = 0; i < 3; i++) {
        event_free(s->signals[i]); /* from now on a signal ends the program */
        s->signals[i] = NULL;
    }
    return NULL;
}

/* Answers without a request id of the client's get one that no other process gives. */
static void make_id_prefix(struct server *s)
{
    unsigned char bytes[8] = { 0 };
    RAND_bytes(bytes, sizeof bytes);
    for (int i = 0; i < 8; i++) snprintf(s->id_prefix + 2 * i, 3, "%02x", bytes[i]);
}

static void name_routes(struct server *s)
{
    for (int i = 0; i < ROUTES_MAX; i++)
        s->routes[i] =
            route_at(i) ? (struct metrics_route){ .path = route_at(i)->path, .method = route_at(i)->method }
                        : (struct metrics_route){ .path = "", .method = "" };
    s->routes[ROUTES_MAX] = (struct metrics_route){ .path = "other", .method = "other" };
}

static bool start(struct server *s, struct err *e)
{
    if (!keys_load(&s->keys, "--api-key", s->o.keys, s->o.n_keys, s->o.key_file, e) ||
        !tls_load(&s->tls, &s->o.tls, e) ||
        (s->o.request_log && !request_log_open(&s->log, s->o.request_log, e)) || !make_events(s, e) ||
        !workers_create(&s->workers, WORKERS, wake_made, s, e) ||
        !(s->o.uds ? listen_unix(s, e) : listen_tcp(s, e)) || !admin_listen(s, e))
        return false;
    int fault = pthread_create(&s->thread, NULL, run, s);
    s->thread_runs = fault == 0;
    return fault == 0 || err_set(e, ERR_IO, "starting a thread: %s", strerror(fault));
}

bool server_start(struct server **out, const struct server_options *o, struct err *e)
{
    struct server *s = calloc(1, sizeof *s);
    *out = NULL;
    if (!s) return err_memory(e, "server", sizeof *s);
    s->o = *o;
    s->clean = true;
    s->wake_timer = -1;
    set_defaults(s);
    raise_descriptors(s);
    make_id_prefix(s);
    name_routes(s);
    metrics_init(&s->metrics);
    if (start(s, e)) {
        *out = s;
        return true;
    }
    server_free(s);
    return false;
}

bool server_wait(struct server *s)
{
    if (s->thread_runs) pthread_join(s->thread, NULL);
    s->thread_runs = false;
    return s->clean;
}

static void free_event(struct event *e)
{
    if (e) event_free(e);
}

void server_free(struct server *s)
{
    if (!s) return;
    if (s->thread_runs) {
        server_stop(s);
        server_wait(s);
    }
    if (s->listener) {
        evconnlistener_free(s->listener);
        if (s->o.uds) unlink(s->o.uds);
    }
    if (s->admin) {
        evconnlistener_free(s->admin);
        if (strncmp(s->admin_address, "unix:", 5) == 0) unlink(s->o.admin);
    }
    workers_free(s->workers);
    free_event(s->wake);
    free_event(s->due);
    free_event(s->made);
    free_event(s->attach);
    free_event(s->stop);
    free_event(s->tick);
    free_event(s->relisten);
    for (int i = 0; i < 3; i++) free_event(s->signals[i]);
    if (s->base) event_base_free(s->base);
    if (s->wake_timer >= 0) close(s->wake_timer);
    SSL_CTX_free(s->tls);
    keys_free(&s->keys);
    keys_free(&s->admin_keys);
    request_log_close(s->log);
    free(s);
}
