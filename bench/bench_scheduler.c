/* What the scheduler costs: streams that generate at once through it, and the very same rows by engine steps
 * that look at no logits, as `quench bench -n` runs them. Random prompts of one token; draws at temperature 1
 * with top-k 20, which any seed repeats.
 * usage: bench_scheduler MODEL [STREAMS,... [TOKENS [RUNS [DRAFTS]]]]
 * CSV: streams, tokens a second through the scheduler, by steps alone, the share: medians of RUNS pairs.
 * With DRAFTS: what speculation brings, at temperature 1 and greedy. CSV: streams, temperature, tokens a
 * second without and with up to so many drafts a round, the share, drafts a round of a stream, share of them
 * right. */
#include "base/clock.h"
#include "engine/scheduler.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { STREAMS_MAX = 256, RUNS_MAX = 25 };

static struct checkpoint checkpoint;
static struct backend backend;
static struct model model;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t news = PTHREAD_COND_INITIALIZER;
static int64_t wakes;
static int32_t *tokens; /* [streams][1 + generated] */

static void check(bool ok, const struct err *e)
{
    if (ok) return;
    fprintf(stderr, "bench_scheduler: %s\n", e->text);
    exit(1);
}

static void wake(void *ctx, bool ended)
{
    (void)ended;
    (void)ctx;
    pthread_mutex_lock(&lock);
    wakes++;
    pthread_cond_signal(&news);
    pthread_mutex_unlock(&lock);
}

/* What has come of a stream, at most eight events of it. False: nothing had. */
static bool take(struct request *r, int32_t *to, int *count, int *left)
{
    struct request_event events[8];
    int got = request_take(r, events, 8);
    for (int k = 0; k < got; k++) {
        if (events[k].kind == REQUEST_TOKEN)
            to[(*count)++] = events[k].token.id;
        else if (events[k].kind == REQUEST_FINISHED)
            (*left)--;
    }
    return got > 0;
}

/* Takes what has come of each stream until all have ended. */
static void collect(struct request **requests, int streams, int n)
{
    int count[STREAMS_MAX] = { 0 }, left = streams;
    int64_t seen = 0;
    while (left > 0) {
        pthread_mutex_lock(&lock);
        while (wakes == seen) pthread_cond_wait(&news, &lock);
        seen = wakes;
        pthread_mutex_unlock(&lock);
        for (int i = 0; i < streams; i++)
            for (bool more = true; more;)
                more = take(requests[i], &tokens[i * (n + 1) + 1], &count[i], &left);
    }
}

static double through_scheduler(struct scheduler *s, int streams, int n, float temperature)
{
    struct request *requests[STREAMS_MAX];
    struct err e = { 0 };
    pthread_mutex_lock(&lock);
    wakes = 0;
    pthread_mutex_unlock(&lock);
    double begin = clock_seconds();
    for (int i = 0; i < streams; i++) {
        struct request_options o = { .prompt = &tokens[i * (n + 1)],
                                     .n_prompt = 1,
                                     .sampling = { temperature, 20, 0, 0, (uint64_t)i },
                                     .max_tokens = n,
                                     .top_logprobs = -1,
                                     .prompt_logprobs = -1 };
        check(scheduler_submit(s, &requests[i], &o, &e), &e);
    }
    collect(requests, streams, n);
    double seconds = clock_seconds() - begin;
    for (int i = 0; i < streams; i++) request_free(requests[i]);
    return seconds;
}

static double by_steps(struct engine *g, int streams, int n)
{
    int handles[STREAMS_MAX];
    struct row rows[STREAMS_MAX];
    struct engine_run runs[STREAMS_MAX];
    int64_t index[STREAMS_MAX];
    struct err e = { 0 };
    double begin = clock_seconds();
    for (int i = 0; i < streams; i++) check(engine_open(g, &handles[i], &e), &e);
    for (int at = 0; at < n; at++) {
        struct mat hidden;
        float first;
        for (int i = 0; i < streams; i++) {
            engine_text_rows(&rows[i], &tokens[i * (n + 1) + at], 1, at);
            runs[i] = (struct engine_run){ .handle = handles[i], .rows = &rows[i], .n = 1 };
            index[i] = i;
        }
        check(engine_step(g, runs, streams, &hidden, &e), &e);
        struct mat logits = engine_logits(g, hidden, index, streams);
        backend.ops->download(backend.queue, &first, logits.data, sizeof first);
        check(engine_wait(g, &e), &e);
    }
    for (int i = 0; i < streams; i++) engine_close(g, handles[i]);
    return clock_seconds() - begin;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void compare(int streams, int n, int runs)
{
    double seconds[2][RUNS_MAX];
    struct err e = { 0 };
    struct engine_options o = { .context = n + 2, .sequences = streams, .step_rows = streams + 96 };
    struct engine *g;
    struct scheduler *s;
    for (int i = 0; i < streams; i++) tokens[i * (n + 1)] = (i * 37 + 11) % 2000;
    check(engine_create(&g, &model, &o, &e), &e);
    for (int run = 0; run <= runs; run++) { /* the first only warms up */
        struct scheduler_options so = { .engine = g, .model = &model, .no_pictures = true, .wake = wake };
        check(scheduler_create(&s, &so, &e), &e);
        double through = through_scheduler(s, streams, n, 1);
        scheduler_free(s);
        double alone = by_steps(g, streams, n);
        if (run == 0) continue;
        seconds[0][run - 1] = through;
        seconds[1][run - 1] = alone;
    }
    engine_free(g);
    for (int i = 0; i < 2; i++) qsort(seconds[i], (size_t)runs, sizeof seconds[i][0], by_value);
    double all = (double)streams * n, a = all / seconds[0][runs / 2], b = all / seconds[1][runs / 2];
    printf("%d,%.0f,%.0f,%.1f%%\n", streams, a, b, 100 * a / b);
    fflush(stdout);
}

/* One pair a run: without drafts, with them. */
static void speculate(int streams, int n, int runs, int drafts, float temperature)
{
    double seconds[2][RUNS_MAX], share[RUNS_MAX];
    struct err e = { 0 };
    struct engine *g[2];
    struct scheduler *s[2];
    struct scheduler_stats stats, before;
    for (int i = 0; i < streams; i++) tokens[i * (n + 1)] = (i * 37 + 11) % 2000;
    for (int i = 0; i < 2; i++) {
        struct engine_options o = { .context = n + 2 + drafts,
                                    .sequences = streams,
                                    .step_rows = streams * (drafts + 1) + 96,
                                    .drafts = i ? drafts : 0 };
        check(engine_create(&g[i], &model, &o, &e), &e);
        struct scheduler_options so = { .engine = g[i], .model = &model, .no_pictures = true, .wake = wake };
        check(scheduler_create(&s[i], &so, &e), &e);
    }
    for (int run = -2; run < runs; run++) /* the first two warm up, and learn what drafts cost */
        for (int i = 0; i < 2; i++) {
            if (run == 0 && i == 0) scheduler_stats(s[1], &before);
            double took = through_scheduler(s[i], streams, n, temperature);
            if (run >= 0) seconds[i][run] = took;
        }
    scheduler_stats(s[1], &stats);
    for (int run = 0; run < runs; run++) share[run] = seconds[0][run] / seconds[1][run];
    qsort(share, (size_t)runs, sizeof *share, by_value);
    for (int i = 0; i < 2; i++) {
        scheduler_free(s[i]);
        engine_free(g[i]);
        qsort(seconds[i], (size_t)runs, sizeof seconds[i][0], by_value);
    }
    double drafted = (double)(stats.drafted - before.drafted),
           right = (double)(stats.accepted - before.accepted);
    double all = (double)streams * n, a = all / seconds[0][runs / 2], b = all / seconds[1][runs / 2];
    printf("%d,%g,%.0f,%.0f,%.1f%%,%.2f,%.1f%%\n", streams, (double)temperature, a, b, 100 * share[runs / 2],
           drafted / (all * runs - right), drafted > 0 ? 100 * right / drafted : 0);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    struct err e = { 0 };
    const char *streams = argc > 2 ? argv[2] : "1,64";
    int n = argc > 3 ? atoi(argv[3]) : 128, runs = argc > 4 ? atoi(argv[4]) : 5;
    int drafts = argc > 5 ? atoi(argv[5]) : 0;
    if (argc < 2 || n < 1 || runs < 1 || runs > RUNS_MAX || drafts < 0 || drafts > DRAFTS_MAX) {
        fprintf(stderr, "usage: bench_scheduler MODEL [STREAMS,... [TOKENS [RUNS [DRAFTS]]]]\n");
        return 2;
    }
    check(checkpoint_open(&checkpoint, argv[1], &e), &e);
    check(backend_create(&backend, &(struct backend_options){ .rounded = true }, &e), &e);
    check(model_init(&model, &checkpoint, &backend, NULL, &e) && model_bind_all(&model, &e), &e);
    check(drafts == 0 || model_bind_mtp(&model, true, &e), &e);
    tokens = calloc((size_t)STREAMS_MAX * (size_t)(n + 1), sizeof *tokens);
    if (!tokens) return 1;
    printf(drafts ? "streams,temperature,plain,drafting,share,drafts,right\n"
                  : "streams,scheduler,steps,share\n");
    for (const char *at = streams; *at; at += strcspn(at, ","), at += *at == ',') {
        int count = atoi(at);
        if (count < 1 || count > STREAMS_MAX) return 2;
        if (drafts == 0) compare(count, n, runs);
        for (int greedy = 0; drafts > 0 && greedy < 2; greedy++)
            speculate(count, n, runs, drafts, greedy ? 0 : 1);
    }
    free(tokens);
    model_deinit(&model);
    backend_destroy(&backend);
    checkpoint_close(&checkpoint);
}
