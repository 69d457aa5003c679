/* Threads that make exchanges: bodies are parsed, templates rendered, texts cut into tokens, schemas compiled
 * and pictures decoded beside the loop, which goes on sending. */
#ifndef SERVER_WORKERS_H
#define SERVER_WORKERS_H
#include "server/api.h"

enum { REQUEST_ID_MAX = 128 };

struct connection;

struct job {
    struct job *next;
    struct connection *connection; /* who waits; NULL: nobody any more. The loop's thread only */
    struct api *api;
    enum api_route route;
    char *argument, *body; /* owned; body has a NUL behind its bytes */
    size_t bytes, room;    /* of the body: what is said, what is held */
    struct api_caller caller;
    char request_id[REQUEST_ID_MAX + 1];
    struct exchange *exchange; /* the result; NULL: out of memory */
};

struct workers;
/* done(ctx): from a thread: workers_take has something. */
bool workers_create(struct workers **out, int threads, void (*done)(void *ctx), void *ctx, struct err *e);
/* Waits for what is being made; jobs that are left are freed with their exchanges. NULL is fine. */
void workers_free(struct workers *w);
/* Takes the job over. False, and it is still the caller's: so many wait already that it is refused. */
bool workers_give(struct workers *w, struct job *job);
struct job *workers_take(struct workers *w); /* one that is done, the caller's; NULL: none */
void job_free(struct job *job);              /* with its exchange; NULL is fine */
#endif
