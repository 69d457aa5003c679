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
enum { FIRST_IDS = 24576, LAST_IDS = 512 };

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

bool model_bind_mtp(struct model *m, struct err *e)
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
    return (bind_linear(m, &t->fc, "mtp.fc", hidden, 2 * hidden, e) &&
            bind_vector(m, &t->embedding_norm, "mtp.pre_fc_norm_embedding.weight", hidden, 1, e) &&
            bind_vector(m, &t->hidden_norm, "mtp.pre_fc_norm_hidden.weight", hidden, 1, e) &&
            bind_vector(m, &t->norm, "mtp.norm.weight", hidden, 1, e) &&
            model_bind_layer(m, c->n_layers, e) && bind_draft_head(m, e)) ||
           err_note(e, "%s", m->checkpoint->path);
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

struct mat step_mtp(struct step *s, const struct step_rows *rows, struct mat hidden, const int64_t *index,
                    const struct layer_state *state)
{
    const struct mtp *t = &s->model->mtp;
    int n_layers = s->model->config->n_layers;
    float eps = (float)s->model->config->rms_norm_eps;
    struct mat pair = mat_rows(s->pair, rows->n), left = pair, right = pair, h = mat_rows(s->h, rows->n),
               guess = mat_rows(s->guess, rows->n);
    left.cols = right.cols = h.cols;
    right.data += h.cols;
    assert(t->fc && rows->n <= s->rows_max);
    s->op->gather(s->q, h, hidden, index);
    s->op->rmsnorm(s->q, right, h, t->hidden_norm, eps);
    struct mat x = step_embed(s, rows);
    s->op->rmsnorm(s->q, left, x, t->embedding_norm, eps);
    s->op->matmul(s->q, x, pair, t->fc);
    step_layer(s, n_layers, x, rows, state);
    s->op->rmsnorm(s->q, guess, x, t->norm, eps);
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
