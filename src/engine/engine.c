#include "engine/sequence.h"
#include <assert.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

enum { LOGITS_BYTES = 64 << 20 }; /* of one batch of logits: bounds memory for large vocabularies */

static void set_defaults(struct engine_options *o, const struct config *c, const struct backend *backend)
{
    if (o->context == 0) o->context = c->max_position_embeddings < 4096 ? c->max_position_embeddings : 4096;
    if (o->sequences == 0) o->sequences = 1;
    if (o->step_rows == 0) o->step_rows = backend->step_rows;
    if (o->step_rows < o->drafts + 1) o->step_rows = o->drafts + 1;
    if (o->step_rows > o->context * o->sequences) o->step_rows = o->context * o->sequences;
}

static int64_t logits_rows_of(const struct engine_options *o, const struct config *c)
{
    int64_t n = LOGITS_BYTES / (c->vocab_size * (int64_t)sizeof(float));
    if (n < o->drafts + 1) n = o->drafts + 1;
    if (n > o->step_rows) n = o->step_rows;
    return n < 1 ? 1 : n;
}

uint64_t engine_step_bytes(const struct config *c, const struct backend *b,
                           const struct engine_options *options)
{
    struct engine_options o = *options;
    set_defaults(&o, c, b);
    return step_bytes(c, b, o.drafts > 0, o.step_rows, logits_rows_of(&o, c), o.context);
}

static bool take_host_memory(struct engine *g, struct err *e)
{
    int64_t n_seq = g->o.sequences, lists = (n_seq + g->o.snapshots) * g->pages_each, pages = g->o.pages;
    g->sequences = calloc((size_t)n_seq, sizeof *g->sequences);
    g->snapshots = calloc((size_t)g->o.snapshots + 1, sizeof *g->snapshots);
    g->page_memory = calloc((size_t)(lists + 2 * pages), sizeof *g->page_memory);
    g->rows = calloc((size_t)g->o.step_rows, sizeof *g->rows);
    g->spans = calloc((size_t)n_seq, sizeof *g->spans);
    g->states = calloc((size_t)g->model->config->n_layers + 1, sizeof *g->states);
    g->head_rows = calloc((size_t)g->o.step_rows, sizeof *g->head_rows);
    g->head_index = calloc((size_t)g->o.step_rows, sizeof *g->head_index);
    g->head_spans = calloc((size_t)n_seq, sizeof *g->head_spans);
    g->guesses = calloc((size_t)n_seq, sizeof *g->guesses);
    g->host_logits = malloc((size_t)(g->logits_rows * g->model->config->vocab_size) * sizeof *g->host_logits);
    if (!g->sequences || !g->snapshots || !g->page_memory || !g->rows || !g->spans || !g->states ||
        !g->host_logits || !g->head_rows || !g->head_index || !g->head_spans || !g->guesses)
        return err_memory(e, "sequences", (uint64_t)(lists + 2 * pages) * sizeof *g->page_memory);
    g->free_pages = g->page_memory + lists;
    g->holders = g->free_pages + pages;
    for (int64_t i = 0; i < n_seq; i++) g->sequences[i].pages = g->page_memory + i * g->pages_each;
    for (int64_t i = 0; i < g->o.snapshots; i++)
        g->snapshots[i].pages = g->page_memory + (n_seq + i) * g->pages_each;
    for (int64_t i = 0; i < pages; i++) g->free_pages[g->n_free++] = (int32_t)(pages - 1 - i);
    return true;
}

int engine_states(const struct engine *g)
{
    return g->model->config->n_layers + (g->o.drafts > 0);
}

static bool take_state(struct engine *g, struct err *e)
{
    for (int i = 0; i < engine_states(g); i++)
        if (!layer_state_create(&g->states[i], g->model, i, g->o.kv, g->o.pages,
                                g->o.sequences + g->o.snapshots, e) ||
            (g->o.drafts &&
             !layer_state_add_log(&g->states[i], g->model, i, g->o.sequences, g->o.drafts + 1, e)))
            return err_note(e, "context of %" PRId64 " tokens for %d sequences", g->o.context,
                            g->o.sequences);
    return step_create(&g->step, g->model, g->o.step_rows, g->logits_rows, g->o.context, e);
}

bool engine_create(struct engine **out, struct model *m, const struct engine_options *o, struct err *e)
{
    *out = NULL;
    struct engine *g = calloc(1, sizeof *g);
    if (!g) return err_memory(e, "engine", sizeof *g);
    g->model = m;
    g->o = *o;
    set_defaults(&g->o, m->config, m->backend);
    g->pages_each = (g->o.context + KV_PAGE - 1) / KV_PAGE;
    if (g->o.pages == 0) g->o.pages = g->pages_each * g->o.sequences;
    g->logits_rows = logits_rows_of(&g->o, m->config);
    bool ok =
        g->o.context <= m->config->max_position_embeddings ||
        err_set(e, ERR_LIMIT, "a context of %" PRId64 " tokens was asked for, the model allows %" PRId64,
                g->o.context, m->config->max_position_embeddings);
    assert(g->o.drafts >= 0 && g->o.drafts <= DRAFTS_MAX && (!g->o.drafts || m->mtp.fc));
    ok = ok && take_host_memory(g, e) && take_state(g, e);
    if (ok)
        *out = g;
    else
        engine_free(g);
    return ok;
}

void engine_free(struct engine *g)
{
    if (!g) return;
    step_free(g->step);
    g->model->backend->ops->memory_free(g->model->backend->queue, g->allowed);
    for (int i = 0; g->states && i <= g->model->config->n_layers; i++)
        layer_state_free(&g->states[i], g->model);
    free(g->states);
    free(g->sequences);
    free(g->snapshots);
    free(g->page_memory);
    free(g->rows);
    free(g->spans);
    free(g->head_rows);
    free(g->head_index);
    free(g->head_spans);
    free(g->guesses);
    free(g->host_logits);
    free(g);
}

int64_t engine_context(const struct engine *g)
{
    return g->o.context;
}

int64_t engine_step_rows(const struct engine *g)
{
    return g->o.step_rows;
}

int engine_sequences(const struct engine *g)
{
    return g->o.sequences;
}

int engine_snapshots(const struct engine *g)
{
    return g->o.snapshots;
}

int64_t engine_pages(const struct engine *g)
{
    return g->o.pages;
}

int64_t engine_pages_free(const struct engine *g)
{
    return g->n_free;
}

int engine_drafts(const struct engine *g)
{
    return g->o.drafts;
}

bool engine_wait(struct engine *g, struct err *e)
{
    const struct backend *b = g->model->backend;
    return b->ops->wait(b->queue, e);
}

int64_t engine_logits_rows(const struct engine *g)
{
    return g->logits_rows;
}

bool engine_few_differ(const struct engine *g)
{
    return g->model->backend->few_differ;
}

int64_t engine_vocab(const struct engine *g)
{
    return g->model->config->vocab_size;
}

int64_t engine_length(const struct engine *g, int handle)
{
    return g->sequences[handle].length;
}

int64_t engine_position(const struct engine *g, int handle)
{
    return g->sequences[handle].length + g->sequences[handle].shift;
}

/* Past the largest position so far, `before` among them. */
static int64_t next_position(const struct row *rows, int64_t n, int64_t before)
{
    for (int64_t i = 0; i < n; i++)
        for (int k = 0; k < 3; k++)
            if (rows[i].position[k] >= before) before = rows[i].position[k] + (int64_t)1;
    return before;
}

bool engine_open(struct engine *g, int *handle, struct err *e)
{
    for (int i = 0; i < g->o.sequences; i++) {
        if (g->sequences[i].open) continue;
        g->sequences[i] = (struct sequence){ .open = true, .pages = g->sequences[i].pages };
        for (int l = 0; l < g->model->config->n_layers; l++) layer_state_reset(&g->states[l], g->model, l, i);
        *handle = i;
        return true;
    }
    return err_set(e, ERR_LIMIT, "all %d sequences are in use", g->o.sequences);
}

void engine_close(struct engine *g, int handle)
{
    struct sequence *s = &g->sequences[handle];
    while (s->n_pages > 0) engine_let_page(g, s->pages[--s->n_pages]);
    *s = (struct sequence){ .pages = s->pages };
}

static bool no_room(const struct engine *g, int64_t tokens, struct err *e)
{
    return err_set(e, ERR_LIMIT, "%" PRId64 " tokens do not fit a context of %" PRId64, tokens, g->o.context);
}

int32_t engine_take_page(struct engine *g)
{
    int32_t page = g->free_pages[--g->n_free];
    g->holders[page] = 1;
    return page;
}

void engine_let_page(struct engine *g, int32_t page)
{
    if (--g->holders[page] == 0) g->free_pages[g->n_free++] = page;
}

/* Pages that a sequence of so many tokens lacks. */
static int64_t lacking(const struct sequence *s, int64_t tokens)
{
    int64_t n = (tokens + KV_PAGE - 1) / KV_PAGE - s->n_pages;
    return n > 0 ? n : 0;
}

static bool take_pages(struct engine *g, struct sequence *s, int64_t tokens)
{
    int64_t n = lacking(s, tokens);
    if (n > g->n_free) return false;
    for (; n > 0; n--) s->pages[s->n_pages++] = engine_take_page(g);
    return true;
}

bool engine_reserve(struct engine *g, int handle, int64_t n)
{
    struct sequence *s = &g->sequences[handle];
    return take_pages(g, s, s->length + n);
}

static bool no_pages(const struct engine *g, struct err *e)
{
    return err_set(e, ERR_BUSY, "all %" PRId64 " KV pages are in use", g->o.pages);
}

bool engine_skip(struct engine *g, int handle, int64_t n, struct err *e)
{
    struct sequence *s = &g->sequences[handle];
    if (n > g->o.context - s->length) return no_room(g, s->length + n, e);
    if (!take_pages(g, s, s->length + n)) return no_pages(g, e);
    s->length += n;
    s->head_length += n;
    s->kept = 0;
    s->n_fresh = 0;
    for (int i = 0; n > 0 && i < engine_states(g); i++)
        if (!layer_state_noise(&g->states[i], g->model, i, s->pages, s->n_pages, handle, e)) return false;
    return true;
}

/* What the MTP head sees of a sequence: for each of its rows the token that came after. */

/* A step of the head being put together. */
struct head_step {
    int64_t n, n_spans;
};

static void begin_span(struct engine *g, struct head_step *h, const struct sequence *s, int64_t past)
{
    g->head_spans[h->n_spans++] = (struct span){ .first = h->n, .past = past, .pages = s->pages };
}

/* Hidden row `index`, of a token at the position of `at`, and the token after it. */
static void add_row(struct engine *g, struct head_step *h, int64_t index, const struct row *at,
                    const struct row *after)
{
    g->head_rows[h->n] = *after;
    memcpy(g->head_rows[h->n].position, at->position, sizeof at->position);
    g->head_index[h->n++] = index;
    g->head_spans[h->n_spans - 1].n++;
}

static struct step_rows head_rows(const struct engine *g, const struct head_step *h)
{
    return (
        struct step_rows){ .rows = g->head_rows, .n = h->n, .spans = g->head_spans, .n_spans = h->n_spans };
}

static void show(struct engine *g, const struct head_step *h)
{
    struct step_rows rows = head_rows(g, h);
    if (h->n > 0)
        step_mtp_see(g->step, &rows, g->hidden, g->head_index, &g->states[g->model->config->n_layers]);
}

/* All rows of the last step's prompts but each one's last, whose next token is not known. */
static void show_prompts(struct engine *g, int n_runs)
{
    struct head_step h = { 0 };
    for (int i = 0; i < n_runs; i++) {
        const struct span *span = &g->spans[i];
        struct sequence *s = &g->sequences[span->slot];
        if (s->tentative || span->n < 2) continue;
        begin_span(g, &h, s, s->head_length);
        for (int64_t r = span->first; r + 1 < span->first + span->n; r++)
            add_row(g, &h, r, &g->rows[r], &g->rows[r + 1]);
        s->head_length += span->n - 1;
        s->fresh_first += span->n - 1;
        s->n_fresh = 1;
    }
    show(g, &h);
}

/* The last rows of sequences that a prompt follows, while their hidden rows are there. */
static void show_boundaries(struct engine *g, const struct engine_run *runs, int n_runs)
{
    struct head_step h = { 0 };
    for (int i = 0; g->o.drafts && i < n_runs; i++) {
        struct sequence *s = &g->sequences[runs[i].handle];
        int64_t end = s->fresh_first + s->n_fresh;
        if (runs[i].tentative || runs[i].n < 2 || s->n_fresh == 0) continue;
        begin_span(g, &h, s, s->head_length);
        for (int64_t r = s->fresh_first; r < end; r++)
            add_row(g, &h, r, &g->rows[r], r + 1 < end ? &g->rows[r + 1] : &runs[i].rows[0]);
        s->head_length += s->n_fresh;
    }
    show(g, &h);
}

bool engine_step(struct engine *g, const struct engine_run *runs, int n_runs, struct mat *hidden,
                 struct err *e)
{
    struct step_rows step = { .rows = g->rows, .spans = g->spans, .n_spans = n_runs, .prompts = true };
    int64_t pages = 0;
    for (int i = 0; i < n_runs; i++) {
        struct sequence *s = &g->sequences[runs[i].handle];
        step.prompts = step.prompts && runs[i].prompt;
        if (runs[i].n > g->o.context - s->length) return no_room(g, s->length + runs[i].n, e);
        step.n += runs[i].n;
        if (step.n > g->o.step_rows)
            return err_set(e, ERR_LIMIT, "%" PRId64 " rows in a step of at most %" PRId64, step.n,
                           g->o.step_rows);
        pages += lacking(s, s->length + runs[i].n);
    }
    if (pages > g->n_free) return no_pages(g, e);
    show_boundaries(g, runs, n_runs);
    int64_t first = 0;
    for (int i = 0; i < g->o.sequences; i++) g->sequences[i].n_fresh = 0;
    for (int i = 0; i < n_runs; i++) {
        const struct engine_run *r = &runs[i];
        struct sequence *s = &g->sequences[r->handle];
        assert(s->open && !s->tentative && (!r->tentative || r->n <= g->o.drafts + 1));
        memcpy(g->rows + first, r->rows, (size_t)r->n * sizeof *g->rows);
        take_pages(g, s, s->length + r->n);
        g->spans[i] = (struct span){ .first = first,
                                     .n = r->n,
                                     .past = s->length,
                                     .pages = s->pages,
                                     .slot = r->handle,
                                     .kept = s->kept,
                                     .logged = r->tentative };
        int64_t next = next_position(r->rows, r->n, s->length + s->shift);
        s->kept = 0;
        s->length += r->n;
        s->shift = next - s->length;
        s->tentative = r->tentative;
        s->fresh_first = first;
        s->n_fresh = r->n;
        first += r->n;
    }
    *hidden = g->hidden = step_run(g->step, &step, g->states);
    if (g->o.drafts) show_prompts(g, n_runs);
    return true;
}

void engine_keep(struct engine *g, int handle, int64_t n)
{
    struct sequence *s = &g->sequences[handle];
    assert(s->tentative && n >= 1 && n <= s->n_fresh);
    s->tentative = false;
    s->length -= s->n_fresh - n;
    s->n_fresh = n;
    s->kept = (int32_t)n;
}

/* Drafting. */

/* The fresh rows of each sequence and its next token. */
static void add_fresh(struct engine *g, struct head_step *h, const struct engine_draft *d)
{
    struct sequence *s = &g->sequences[d->handle];
    struct row next = { .token = d->next };
    assert(s->open && !s->tentative && s->n_fresh > 0);
    begin_span(g, h, s, s->head_length);
    for (int64_t r = s->fresh_first; r < s->fresh_first + s->n_fresh; r++)
        add_row(g, h, r, &g->rows[r], r + 1 < s->fresh_first + s->n_fresh ? &g->rows[r + 1] : &next);
    s->head_length += s->n_fresh;
}

/* The head's own guess number `depth` as the next token, and its own row in place of a hidden one. */
static void add_guess(struct engine *g, struct head_step *h, const struct engine_draft *d, int depth,
                      int64_t index)
{
    const struct sequence *s = &g->sequences[d->handle];
    struct row at = g->rows[s->fresh_first + s->n_fresh - 1], next = { .token = d->tokens[depth - 1] };
    for (int i = 0; i < 3; i++) at.position[i] += depth;
    begin_span(g, h, s, s->head_length + depth - 1);
    add_row(g, h, index, &at, &next);
}

/* Runs the head; a row comes of each span, and a token of each row: the guess number `depth` of the sequences
 * that want so many. */
static struct mat guess(struct engine *g, const struct head_step *h, struct mat hidden,
                        struct engine_draft *drafts, int n, int depth)
{
    struct step_rows rows = head_rows(g, h);
    struct mat m = step_mtp(g->step, &rows, hidden, g->head_index, &g->states[g->model->config->n_layers]);
    for (int64_t i = 0; i < m.rows; i++) g->head_index[i] = i;
    for (int64_t i = 0, some; i < m.rows; i += some) {
        some = m.rows - i < g->logits_rows ? m.rows - i : g->logits_rows;
        step_draft(g->step, g->guesses + i, m, g->head_index + i, some);
    }
    for (int i = 0, from = 0; i < n; i++)
        if (drafts[i].n > depth) drafts[i].tokens[depth] = g->guesses[from++];
    return m;
}

bool engine_draft(struct engine *g, struct engine_draft *drafts, int n, struct err *e)
{
    struct head_step h = { 0 };
    const struct backend *b = g->model->backend;
    for (int i = 0; i < n; i++) {
        struct sequence *s = &g->sequences[drafts[i].handle];
        int64_t room = g->o.context - s->length - 1;
        if (drafts[i].n > room) drafts[i].n = (int)room;
        if (!take_pages(g, s, s->length + drafts[i].n)) drafts[i].n = 0;
        if (drafts[i].n > 0) add_fresh(g, &h, &drafts[i]);
    }
    struct mat hidden = g->hidden;
    for (int depth = 0; h.n > 0; depth++) {
        hidden = guess(g, &h, hidden, drafts, n, depth);
        struct head_step next = { 0 };
        for (int i = 0, from = 0; i < n; i++) {
            if (drafts[i].n <= depth) continue;
            if (drafts[i].n > depth + 1) add_guess(g, &next, &drafts[i], depth + 1, from);
            from++;
        }
        h = next;
    }
    for (int i = 0; i < n; i++)
        if (drafts[i].n > 0) g->sequences[drafts[i].handle].n_fresh = 0;
    return b->ops->wait(b->queue, e);
}

struct mat engine_logits(struct engine *g, struct mat hidden, const int64_t *index, int64_t n)
{
    return step_logits(g->step, hidden, index, n);
}

const float *engine_fetch(struct engine *g, struct mat logits, int64_t first, int64_t n)
{
    const struct backend *b = g->model->backend;
    float *to = g->host_logits + first * logits.cols;
    b->ops->download(b->queue, to, logits.data + first * logits.stride,
                     (uint64_t)(n * logits.cols) * sizeof(float));
    return to;
}

void engine_draw(struct engine *g, int32_t *out, struct mat logits, const struct draw *draws)
{
    g->model->backend->ops->draw(g->model->backend->queue, out, logits, g->allowed, draws);
}

void engine_draw_rows(struct engine *g, int32_t *out, struct mat hidden, const int64_t *index, int64_t n,
                      const struct draw *draws)
{
    step_draw(g->step, out, hidden, index, n, g->allowed, draws);
}

bool engine_allow(struct engine *g, const uint32_t *allowed, struct err *e)
{
    const struct backend *b = g->model->backend;
    uint64_t bytes = (uint64_t)(g->model->config->vocab_size + 31) / 32 * sizeof *allowed;
    void *memory = g->allowed;
    if (!allowed) {
        b->ops->memory_free(b->queue, memory);
        g->allowed = NULL;
        return true;
    }
    if (!memory && !b->ops->memory_create(b->queue, &memory, bytes, e)) return err_note(e, "vocabulary");
    g->allowed = memory;
    b->ops->upload(b->queue, g->allowed, allowed, bytes);
    return true;
}

void engine_mask(struct engine *g, struct mat logits, int64_t row, const uint32_t *allowed)
{
    struct mat one = mat_of(logits.data + row * logits.stride, 1, logits.cols);
    g->model->backend->ops->mask(g->model->backend->queue, one, allowed);
}

void engine_edit(struct engine *g, struct mat logits, const struct logit_edit *edits, int64_t n)
{
    if (n > 0) g->model->backend->ops->edit(g->model->backend->queue, logits, edits, n);
}

const float *engine_logits_host(struct engine *g, struct mat hidden, const int64_t *index, int64_t n)
{
    return engine_fetch(g, engine_logits(g, hidden, index, n), 0, n);
}

void engine_text_rows(struct row *rows, const int32_t *tokens, int64_t n, int64_t first)
{
    for (int64_t i = 0; i < n; i++) {
        int32_t p = (int32_t)(first + i);
        rows[i] = (struct row){ .token = tokens[i], .position = { p, p, p } };
    }
}

bool engine_prefill_rows(struct engine *g, int handle, const struct row *rows, int64_t n, const float **last,
                         const struct report *progress, struct err *e)
{
    struct mat hidden = { 0 };
    int64_t past = g->sequences[handle].length;
    bool is_long = n > ROWS_EXACT && g->o.step_rows > ROWS_EXACT;
    if (n > g->o.context - past) return no_room(g, past + n, e); /* before any step, with the whole count */
    for (int64_t done = 0, count; done < n; done += count) {
        count = n - done < g->o.step_rows ? n - done : g->o.step_rows;
        struct engine_run run = { .handle = handle, .rows = rows + done, .n = count, .prompt = is_long };
        if (!engine_step(g, &run, 1, &hidden, e)) return false;
        report_progress(progress, "prompt", (uint64_t)(done + count), (uint64_t)n);
    }
    if (last && n > 0) *last = engine_logits_host(g, hidden, &(int64_t){ hidden.rows - 1 }, 1);
    const struct backend *b = g->model->backend;
    return b->ops->wait(b->queue, e);
}

bool engine_prefill(struct engine *g, int handle, const int32_t *tokens, int64_t n, const float **last,
                    const struct report *progress, struct err *e)
{
    struct row *rows = malloc((size_t)n * sizeof *rows + 1);
    if (!rows) return err_memory(e, "prompt", (uint64_t)n * sizeof *rows);
    engine_text_rows(rows, tokens, n, engine_position(g, handle));
    bool ok = engine_prefill_rows(g, handle, rows, n, last, progress, e);
    free(rows);
    return ok;
}
