/* What tests of the scheduler share: one over the demo model, requests, and what came of them. */
#ifndef TESTS_SUPPORT_REQUESTS_H
#define TESTS_SUPPORT_REQUESTS_H
#include "engine/scheduler.h"
#include "support/models.h"
#include "tokenizer/tokenizer.h"
#include <pthread.h>

enum { ANSWER_MOST = 128, PROMPT_MOST = 1024, IM_END = 2024, NEWLINE = 198 }; /* ids of the demo's */

struct demo {
    struct loaded loaded; /* the MTP head is bound */
    struct tokenizer *tokenizer;
};
/* On a CPU; with QUENCH_DEVICE=cuda on a GPU. */
void demo_load(struct demo *d);
void demo_unload(struct demo *d);
struct token_list demo_encode(const struct demo *d, const char *text);

/* A scheduler and who waits for its news. One at a time over a model: its thread goes on using the backend
 * when requests have got their last event, to keep and store what is known of them. */
struct service {
    struct engine *engine;
    struct scheduler *scheduler;
    pthread_mutex_t lock;
    pthread_cond_t news;
    int64_t wakes;
};
/* engine, model, wake and ctx of the options are set here; a context of 0 is 1024, sequences 0 are 16. */
void service_start(struct service *s, struct demo *d, struct engine_options g, struct scheduler_options o);
void service_stop(struct service *s);
int64_t service_wakes(struct service *s);
void service_await(struct service *s, int64_t seen); /* more wakes than that; fails after ten minutes */

/* What came of a request. */
struct answer {
    struct request *request;
    struct request_event tokens[ANSWER_MOST], prompt[PROMPT_MOST];
    int n, n_prompt;
    bool finished;
    enum request_finish finish;
    int32_t stop_token;
    struct request_usage usage;
};
/* Greedy, at most `most` tokens, with the scores of the three likeliest. */
struct request_options answer_options(const int32_t *prompt, int64_t n, int64_t most);
void answer_submit(struct answer *a, struct service *s, const struct request_options *o);
/* Takes what there is, `most` events at a time; frees the request after its last event. */
void answer_pump(struct answer *a, int most);
void answer_finish_all(struct answer *a, int n, struct service *s);
void answer_ask(struct answer *a, struct service *s, const struct request_options *o);
/* Every event has the same bits. */
void answer_same(const struct answer *a, const struct answer *b, const char *what);

/* A small generator: the tests' choices repeat. */
extern uint64_t random_state;
int64_t random_below(int64_t n);

/* Rounds of a test: a sanitizer of threads makes each many times as long. */
int rounds(int n);
#endif
