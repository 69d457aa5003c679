/* One work item a set of moments: the block's, which all gate_proj and up_proj of a layer share, and one of
 * each expert's down_proj. */
#include "quantize/curvature.h"
#include "quantize/gptq.h"
#include <stdlib.h>

bool curvatures_init(struct curvatures *c, const struct config *config, bool wants_factors, struct err *e)
{
    int64_t inner = config->moe_intermediate;
    *c = (struct curvatures){ .wants_factors = wants_factors };
    if (!moments_init(&c->moments, config->n_experts, config->hidden_size, inner, e)) return false;
    size_t columns = (size_t)(config->hidden_size + config->n_experts * inner);
    c->importance = malloc(columns * sizeof *c->importance);
    c->factored = calloc((size_t)config->n_experts + 1, sizeof *c->factored);
    if (c->importance && c->factored) return true;
    curvatures_deinit(c);
    return err_memory(e, "column importance", columns * sizeof *c->importance);
}

void curvatures_deinit(struct curvatures *c)
{
    moments_deinit(&c->moments);
    free(c->importance);
    free(c->factored);
    *c = (struct curvatures){ 0 };
}

struct part {
    float *moments, *importance;
    int64_t n;
};

/* 0: the block; 1 + expert: its down_proj. */
static struct part part_of(const struct curvatures *c, int64_t i)
{
    const struct moments *m = &c->moments;
    if (i == 0) return (struct part){ m->block, c->importance, m->hidden };
    return (struct part){ moments_down(m, (int)i - 1), c->importance + m->hidden + (i - 1) * m->inner,
                          m->inner };
}

static void update_part(void *ctx, int64_t i, int thread)
{
    struct curvatures *c = ctx;
    struct part p = part_of(c, i);
    double mean = 0;
    (void)thread;
    for (int64_t k = 0; k < p.n; k++) mean += (double)p.moments[k * p.n + k] / (double)p.n;
    for (int64_t k = 0; k < p.n; k++)
        p.importance[k] = mean > 0 ? (float)((double)p.moments[k * p.n + k] / mean) : 1;
    c->factored[i] = c->wants_factors && gptq_factor(p.moments, p.n);
}

void curvatures_update(struct curvatures *c, struct pool *pool)
{
    pool_run(pool, 1 + c->moments.n_experts, update_part, c);
}

struct curvature curvatures_of(const struct curvatures *c, const struct matrix *m)
{
    int64_t i = m->part == PART_DOWN ? 1 + m->expert : 0;
    struct part p = part_of(c, i);
    return (struct curvature){ .importance = p.importance, .factor = c->factored[i] ? p.moments : NULL };
}
