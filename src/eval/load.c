#include "eval/load.h"
#include "base/clock.h"
#include "engine/sample.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

enum {
    REFUSAL_BYTES_MAX = 600, /* of a body that says why */
    FILES_BESIDES = 16       /* than connections */
};

struct load;
struct flight {
    struct load *load;
    const struct load_request *request;
    struct load_answer *answer;
    struct load_http_call call;
    struct load_stream stream;
    struct err fault;
    char refusal[REFUSAL_BYTES_MAX + 1];
    size_t refusal_bytes;
    struct flight *next; /* of those whose connection waits to be closed */
};

struct load {
    const struct load_options *o;
    struct flight *flights;
    double *at;
    int64_t n, arrived, started, ended;
    double begin;
    struct event *turn; /* the loop's turn to start and close connections */
    struct flight *closing;
};

static double normal(uint64_t seed, uint64_t *counter)
{
    double u = 1 - sample_uniform(seed, (*counter)++), v = sample_uniform(seed, (*counter)++);
    return sqrt(-2 * log(u)) * cos(2 * M_PI * v);
}

/* Source: Marsaglia and Tsang, "A simple method for generating gamma variables" (2000). */
static double gamma_draw(double shape, uint64_t seed, uint64_t *counter)
{
    if (shape < 1)
        return gamma_draw(shape + 1, seed, counter) * pow(1 - sample_uniform(seed, (*counter)++), 1 / shape);
    double d = shape - 1.0 / 3, c = 1 / sqrt(9 * d);
    for (;;) {
        double x = normal(seed, counter), v = 1 + c * x;
        v = v * v * v;
        if (v > 0 && log(1 - sample_uniform(seed, (*counter)++)) < 0.5 * x * x + d * (1 - v + log(v)))
            return d * v;
    }
}

void load_arrivals(double *at, int64_t n, double rate, double burstiness, uint64_t seed)
{
    uint64_t counter = 0;
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        if (!isinf(rate)) sum += isinf(burstiness) ? 1 : gamma_draw(burstiness, seed, &counter);
        at[i] = sum;
    }
    if (sum > 0)
        for (int64_t i = 0; i < n; i++) at[i] *= (double)n / (rate * sum);
}

static void wake(struct load *l, double seconds)
{
    struct timeval after = { .tv_sec = (time_t)seconds, .tv_usec = (suseconds_t)(fmod(seconds, 1) * 1e6) };
    event_add(l->turn, &after);
}

static void fail(struct flight *f)
{
    if (!f->answer->error) f->answer->error = strdup(f->fault.text);
}

static void take_bytes(void *ctx, int status, const char *data, size_t n)
{
    struct flight *f = ctx;
    double now = clock_seconds();
    if (status != 200) {
        size_t room = REFUSAL_BYTES_MAX - f->refusal_bytes, part = n < room ? n : room;
        memcpy(f->refusal + f->refusal_bytes, data, part);
        f->refusal_bytes += part;
    } else if (!f->answer->error && !load_stream_push(&f->stream, f->answer, data, n, now, &f->fault))
        fail(f);
}

static void judge(struct flight *f, int status, const char *error)
{
    if (status && status != 200)
        err_set(&f->fault, ERR_IO, "HTTP status %d%s%s", status, f->refusal_bytes ? ": " : "", f->refusal);
    else if (error)
        err_set(&f->fault, ERR_IO, "%s", error);
    else if (load_stream_end(&f->stream, f->answer, &f->fault)) {
        f->answer->ok = true;
        return;
    }
    fail(f);
}

static void end_flight(void *ctx, int status, const char *error)
{
    struct flight *f = ctx;
    struct load *l = f->load;
    struct load_answer *a = f->answer;
    if (!a->error) judge(f, status, error);
    if (a->prompt_tokens < 0) a->prompt_tokens = f->request->prompt_tokens;
    if (a->output_tokens < 0) a->output_tokens = a->ttft > 0 ? 1 + a->n_itl : 0;
    load_stream_deinit(&f->stream);
    f->next = l->closing;
    l->closing = f;
    l->ended++;
    report_progress(l->o->report, "requests", (uint64_t)l->ended, (uint64_t)l->n);
    event_active(l->turn, EV_TIMEOUT, 0);
}

static void start(struct load *l, int64_t i)
{
    struct flight *f = &l->flights[i];
    struct load_answer *a = f->answer;
    a->start = clock_seconds();
    a->queued = a->start - (l->begin + l->at[i]);
    a->prompt_tokens = a->output_tokens = -1;
    if (load_http_start(l->o->http, &f->call, l->o->endpoint, f->request->body, &f->fault)) return;
    fail(f);
    end_flight(f, 0, NULL);
}

static void take_turn(evutil_socket_t fd, short what, void *ctx)
{
    struct load *l = ctx;
    (void)fd, (void)what;
    for (; l->closing; l->closing = l->closing->next) load_http_close(&l->closing->call);
    double now = clock_seconds() - l->begin;
    while (l->arrived < l->n && l->at[l->arrived] <= now) l->arrived++;
    int64_t most = l->o->max_concurrency > 0 ? l->o->max_concurrency : l->n;
    while (l->started < l->arrived && l->started - l->ended < most) start(l, l->started++);
    if (l->ended == l->n && !l->closing) event_base_loopbreak(load_http_base(l->o->http));
    if (l->arrived < l->n) wake(l, fmax(0, l->at[l->arrived] - (clock_seconds() - l->begin)));
}

/* A connection each: more than a shell's soft limit leaves. */
static void raise_file_limit(int64_t connections, const struct report *report)
{
    struct rlimit l;
    if (getrlimit(RLIMIT_NOFILE, &l) != 0) return;
    l.rlim_cur = l.rlim_max;
    setrlimit(RLIMIT_NOFILE, &l);
    if ((uint64_t)connections + FILES_BESIDES > l.rlim_max)
        report_warn(report,
                    "%lld requests at a time need as many open files, and the limit is %llu: those over "
                    "it will fail (ulimit -n)",
                    (long long)connections, (unsigned long long)l.rlim_max);
}

bool load_run(struct load_answer *answers, double *duration, const struct load_request *requests, int64_t n,
              const struct load_options *o, struct err *e)
{
    struct load l = { .o = o, .n = n };
    struct event_base *base = load_http_base(o->http);
    l.flights = calloc((size_t)n, sizeof *l.flights);
    l.at = calloc((size_t)n, sizeof *l.at);
    l.turn = event_new(base, -1, 0, take_turn, &l);
    bool ok = (l.flights && l.at && l.turn) || err_memory(e, "requests", (uint64_t)n * sizeof *l.flights);
    raise_file_limit(o->max_concurrency && o->max_concurrency < n ? o->max_concurrency : n, o->report);
    for (int64_t i = 0; ok && i < n; i++) {
        struct flight *f = &l.flights[i];
        *f = (struct flight){ .load = &l, .request = &requests[i], .answer = &answers[i] };
        f->call = (struct load_http_call){ .ctx = f, .bytes = take_bytes, .end = end_flight };
    }
    if (ok) {
        load_arrivals(l.at, n, o->rate, o->burstiness, o->seed);
        l.begin = clock_seconds();
        event_active(l.turn, EV_TIMEOUT, 0);
        event_base_dispatch(base);
        *duration = clock_seconds() - l.begin;
    }
    if (l.turn) event_free(l.turn);
    free(l.at);
    free(l.flights);
    return ok;
}
