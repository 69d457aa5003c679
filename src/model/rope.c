#include "model/rope.h"
#include <math.h>

/* From which frequency to which one positions go from kept to stretched. */
struct ramp {
    double low, high;
};

/* The frequency, as a dimension, that turns so often within the original positions. */
static double dim_of_turns(const struct config *c, double turns)
{
    return c->rotary_dim * log((double)c->yarn.original / (turns * 2 * M_PI)) / (2 * log(c->rope_theta));
}

static struct ramp ramp_of(const struct config *c)
{
    struct ramp r = { dim_of_turns(c, c->yarn.beta_fast), dim_of_turns(c, c->yarn.beta_slow) };
    if (c->yarn.truncate) r = (struct ramp){ floor(r.low), ceil(r.high) };
    r = (struct ramp){ fmax(r.low, 0), fmin(r.high, c->rotary_dim - 1) };
    if (r.low == r.high) r.high += 0.001;
    return r;
}

void rope_inverse(float *inverse, const struct config *c)
{
    struct ramp r = { 0 };
    if (c->yarn.factor > 0) r = ramp_of(c);
    for (int j = 0; j < c->rotary_dim / 2; j++) {
        double plain = pow(c->rope_theta, -2.0 * j / c->rotary_dim);
        double share = c->yarn.factor > 0 ? fmin(fmax((j - r.low) / (r.high - r.low), 0), 1) : 0;
        inverse[j] = (float)(share > 0 ? plain * (1 - share + share / c->yarn.factor) : plain);
    }
}

float rope_scale(const struct config *c)
{
    if (c->yarn.factor == 0) return 1;
    if (c->yarn.attention_factor > 0) return (float)c->yarn.attention_factor;
    return (float)(0.1 * log(c->yarn.factor) + 1);
}
