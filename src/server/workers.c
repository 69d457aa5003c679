#include "server/workers.h"
#include "server/crash.h"
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { WAITING_MAX = 1024 };

struct queue_of_jobs {
    struct job *first, **end;
    int n;
};

struct workers {
    pthread_mutex_t lock; /* of the queues and `ends` */
    pthread_cond_t news;
    struct queue_of_jobs waiting, made;
    bool ends;
    void (*done)(void *ctx);
    void *ctx;
    int n_threads;
    pthread_t threads[];
};

static void put(struct queue_of_jobs *q, struct job *job)
{
    job->next = NULL;
    *q->end = job;
    q->end = &job->next;
    q->n++;
}

static struct job *take(struct queue_of_jobs *q)
{
    struct job *job = q->first;
    if (!job) return NULL;
    q->first = job->next;
    if (!q->first) q->end = &q->first;
    q->n--;
    return job;
}

static void make(struct job *job)
{
    job->exchange = exchange_create(job->api, job->route, job->argument, job->body, job->bytes, &job->caller);
    free(job->body);
    job->body = NULL;
}

static void *work(void *ctx)
{
    struct workers *w = ctx;
    crash_own_stack();
    pthread_mutex_lock(&w->lock);
    while (!w->ends) {
        struct job *job = take(&w->waiting);
        if (!job) {
            pthread_cond_wait(&w->news, &w->lock);
            continue;
        }
        pthread_mutex_unlock(&w->lock);
        make(job);
        pthread_mutex_lock(&w->lock);
        put(&w->made, job);
        w->done(w->ctx);
    }
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

bool workers_create(struct workers **out, int threads, void (*done)(void *ctx), void *ctx, struct err *e)
{
    struct workers *w = calloc(1, sizeof *w + (size_t)threads * sizeof *w->threads);
    *out = NULL;
    if (!w) return err_memory(e, "threads", sizeof *w);
    w->done = done;
    w->ctx = ctx;
    w->waiting.end = &w->waiting.first;
    w->made.end = &w->made.first;
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->news, NULL);
    for (; w->n_threads < threads; w->n_threads++) {
        int fault = pthread_create(&w->threads[w->n_threads], NULL, work, w);
        if (fault == 0) continue;
        workers_free(w);
        return err_set(e, ERR_IO, "starting a thread: %s", strerror(fault));
    }
    *out = w;
    return true;
}

void workers_free(struct workers *w)
{
    if (!w) return;
    pthread_mutex_lock(&w->lock);
    w->ends = true;
    pthread_cond_broadcast(&w->news);
    pthread_mutex_unlock(&w->lock);
    for (int i = 0; i < w->n_threads; i++) pthread_join(w->threads[i], NULL);
    for (struct job *job; (job = take(&w->waiting));) job_free(job);
    for (struct job *job; (job = take(&w->made));) job_free(job);
    pthread_cond_destroy(&w->news);
    pthread_mutex_destroy(&w->lock);
    free(w);
}

bool workers_give(struct workers *w, struct job *job)
{
    pthread_mutex_lock(&w->lock);
    bool room = w->waiting.n < WAITING_MAX;
    if (room) put(&w->waiting, job);
    if (room) pthread_cond_signal(&w->news);
    pthread_mutex_unlock(&w->lock);
    return room;
}

struct job *workers_take(struct workers *w)
{
    pthread_mutex_lock(&w->lock);
    struct job *job = take(&w->made);
    pthread_mutex_unlock(&w->lock);
    return job;
}

void job_free(struct job *job)
{
    if (!job) return;
    exchange_free(job->exchange);
    free(job->argument);
    free(job->body);
    free(job);
}
