#include "server/repeats.h"
#include <stdlib.h>

struct repeats {
    struct repeats_rule rule;
    int64_t n;    /* tokens so far */
    int32_t *ids; /* [size_max] the last ones, token i at i % size_max */
    /* [size_max + 1] same[k]: how many of the last tokens, one after the other, are what came k before them.
     * A run of k tokens stands there m times when (m - 1) * k are. */
    int64_t *same;
};

bool repeats_create(struct repeats **out, const struct repeats_rule *rule, struct err *e)
{
    struct repeats *r = *out = calloc(1, sizeof *r);
    size_t most = (size_t)rule->size_max;
    if (r) {
        r->rule = *rule;
        r->ids = calloc(most, sizeof *r->ids);
        r->same = calloc(most + 1, sizeof *r->same);
    }
    if (r && r->ids && r->same) return true;
    repeats_free(r);
    *out = NULL;
    return err_memory(e, "repetitions", most * sizeof *r->same);
}

void repeats_free(struct repeats *r)
{
    if (!r) return;
    free(r->ids);
    free(r->same);
    free(r);
}

bool repeats_push(struct repeats *r, int32_t id)
{
    bool found = false;
    for (int k = r->rule.size_min; k <= r->rule.size_max && k <= r->n; k++) {
        bool is_same = r->ids[(r->n - k) % r->rule.size_max] == id;
        r->same[k] = is_same ? r->same[k] + 1 : 0;
        found = found || r->same[k] >= k * (r->rule.count - 1);
    }
    r->ids[r->n % r->rule.size_max] = id;
    r->n++;
    return found;
}
