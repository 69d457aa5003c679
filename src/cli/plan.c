#include "cli/plan.h"
#include "base/memory.h"
#include "cli/common.h"
#include <stdio.h>
#include <string.h>

enum {
    SEQUENCES_MOST = 32,
    SNAPSHOTS_MOST = 1024,
    SNAPSHOT_PART = 4, /* one of so many parts of what is left */
    AUTO_LEAST = 4096  /* tokens, before sequences are given up for them */
};
static const double SHARE_DEVICE = 0.92, SHARE_HOST = 0.5;
/* For the program and what a backend keeps for itself, a host's steps among it and a device's pictures; the
 * same in all shapes. */
static const uint64_t RESERVE_DEVICE = 512ull << 20, RESERVE_HOST = 64ull << 20;

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

/* What a GPU keeps of the head besides (weight_coarsen). */
static uint64_t coarse_of(const struct plan_options *o)
{
    const struct config *c = &o->checkpoint->config;
    const struct backend *b = o->backend;
    const struct tensor *head = checkpoint_find(o->checkpoint, "lm_head.weight");
    if (!b->memory || (head && head->dtype != DTYPE_BF16)) return 0;
    return b->ops->coarse_bytes(b->queue, WEIGHT_BF16, c->vocab_size, c->hidden_size);
}

static uint64_t page_of(const struct plan_options *o, uint64_t full_layers)
{
    const struct config *c = &o->checkpoint->config;
    uint64_t line = (uint64_t)kv_line_bytes(o->kv, c->n_kv_heads, c->head_dim);
    return KV_PAGE * 2 * (full_layers + (o->drafts > 0)) * line;
}

/* The recurrent state and the convolution's; with drafts a log of the rows that may be taken back. */
static uint64_t state_of(const struct plan_options *o, uint64_t linear_layers, int drafts)
{
    const struct config *c = &o->checkpoint->config;
    uint64_t values = (uint64_t)c->linear_value_heads * (uint64_t)c->linear_value_dim;
    uint64_t channels = 2 * (uint64_t)c->linear_key_heads * (uint64_t)c->linear_key_dim + values;
    uint64_t keep = c->conv_kernel > 0 ? (uint64_t)c->conv_kernel - 1 : 0;
    struct delta_shape shape = { c->linear_key_heads, c->linear_value_heads, c->linear_key_dim,
                                 c->linear_value_dim, c->conv_kernel };
    uint64_t log = drafts ? (uint64_t)(drafts + 1) * (uint64_t)delta_log_floats(&shape) : 0;
    return linear_layers * 4 * (values * (uint64_t)c->linear_key_dim + keep * channels + log);
}

static uint64_t budget_of(const struct plan_options *o)
{
    if (o->budget) return o->budget;
    bool device = o->backend->memory > 0;
    double share = o->utilization > 0 ? o->utilization : device ? SHARE_DEVICE : SHARE_HOST;
    return (uint64_t)((double)(device ? o->backend->memory : memory_available()) * share);
}

static int64_t pages_for(int64_t tokens)
{
    return (tokens + KV_PAGE - 1) / KV_PAGE;
}

static uint64_t fixed_of(const struct plan *p)
{
    return p->weights + p->coarse + p->steps + p->reserve + p->encoder_cache;
}

/* What pages and states may take. */
static uint64_t rest_of(const struct plan *p)
{
    uint64_t fixed = fixed_of(p);
    return p->budget > fixed ? p->budget - fixed : 0;
}

/* At least: every state, one sequence of full length, and a page for each of the others. */
static uint64_t least(const struct plan *p)
{
    return (uint64_t)p->sequences * p->state + (uint64_t)(pages_for(p->context) + p->sequences - 1) * p->page;
}

static bool too_large(const struct plan *p, const struct plan_options *o, struct err *e)
{
    char need[32], have[32], more[32];
    uint64_t bytes = fixed_of(p) + least(p);
    return err_set(e, ERR_LIMIT,
                   "%lld sequences, one of them of %lld tokens, need %s with the weights, %s more than the "
                   "budget of %s; "
                   "lower --max-model-len or --max-num-seqs, take --kv-cache-dtype %s, or raise --memory",
                   (long long)p->sequences, (long long)p->context, common_bytes(need, sizeof need, bytes),
                   common_bytes(more, sizeof more, bytes - p->budget),
                   common_bytes(have, sizeof have, p->budget), o->backend->kv_int8 ? "int8" : "fp8");
}

static uint64_t plan_bytes(const struct plan *p)
{
    return fixed_of(p) + (uint64_t)p->pages * p->page + (uint64_t)p->sequences * p->state;
}

/* Every sequence in full. */
static bool fill_exactly(struct plan *p, struct err *e)
{
    char need[32], have[32], more[32], weights[32], each[32];
    p->pages = p->sequences * pages_for(p->context);
    uint64_t bytes = plan_bytes(p), sequence = (uint64_t)pages_for(p->context) * p->page + p->state;
    if (bytes <= p->budget) return true;
    return err_set(
        e, ERR_LIMIT,
        "%s of memory are needed, %s of it for weights and %s for each of %lld sequence%s of %lld "
        "tokens; that is %s more than the %s that are free. Fewer tokens and --kv-cache-dtype fp8 take "
        "less, --device cpu takes the host's",
        common_bytes(need, sizeof need, bytes), common_bytes(weights, sizeof weights, p->weights),
        common_bytes(each, sizeof each, sequence), (long long)p->sequences, p->sequences == 1 ? "" : "s",
        (long long)p->context, common_bytes(more, sizeof more, bytes - p->budget),
        common_bytes(have, sizeof have, p->budget));
}

/* Sequences and context, as asked for or as many as fit; of what is for pages the prefix cache keeps its
 * part. */
static void choose_size(struct plan *p, int64_t most, bool prefix_cache)
{
    uint64_t rest = rest_of(p);
    int64_t asked = p->context;
    if (!p->context) p->context = most < AUTO_LEAST ? most : AUTO_LEAST;
    if (!p->sequences)
        for (p->sequences = SEQUENCES_MOST; p->sequences > 1 && least(p) > rest;) p->sequences--;
    if (asked) return;
    uint64_t others = (uint64_t)p->sequences * p->state + (uint64_t)(p->sequences - 1) * p->page;
    uint64_t left = rest > others ? rest - others : 0;
    if (prefix_cache) left -= left / SNAPSHOT_PART;
    uint64_t fit = left / p->page * KV_PAGE;
    p->context = fit >= (uint64_t)most ? most : fit > KV_PAGE ? (int64_t)fit : KV_PAGE;
}

/* What is left: a part for snapshots, by which prompts go on where known ones part, the others for pages. No
 * more pages than all sequences fill and the snapshots keep of theirs. */
static void share_rest(struct plan *p, bool prefix_cache)
{
    uint64_t left = rest_of(p) - least(p);
    int64_t full = pages_for(p->context);
    p->pages = full + p->sequences - 1;
    if (prefix_cache && p->snapshot_state) {
        uint64_t n = left / SNAPSHOT_PART / p->snapshot_state;
        p->snapshots = n < SNAPSHOTS_MOST ? (int64_t)n : SNAPSHOTS_MOST;
        left -= (uint64_t)p->snapshots * p->snapshot_state;
    }
    uint64_t most = (uint64_t)full * (uint64_t)(p->sequences + p->snapshots), more = left / p->page;
    if ((uint64_t)p->pages + more > most) more = most > (uint64_t)p->pages ? most - (uint64_t)p->pages : 0;
    p->pages += (int64_t)more;
}

static uint64_t steps_of(const struct plan_options *o)
{
    const struct config *c = &o->checkpoint->config;
    if (!o->backend->memory) return 0;
    struct engine_options e = { .context = o->context ? o->context : c->max_position_embeddings,
                                .sequences = (int)(o->sequences ? o->sequences : SEQUENCES_MOST),
                                .step_rows = o->step_rows,
                                .drafts = o->drafts };
    return engine_step_bytes(c, o->backend, &e);
}

bool plan_make(struct plan *p, const struct plan_options *o, struct err *e)
{
    const struct config *c = &o->checkpoint->config;
    uint64_t full = 0;
    for (int i = 0; i < c->n_layers; i++) full += c->layer_kinds[i] == LAYER_FULL_ATTENTION;
    uint64_t linear = (uint64_t)c->n_layers - full;
    *p = (struct plan){ .context = o->context,
                        .sequences = o->sequences,
                        .budget = budget_of(o),
                        .weights = weights_of(o),
                        .coarse = coarse_of(o),
                        .steps = steps_of(o),
                        .reserve = o->backend->memory ? RESERVE_DEVICE : RESERVE_HOST,
                        .encoder_cache = o->backend->memory ? 0 : o->encoder_cache,
                        .page = page_of(o, full),
                        .state = state_of(o, linear, o->drafts),
                        .snapshot_state = state_of(o, linear, 0) };
    if (p->context > c->max_position_embeddings)
        return err_set(e, ERR_LIMIT, "--max-model-len: %lld, the model allows %lld", (long long)p->context,
                       (long long)c->max_position_embeddings);
    if (p->page == 0) return err_set(e, ERR_UNSUPPORTED, "a model without attention layers cannot be served");
    if (o->exact) return fill_exactly(p, e);
    choose_size(p, c->max_position_embeddings, o->prefix_cache);
    if (least(p) > rest_of(p)) return too_large(p, o, e);
    share_rest(p, o->prefix_cache);
    return true;
}

static void print_row(const char *what, const char *count, uint64_t bytes)
{
    char text[32];
    fprintf(stderr, "            %-18s %-36s %12s\n", what, count, common_bytes(text, sizeof text, bytes));
}

void plan_print(const struct plan *p, const struct plan_options *o)
{
    char text[64];
    uint64_t vision = 0;
    for (size_t i = 0; i < o->checkpoint->n_tensors; i++)
        if (is_vision(o->checkpoint->tensors[i]->name)) vision += o->checkpoint->tensors[i]->bytes;
    fprintf(stderr, "memory, of a budget of %s:\n", common_bytes(text, sizeof text, p->budget));
    print_row("weights", "", p->weights - vision);
    if (vision) print_row("vision tower", "when the first image comes", vision);
    if (p->coarse) print_row("head", "a coarse copy, read for most tokens", p->coarse);
    snprintf(text, sizeof text, "%lld tokens in %s", (long long)p->pages * KV_PAGE, common_kv_name(o->kv));
    print_row("keys and values", text, (uint64_t)p->pages * p->page);
    snprintf(text, sizeof text, "%lld sequences", (long long)p->sequences);
    print_row("recurrent state", text, (uint64_t)p->sequences * p->state);
    snprintf(text, sizeof text, "%lld snapshots", (long long)p->snapshots);
    if (!o->exact) print_row("prefix cache", text, (uint64_t)p->snapshots * p->snapshot_state);
    if (o->encoder_cache)
        print_row("encoder cache", p->encoder_cache ? "" : "in the host's memory", o->encoder_cache);
    if (p->steps) print_row("steps", "", p->steps);
    print_row(p->steps ? "others" : "steps", "kept free", p->reserve);
}

bool plan_device(const struct checkpoint *c, const struct backend *b, const struct engine_options *o,
                 uint64_t *taken, bool quiet, struct err *e)
{
    int64_t most = c->config.max_position_embeddings;
    uint64_t before = taken ? *taken : 0;
    struct plan_options options = { .checkpoint = c,
                                    .backend = b,
                                    .kv = o->kv,
                                    .drafts = o->drafts,
                                    .context = o->context < most ? o->context : most,
                                    .sequences = o->sequences ? o->sequences : 1,
                                    .step_rows = o->step_rows,
                                    .exact = true,
                                    .budget = b->memory_free > before ? b->memory_free - before : 1 };
    struct plan p;
    if (!b->memory) return true;
    if (!plan_make(&p, &options, e)) return c->path ? err_note(e, "%s", c->path) : false;
    if (!quiet) plan_print(&p, &options);
    if (taken) *taken += plan_bytes(&p) - p.reserve;
    return true;
}

bool plan_fits(void *ctx, const struct engine_options *o, struct err *e)
{
    const struct plan_fits *f = ctx;
    return plan_device(f->checkpoint, f->backend, o, f->taken, f->quiet, e);
}
