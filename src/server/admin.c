/* What only the operator may ask: a listener of its own with a key of its own, in the same loop. Its routes
 * are in no table of the public listener, and the public ones not in this. */
#include "base/clock.h"
#include "server/server_struct.h"
#include <ctype.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { ADMIN_CONNECTIONS_MAX = 16 };

enum { LIST, CANCEL, PAUSE, RESUME, RESET, RELOAD };
static const struct route routes[] = {
    [LIST] = { "/requests", "GET", ROUTE_ADMIN, API_MODELS, false, NULL },
    [CANCEL] = { "/requests/", "POST", ROUTE_ADMIN, API_MODELS, false, NULL }, /* ID/cancel */
    [PAUSE] = { "/pause", "POST", ROUTE_ADMIN, API_MODELS, false, NULL },
    [RESUME] = { "/resume", "POST", ROUTE_ADMIN, API_MODELS, false, NULL },
    [RESET] = { "/reset_prefix_cache", "POST", ROUTE_ADMIN, API_MODELS, false, NULL },
    [RELOAD] = { "/reload", "POST", ROUTE_ADMIN, API_MODELS, false, NULL },
};
enum { N_ROUTES = sizeof routes / sizeof *routes };

/* Who may ask. */

static bool has_key(const struct connection *c)
{
    const char *bearer = keys_bearer(http_header(&c->request, "authorization"));
    uint64_t owner;
    uint8_t salt[KEY_DIGEST];
    return bearer && keys_find(&c->server->admin_keys, bearer, &owner, salt);
}

static const struct route *find(const char *method, const char *path, const char **argument, bool *exists)
{
    *exists = false;
    for (int i = 0; i < N_ROUTES; i++) {
        size_t n = strlen(routes[i].path);
        bool same = i == CANCEL ? strncmp(path, routes[i].path, n) == 0 : strcmp(path, routes[i].path) == 0;
        if (!same) continue;
        *exists = true;
        *argument = path + n;
        if (strcmp(method, routes[i].method) == 0) return &routes[i];
    }
    return NULL;
}

bool admin_admit(struct connection *c)
{
    bool exists;
    c->caller = (struct api_caller){ 0 };
    answer_request_id(c);
    c->route = find(c->request.method, c->request.path, &c->argument, &exists);
    if (http_header(&c->request, "origin")) return answer_refuse(c, 403, NULL, "no web page may ask here");
    if (!has_key(c)) {
        c->server->metrics.unauthorized++;
        return answer_refuse(c, 401, "WWW-Authenticate: Bearer\r\n",
                             "the key of --admin-key is needed, as 'Authorization: Bearer KEY'");
    }
    if (!c->route)
        return exists
                   ? answer_refuse(c, 405, NULL, "this path is asked with another method")
                   : answer_refuse(c, 404, NULL, "there is no such path; GET /requests is one that exists");
    if (c->request.chunked || c->request.content_length > 0)
        return answer_refuse(c, 400, NULL, "this path takes no body");
    return true;
}

/* What may be asked. */

/* How far a request has come. */
static const char *state_of(const struct connection *c, const struct exchange_account *a)
{
    if (c->job) return "preparing";
    if (a->usage.answer_tokens > 0) return "decode";
    return a->usage.prefilled > 0 ? "prefill" : "waiting";
}

/* Nothing of what it says. */
static json_t *describe(const struct connection *c, double now)
{
    struct exchange_account a = { 0 };
    char owner[20];
    if (c->exchange) exchange_account(c->exchange, &a);
    const struct request_usage *u = &a.usage;
    snprintf(owner, sizeof owner, "%016" PRIx64, c->caller.owner);
    return json_pack("{s:s, s:s?, s:s, s:s, s:b, s:f, s:I, s:I, s:I, s:I}", "id", c->request_id, "key",
                     c->caller.owner ? owner : NULL, "path", c->route->path, "state", state_of(c, &a),
                     "stream", c->streams, "seconds", now - c->begun, "prompt_tokens",
                     (json_int_t)u->prompt_tokens, "prefilled", (json_int_t)u->prefilled, "cached_tokens",
                     (json_int_t)u->cached_tokens, "answer_tokens", (json_int_t)u->answer_tokens);
}

static void list(struct connection *c)
{
    const struct server *s = c->server;
    json_t *all = json_array();
    double now = clock_seconds();
    for (const struct connection *x = s->connections; x; x = x->next)
        if (connection_is_answering(x)) json_array_append_new(all, describe(x, now));
    answer_json(c, 200,
                json_pack("{s:b, s:b, s:o}", "paused", s->paused, "draining", s->draining, "requests", all));
}

/* An id that a client chose may be that of several. */
static void cancel(struct connection *c)
{
    static const char tail[] = "/cancel";
    size_t n = strlen(c->argument), k = sizeof tail - 1;
    int64_t cancelled = 0;
    if (n <= k || strcmp(c->argument + n - k, tail) != 0) {
        connection_error(c, 404, NULL, "there is no such path; POST /requests/ID/cancel exists");
        return;
    }
    for (struct connection *x = c->server->connections; x; x = x->next) {
        if (!connection_is_answering(x) || strncmp(x->request_id, c->argument, n - k) != 0 ||
            x->request_id[n - k])
            continue;
        connection_abort(x, 403, "the request was cancelled by the server's operator");
        cancelled++;
    }
    if (cancelled == 0)
        connection_error(c, 404, NULL, "no request under way has this id");
    else
        answer_json(c, 200, json_pack("{s:I}", "cancelled", (json_int_t)cancelled));
}

static void pause_or_not(struct connection *c, bool paused)
{
    struct server *s = c->server;
    if (paused != s->paused && s->o.note) s->o.note(s->o.ctx, paused ? "paused by its operator" : "resumed");
    s->paused = paused;
    answer_json(c, 200, json_pack("{s:b}", "paused", paused));
}

static void reset(struct connection *c)
{
    if (!c->server->scheduler) {
        connection_error(c, 503, "Retry-After: 2\r\n", "the model is still being loaded");
        return;
    }
    scheduler_forget(c->server->scheduler);
    answer_json(c, 200, json_pack("{s:b}", "reset", true));
}

static void reload(struct connection *c)
{
    struct err e = { 0 };
    if (server_reload(c->server, &e))
        answer_json(c, 200, json_pack("{s:b}", "reloaded", true));
    else
        connection_error(c, 500, NULL, e.text);
}

void admin_answer(struct connection *c)
{
    switch (c->route - routes) {
    case LIST: list(c); return;
    case CANCEL: cancel(c); return;
    case PAUSE: pause_or_not(c, true); return;
    case RESUME: pause_or_not(c, false); return;
    case RESET: reset(c); return;
    default: reload(c);
    }
}

/* The listener. */

static void on_accept(struct evconnlistener *l, evutil_socket_t fd, struct sockaddr *from, int length,
                      void *ctx)
{
    (void)l, (void)from, (void)length;
    struct server *s = ctx;
    if (s->n_admin >= ADMIN_CONNECTIONS_MAX || !connection_open(s, fd, true)) close(fd);
}

static bool is_number(const char *text)
{
    return *text && strspn(text, "0123456789") == strlen(text);
}

static bool listen_loopback(struct server *s, struct err *e)
{
    struct sockaddr_in a = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t n = sizeof a;
    long port = strtol(s->o.admin, NULL, 10);
    if (strlen(s->o.admin) > 5 || port > 65535)
        return err_set(e, ERR_ARGUMENT, "--admin-listen: %s is no port", s->o.admin);
    a.sin_port = htons((uint16_t)port);
    if (!server_listen(&s->admin, s, on_accept, (struct sockaddr *)&a, sizeof a, e))
        return err_note(e, "--admin-listen %s", s->o.admin);
    if (getsockname(evconnlistener_get_fd(s->admin), (struct sockaddr *)&a, &n) != 0)
        return err_errno(e, "getsockname");
    snprintf(s->admin_address, sizeof s->admin_address, "http://127.0.0.1:%d", ntohs(a.sin_port));
    return true;
}

/* Nobody but this user may open it, key or not. */
static bool listen_private(struct server *s, struct err *e)
{
    mode_t usual = umask(0177);
    bool ok = server_listen_unix(&s->admin, s, on_accept, s->o.admin, "--admin-listen", e);
    umask(usual);
    if (ok) snprintf(s->admin_address, sizeof s->admin_address, "unix:%s", s->o.admin);
    return ok;
}

bool admin_listen(struct server *s, struct err *e)
{
    uint64_t owner;
    uint8_t salt[KEY_DIGEST];
    if (!s->o.admin && !s->o.admin_key) return true;
    if (!s->o.admin) return err_set(e, ERR_ARGUMENT, "--admin-key needs --admin-listen");
    if (!s->o.admin_key)
        return err_set(e, ERR_ARGUMENT, "--admin-listen needs a key of its own: --admin-key");
    if (keys_find(&s->keys, s->o.admin_key, &owner, salt))
        return err_set(e, ERR_ARGUMENT, "--admin-key is also a key of the API; it must be another one");
    return keys_load(&s->admin_keys, "--admin-key", &s->o.admin_key, 1, NULL, e) &&
           (is_number(s->o.admin) ? listen_loopback(s, e) : listen_private(s, e));
}
