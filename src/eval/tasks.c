#include "eval/tasks.h"
#include "base/doc.h"
#include "engine/prompt.h"
#include "engine/sample.h"
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LINE_BYTES_MAX = 64 << 20 };

void tasks_deinit(struct tasks *t)
{
    for (int64_t i = 0; i < t->n; i++) {
        free(t->items[i].prompt);
        free(t->items[i].system);
        free(t->items[i].answer);
        for (int k = 0; k < t->items[i].n_images; k++) free(t->items[i].images[k]);
        free(t->items[i].images);
    }
    free(t->items);
    *t = (struct tasks){ 0 };
}

static bool read_images(struct task *t, const json_t *images, struct err *e)
{
    size_t n = json_array_size(images);
    if (!images) return true;
    t->images = calloc(n + 1, sizeof *t->images);
    if (!t->images) return err_memory(e, "a task", n * sizeof *t->images);
    for (size_t i = 0; i < n; i++) {
        const char *source = json_string_value(json_array_get(images, i));
        t->images[i] = source ? strdup(source) : NULL;
        if (!source) return err_set(e, ERR_FORMAT, "images[%zu]: expected a string", i);
        if (!t->images[i]) return err_memory(e, "a task", strlen(source));
        t->n_images++;
    }
    return json_is_array(images) || err_set(e, ERR_FORMAT, "images: expected an array of strings");
}

static bool read_task(struct task *t, const json_t *line, struct err *e)
{
    const char *prompt, *answer, *system = NULL;
    if (!json_is_object(line)) return err_set(e, ERR_FORMAT, "expected an object");
    if (!doc_string(&prompt, line, "", "prompt", e) || !doc_string(&answer, line, "", "answer", e))
        return false;
    if (json_object_get(line, "system") && !doc_string(&system, line, "", "system", e)) return false;
    t->prompt = strdup(prompt);
    t->answer = strdup(answer);
    t->system = system ? strdup(system) : NULL;
    return ((t->prompt && t->answer && (t->system || !system)) || err_memory(e, "a task", sizeof *t)) &&
           read_images(t, json_object_get(line, "images"), e);
}

static bool add_task(struct tasks *t, const char *line, size_t bytes, int64_t number, struct err *e)
{
    json_t *v;
    struct task *grown = realloc(t->items, (size_t)(t->n + 1) * sizeof *grown);
    if (!grown) return err_memory(e, "tasks", (uint64_t)t->n * sizeof *grown);
    t->items = grown;
    t->items[t->n] = (struct task){ .line = number };
    if (bytes > LINE_BYTES_MAX) return err_set(e, ERR_LIMIT, "a line of %zu bytes", bytes);
    if (!doc_parse(&v, line, bytes, e)) return false;
    bool ok = read_task(&t->items[t->n++], v, e);
    json_decref(v);
    return ok;
}

static bool is_blank(const char *line)
{
    return line[strspn(line, " \t\r\n")] == 0;
}

bool tasks_load(struct tasks *t, const char *path, int64_t most, struct err *e)
{
    FILE *f = fopen(path, "re");
    char *line = NULL;
    size_t size = 0;
    bool ok = true;
    *t = (struct tasks){ 0 };
    if (!f) return err_errno(e, path);
    ssize_t n;
    for (int64_t number = 1; ok && (most == 0 || t->n < most) && (n = getline(&line, &size, f)) > 0;
         number++) {
        if (is_blank(line)) continue;
        ok = add_task(t, line, (size_t)n, number, e) || err_note(e, "%s: line %lld", path, (long long)number);
    }
    if (ok && ferror(f)) ok = err_errno(e, path);
    if (ok && t->n == 0) ok = err_set(e, ERR_FORMAT, "%s: no tasks", path);
    free(line);
    fclose(f);
    if (!ok) tasks_deinit(t);
    return ok;
}

/* Grading. */

struct part {
    const char *at;
    size_t bytes;
};

static struct part final_part(const char *text, size_t bytes)
{
    static const char end_think[] = "</think>", end_turn[] = "<|im_end|>";
    struct part p = { text, bytes };
    for (const char *at; (at = memmem(p.at, p.bytes, end_think, strlen(end_think)));) {
        size_t skip = (size_t)(at - p.at) + strlen(end_think);
        p = (struct part){ p.at + skip, p.bytes - skip };
    }
    const char *end = memmem(p.at, p.bytes, end_turn, strlen(end_turn));
    if (end) p.bytes = (size_t)(end - p.at);
    while (p.bytes && strchr(" \t\r\n", *p.at) && *p.at) p = (struct part){ p.at + 1, p.bytes - 1 };
    while (p.bytes && strchr(" \t\r\n", p.at[p.bytes - 1]) && p.at[p.bytes - 1]) p.bytes--;
    return p;
}

bool tasks_grade(const char *text, size_t bytes, const char *answer, bool in_reasoning)
{
    if (in_reasoning && !memmem(text, bytes, "</think>", strlen("</think>"))) return false;
    struct part found = final_part(text, bytes), wanted = final_part(answer, strlen(answer));
    return found.bytes == wanted.bytes && memcmp(found.at, wanted.at, found.bytes) == 0;
}

void tasks_interval(double *low, double *high, int64_t right, int64_t n)
{
    const double z = 1.959963984540054; /* 97.5 % of a normal distribution */
    double p = (double)right / (double)n, m = (double)n, square = z * z / m;
    double centre = (p + square / 2) / (1 + square);
    double half = z * sqrt(p * (1 - p) / m + square / (4 * m)) / (1 + square);
    *low = centre - half > 0 ? centre - half : 0;
    *high = centre + half < 1 ? centre + half : 1;
}

double tasks_mcnemar(int64_t a, int64_t b)
{
    int64_t n = a + b, few = a < b ? a : b;
    double sum = 0;
    for (int64_t i = 0; i <= few; i++)
        sum += exp(lgamma((double)n + 1) - lgamma((double)i + 1) - lgamma((double)(n - i) + 1) -
                   (double)n * log(2));
    return 2 * sum < 1 ? 2 * sum : 1;
}

/* Running. */

struct question {
    struct prompt prompt;
    struct picture *pictures; /* [n_pictures], whose rows the prompt has */
    int n_pictures;
    bool in_reasoning;
};

/* One sequence of the engine and the task it works on. */
struct slot {
    int64_t task; /* -1: none */
    int handle;
    int32_t next; /* the token to append */
    struct token_list tokens;
};

struct job {
    const struct tasks *tasks;
    const struct tasks_options *o;
    struct question *questions;
    struct picture_reader *reader; /* NULL: no task has images */
    struct task_result *results;
    struct engine *engine;
    uint32_t *allowed; /* tokens that may be sampled */
    struct slot *slots;
    struct row *rows;
    struct engine_run *runs;
    int64_t *index;
    int64_t started, done;
};

static json_t *user_message(const struct task *t)
{
    if (t->n_images == 0) return json_pack("{s:s,s:s}", "role", "user", "content", t->prompt);
    json_t *parts = json_array();
    for (int i = 0; i < t->n_images; i++) json_array_append_new(parts, json_pack("{s:s}", "type", "image"));
    json_array_append_new(parts, json_pack("{s:s,s:s}", "type", "text", "text", t->prompt));
    return json_pack("{s:s,s:o}", "role", "user", "content", parts);
}

static bool render(char **text, size_t *bytes, const struct task *t, const struct tasks_options *o,
                   struct err *e)
{
    struct chat_options chat = { .add_generation_prompt = true, .thinking = o->thinking };
    json_t *messages = json_array();
    if (t->system)
        json_array_append_new(messages, json_pack("{s:s,s:s}", "role", "system", "content", t->system));
    json_array_append_new(messages, user_message(t));
    bool ok = chat_render(text, bytes, o->template, messages, NULL, &chat, e);
    json_decref(messages);
    return ok;
}

/* The text of a task's prompt to tokens. */
static bool encode_task(struct question *q, struct token_list *tokens, const struct task *t,
                        const struct tasks_options *o, struct err *e)
{
    static const char open[] = "<|im_start|>", think[] = "<think>\n";
    char *text = NULL;
    size_t bytes = strlen(t->prompt);
    bool is_rendered = strncmp(t->prompt, open, strlen(open)) == 0;
    if (is_rendered && t->system)
        return err_set(e, ERR_FORMAT, "\"system\" beside a prompt that is a whole chat");
    if (!is_rendered && !render(&text, &bytes, t, o, e)) return false;
    const char *whole = text ? text : t->prompt;
    q->in_reasoning =
        bytes >= strlen(think) && memcmp(whole + bytes - strlen(think), think, strlen(think)) == 0;
    bool ok = tokenizer_encode(o->tokenizer, tokens, whole, bytes, 0, e);
    free(text);
    return ok && (tokens->n > 0 || err_set(e, ERR_FORMAT, "the prompt is empty"));
}

static bool check_tokens(const struct token_list *tokens, const struct config *c, struct err *e)
{
    for (size_t i = 0; i < tokens->n; i++)
        if (tokens->ids[i] >= c->vocab_size)
            return err_set(e, ERR_FORMAT, "the tokenizer gives token %d, the model has %lld", tokens->ids[i],
                           (long long)c->vocab_size);
    return true;
}

static bool read_pictures(struct job *j, struct question *q, const struct task *t, struct model *m,
                          struct err *e)
{
    if (t->n_images == 0) return true;
    q->pictures = calloc((size_t)t->n_images, sizeof *q->pictures);
    if (!q->pictures) return err_memory(e, "pictures", sizeof *q->pictures);
    if (!j->reader && !picture_reader_create(&j->reader, m, e)) return false;
    for (; q->n_pictures < t->n_images; q->n_pictures++)
        if (!picture_read(j->reader, &q->pictures[q->n_pictures], t->images[q->n_pictures], NULL, e))
            return false;
    return true;
}

static bool ask(struct job *j, struct question *q, const struct task *t, struct model *m, struct err *e)
{
    struct token_list tokens = { 0 };
    struct place_tokens places = { t->n_images ? m->config->image_token : -1, -1 };
    bool ok =
        encode_task(q, &tokens, t, j->o, e) && check_tokens(&tokens, m->config, e) &&
        read_pictures(j, q, t, m, e) &&
        prompt_create(&q->prompt, tokens.ids, (int64_t)tokens.n, places, q->pictures, q->n_pictures, 0, e);
    free(tokens.ids);
    return ok;
}

static bool ask_all(struct job *j, struct model *m, int64_t *context, struct err *e)
{
    for (int64_t i = 0; i < j->tasks->n; i++) {
        if (!ask(j, &j->questions[i], &j->tasks->items[i], m, e))
            return err_note(e, "task of line %lld", (long long)j->tasks->items[i].line);
        int64_t need = j->questions[i].prompt.n + j->o->max_tokens;
        if (need > *context) *context = need;
    }
    if (*context > m->config->max_position_embeddings)
        return err_set(e, ERR_LIMIT, "a prompt and its answer need %lld tokens, the model allows %lld",
                       (long long)*context, (long long)m->config->max_position_embeddings);
    return true;
}

static bool is_one_of(const int32_t *ids, int n, int32_t id)
{
    for (int i = 0; i < n; i++)
        if (ids[i] == id) return true;
    return false;
}

static bool finish(struct job *j, struct slot *s, bool is_cut, struct err *e)
{
    struct task_result *r = &j->results[s->task];
    const struct question *q = &j->questions[s->task];
    engine_close(j->engine, s->handle);
    if (!tokenizer_decode(j->o->tokenizer, s->tokens.ids, s->tokens.n, true, &r->text, &r->bytes, e))
        return false;
    r->prompt_tokens = q->prompt.n;
    r->tokens = (int64_t)s->tokens.n;
    r->is_cut = is_cut;
    r->is_right = tasks_grade(r->text, r->bytes, j->tasks->items[s->task].answer, q->in_reasoning);
    s->task = -1;
    report_progress(j->o->report, "answer", (uint64_t)++j->done, (uint64_t)j->tasks->n);
    return true;
}

/* The likeliest token becomes the slot's next, or the answer ends. */
static bool take_logits(struct job *j, struct slot *s, const float *logits, struct err *e)
{
    static const struct sampling greedy = { 0 };
    int32_t id = sample_token(&greedy, logits, engine_vocab(j->engine), 0, j->allowed);
    if (is_one_of(j->o->stop_tokens, j->o->n_stop_tokens, id)) return finish(j, s, false, e);
    s->tokens.ids[s->tokens.n++] = s->next = id; /* room for max_tokens */
    return (int64_t)s->tokens.n < j->o->max_tokens || finish(j, s, true, e);
}

static bool start(struct job *j, struct slot *s, struct err *e)
{
    const float *logits;
    s->task = j->started++;
    s->tokens.n = 0;
    const struct prompt *p = &j->questions[s->task].prompt;
    return engine_open(j->engine, &s->handle, e) &&
           engine_prefill_rows(j->engine, s->handle, p->rows, p->n, &logits, NULL, e) &&
           take_logits(j, s, logits, e);
}

/* One token for every slot at work. */
static bool step(struct job *j, struct err *e)
{
    struct slot *at_work[TASKS_SEQUENCES_MAX];
    int n = 0;
    struct mat hidden;
    for (int i = 0; i < j->o->sequences; i++) {
        struct slot *s = &j->slots[i];
        if (s->task < 0) continue;
        engine_text_rows(&j->rows[n], &s->next, 1, engine_position(j->engine, s->handle));
        j->runs[n] = (struct engine_run){ .handle = s->handle, .rows = &j->rows[n], .n = 1 };
        j->index[n] = n;
        at_work[n++] = s;
    }
    if (n == 0) return true;
    if (!engine_step(j->engine, j->runs, n, &hidden, e)) return false;
    int64_t batch = engine_logits_rows(j->engine);
    for (int64_t first = 0; first < n; first += batch) {
        int64_t count = n - first < batch ? n - first : batch;
        const float *logits = engine_logits_host(j->engine, hidden, j->index + first, count);
        for (int64_t i = 0; i < count; i++)
            if (!take_logits(j, at_work[first + i], logits + i * engine_vocab(j->engine), e)) return false;
    }
    return true;
}

static bool run(struct job *j, struct err *e)
{
    while (j->done < j->tasks->n) {
        for (int i = 0; i < j->o->sequences; i++)
            while (j->slots[i].task < 0 && j->started < j->tasks->n)
                if (!start(j, &j->slots[i], e))
                    return err_note(e, "task of line %lld",
                                    (long long)j->tasks->items[j->slots[i].task].line);
        if (!step(j, e)) return false;
    }
    return true;
}

static bool allocate(struct job *j, struct err *e)
{
    size_t n = (size_t)j->o->sequences;
    bool ok = true;
    j->slots = calloc(n, sizeof *j->slots);
    j->rows = calloc(n, sizeof *j->rows);
    j->runs = calloc(n, sizeof *j->runs);
    j->index = calloc(n, sizeof *j->index);
    for (size_t i = 0; j->slots && i < n; i++) {
        j->slots[i].task = -1;
        j->slots[i].tokens.ids = malloc((size_t)j->o->max_tokens * sizeof(int32_t));
        ok = ok && j->slots[i].tokens.ids;
    }
    return (ok && j->slots && j->rows && j->runs && j->index) || err_memory(e, "tasks", n * sizeof *j->rows);
}

static void free_questions(struct job *j)
{
    for (int64_t i = 0; j->questions && i < j->tasks->n; i++) {
        struct question *q = &j->questions[i];
        prompt_free(&q->prompt);
        for (int k = 0; k < q->n_pictures; k++) picture_free(&q->pictures[k]);
        free(q->pictures);
    }
    free(j->questions);
    picture_reader_free(j->reader);
}

static void release(struct job *j)
{
    engine_free(j->engine);
    for (int i = 0; j->slots && i < j->o->sequences; i++) free(j->slots[i].tokens.ids);
    free_questions(j);
    free(j->allowed);
    free(j->slots);
    free(j->rows);
    free(j->runs);
    free(j->index);
}

bool tasks_run(struct task_result *results, const struct tasks *t, struct model *m,
               const struct tasks_options *o, struct err *e)
{
    struct job j = { .tasks = t, .o = o, .results = results };
    struct engine_options eo = { .sequences = o->sequences, .kv = o->kv };
    j.questions = calloc((size_t)t->n, sizeof *j.questions);
    bool ok = (j.questions || err_memory(e, "tasks", (uint64_t)t->n * sizeof *j.questions)) &&
              ask_all(&j, m, &eo.context, e) && (!o->fits || o->fits(o->ctx, &eo, e)) &&
              engine_create(&j.engine, m, &eo, e) && allocate(&j, e) && run(&j, e);
    release(&j);
    return ok || err_note(e, "%s", m->checkpoint->path);
}

void tasks_free_results(struct task_result *results, int64_t n)
{
    for (int64_t i = 0; results && i < n; i++) free(results[i].text);
    free(results);
}
