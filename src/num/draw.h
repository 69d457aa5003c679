/* Which token is drawn from a row of logits, in integers: no rounding, no order of additions, so a row gives
 * the same token on every backend, to whatever parts the work is cut. C and CUDA share this header.
 *
 * The place of a token is its distance from the likeliest one, in units of 2^-19 nats of the distribution at
 * the draw's temperature; its weight, e^-distance in units of 2^-42, follows from the place alone. Tokens
 * stand in the order of their places, those of one place in the order of their ids. Out are tokens beyond
 * the draw's reach, then those behind the k-th (those at its place stay), then those behind the first at
 * which the weights reach top_p of what is left. Of those that remain, `uniform` chooses by weight. */
#ifndef NUM_DRAW_H
#define NUM_DRAW_H
#include <stdbool.h>
#include <stdint.h>

#ifdef __CUDACC__
#define DRAW_BOTH __host__ __device__
#else
#define DRAW_BOTH
#endif

struct draw {
    float scale;    /* 1 / temperature; 0: the likeliest token, the first of equals */
    float reach;    /* nats, at most DRAW_REACH; min-p in another form */
    int32_t top_k;  /* 0: off */
    float top_p;    /* 0 or 1: off */
    double uniform; /* in [0, 1) */
};
#define DRAW_REACH 29.0f /* so that every weight is 1 or more */

enum { DRAW_DIGIT = 12, DRAW_BINS = 1 << DRAW_DIGIT }; /* a place has two digits of so many bits */
#define DRAW_OUT UINT32_MAX                            /* no place */

/* top: the largest logit that may be drawn; x: one that may, neither NaN. */
DRAW_BOTH static inline uint32_t draw_place(float top, float x, float scale, float reach)
{
    float far = (top - x) * scale;
    if (x >= top) return 0;
    return far <= reach ? (uint32_t)(far * 524288.0f) : DRAW_OUT;
}

/* Whether a place has a digit in a count of first ones (level 0), or of second ones behind `first`. */
DRAW_BOTH static inline bool draw_begins(uint32_t place, int level, uint32_t first)
{
    return level == 0 || place >> DRAW_DIGIT == first;
}

DRAW_BOTH static inline uint32_t draw_digit(uint32_t place, int level)
{
    return level == 0 ? place >> DRAW_DIGIT : place & (DRAW_BINS - 1u);
}

DRAW_BOTH static inline uint32_t draw_high(uint32_t a, uint32_t b)
{
    return (uint32_t)((uint64_t)a * b >> 32);
}

/* 2^42 e^-(place * 2^-19), to nine digits. 2^-f, 0 <= f < 1, by its series: the terms are ln(2)^k / k!. */
DRAW_BOTH static inline uint64_t draw_weight(uint32_t place)
{
    uint64_t y = (uint64_t)place * 3098164009u; /* log2(e) * 2^31: y in units of 2^-50 */
    uint32_t f = (uint32_t)(y >> 18), p = 15;   /* 2^-32; from here on 2^-31 */
    p = 219 - draw_high(f, p);
    p = 2838 - draw_high(f, p);
    p = 32755 - draw_high(f, p);
    p = 330788 - draw_high(f, p);
    p = 2863360 - draw_high(f, p);
    p = 20654775 - draw_high(f, p);
    p = 119194166 - draw_high(f, p);
    p = 515882496 - draw_high(f, p);
    p = 1488522236 - draw_high(f, p);
    p = 2147483648u - draw_high(f, p);
    return (uint64_t)p << 11 >> (y >> 50);
}

/* Up to where the weights have to go, of `total`, for a part of them; and for the token that is chosen. */
DRAW_BOTH static inline uint64_t draw_share(float part, uint64_t total)
{
    uint64_t share = (uint64_t)((double)part * (double)total);
    return share > 0 ? share : 1;
}

DRAW_BOTH static inline uint64_t draw_mark(double uniform, uint64_t kept)
{
    uint64_t at = (uint64_t)(uniform * (double)kept);
    return at < kept ? at + 1 : kept;
}

/* What stays when the weights must reach `share` and lack `left` of it before the tokens at `place`. */
DRAW_BOTH static inline uint64_t draw_kept(uint64_t share, uint64_t left, uint32_t place)
{
    uint64_t weight = draw_weight(place);
    return share - left + (left + weight - 1) / weight * weight;
}

/* Bit id % 32 of allowed[id / 32] is clear where token id must not be drawn; NULL: all may. -inf and NaN are
 * not drawn either. -1: there is none. n < 2^21. */
int32_t draw_token(const struct draw *d, const float *logits, int64_t n, const uint32_t *allowed);

static inline bool draw_allows(const uint32_t *allowed, int64_t id)
{
    return !allowed || (allowed[id / 32] >> id % 32 & 1);
}

/* What a request does to one logit: bias, then its penalties. */
struct logit_edit {
    int32_t row, column;
    float bias, repetition, minus; /* added; divides what is above 0 and multiplies what is not; subtracted */
};
DRAW_BOTH static inline float edit_apply(float x, const struct logit_edit *e)
{
    x += e->bias;
    x = x > 0 ? x / e->repetition : x * e->repetition;
    return x - e->minus;
}
#endif
