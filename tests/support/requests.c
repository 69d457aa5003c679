#include "support/requests.h"
#include "support/sanitized.h"
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

void demo_load(struct demo *d)
{
    struct err e = { 0 };
    const char *device = getenv("QUENCH_DEVICE");
    bool on_gpu = device && strcmp(device, "cuda") == 0;
    struct backend_options o = { .device = DEVICE_CPU, .threads = 2 };
    if (on_gpu) o = (struct backend_options){ .device = DEVICE_CUDA, .rounded = true };
    *d = (struct demo){ 0 };
    load_model(&d->loaded, "models/demo", &o);
    must(model_bind_mtp(&d->loaded.model, true, &e), &e);
    must(tokenizer_load(&d->tokenizer, "models/demo", &e), &e);
}

void demo_unload(struct demo *d)
{
    tokenizer_free(d->tokenizer);
    unload_model(&d->loaded);
}

struct token_list demo_encode(const struct demo *d, const char *text)
{
    struct token_list list = { 0 };
    struct err e = { 0 };
    must(tokenizer_encode(d->tokenizer, &list, text, strlen(text), 0, &e), &e);
    return list;
}

static void wake(void *ctx, bool ended)
{
    (void)ended;
    struct service *s = ctx;
    pthread_mutex_lock(&s->lock);
    s->wakes++;
    pthread_cond_broadcast(&s->news);
    pthread_mutex_unlock(&s->lock);
}

void service_start(struct service *s, struct demo *d, struct engine_options g, struct scheduler_options o)
{
    struct err e = { 0 };
    *s = (struct service){ .lock = PTHREAD_MUTEX_INITIALIZER, .news = PTHREAD_COND_INITIALIZER };
    if (!g.context) g.context = 1024;
    if (!g.sequences) g.sequences = 16;
    must(engine_create(&s->engine, &d->loaded.model, &g, &e), &e);
    o.engine = s->engine;
    o.model = &d->loaded.model;
    o.ctx = s;
    o.wake = wake;
    must(scheduler_create(&s->scheduler, &o, &e), &e);
}

void service_stop(struct service *s)
{
    scheduler_free(s->scheduler);
    engine_free(s->engine);
}

int64_t service_wakes(struct service *s)
{
    pthread_mutex_lock(&s->lock);
    int64_t n = s->wakes;
    pthread_mutex_unlock(&s->lock);
    return n;
}

void service_await(struct service *s, int64_t seen)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += 600;
    pthread_mutex_lock(&s->lock);
    int late = 0;
    while (s->wakes == seen && !late) late = pthread_cond_timedwait(&s->news, &s->lock, &until);
    pthread_mutex_unlock(&s->lock);
    if (late) fail_msg("no news from the scheduler in ten minutes");
}

struct request_options answer_options(const int32_t *prompt, int64_t n, int64_t most)
{
    return (struct request_options){ .prompt = prompt,
                                     .n_prompt = n,
                                     .max_tokens = most,
                                     .top_logprobs = 3,
                                     .prompt_logprobs = -1,
                                     .constraint_after = -1,
                                     .thinking_budget = -1 };
}

void answer_submit(struct answer *a, struct service *s, const struct request_options *o)
{
    struct err e = { 0 };
    *a = (struct answer){ 0 };
    must(scheduler_submit(s->scheduler, &a->request, o, &e), &e);
}

static void take(struct answer *a, const struct request_event *event)
{
    assert_false(a->finished);
    if (event->kind == REQUEST_TOKEN) {
        assert_true(a->n < ANSWER_MOST);
        a->tokens[a->n++] = *event;
    } else if (event->kind == REQUEST_PROMPT) {
        a->prompt[a->n_prompt++] = *event;
    } else {
        a->finished = true;
        a->finish = event->finish;
        a->stop_token = event->stop_token;
    }
}

void answer_pump(struct answer *a, int most)
{
    struct request_event events[16];
    int n;
    while (a->request && !a->finished && (n = request_take(a->request, events, most < 16 ? most : 16)) > 0)
        for (int i = 0; i < n; i++) take(a, &events[i]);
    if (!a->request || !a->finished) return;
    request_usage(a->request, &a->usage);
    assert_int_equal(a->usage.answer_tokens, a->n);
    if (a->finish == FINISHED_ERROR) assert_true(request_error(a->request)[0]);
    request_free(a->request);
    a->request = NULL;
}

void answer_finish_all(struct answer *a, int n, struct service *s)
{
    for (int left = n; left > 0;) {
        int64_t seen = service_wakes(s);
        left = 0;
        for (int i = 0; i < n; i++) {
            answer_pump(&a[i], 16);
            left += !a[i].finished;
        }
        if (left) service_await(s, seen);
    }
}

void answer_ask(struct answer *a, struct service *s, const struct request_options *o)
{
    answer_submit(a, s, o);
    answer_finish_all(a, 1, s);
}

void answer_same(const struct answer *a, const struct answer *b, const char *what)
{
    if (a->n != b->n || a->finish != b->finish || a->stop_token != b->stop_token)
        fail_msg("%s: %d tokens and %d tokens", what, a->n, b->n);
    assert_int_equal(a->n_prompt, b->n_prompt);
    for (int i = 0; i < a->n; i++)
        if (memcmp(&a->tokens[i], &b->tokens[i], sizeof a->tokens[i]) != 0)
            fail_msg("%s: token %d of %d: %d %.9g and %d %.9g", what, i, a->n, a->tokens[i].token.id,
                     (double)a->tokens[i].token.logprob, b->tokens[i].token.id,
                     (double)b->tokens[i].token.logprob);
    assert_memory_equal(a->prompt, b->prompt, (size_t)a->n_prompt * sizeof a->prompt[0]);
}

uint64_t random_state = 1;
int64_t random_below(int64_t n)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (int64_t)((random_state >> 33) % (uint64_t)n);
}

int rounds(int n)
{
    int each = RACES ? 6 : SANITIZED ? 3 : 1;
    return (n + each - 1) / each;
}
