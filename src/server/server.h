/* The server: listens before a model is there, then answers the routes of routes.h from one thread over
 * libevent. Everything below may be called from any other thread. */
#ifndef SERVER_SERVER_H
#define SERVER_SERVER_H
#include "server/api.h"
#include "server/http.h"
#include "server/tls.h"

/* Zeroed limits mean the defaults behind them. */
struct server_options {
    const char *host; /* NULL: 127.0.0.1 */
    int port;         /* 0: any that is free */
    const char *uds;  /* a Unix socket's path instead; or NULL */
    bool open_bind;   /* other machines may ask without a key */
    const char *root_path;

    struct tls_files tls;
    const char *const *keys; /* [n_keys] */
    int n_keys;
    const char *key_file;
    bool public_metrics;
    const char *admin; /* listener of the operator's: a port of 127.0.0.1 or a Unix socket's path; or NULL */
    const char *admin_key;      /* which it needs */
    const char *const *origins; /* [n_origins] web pages that may ask; "*": all */
    int n_origins;

    size_t max_header_bytes; /* 64 KiB */
    int max_headers;         /* 100 */
    size_t max_body_bytes;   /* 64 MiB */
    int max_connections;     /* 4096 */
    double header_seconds;   /* 10: until a request's headers are here */
    double body_seconds;     /* 30: until its body is, and a second more for each 16 KiB */
    double idle_seconds;     /* 60: between two requests of a connection */
    double send_seconds;     /* 30: in which a client must read a KiB a second of what waits for it */
    double comment_seconds;  /* 10: of silence in a stream */
    double stall_seconds;    /* 60: without a step while requests wait, then not ready */
    double shutdown_seconds; /* 30; < 0: none */
    double request_seconds;  /* from a request to its answer's end; 0: any */
    /* of an API key; without keys all clients count as one; 0: any */
    int64_t max_key_requests;                  /* under way */
    int64_t max_key_tokens, max_queued_tokens; /* of prompts that wait: of a key, of all */

    const char *request_log; /* "-": standard output; NULL: none */
    const char *model_name, *version;
    const char *page; /* at /, HTML; NULL: 404 */
    size_t page_bytes;
    const char *page_policy; /* its Content-Security-Policy */

    void *ctx;
    void (*note)(void *ctx, const char *text); /* reloads, drains: one sentence; from the server's thread */
    void (*quit)(void *ctx);                   /* a signal while no model is there yet; does not return */
};

struct server;
/* Binds, listens and starts the thread, which also takes SIGTERM, SIGINT and SIGHUP. Strings are borrowed. */
bool server_start(struct server **out, const struct server_options *o, struct err *e);
/* "http://127.0.0.1:8000", with the port that was free. */
const char *server_address(const struct server *s);
/* Likewise of the operator's listener, or "". */
const char *server_admin_address(const struct server *s);
/* What is being loaded, for /ready. `what` is borrowed for good. */
void server_loading(struct server *s, const char *what, uint64_t done, uint64_t total);
/* From now on requests go to api; both are borrowed until server_wait returns. */
void server_attach(struct server *s, struct api *api, struct scheduler *scheduler);
/* For struct scheduler_options: ctx is the server. Must not be called after server_free. */
void server_wake(void *server, bool ended);
void server_stop(struct server *s); /* as a second signal does */
/* Until a signal and then the drain have ended it. True: every request was answered to its end. No exchange
 * is left then. */
bool server_wait(struct server *s);
void server_free(struct server *s); /* stops it first if it runs; NULL is fine */
#endif
