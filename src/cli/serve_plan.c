#include "cli/serve_plan.h"
#include "base/memory.h"
#include "cli/common.h"
#include <stdio.h>
#include <string.h>

enum { SEQUENCES_MOST = 32 };
/* For a step's rows, the program and what a backend keeps for itself; the same in all shapes, measured low.
 */
static const uint64_t RESERVE_DEVICE = 2ull << 30, RESERVE_HOST = 64ull << 20;

static bool is_vision(const char *name)
{
    return strstr(name, "visual.");
}

/* As stored: backends keep weights in as many bytes. */
static uint64_t weights_of(const struct plan_options *o)
{
    uint64_t bytes = 0;
    for (size_t i = 0; i < o->checkpoint->n_tensors; i++) {
        const struct tensor *t = o->checkpoint->tensors[i];
        if (o->drafts || strncmp(t->name, "mtp.", 4) != 0) bytes += t->bytes;
    }
    return bytes;
}

static uint64_t kv_token_of(const struct plan_options *o, uint64_t full_layers)
{
    const struct config *c = &o->checkpoint->config;
    uint64_t each = o->kv == KV_F32 ? 4 : o->kv == KV_BF16 ? 2 : 1;
    return 2 * (full_layers + (o->drafts > 0)) * (uint64_t)c->n_kv_heads * (uint64_t)c->head_dim * each;
}

/* The recurrent state, the convolution's, and while drafting a log of the rows that may be taken back. */
static uint64_t state_of(const struct plan_options *o, uint64_t linear_layers)
{
    const struct config *c = &o->checkpoint->config;
    uint64_t values = (uint64_t)c->linear_value_heads * (uint64_t)c->linear_value_dim;
    uint64_t channels = 2 * (uint64_t)c->linear_key_heads * (uint64_t)c->linear_key_dim + values;
    uint64_t keep = c->conv_kernel > 0 ? (uint64_t)c->conv_kernel - 1 : 0;
    uint64_t log = o->drafts ? (uint64_t)(o->drafts + 1) * (2 * channels + 2 * values) : 0;
    return linear_layers * 4 * (values * (uint64_t)c->linear_key_dim + keep * channels + log);
}

static uint64_t budget_of(const struct plan_options *o)
{
    if (o->budget) return o->budget;
    uint64_t there = o->backend->memory ? o->backend->memory : memory_available();
    return (uint64_t)((double)there * o->utilization);
}

static uint64_t sequences_bytes(const struct plan *p)
{
    return (uint64_t)p->sequences * (p->state + (uint64_t)p->context * p->kv_token);
}

static uint64_t rest_of(const struct plan *p)
{
    uint64_t fixed = p->weights + p->reserve;
    return p->budget > fixed ? p->budget - fixed : 0;
}

static bool too_large(const struct plan *p, struct err *e)
{
    char need[32], have[32];
    return err_set(
        e, ERR_LIMIT,
        "%lld sequences of %lld tokens need %s with the weights, the budget is %s; lower --max-model-len "
        "or --max-num-seqs, take --kv-cache-dtype fp8, or raise --memory",
        (long long)p->sequences, (long long)p->context,
        common_bytes(need, sizeof need, p->weights + p->reserve + sequences_bytes(p)),
        common_bytes(have, sizeof have, p->budget));
}

bool plan_make(struct plan *p, const struct plan_options *o, struct err *e)
{
    const struct config *c = &o->checkpoint->config;
    uint64_t full = 0;
    for (int i = 0; i < c->n_layers; i++) full += c->layer_kinds[i] == LAYER_FULL_ATTENTION;
    *p = (struct plan){ .context = o->context,
                        .sequences = o->sequences,
                        .budget = budget_of(o),
                        .weights = weights_of(o),
                        .reserve = o->backend->memory ? RESERVE_DEVICE : RESERVE_HOST,
                        .kv_token = kv_token_of(o, full),
                        .state = state_of(o, (uint64_t)c->n_layers - full) };
    int64_t most = c->max_position_embeddings;
    if (p->context > most)
        return err_set(e, ERR_LIMIT, "--max-model-len: %lld, the model allows %lld", (long long)p->context,
                       (long long)most);
    if (p->context && !p->sequences) {
        uint64_t fit = rest_of(p) / (p->state + (uint64_t)p->context * p->kv_token);
        p->sequences = fit < 1 ? 1 : fit < SEQUENCES_MOST ? (int64_t)fit : SEQUENCES_MOST;
    }
    if (!p->sequences) p->sequences = SEQUENCES_MOST;
    if (!p->context) {
        uint64_t states = (uint64_t)p->sequences * p->state, rest = rest_of(p);
        uint64_t fit = rest > states ? (rest - states) / ((uint64_t)p->sequences * p->kv_token) : 0;
        p->context = fit < (uint64_t)most ? (int64_t)(fit / KV_PAGE * KV_PAGE) : most;
        if (p->context == 0) p->context = KV_PAGE;
    }
    return sequences_bytes(p) <= rest_of(p) || too_large(p, e);
}

void plan_print(const struct plan *p, const struct plan_options *o)
{
    char a[32], b[32];
    uint64_t kv = (uint64_t)p->sequences * (uint64_t)p->context * p->kv_token, vision = 0;
    for (size_t i = 0; i < o->checkpoint->n_tensors; i++)
        if (is_vision(o->checkpoint->tensors[i]->name)) vision += o->checkpoint->tensors[i]->bytes;
    fprintf(stderr, "memory      %-38s %12s\n", "weights", common_bytes(a, sizeof a, p->weights));
    if (vision)
        fprintf(stderr, "            %-38s %12s\n", "  of these the vision tower",
                common_bytes(a, sizeof a, vision));
    snprintf(b, sizeof b, "%lld x %lld tokens", (long long)p->sequences, (long long)p->context);
    fprintf(stderr, "            keys and values, %-4s %-16s %12s\n", common_kv_name(o->kv), b,
            common_bytes(a, sizeof a, kv));
    snprintf(b, sizeof b, "%lld sequences", (long long)p->sequences);
    fprintf(stderr, "            recurrent state, %-21s %12s\n", b,
            common_bytes(a, sizeof a, (uint64_t)p->sequences * p->state));
    fprintf(stderr, "            %-38s %12s\n", "kept for steps", common_bytes(a, sizeof a, p->reserve));
    fprintf(stderr, "            %-38s %12s\n", "budget", common_bytes(a, sizeof a, p->budget));
}
