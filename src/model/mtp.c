/* The multi-token prediction head: what one more layer makes of a hidden row and the token that came after it
 * is a guess at the token after that. Source: the released model's definition (docs/numerics.md). */
#include "model/bind.h"
#include "model/mtp.h"
#include "model/step.h"
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>

/* Ids of a byte-pair tokenizer are in the order of its merges, so the first are the parts of text met most
 * often; what was added after training, control tokens among them, comes last. */
enum { FIRST_IDS = 65536, LAST_IDS = 512 };

static bool choose_ids(struct mtp *t, int64_t vocab, struct err *e)
{
    int64_t n = vocab < FIRST_IDS + LAST_IDS ? vocab : FIRST_IDS + LAST_IDS;
    t->ids = malloc((size_t)n * sizeof *t->ids);
    if (!t->ids) return err_memory(e, "shortlist", (uint64_t)n * sizeof *t->ids);
    for (int64_t i = 0; i < n; i++) t->ids[i] = (int32_t)(i < n - LAST_IDS ? i : vocab - n + i);
    t->n_ids = n;
    return true;
}

/* Where lm_head is stored as numbers: else it serves as it is. */
static bool bind_draft_head(struct model *m, struct err *e)
{
    const struct config *c = m->config;
    char embed[64];
    snprintf(embed, sizeof embed, "%sembed_tokens.weight", m->prefix);
    const char *name = c->tie_word_embeddings ? embed : "lm_head.weight";
    if (c->hidden_size % 16 != 0 || m->head->format == WEIGHT_FP8 || m->head->format == WEIGHT_FP8_BLOCK ||
        m->head->format == WEIGHT_NVFP4)
        return true;
    return choose_ids(&m->mtp, c->vocab_size, e) &&
           bind_rows_nvfp4(m, &m->mtp.head, name, m->mtp.ids, m->mtp.n_ids, c->vocab_size, c->hidden_size, e);
}

bool model_bind_mtp(struct model *m, bool packed, struct err *e)
{
    const struct config *c = m->config;
    int64_t hidden = c->hidden_size;
    struct mtp *t = &m->mtp;
    if (c->mtp_layers == 0 || !checkpoint_find(m->checkpoint, "mtp.norm.weight"))
        return err_set(e, ERR_UNSUPPORTED,
                       "%s: no MTP head to draft with (config.json: mtp_num_hidden_layers %d, tensor "
                       "'mtp.norm.weight' %s); 'quench merge-mtp' brings a lost one back",
                       m->checkpoint->path, c->mtp_layers,
                       checkpoint_find(m->checkpoint, "mtp.norm.weight") ? "found" : "missing");
    m->packs = packed;
    bool ok = bind_linear(m, &t->fc, "mtp.fc", hidden, 2 * hidden, e) &&
              bind_vector(m, &t->embedding_norm, "mtp.pre_fc_norm_embedding.weight", hidden, 1, e) &&
              bind_vector(m, &t->hidden_norm, "mtp.pre_fc_norm_hidden.weight", hidden, 1, e) &&
              bind_vector(m, &t->norm, "mtp.norm.weight", hidden, 1, e) &&
              model_bind_layer(m, c->n_layers, e) && bind_draft_head(m, e);
    m->packs = false;
    return ok || err_note(e, "%s", m->checkpoint->path);
}

void mtp_deinit(struct mtp *t, const struct backend *b)
{
    b->ops->weight_free(b->queue, t->fc);
    b->ops->weight_free(b->queue, t->head);
    b->ops->memory_free(b->queue, t->embedding_norm);
    b->ops->memory_free(b->queue, t->hidden_norm);
    b->ops->memory_free(b->queue, t->norm);
    free(t->ids);
    *t = (struct mtp){ 0 };
}

/* x[n]: embeddings and hidden rows become one row each. */
static struct mat mix(struct step *s, const struct step_rows *rows, struct mat hidden, const int64_t *index)
{
    const struct mtp *t = &s->model->mtp;
    float eps = (float)s->model->config->rms_norm_eps;
    struct mat pair = mat_rows(s->pair, rows->n), left = pair, right = pair, h = mat_rows(s->h, rows->n);
    left.cols = right.cols = h.cols;
    right.data += h.cols;
    s->op->gather(s->q, h, hidden, index);
    s->op->rmsnorm(s->q, right, h, t->hidden_norm, eps);
    struct mat x = step_embed(s, rows);
    s->op->rmsnorm(s->q, left, x, t->embedding_norm, eps);
    s->op->matmul(s->q, x, pair, t->fc);
    return x;
}

/* All that later rows read of rows: their keys and values. Leaves the normed rows in s->h. */
static void remember(struct step *s, struct mat x, const struct step_rows *rows, const struct kv_cache *kv)
{
    const struct layer *l = &s->model->layers[s->model->config->n_layers];
    const struct attention_weights *w = &l->attention;
    float eps = (float)s->model->config->rms_norm_eps;
    struct mat h = mat_rows(s->h, x.rows), k = mat_rows(s->k, x.rows), v = mat_rows(s->v, x.rows);
    s->op->rmsnorm(s->q, h, x, l->input_norm, eps);
    s->op->matmul(s->q, k, h, w->k);
    s->op->matmul(s->q, v, h, w->v);
    s->op->norm_rope(s->q, k, kv->n_kv_heads, kv->head_dim, kv->head_dim, w->k_norm, eps, &s->model->rope,
                     rows);
    s->op->kv_append(s->q, kv, k, v, rows);
}

/* The last row of each span, as a span of its own; false: they are all there is. */
static bool choose_last(struct step *s, struct step_rows *last, const struct step_rows *rows)
{
    *last = (struct step_rows){ s->last_rows, rows->n_spans, s->last_spans, rows->n_spans, false };
    for (int64_t i = 0; i < rows->n_spans; i++) {
        s->last_spans[i] = rows->spans[i];
        s->last_spans[i].past += rows->spans[i].n - 1;
        s->last_spans[i].first = i;
        s->last_spans[i].n = 1;
        s->last_at[i] = rows->spans[i].first + rows->spans[i].n - 1;
        s->last_rows[i] = rows->rows[s->last_at[i]];
    }
    return last->n < rows->n;
}

/* x += attention(h), whose keys and values are in the cache. */
static void attend(struct step *s, struct mat x, struct mat h, const struct step_rows *rows,
                   const struct kv_cache *kv)
{
    const struct config *c = s->model->config;
    const struct attention_weights *w = &s->model->layers[c->n_layers].attention;
    struct mat qg = mat_rows(s->qg, x.rows), att = mat_rows(s->att, x.rows), y = mat_rows(s->y, x.rows);
    s->op->matmul(s->q, qg, h, w->q);
    s->op->norm_rope(s->q, qg, c->n_heads, 2 * kv->head_dim, kv->head_dim, w->q_norm, (float)c->rms_norm_eps,
                     &s->model->rope, rows);
    s->op->attention(s->q, att, qg, c->n_heads, kv, rows);
    s->op->matmul(s->q, y, att, w->o);
    s->op->add(s->q, x, y);
}

void step_mtp_see(struct step *s, const struct step_rows *rows, struct mat hidden, const int64_t *index,
                  const struct layer_state *state)
{
    assert(s->model->mtp.fc && rows->n <= s->rows_max);
    remember(s, mix(s, rows, hidden, index), rows, &state->kv);
}

struct mat step_mtp(struct step *s, const struct step_rows *rows, struct mat hidden, const int64_t *index,
                    const struct layer_state *state)
{
    int n_layers = s->model->config->n_layers;
    struct step_rows last;
    assert(s->model->mtp.fc && rows->n <= s->rows_max);
    struct mat x = mix(s, rows, hidden, index), h = mat_rows(s->h, rows->n);
    remember(s, x, rows, &state->kv);
    if (choose_last(s, &last, rows)) {
        struct mat few = mat_rows(s->guess, last.n), normed = mat_rows(s->y, last.n);
        s->op->gather(s->q, few, x, s->last_at);
        s->op->gather(s->q, normed, h, s->last_at);
        for (int64_t i = 0; i < last.n; i++) s->last_at[i] = i;
        x = mat_rows(s->x, last.n);
        h = mat_rows(s->h, last.n);
        s->op->gather(s->q, x, few, s->last_at);
        s->op->gather(s->q, h, normed, s->last_at);
    }
    attend(s, x, h, &last, &state->kv);
    step_moe(s, n_layers, x);
    struct mat guess = mat_rows(s->guess, last.n);
    s->op->rmsnorm(s->q, guess, x, s->model->mtp.norm, (float)s->model->config->rms_norm_eps);
    step_tap(s, "mtp", n_layers, guess);
    return guess;
}

void step_draft(struct step *s, int32_t *tokens, struct mat hidden, const int64_t *index, int64_t n)
{
    const struct mtp *t = &s->model->mtp;
    const struct weight *head = t->head ? t->head : s->model->head;
    struct mat chosen = mat_rows(s->chosen, n), logits = mat_of(s->logits.data, n, head->rows);
    assert(n <= s->logits_max);
    s->op->gather(s->q, chosen, hidden, index);
    s->op->matmul(s->q, logits, chosen, head);
    s->op->argmax(s->q, tokens, logits);
    for (int64_t i = 0; t->head && i < n; i++) tokens[i] = t->ids[tokens[i]];
}
