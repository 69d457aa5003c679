/* A ring of bytes, a queue of what to do with them, and the thread that does it. */
#include "quantize/writer.h"
#include "base/pages.h"
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

enum { QUEUE = 256 };
/* Enough for what is packed while a sync lasts, and little enough to stay in a cache. */
static const uint64_t RING_BYTES = 16 << 20;

struct entry {
    const uint8_t *data; /* NULL: a result or a mark */
    uint64_t bytes;
    uint64_t ring_end; /* of these bytes; 0: mapped ones */
    bool has_result;
    struct writer_result result;
};

struct writer {
    struct shards *shards;
    struct journal *journal;
    uint8_t *ring;
    uint64_t size;
    uint64_t reserved; /* where the last room begins */
    uint64_t sync_bytes, synced;
    struct writer_result *results; /* since the last record */
    size_t n_results, results_capacity;
    pthread_t thread;
    bool is_running;

    pthread_mutex_t lock; /* of all below */
    pthread_cond_t filled, freed;
    uint64_t head, tail; /* bytes ever put into the ring, and freed; padding at its end included */
    struct entry queue[QUEUE];
    uint64_t n_in, n_out; /* entries ever put and done */
    bool stop, failed;
    struct err error;
};

uint64_t writer_memory(uint64_t room)
{
    return 4 * room > RING_BYTES ? 4 * room : RING_BYTES;
}

/* The thread. */

static bool add_result(struct writer *w, const struct writer_result *r, struct err *e)
{
    if (w->n_results == w->results_capacity) {
        size_t capacity = 2 * w->results_capacity + 64;
        struct writer_result *grown = realloc(w->results, capacity * sizeof *grown);
        if (!grown) return err_memory(e, "results", capacity * sizeof *grown);
        w->results = grown;
        w->results_capacity = capacity;
    }
    w->results[w->n_results++] = *r;
    return true;
}

static bool append_record(struct writer *w, struct err *e)
{
    struct writer_record head = { shards_offset(w->shards), w->n_results };
    size_t bytes = sizeof head + w->n_results * sizeof *w->results;
    char *text = malloc(bytes);
    if (!text) return err_memory(e, "journal record", bytes);
    memcpy(text, &head, sizeof head);
    if (w->n_results) memcpy(text + sizeof head, w->results, bytes - sizeof head);
    bool ok = shards_sync(w->shards, e) && journal_append(w->journal, JOURNAL_DATA, text, bytes, false, e);
    free(text);
    w->synced = head.offset;
    w->n_results = 0;
    return ok;
}

static bool perform(struct writer *w, const struct entry *x, struct err *e)
{
    if (x->data) {
        bool ok = shards_append(w->shards, x->data, x->bytes, e);
        if (!x->ring_end) pages_release(x->data, x->bytes);
        return ok;
    }
    if (x->has_result) return add_result(w, &x->result, e);
    return shards_offset(w->shards) - w->synced < w->sync_bytes || append_record(w, e);
}

static void *run(void *arg)
{
    struct writer *w = arg;
    /* It waits for its turn instead of interrupting a thread that packs, for which the others would wait. */
    sched_setscheduler(0, SCHED_BATCH, &(struct sched_param){ 0 });
    pthread_mutex_lock(&w->lock);
    for (;;) {
        while (w->n_in == w->n_out && !w->stop) pthread_cond_wait(&w->filled, &w->lock);
        if (w->stop) break;
        struct entry x = w->queue[w->n_out % QUEUE];
        struct err error = { 0 };
        pthread_mutex_unlock(&w->lock);
        bool ok = perform(w, &x, &error);
        pthread_mutex_lock(&w->lock);
        if (x.ring_end) w->tail = x.ring_end;
        w->n_out++;
        if (!ok) {
            w->failed = w->stop = true;
            w->error = error;
        }
        pthread_cond_signal(&w->freed);
    }
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

/* Who puts. */

static bool check(const struct writer *w, struct err *e)
{
    if (w->failed && e) *e = w->error;
    return !w->failed;
}

static bool push(struct writer *w, const struct entry *x, struct err *e)
{
    pthread_mutex_lock(&w->lock);
    while (!w->failed && w->n_in - w->n_out == QUEUE) pthread_cond_wait(&w->freed, &w->lock);
    bool ok = check(w, e);
    if (ok) {
        w->queue[w->n_in++ % QUEUE] = *x;
        if (x->ring_end) w->head = x->ring_end;
        pthread_cond_signal(&w->filled);
    }
    pthread_mutex_unlock(&w->lock);
    return ok;
}

void *writer_room(struct writer *w, uint64_t bytes, struct err *e)
{
    pthread_mutex_lock(&w->lock);
    uint64_t at = w->head, left = w->size - at % w->size;
    if (bytes > left) at += left;
    while (!w->failed && at + bytes - w->tail > w->size && w->tail < w->head)
        pthread_cond_wait(&w->freed, &w->lock);
    bool ok = check(w, e);
    if (ok && w->tail >= w->head) w->tail = w->head = at; /* empty: the padding holds nothing */
    pthread_mutex_unlock(&w->lock);
    w->reserved = at;
    if (!ok) return NULL;
    if (bytes <= w->size) return w->ring + at % w->size;
    err_set(e, ERR_ARGUMENT, "%llu bytes at once", (unsigned long long)bytes);
    return NULL;
}

bool writer_put(struct writer *w, uint64_t bytes, struct err *e)
{
    if (bytes == 0) return true;
    return push(w,
                &(struct entry){ .data = w->ring + w->reserved % w->size,
                                 .bytes = bytes,
                                 .ring_end = w->reserved + bytes },
                e);
}

bool writer_put_copy(struct writer *w, const void *data, uint64_t bytes, struct err *e)
{
    for (uint64_t at = 0, n; at < bytes; at += n) {
        n = bytes - at < w->size / 4 ? bytes - at : w->size / 4;
        void *room = writer_room(w, n, e);
        if (!room) return false;
        memcpy(room, (const char *)data + at, n);
        if (!writer_put(w, n, e)) return false;
    }
    return true;
}

bool writer_put_mapped(struct writer *w, const uint8_t *data, uint64_t bytes, struct err *e)
{
    return bytes == 0 || push(w, &(struct entry){ .data = data, .bytes = bytes }, e);
}

bool writer_add(struct writer *w, uint64_t index, const struct matrix_result *result, struct err *e)
{
    return push(w, &(struct entry){ .has_result = true, .result = { index, *result } }, e);
}

bool writer_mark(struct writer *w, struct err *e)
{
    return push(w, &(struct entry){ 0 }, e);
}

bool writer_create(struct writer **out, struct shards *shards, struct journal *journal, uint64_t room,
                   uint64_t sync_bytes, struct err *e)
{
    struct writer *w = calloc(1, sizeof *w);
    *out = w;
    if (!w) return err_memory(e, "writer", sizeof *w);
    w->shards = shards;
    w->journal = journal;
    w->size = writer_memory(room);
    w->sync_bytes = sync_bytes;
    w->synced = shards_offset(shards);
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->filled, NULL);
    pthread_cond_init(&w->freed, NULL);
    w->ring = malloc(w->size);
    if (!w->ring) return err_memory(e, "writer", w->size);
    errno = pthread_create(&w->thread, NULL, run, w);
    w->is_running = errno == 0;
    return w->is_running || err_errno(e, "pthread_create");
}

static void stop(struct writer *w)
{
    if (!w->is_running) return;
    pthread_mutex_lock(&w->lock);
    w->stop = true;
    pthread_cond_signal(&w->filled);
    pthread_mutex_unlock(&w->lock);
    pthread_join(w->thread, NULL);
    w->is_running = false;
}

bool writer_finish(struct writer *w, struct err *e)
{
    pthread_mutex_lock(&w->lock);
    while (!w->failed && w->n_in != w->n_out) pthread_cond_wait(&w->freed, &w->lock);
    pthread_mutex_unlock(&w->lock);
    stop(w);
    return check(w, e) && append_record(w, e);
}

void writer_free(struct writer *w)
{
    if (!w) return;
    stop(w);
    pthread_mutex_destroy(&w->lock);
    pthread_cond_destroy(&w->filled);
    pthread_cond_destroy(&w->freed);
    free(w->ring);
    free(w->results);
    free(w);
}
