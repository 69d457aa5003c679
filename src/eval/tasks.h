/* Questions with known answers, put to a model greedily, several at once; graded by exact match.
 * A file of tasks has one JSON object a line: "prompt" and "answer", and perhaps "system" and "images"
 * (paths or data: URLs, shown before the prompt's text). The prompt is a
 * user's message, rendered with the model's chat template; one that begins with <|im_start|> is a whole
 * rendered chat and stays as it is. Grading: of the answer and of the generated text, what follows the last
 * </think>, up to the first <|im_end|>, without whitespace at its ends; the two are right when they are the
 * same bytes. A text that never left its reasoning is wrong. */
#ifndef EVAL_TASKS_H
#define EVAL_TASKS_H
#include "base/report.h"
#include "engine/engine.h"
#include "tokenizer/chat.h"
#include "tokenizer/tokenizer.h"

struct task {
    char *prompt, *system, *answer; /* system: NULL when there is none */
    char **images;
    int n_images;
    int64_t line;
};
struct tasks {
    struct task *items;
    int64_t n;
};
/* Errors name the line. At most `most` tasks are read; 0: all. At least one, or an error. */
bool tasks_load(struct tasks *t, const char *path, int64_t most, struct err *e);
void tasks_deinit(struct tasks *t); /* accepts a zeroed one */

enum { TASKS_SEQUENCES_MAX = 64 };

struct tasks_options {
    const struct tokenizer *tokenizer;
    const struct chat_template *template;
    enum chat_thinking thinking;
    int sequences; /* at a time, 1 to TASKS_SEQUENCES_MAX */
    int64_t max_tokens;
    enum kv_dtype kv;
    const int32_t *stop_tokens, *never;
    int n_stop_tokens, n_never;
    const struct report *report;
    /* Whether such an engine fits, asked before it is made; NULL: yes. */
    bool (*fits)(void *ctx, const struct engine_options *o, struct err *e);
    void *ctx;
};
struct task_result {
    char *text; /* generated, special tokens left out; malloc'd */
    size_t bytes;
    int64_t prompt_tokens, tokens;
    bool is_right, is_cut; /* cut: max_tokens came before a stop token */
};
/* results: [t->n], zeroed; freed with tasks_free_results also after a failure. */
bool tasks_run(struct task_result *results, const struct tasks *t, struct model *m,
               const struct tasks_options *o, struct err *e);
void tasks_free_results(struct task_result *results, int64_t n);

/* Whether a generated text answers a task; in_reasoning: its prompt ended in an open <think>. */
bool tasks_grade(const char *text, size_t bytes, const char *answer, bool in_reasoning);
/* Wilson's 95 % interval of a share. */
void tasks_interval(double *low, double *high, int64_t right, int64_t n);
/* Two-sided exact McNemar test: the chance that `a` and `b` tasks, each right for one model only, differ so
 * much when neither model is better. */
double tasks_mcnemar(int64_t a, int64_t b);
#endif
