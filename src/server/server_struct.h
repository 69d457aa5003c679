/* Inside of the server: what its files share. Everything belongs to the loop's thread but what says
 * otherwise. */
#ifndef SERVER_SERVER_STRUCT_H
#define SERVER_SERVER_STRUCT_H
#include "server/keys.h"
#include "server/limits.h"
#include "server/log.h"
#include "server/metrics.h"
#include "server/routes.h"
#include "server/server.h"
#include "server/workers.h"
#include <event2/bufferevent.h>
#include <event2/event.h>
#include <event2/listener.h>
#include <pthread.h>
#include <stdatomic.h>

enum { ROUTES_MAX = 64, WORKERS = 3 };

enum phase {
    PHASE_HEAD,   /* a request's headers are awaited */
    PHASE_BODY,   /* its body */
    PHASE_ANSWER, /* an exchange is made, then runs */
    PHASE_FLUSH,  /* the last bytes go out */
    PHASE_LINGER  /* all is sent; what the client still sends is dropped until it closes */
};

struct connection {
    struct server *server;
    struct connection *previous, *next;
    struct bufferevent *events;
    enum phase phase;
    double since;  /* of the phase */
    bool first;    /* no request was read yet */
    bool is_admin; /* came to the operator's listener */

    /* the request */
    size_t scanned;
    char *head;
    struct http_header *headers;
    struct http_request request;
    struct http_chunks chunks;
    char *body;
    size_t body_bytes, body_room;
    const struct route *route; /* NULL: none such */
    const char *argument;
    struct api_caller caller;
    char request_id[REQUEST_ID_MAX + 1];
    const char *origin; /* allowed to read the answer; or NULL */
    bool refused;       /* before its body was read */

    /* the answer */
    struct job *job;           /* makes the exchange; borrow, the workers' */
    struct exchange *exchange; /* owned */
    bool head_sent, streams;
    bool aborted; /* an error stands in place of the answer, or of its rest */
    int status;
    double begun, heard; /* when the request was here; when the stream said something last */
    uint64_t sent_bytes;
    uint64_t crash_place; /* where crash.h has it */

    /* tokens seen so far */
    int64_t seen_tokens;
    double seen_at, first_token;
    bool prompt_counted;

    double unread_since; /* output waits for the client; 0: none does */
    uint64_t unread_mark, written;
};

struct server {
    struct server_options o;
    struct http_limits limits;
    struct event_base *base;
    struct event *wake, *attach, *made, *stop, *tick, *signals[3], *relisten;
    struct event *due; /* text of a stream waits no longer */
    int wake_timer;    /* fires once the scheduler has news; -1: not opened */
    atomic_bool wake_is_set;
    _Atomic double look_at; /* clock_seconds of the next look at news, unless an answer ends before */
    struct evconnlistener *listener, *admin; /* admin: NULL where none is asked for */
    pthread_t thread;
    bool thread_runs, clean;
    char address[300], admin_address[128];

    _Atomic(const char *) loading;
    _Atomic uint64_t loading_done, loading_total;
    struct api *pending_api; /* handed over by `attach` */
    struct scheduler *pending_scheduler;

    struct api *api; /* NULL: still loading */
    struct scheduler *scheduler;
    struct scheduler_stats stats; /* as of the last look */
    SSL_CTX *tls;
    struct keys keys, admin_keys;
    struct request_log *log;
    struct workers *workers;
    struct metrics metrics;
    struct metrics_route routes[ROUTES_MAX + 1]; /* the last: paths that are not in the table */

    struct connection *connections;
    int64_t n_connections, n_exchanges;
    int64_t n_admin;   /* connections of the operator's, which are not counted among the others */
    size_t body_bytes; /* held by all connections */
    uint64_t n_requests;
    char id_prefix[17];
    double turn_seconds; /* of late, between two requests' ends while others wait; 0: not known */
    bool draining, stopping;
    bool paused;                        /* by the operator: no new requests */
    double drain_since, answered_since; /* when no exchange was left */
    bool is_open_to_all;                /* others than this machine can connect */
};

/* server.c */
/* Keys, certificates and the log are read again; what cannot be read stays as it was. */
bool server_reload(struct server *s, struct err *e);
bool server_listen(struct evconnlistener **out, struct server *s, evconnlistener_cb on_accept,
                   const struct sockaddr *a, socklen_t length, struct err *e);
bool server_listen_unix(struct evconnlistener **out, struct server *s, evconnlistener_cb on_accept,
                        const char *path, const char *flag, struct err *e);

/* connection.c */
bool connection_open(struct server *s, evutil_socket_t fd, bool is_admin);
void connection_close(struct connection *c);
bool connection_is_answering(const struct connection *c);
void connection_take(struct connection *c,
                     struct exchange *x); /* the one it waits for; NULL: out of memory */
/* The exchange has news, or there is room for it. */
void connection_pump(struct connection *c);
void connection_tick(struct connection *c, double now); /* looks at the clock; may close */
/* An error in place of what is not sent yet: nothing more is made for this request. */
void connection_abort(struct connection *c, int status, const char *message);
bool connection_is_idle(const struct connection *c);
bool connection_is_quiet(const struct connection *c); /* nothing to read or to send */

/* Answers in one piece and goes on to the next request. extra: further headers, each with its CR LF, or NULL.
 */
void connection_answer(struct connection *c, int status, const char *type, const char *extra,
                       const char *body, size_t bytes);
/* An error in the shape of the route's API. */
void connection_error(struct connection *c, int status, const char *extra, const char *message);

/* answer.c */
/* The request's headers are here: false, and it is answered, where it goes no further. */
bool answer_admit(struct connection *c);
/* A route that needs no exchange. */
void answer_local(struct connection *c);
/* Access-Control headers for this connection's answer. */
void answer_cors(const struct connection *c, struct evbuffer *out);

/* False. Answers with an error, and closes where a body would follow. */
bool answer_refuse(struct connection *c, int status, const char *extra, const char *message);
void answer_json(struct connection *c, int status, json_t *body); /* takes the reference over */
void answer_request_id(struct connection *c);                     /* the client's, or one that is made */

/* admin.c */
bool admin_listen(struct server *s, struct err *e); /* nothing where none is asked for */
bool admin_admit(struct connection *c);             /* as answer_admit */
void admin_answer(struct connection *c);

/* account.c */
/* Tokens that came since the last look. says: they were sent, too. */
void account_tokens(struct connection *c, double now, bool says);
/* For crash.h: it is in this state, a literal. */
void account_state(struct connection *c, const char *state);
void account_request(struct connection *c, bool aborted); /* it is answered, or will not be */
#endif
