/* What is decided and answered without the model: who may ask (keys, origins, methods), probes, metrics. */
#include "base/clock.h"
#include "server/server_struct.h"
#include <arpa/inet.h>
#include <event2/buffer.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

static const char JSON[] = "application/json";

/* An id that a client chose is kept where it can do no harm in headers and logs. */
void answer_request_id(struct connection *c)
{
    static const char fine[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-:";
    const char *id = http_header(&c->request, "x-request-id");
    size_t n = id ? strspn(id, fine) : 0;
    if (id && n > 0 && !id[n] && n <= REQUEST_ID_MAX)
        memcpy(c->request_id, id, n + 1);
    else
        snprintf(c->request_id, sizeof c->request_id, "%s%llx", c->server->id_prefix,
                 (unsigned long long)++c->server->n_requests);
    c->caller.request_id = c->request_id;
}

/* Behind --root-path, which a proxy may or may not have cut off. */
static const char *inner_path(const struct connection *c)
{
    const char *path = c->request.path, *root = c->server->o.root_path;
    size_t n = root ? strlen(root) : 0;
    while (n > 0 && root[n - 1] == '/') n--;
    return n > 0 && strncmp(path, root, n) == 0 && path[n] == '/' ? path + n : path;
}

static bool is_listed(const struct server *s, const char *origin)
{
    for (int i = 0; i < s->o.n_origins; i++)
        if (strcmp(s->o.origins[i], "*") == 0 || strcasecmp(s->o.origins[i], origin) == 0) return true;
    return false;
}

/* A Host that names this machine by number or as localhost: a foreign site cannot give itself such a name. */
static bool is_numeric_host(const char *host)
{
    char name[64];
    struct in6_addr address;
    size_t n = host[0] == '[' ? strcspn(host, "]") : strcspn(host, ":");
    if (host[0] == '[') {
        host++;
        n--;
    }
    if (n >= sizeof name) return false;
    memcpy(name, host, n);
    name[n] = 0;
    return strcasecmp(name, "localhost") == 0 || inet_pton(AF_INET, name, &address) == 1 ||
           inet_pton(AF_INET6, name, &address) == 1;
}

/* Browsers send Origin with what a page of theirs asks for. This server's own page may ask, listed ones may;
 * others may not, also where no answer would be shown to them. A site whose name was made to mean this
 * machine is its own origin, too: without keys that counts for numeric hosts only. */
static bool check_origin(struct connection *c)
{
    const char *origin = http_header(&c->request, "origin"), *host = http_header(&c->request, "host");
    bool listed = origin && is_listed(c->server, origin);
    c->origin = listed ? origin : NULL;
    if (!origin || listed) return true;
    const char *name = strncmp(origin, "http://", 7) == 0    ? origin + 7
                       : strncmp(origin, "https://", 8) == 0 ? origin + 8
                                                             : "";
    return host && strcasecmp(name, host) == 0 && (c->server->keys.n > 0 || is_numeric_host(host));
}

void answer_cors(const struct connection *c, struct evbuffer *out)
{
    if (!c->origin) return;
    evbuffer_add_printf(out, "Access-Control-Allow-Origin: %s\r\nVary: Origin\r\n", c->origin);
    evbuffer_add_printf(out, "Access-Control-Expose-Headers: X-Request-Id, Retry-After\r\n");
}

static void answer_preflight(struct connection *c, const char *path)
{
    char extra[512];
    const char *asked = http_header(&c->request, "access-control-request-headers");
    bool printable = asked && strlen(asked) < 256;
    snprintf(extra, sizeof extra,
             "Access-Control-Allow-Methods: %s\r\nAccess-Control-Allow-Headers: %s\r\n"
             "Access-Control-Max-Age: 600\r\n",
             route_methods(path), printable ? asked : "authorization, content-type, x-api-key, x-request-id");
    connection_answer(c, 204, NULL, extra, "", 0);
}

static bool has_key(struct connection *c)
{
    const struct server *s = c->server;
    const char *bearer = keys_bearer(http_header(&c->request, "authorization")),
               *plain = http_header(&c->request, "x-api-key");
    if (s->keys.n == 0) return true;
    return (bearer && keys_find(&s->keys, bearer, &c->caller.owner, c->caller.salt)) ||
           (plain && keys_find(&s->keys, plain, &c->caller.owner, c->caller.salt));
}

static bool is_public(const struct connection *c)
{
    return c->route &&
           (c->route->is_public || (c->route->kind == ROUTE_METRICS && c->server->o.public_metrics));
}

/* A media type, whatever its parameters. A page of a foreign site can send others without asking first. */
static bool says_json(const struct http_request *r)
{
    const char *type = http_header(r, "content-type");
    return type && strncasecmp(type, JSON, sizeof JSON - 1) == 0 && strchr("; \t", type[sizeof JSON - 1]);
}

bool answer_refuse(struct connection *c, int status, const char *extra, const char *message)
{
    c->refused = c->request.chunked || c->request.content_length > 0 || status == 401;
    connection_error(c, status, extra, message);
    return false;
}

static bool refuse_route(struct connection *c, const char *path, bool exists)
{
    char extra[80];
    if (!exists)
        return answer_refuse(
            c, 404, NULL,
            "there is no such path; GET /v1/models and POST /v1/chat/completions are two that exist");
    snprintf(extra, sizeof extra, "Allow: %s\r\n", route_methods(path));
    return answer_refuse(c, 405, extra, "this path is asked with another method; the Allow header names it");
}

/* Work for the model, now. */
static bool check_state(struct connection *c)
{
    struct server *s = c->server;
    char message[LIMITS_MESSAGE], extra[40];
    if (c->route->kind != ROUTE_API) return true;
    if (s->draining) return answer_refuse(c, 503, "Retry-After: 5\r\n", "the server is shutting down");
    if (s->paused) return answer_refuse(c, 503, "Retry-After: 5\r\n", "the server is paused by its operator");
    if (!s->api)
        return answer_refuse(c, 503, "Retry-After: 2\r\n",
                             "the model is still being loaded; GET /ready says how far");
    if (s->stats.failed)
        return answer_refuse(c, 503, NULL, "the device is lost; the server must be started again");
    if (limits_allow_request(c, message)) return true;
    snprintf(extra, sizeof extra, "Retry-After: %d\r\n", limits_retry_after(s));
    return answer_refuse(c, 429, extra, message);
}

bool answer_admit(struct connection *c)
{
    struct server *s = c->server;
    const char *path = inner_path(c), *method = c->request.method;
    bool exists;
    c->caller = (struct api_caller){ 0 };
    answer_request_id(c);
    c->route = route_find(method, path, &c->argument, &exists);
    if (!check_origin(c))
        return answer_refuse(
            c, 403, NULL,
            "this web page's origin is not allowed to ask; --allowed-origins lists those that are");
    if (strcmp(method, "OPTIONS") == 0 && c->origin &&
        http_header(&c->request, "access-control-request-method")) {
        c->refused = c->request.chunked || c->request.content_length > 0;
        answer_preflight(c, path);
        return false;
    }
    if (!has_key(c) && !is_public(c)) {
        s->metrics.unauthorized++;
        return answer_refuse(c, 401, "WWW-Authenticate: Bearer\r\n",
                             "a valid API key is needed, as 'Authorization: Bearer KEY' or 'x-api-key: KEY'");
    }
    if (!c->route) return refuse_route(c, path, exists);
    if (c->route->kind == ROUTE_ABSENT) return answer_refuse(c, 404, NULL, c->route->says);
    if (c->route->kind == ROUTE_PAGE && !s->o.page)
        return answer_refuse(c, 404, NULL, "this server has no page");
    if (c->route->kind == ROUTE_API && strcmp(c->route->method, "POST") == 0 && !says_json(&c->request))
        return answer_refuse(c, 415, NULL, "Content-Type must be application/json");
    if (!check_state(c)) return false;
    if (c->argument && *c->argument) {
        /* the head is ours, and what is behind the path in it is not read again */
        char *decoded = c->head + (c->argument - c->head);
        if (!http_percent_decode(decoded))
            return answer_refuse(c, 400, NULL, "the path is not percent-encoded UTF-8");
    }
    return true;
}

static void answer_text(struct connection *c, int status, const char *extra, json_t *body)
{
    char *text = body ? json_dumps(body, JSON_COMPACT) : NULL;
    connection_answer(c, text ? status : 500, JSON, extra, text ? text : "{}", text ? strlen(text) : 2);
    free(text);
    json_decref(body);
}

void answer_json(struct connection *c, int status, json_t *body)
{
    answer_text(c, status, NULL, body);
}

static bool is_stalled(const struct server *s)
{
    return s->stats.running + s->stats.waiting > 0 &&
           clock_seconds() - s->stats.last_step > s->o.stall_seconds;
}

static void answer_ready(struct connection *c)
{
    struct server *s = c->server;
    if (s->scheduler) scheduler_stats(s->scheduler, &s->stats);
    const char *why = s->draining       ? "draining"
                      : !s->api         ? "loading"
                      : s->paused       ? "paused"
                      : s->stats.failed ? "failed"
                      : is_stalled(s)   ? "stalled"
                                        : NULL;
    json_t *body = json_pack("{s:s}", "status", why ? why : "ready");
    const char *what = atomic_load(&s->loading);
    if (why && !s->draining && !s->api && what)
        json_object_update_new(body, json_pack("{s:s, s:I, s:I}", "loading", what, "done",
                                               (json_int_t)atomic_load(&s->loading_done), "total",
                                               (json_int_t)atomic_load(&s->loading_total)));
    answer_text(c, why ? 503 : 200, why ? "Retry-After: 2\r\n" : NULL, body);
}

static void answer_metrics(struct connection *c)
{
    struct server *s = c->server;
    char *text = NULL;
    size_t bytes = 0;
    FILE *f = open_memstream(&text, &bytes);
    if (s->scheduler) scheduler_stats(s->scheduler, &s->stats);
    struct metrics_now now = { .model_name = s->o.model_name,
                               .stats = s->scheduler ? &s->stats : NULL,
                               .routes = s->routes,
                               .n_routes = ROUTES_MAX + 1,
                               .connections = s->n_connections,
                               .exchanges = s->n_exchanges,
                               .body_bytes = (int64_t)s->body_bytes,
                               .draining = s->draining,
                               .paused = s->paused };
    if (f) metrics_write(&s->metrics, &now, f);
    bool ok = f && fclose(f) == 0;
    connection_answer(c, ok ? 200 : 500, "text/plain; version=0.0.4; charset=utf-8", NULL, ok ? text : "",
                      ok ? bytes : 0);
    free(text);
}

static void answer_load(struct connection *c)
{
    struct server *s = c->server;
    if (s->scheduler) scheduler_stats(s->scheduler, &s->stats);
    answer_text(c, 200, NULL,
                json_pack("{s:I, s:I, s:I, s:I}", "server_load", (json_int_t)s->n_exchanges, "running",
                          (json_int_t)s->stats.running, "waiting", (json_int_t)s->stats.waiting,
                          "waiting_tokens", (json_int_t)s->stats.waiting_tokens));
}

static void answer_page(struct connection *c)
{
    const struct server_options *o = &c->server->o;
    char extra[1024];
    snprintf(extra, sizeof extra,
             "Content-Security-Policy: %s\r\nX-Content-Type-Options: nosniff\r\n"
             "Referrer-Policy: no-referrer\r\nCache-Control: no-cache\r\n",
             o->page_policy);
    connection_answer(c, 200, "text/html; charset=utf-8", extra, o->page, o->page_bytes);
}

void answer_local(struct connection *c)
{
    switch (c->route->kind) {
    case ROUTE_HEALTH: connection_answer(c, c->server->stats.failed ? 503 : 200, NULL, NULL, "", 0); return;
    case ROUTE_READY: answer_ready(c); return;
    case ROUTE_METRICS: answer_metrics(c); return;
    case ROUTE_VERSION:
        answer_text(c, 200, NULL, json_pack("{s:s}", "version", c->server->o.version));
        return;
    case ROUTE_LOAD: answer_load(c); return;
    default: answer_page(c); return;
    }
}
