/* A request on its way through the scheduler: a copy of what was asked, how far it is, and the bounded ring
 * through which its events leave. And the two places where requests wait: the inbox, into which any thread
 * puts them, and the scheduler's own queue. */
#ifndef ENGINE_REQUEST_H
#define ENGINE_REQUEST_H
#include "base/arena.h"
#include "engine/cuts.h"
#include "engine/logits.h"
#include "engine/picture.h"
#include "engine/prompt.h"
#include "engine/scheduler.h"
#include "engine/snapshot.h"
#include <pthread.h>

enum {
    RING_EVENTS = 64,         /* of a request */
    RING_EVENTS_SCORES = 512, /* of one that scores its prompt: more than a piece of it has rows */
};

/* Where any thread leaves requests, and rings. */
struct inbox {
    pthread_mutex_t lock;
    pthread_cond_t news;
    struct request *first, **end;
    int64_t n_waiting, most; /* requests that do not run yet, behind the inbox too */
    bool rung, closed, failed;
};
bool inbox_init(struct inbox *b, int64_t most, struct err *e);
void inbox_deinit(struct inbox *b);
void inbox_ring(struct inbox *b);
/* ERR_BUSY: full. ERR_IO: the scheduler has failed. */
bool inbox_put(struct inbox *b, struct request *r, struct err *e);
/* Everything in it, oldest first. wait: until there is something, or a ring. *closed: nothing more comes. */
struct request *inbox_take(struct inbox *b, bool wait, bool *closed);
void inbox_count(struct inbox *b, int more); /* of those that wait */

struct request_picture {
    struct picture picture; /* its rows come when they are wanted */
    struct patches patches;
    bool is_video;            /* a pair of its frames */
    struct cut_picture place; /* among the rows of the prompt */
    uint8_t key[32];          /* of the encoder cache */
};

struct request {
    struct request_options o; /* pointers lead into `memory`; no pictures */
    struct arena memory;
    struct prompt prompt;
    struct request_picture *pictures;
    int n_pictures;
    struct cuts cuts;
    int64_t most; /* tokens of the answer */

    /* Of both sides, under the lock. */
    pthread_mutex_t lock;
    int holders;         /* the caller, the scheduler */
    struct inbox *inbox; /* NULL once finished */
    bool cancelled;
    bool blocked; /* the ring was too full for a step */
    struct request_event *ring;
    int ring_size, ring_first, ring_n;
    struct request_usage usage;
    struct err error; /* written before the last event, read after it */

    /* Of the scheduler's thread. */
    struct request *next;
    int64_t number, round; /* of arrival; of its owner's turn */
    struct logits_rules rules;
    struct parcel *parcel; /* what it knew when it was preempted */
    int handle;            /* the engine's; -1: none */

    /* What a file knows of its prompt. It waits while that is read. */
    bool fetching;
    const struct cut *fetch; /* where it would begin then */
    struct parcel *fetched;  /* NULL: nothing, or not yet */

    int64_t done; /* rows of the prompt that are computed */

    int64_t n_answer;          /* tokens posted */
    struct engine_draft draft; /* draft.next: the token sampled last */
    bool drafts_ready;         /* it was in the last step */
    int64_t first, n_rows;     /* of this step; n_rows 0: not in it */
    bool tentative;
    int right;    /* rows of a tentative run that stay */
    bool ended;   /* no more rows of this step count */
    bool is_over; /* `last` says how; it may be still to post */
    struct request_event last;
    double submitted, began, decoding;
};

/* What all requests are made with. */
struct request_maker {
    const struct model *model;
    const struct picture_reader *reader; /* NULL: pictures are refused */
    const struct image_limits *images;   /* NULL: the defaults */
    int64_t limit;                       /* rows of a sequence */
    struct cut_rules rules;
};
bool request_create(struct request **out, const struct request_options *o, const struct request_maker *maker,
                    struct err *e);
/* One holder fewer; the last one's call frees it. */
void request_let_go(struct request *r);

/* Whether the caller has given up. */
bool request_is_cancelled(struct request *r);
/* Room of the ring for events; less than `needed`: taking some rings the inbox. */
int request_room(struct request *r, int needed);
void request_post(struct request *r, const struct request_event *event);
/* Posts `last`, for which there always is room. FINISHED_ERROR: `error` is set. */
void request_end(struct request *r);
void request_finish(struct request *r, enum request_finish finish); /* sets `last` and is_over */

/* Requests that wait: lowest priority number first; of one priority the owners take turns; of one owner in
 * order of arrival. */
struct waiting {
    struct request *first;
    int64_t n, tokens, arrivals, round;
};
void waiting_add(struct waiting *w, struct request *r);       /* a new one */
void waiting_add_again(struct waiting *w, struct request *r); /* one that has run: keeps its turn */
struct request *waiting_best(const struct waiting *w);        /* of those that fetch nothing; NULL: none */
void waiting_remove(struct waiting *w, struct request *r);
/* Whether a is to run before b. */
bool request_before(const struct request *a, const struct request *b);
#endif
