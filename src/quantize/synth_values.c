/* A word of 64 random bits gives four elements: each 16 bits choose one of 65,536 quantiles of the tensor's
 * distribution, so that drawing costs a multiplication or two and a table look-up. */
#include "quantize/synth_values.h"
#include "num/bf16.h"
#include "num/e2m1.h"
#include "num/e4m3.h"
#include "num/nvfp4.h"
#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { QUANTILES = 65536, SLICE = 1 << 18 };

enum kind {
    KIND_WEIGHT,
    KIND_ROUTER,
    KIND_NORM,      /* zero-centred: the gain is 1 + w */
    KIND_GAIN,      /* a plain gain */
    KIND_CONV,      /* of the taps */
    KIND_A_LOG,     /* log of U(1, 16) */
    KIND_DT_BIAS,   /* softplus of it is log-uniform in 0.001 .. 0.1 */
    KIND_ROW_SCALE, /* of FP8 rows */
    KIND_FP8,
    KIND_E2M1, /* two codes */
    KIND_GROUP_SCALE,
    N_KINDS
};

static const double WEIGHT_STD = 0.02;
static const double ROUTER_SPREAD = 0.25; /* of the logarithm of its rows' lengths */
/* Largest of a matrix, of a row of FP8 weights and of a group of 16, in standard deviations. */
static const double MATRIX_MAX = 4.5, ROW_MAX = 3.6, GROUP_MAX = 1.77, GROUP_SPREAD = 0.33;

struct synth_values {
    uint64_t seed;
    float global, input_global; /* of NVFP4 matrices */
    uint16_t table[N_KINDS][QUANTILES];
};

/* Standard normal quantiles in the middle of QUANTILES equal parts. Newton from the point before, on the
 * convex upper tail. */
static void fill_normal(double *z)
{
    double x = 0;
    for (int i = QUANTILES / 2; i < QUANTILES; i++) {
        double q = 1 - (i + 0.5) / QUANTILES;
        for (int k = 0; k < 8; k++) {
            double step =
                (0.5 * erfc(x * M_SQRT1_2) - q) / (exp(-0.5 * x * x) * (0.5 * M_SQRT1_2 * M_2_SQRTPI));
            x += step;
            if (fabs(step) < 1e-12) break;
        }
        z[i] = x;
        z[QUANTILES - 1 - i] = -x;
    }
}

static uint16_t bf16_bits(double x)
{
    return bf16_from_f32((float)x).bits;
}

/* z: a standard normal quantile; u: the same as a probability. */
static uint16_t value_of(enum kind kind, double z, double u)
{
    double group = GROUP_MAX + GROUP_SPREAD * z;
    switch (kind) {
    case KIND_ROUTER: return bf16_bits(1.5 * WEIGHT_STD * z);
    case KIND_NORM: return bf16_bits(0.1 * z);
    case KIND_GAIN: return bf16_bits(1 + 0.1 * z);
    case KIND_CONV: return bf16_bits(0.35 * z);
    case KIND_A_LOG: return bf16_bits(log(1 + 15 * u));
    case KIND_DT_BIAS: return bf16_bits(log(expm1(0.001 * pow(100, u))));
    case KIND_ROW_SCALE: return bf16_bits(WEIGHT_STD * (ROW_MAX + 0.1 * z) / 448);
    case KIND_FP8: return e4m3_from_f32((float)(448 / ROW_MAX * z)).bits;
    case KIND_GROUP_SCALE:
        group = group < 0.8 ? 0.8 : group > MATRIX_MAX ? MATRIX_MAX : group;
        return e4m3_from_f32((float)(448 * group / MATRIX_MAX)).bits;
    default: return bf16_bits(WEIGHT_STD * z);
    }
}

/* Codes of two weights, each drawn by eight bits, against the usual maximum of a group. */
static void fill_codes(uint16_t *table, const double *z)
{
    uint8_t code[256];
    for (int i = 0; i < 256; i++)
        code[i] = e2m1_from_f32((float)(6 / GROUP_MAX * z[i * (QUANTILES / 256) + QUANTILES / 512]));
    for (int i = 0; i < QUANTILES; i++) table[i] = (uint16_t)(code[i & 255] | code[i >> 8] << 4);
}

bool synth_values_create(struct synth_values **out, uint64_t seed, struct err *e)
{
    struct synth_values *v = malloc(sizeof *v);
    double *z = malloc(QUANTILES * sizeof *z);
    *out = v;
    if (!v || !z) {
        free(v);
        free(z);
        *out = NULL;
        return err_memory(e, "random values", sizeof *v);
    }
    v->seed = seed;
    v->global = nvfp4_global_scale((float)(WEIGHT_STD * MATRIX_MAX));
    v->input_global = nvfp4_global_scale(8);
    fill_normal(z);
    for (int k = 0; k < N_KINDS; k++)
        for (int i = 0; i < QUANTILES && k != KIND_E2M1; i++)
            v->table[k][i] = value_of((enum kind)k, z[i], (i + 0.5) / QUANTILES);
    fill_codes(v->table[KIND_E2M1], z);
    free(z);
    return true;
}

void synth_values_free(struct synth_values *v)
{
    free(v);
}

static bool ends_in(const char *name, const char *end)
{
    size_t n = strlen(name), m = strlen(end);
    return n >= m && strcmp(name + n - m, end) == 0;
}

static enum kind kind_of(const struct tensor *t)
{
    static const struct {
        const char *end;
        enum kind kind;
    } names[] = {
        { ".weight_scale", KIND_ROW_SCALE }, { ".A_log", KIND_A_LOG },
        { ".dt_bias", KIND_DT_BIAS },        { ".conv1d.weight", KIND_CONV },
        { ".mlp.gate.weight", KIND_ROUTER }, { ".linear_attn.norm.weight", KIND_GAIN },
        { "norm.weight", KIND_NORM },        { "norm_embedding.weight", KIND_NORM },
        { "norm_hidden.weight", KIND_NORM }, { ".norm1.weight", KIND_GAIN },
        { ".norm2.weight", KIND_GAIN },
    };
    if (t->dtype == DTYPE_U8) return KIND_E2M1;
    if (t->dtype == DTYPE_F8_E4M3) return ends_in(t->name, "_scale") ? KIND_GROUP_SCALE : KIND_FP8;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (ends_in(t->name, names[i].end)) return strstr(t->name, "visual.") ? KIND_GAIN : names[i].kind;
    return KIND_WEIGHT;
}

bool synth_values_are_weights(const struct tensor *t)
{
    return t->dtype == DTYPE_BF16 && kind_of(t) == KIND_WEIGHT;
}

/* splitmix64's output function: every bit of x reaches every bit of the result. */
static inline uint64_t mix(uint64_t x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

static uint64_t stream_of(const char *name, uint64_t seed)
{
    uint64_t h = mix(seed + 0x9e3779b97f4a7c15u);
    for (; *name; name++) h = mix(h ^ (uint8_t)*name);
    return h;
}

struct filling {
    uint8_t *out;
    const uint16_t *table;
    uint64_t stream, first, bytes;
    bool wide; /* two bytes an element */
};

/* Four elements of word number `word`. */
static inline void draw(uint8_t *out, const struct filling *f, uint64_t word)
{
    uint64_t x = mix(f->stream + word * 0x9e3779b97f4a7c15u);
    uint16_t value[4];
    for (int i = 0; i < 4; i++) value[i] = f->table[x >> (16 * i) & 0xffff];
    if (f->wide)
        memcpy(out, value, 8);
    else
        for (int i = 0; i < 4; i++) out[i] = (uint8_t)value[i];
}

static void fill_slice(void *ctx, int64_t slice, int thread)
{
    const struct filling *f = ctx;
    (void)thread;
    uint64_t at = (uint64_t)slice * SLICE, step = f->wide ? 8 : 4;
    uint64_t end = f->bytes - at < SLICE ? f->bytes : at + SLICE;
    uint64_t word = (f->first + at) / step;
    for (; end - at >= step; at += step) draw(f->out + at, f, word++);
    uint8_t last[8];
    if (at < end) {
        draw(last, f, word);
        memcpy(f->out + at, last, end - at);
    }
}

/* Rows of a router differ in length, so that some experts are picked several times as often as others. */
static void stretch_rows(const struct synth_values *v, uint8_t *out, const struct tensor *t, uint64_t first,
                         uint64_t bytes)
{
    uint64_t stream = stream_of(t->name, v->seed + 1), cols = (uint64_t)t->shape[1];
    for (uint64_t at = 0; at + 1 < bytes; at += sizeof(bf16)) {
        uint64_t row = (first + at) / sizeof(bf16) / cols;
        bf16 z = { v->table[KIND_WEIGHT][mix(stream + row) & 0xffff] }, x;
        memcpy(&x, out + at, sizeof x);
        x = bf16_from_f32(bf16_to_f32(x) * expf((float)(ROUTER_SPREAD / WEIGHT_STD) * bf16_to_f32(z)));
        memcpy(out + at, &x, sizeof x);
    }
}

void synth_values_fill(const struct synth_values *v, void *out, const struct tensor *t, uint64_t first,
                       uint64_t bytes, struct pool *pool)
{
    assert(first % 8 == 0);
    if (t->dtype == DTYPE_F32) {
        float x = ends_in(t->name, ".input_global_scale") ? v->input_global : v->global;
        for (uint64_t at = 0; at < bytes; at += sizeof x) memcpy((uint8_t *)out + at, &x, sizeof x);
        return;
    }
    enum kind kind = kind_of(t);
    struct filling f = { out,   v->table[kind], stream_of(t->name, v->seed),
                         first, bytes,          t->dtype == DTYPE_BF16 };
    int64_t slices = (int64_t)((bytes + SLICE - 1) / SLICE);
    if (pool && slices > 1)
        pool_run(pool, slices, fill_slice, &f);
    else
        for (int64_t i = 0; i < slices; i++) fill_slice(&f, i, 0);
    if (kind == KIND_ROUTER) stretch_rows(v, out, t, first, bytes);
}
