/* Kernels of one ISA, second part: the gated delta rule. Included by kernels_*.c only. */
#ifndef BACKEND_CPU_KERNELS_SEQUENCE_H
#define BACKEND_CPU_KERNELS_SEQUENCE_H
#include "backend/cpu/kernels_attention.h"
#include "backend/cpu/kernels_input.h"

/* The delta rule. */

static float dot(const float *a, const float *b, int64_t n)
{
    vec sum = { 0 };
    int64_t i = 0;
    for (; i + VL <= n; i += VL) sum = vload(a + i) * vload(b + i) + sum;
    float s = vsum(sum);
    for (; i < n; i++) s += a[i] * b[i];
    return s;
}

/* `to` <- what tokens make of n vectors of columns of S, one after the other: S <- decay S + k d^T; `to` may
 * be S. Never inlined: a token's update and its repetition from a log are the same instructions, however
 * products and sums were fused. */
#define DELTA_UPDATE(name, n)                                                                                \
    static __attribute__((noinline)) void name(float *to, int64_t to_stride, const float *S, int64_t stride, \
                                               int dk, const struct delta_past *past, int64_t n_tokens)      \
    {                                                                                                        \
        for (int r = 0; r < dk; r++, S += stride, to += to_stride) {                                         \
            vec s[n];                                                                                        \
            for (int i = 0; i < n; i++) s[i] = vload(S + i * VL);                                            \
            for (int64_t t = 0, at = 0; t < n_tokens; t++, at += past->stride)                               \
                for (int i = 0; i < n; i++)                                                                  \
                    s[i] = past->decay[at] * s[i] + past->key[at + r] * vload(past->update + at + i * VL);   \
            for (int i = 0; i < n; i++) vstore(to + i * VL, s[i]);                                           \
        }                                                                                                    \
    }
enum { DELTA_WIDE = DELTA_COLUMNS / VL < 4 ? DELTA_COLUMNS / VL : 4 }; /* vectors of columns at a time */
DELTA_UPDATE(update_wide, DELTA_WIDE)
DELTA_UPDATE(update_narrow, 1)

static __attribute__((noinline)) void update_column(float *to, int64_t to_stride, const float *S,
                                                    int64_t stride, int dk, const struct delta_past *past,
                                                    int64_t n_tokens)
{
    for (int r = 0; r < dk; r++) {
        float s = S[r * stride];
        for (int64_t t = 0, at = 0; t < n_tokens; t++, at += past->stride)
            s = past->decay[at] * s + past->key[at + r] * past->update[at];
        to[r * to_stride] = s;
    }
}

/* n vectors of columns for all tokens, so that this part of S (128 x 2 vectors: 16 KiB) stays in the first
 * cache. S is read once a token: with p = S^T k and w = S^T q of the old state, d = beta (v - e^g p) and o =
 * e^g w + (k.q) d. Of logged tokens S becomes a copy, which none needs after the last. */
INLINE void delta_columns(const struct delta_head *h, int64_t n_tokens, int column, const int n)
{
    float *to = h->copy ? h->copy : h->S + column, unlogged[4 * VL];
    const float *S = h->S + column;
    int64_t stride = h->dv, to_stride = h->copy ? DELTA_COLUMNS : h->dv;
    for (int64_t t = 0; t < n_tokens; t++) {
        const float *q = h->q + t * h->stride, *k = h->k + t * h->stride, *v = h->v + t * h->stride + column;
        float decay = expf(h->log_decay[t * h->gate_stride]), beta = h->beta[t * h->gate_stride];
        float kq = dot(k, q, h->dk), *d = h->copy ? h->update + t * h->update_stride + column : unlogged;
        vec p[4], w[4];
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) p[i] = w[i] = (vec){ 0 };
        for (int r = 0; r < h->dk; r++)
#pragma GCC unroll 4
            for (int i = 0; i < n; i++) {
                vec s = vload(S + r * stride + i * VL);
                p[i] = k[r] * s + p[i];
                w[i] = q[r] * s + w[i];
            }
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
            vec x = beta * (vload(v + i * VL) - decay * p[i]);
            vstore(d + i * VL, x);
            vstore(h->o + t * h->o_stride + column + i * VL, decay * w[i] + kq * x);
        }
        if (h->copy && t + 1 == n_tokens) return;
        struct delta_past now = { k, d, &decay, 0 };
        (n == 1 ? update_narrow : update_wide)(to, to_stride, S, stride, h->dk, &now, 1);
        S = to;
        stride = to_stride;
    }
}

/* The columns past the last whole vector. */
static void delta_column(const struct delta_head *h, int64_t n_tokens, int column)
{
    float *to = h->copy ? h->copy : h->S + column;
    const float *S = h->S + column;
    int64_t stride = h->dv, to_stride = h->copy ? DELTA_COLUMNS : h->dv;
    for (int64_t t = 0; t < n_tokens; t++) {
        const float *q = h->q + t * h->stride, *k = h->k + t * h->stride;
        float decay = expf(h->log_decay[t * h->gate_stride]), p = 0, w = 0;
        for (int r = 0; r < h->dk; r++) {
            p += k[r] * S[r * stride];
            w += q[r] * S[r * stride];
        }
        float d = h->beta[t * h->gate_stride] * (h->v[t * h->stride + column] - decay * p);
        h->o[t * h->o_stride + column] = decay * w + dot(k, q, h->dk) * d;
        if (h->copy) h->update[t * h->update_stride + column] = d;
        if (h->copy && t + 1 == n_tokens) return;
        update_column(to, to_stride, S, stride, h->dk, &(struct delta_past){ k, &d, &decay, 0 }, 1);
        S = to;
        stride = to_stride;
    }
}

static void delta(const struct delta_head *h, int64_t n_tokens)
{
    int c = 0;
    for (; c + DELTA_WIDE * VL <= h->dv; c += DELTA_WIDE * VL) delta_columns(h, n_tokens, c, DELTA_WIDE);
    for (; c + VL <= h->dv; c += VL) delta_columns(h, n_tokens, c, 1);
    for (; c < h->dv; c++) delta_column(h, n_tokens, c);
}

static void delta_replay(float *S, int dk, int dv, const struct delta_past *past, int64_t n_tokens)
{
    struct delta_past p = *past;
    for (int c = 0, n; c < dv; c += n, S += n, p.update += n) {
        n = c + DELTA_WIDE * VL <= dv ? DELTA_WIDE * VL : c + VL <= dv ? VL : 1;
        (n == 1 ? update_column : n == VL ? update_narrow : update_wide)(S, dv, S, dv, dk, &p, n_tokens);
    }
}

enum { TILE_ROWS = VL == 16 ? 8 : 4 }; /* by two vectors: half of the registers that there are */

/* C[i][j] += sum_k A(i, k) B[k][j], A(i, k) at a[i * a_row + k * a_col]; i < m, j < n, any sizes. */
INLINE void tile_rows(float *c, int64_t ldc, const float *a, int64_t a_row, int64_t a_col, const float *b,
                      int64_t ldb, int64_t depth, int64_t n, const int rows)
{
    int64_t j = 0;
    for (; j + 2 * VL <= n; j += 2 * VL) {
        vec sum[TILE_ROWS][2];
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
            for (int v = 0; v < 2; v++) sum[i][v] = vload(c + i * ldc + j + v * VL);
        for (int64_t k = 0; k < depth; k++) {
            vec b0 = vload(b + k * ldb + j), b1 = vload(b + k * ldb + j + VL);
#pragma GCC unroll 8
            for (int i = 0; i < rows; i++) {
                vec x = vset(a[i * a_row + k * a_col]);
                sum[i][0] = x * b0 + sum[i][0];
                sum[i][1] = x * b1 + sum[i][1];
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
            for (int v = 0; v < 2; v++) vstore(c + i * ldc + j + v * VL, sum[i][v]);
    }
    for (int rest = (int)(n % (2 * VL)); rest > 0; rest--, j++)
        for (int i = 0; i < rows; i++)
            for (int64_t k = 0; k < depth; k++) c[i * ldc + j] += a[i * a_row + k * a_col] * b[k * ldb + j];
}

static void tile(float *c, int64_t ldc, const float *a, int64_t a_row, int64_t a_col, const float *b,
                 int64_t ldb, int64_t depth, int64_t m, int64_t n)
{
    int64_t i = 0;
    for (; i + TILE_ROWS <= m; i += TILE_ROWS)
        tile_rows(c + i * ldc, ldc, a + i * a_row, a_row, a_col, b, ldb, depth, n, TILE_ROWS);
    for (; i < m; i++) tile_rows(c + i * ldc, ldc, a + i * a_row, a_row, a_col, b, ldb, depth, n, 1);
}

/* With c_i the running sum of log decays, A_ij = -beta_i (k_i . k_j) e^(c_i - c_j) for j < i and P_ij = (q_i
 * . k_j) e^(c_i - c_j) for j <= i; zero elsewhere, where the exponent may overflow. */
static void masked_products(float *A, float *P, const struct delta_head *h, const float *kT, const float *c,
                            int64_t n)
{
    memset(A, 0, (size_t)n * DELTA_CHUNK * sizeof *A);
    memset(P, 0, (size_t)n * DELTA_CHUNK * sizeof *P);
    tile(A, DELTA_CHUNK, h->k, h->stride, 1, kT, DELTA_CHUNK, h->dk, n, DELTA_CHUNK);
    tile(P, DELTA_CHUNK, h->q, h->stride, 1, kT, DELTA_CHUNK, h->dk, n, DELTA_CHUNK);
    for (int64_t i = 0; i < n; i++) {
        float *a = A + i * DELTA_CHUNK, *p = P + i * DELTA_CHUNK, beta = h->beta[i * h->gate_stride];
        for (int64_t j = 0; j < DELTA_CHUNK; j += VL) {
            vec decay = vexp(c[i] - vload(c + j));
            vstore(a + j, vload(a + j) * decay * -beta);
            vstore(p + j, vload(p + j) * decay);
        }
        for (int64_t j = i; j < DELTA_CHUNK; j++) a[j] = 0;
        for (int64_t j = i + 1; j < DELTA_CHUNK; j++) p[j] = 0;
    }
}

/* N = (I - A)^-1 diag(beta) (V - diag(e^c) K S), by forward substitution: of rows before their block as one
 * product, then within it. */
static void chunk_updates(float *N, const float *A, const struct delta_head *h, const float *c, int64_t n)
{
    memset(N, 0, (size_t)n * (size_t)h->dv * sizeof *N);
    tile(N, h->dv, h->k, h->stride, 1, h->S, h->dv, h->dk, n, h->dv);
    for (int64_t i = 0; i < n; i++) {
        float decay = expf(c[i]), beta = h->beta[i * h->gate_stride];
        const float *v = h->v + i * h->stride;
        float *row = N + i * h->dv;
        for (int d = 0; d < h->dv; d++) row[d] = beta * (v[d] - decay * row[d]);
    }
    for (int64_t block = 0, end; block < n; block = end) {
        end = block + TILE_ROWS < n ? block + TILE_ROWS : n;
        tile(N + block * h->dv, h->dv, A + block * DELTA_CHUNK, DELTA_CHUNK, 1, N, h->dv, block, end - block,
             h->dv);
        for (int64_t i = block; i < end; i++)
            for (int64_t j = block; j < i; j++)
                scale_add(N + i * h->dv, N + j * h->dv, A[i * DELTA_CHUNK + j], h->dv);
    }
}

/* O = diag(e^c) Q S + P N with P the masked products of q and k. */
static void chunk_outputs(const struct delta_head *h, const float *P, const float *N, const float *c,
                          int64_t n)
{
    for (int64_t i = 0; i < n; i++) memset(h->o + i * h->o_stride, 0, (size_t)h->dv * sizeof *h->o);
    tile(h->o, h->o_stride, h->q, h->stride, 1, h->S, h->dv, h->dk, n, h->dv);
    for (int64_t i = 0; i < n; i++) {
        float decay = expf(c[i]), *row = h->o + i * h->o_stride;
        for (int d = 0; d < h->dv; d++) row[d] *= decay;
    }
    tile(h->o, h->o_stride, P, DELTA_CHUNK, 1, N, h->dv, n, n, h->dv);
}

/* kT[r][i] = k[i * stride + r]; what comes after the n keys is not used. */
static void transpose_keys(float *kT, const float *k, int64_t stride, int64_t n, int64_t dk)
{
    const uint8_t *rows[DELTA_CHUNK];
    uint32_t *out = (uint32_t *)(void *)kT;
    int64_t r = 0;
    for (int64_t i = 0; i < DELTA_CHUNK; i++)
        rows[i] = (const uint8_t *)(const void *)(k + (i < n ? i : 0) * stride);
#if defined(__AVX512F__)
    for (; r + 16 <= dk; r += 16)
        for (int i = 0; i < DELTA_CHUNK; i += 16)
            transpose16(out + r * DELTA_CHUNK + i, DELTA_CHUNK, rows + i, 4 * r, 16);
#elif defined(__AVX2__)
    for (; r + 8 <= dk; r += 8)
        for (int i = 0; i < DELTA_CHUNK; i += 8)
            transpose8(out + r * DELTA_CHUNK + i, DELTA_CHUNK, rows + i, 4 * r);
#endif
    for (; r < dk; r++)
        for (int i = 0; i < DELTA_CHUNK; i++) memcpy(out + r * DELTA_CHUNK + i, rows[i] + 4 * r, 4);
}

/* A head's rows are a power of two apart, which is one set of the caches: they are worked on side by side. */
static void delta_chunk(const struct delta_head *head, int64_t n, float *work)
{
    float *kT = work, *A = kT + (int64_t)head->dk * DELTA_CHUNK, *P = A + DELTA_CHUNK * DELTA_CHUNK;
    float *N = P + DELTA_CHUNK * DELTA_CHUNK, *rows = N + (int64_t)head->dv * DELTA_CHUNK,
          c[DELTA_CHUNK] = { 0 };
    int64_t dk = head->dk, dv = head->dv, stride = 2 * dk + dv;
    float *o = rows + DELTA_CHUNK * stride, sum = 0;
    assert(n >= 1 && n <= DELTA_CHUNK && head->dk > 0 && head->dv > 0);
    for (int64_t i = 0; i < n; i++) {
        float *row = rows + i * stride;
        memcpy(row, head->q + i * head->stride, (size_t)dk * sizeof *row);
        memcpy(row + dk, head->k + i * head->stride, (size_t)dk * sizeof *row);
        memcpy(row + 2 * dk, head->v + i * head->stride, (size_t)dv * sizeof *row);
        c[i] = sum += head->log_decay[i * head->gate_stride];
    }
    transpose_keys(kT, rows + dk, stride, n, dk);
    struct delta_head close = *head, *h = &close;
    h->q = rows;
    h->k = rows + dk;
    h->v = rows + 2 * dk;
    h->stride = stride;
    h->o = o;
    h->o_stride = dv;
    masked_products(A, P, h, kT, c, n);
    chunk_updates(N, A, h, c, n);
    chunk_outputs(h, P, N, c, n);
    for (int64_t i = 0; i < n; i++) memcpy(head->o + i * head->o_stride, o + i * dv, (size_t)dv * sizeof *o);
    /* S <- e^(c_last) S + (diag(e^(c_last - c_i)) K)^T N: the factors go into N, which is done with. */
    for (int64_t i = 0; i < n; i++) {
        float decay = expf(c[n - 1] - c[i]);
        for (int d = 0; d < h->dv; d++) N[i * h->dv + d] *= decay;
    }
    float decay = expf(c[n - 1]);
    for (int64_t i = 0; i < (int64_t)h->dk * h->dv; i++) h->S[i] *= decay;
    tile(h->S, h->dv, h->k, 1, h->stride, N, h->dv, n, h->dk, h->dv);
}
/* What every kernels_*.c defines: the table of this ISA, with the products it has beyond these. */
#define CPU_KERNELS(TABLE, NAME, WIDEST_BLOCK, ...)                                                          \
    const struct cpu_kernels cpu_kernels_##TABLE = {                                                         \
        .name = NAME,                                                                                        \
        .block_rows = WIDEST_BLOCK,                                                                          \
        .interleave = interleave,                                                                            \
        .round_bf16 = round_bf16,                                                                            \
        .round_int8 = round_int8,                                                                            \
        .round_fp8 = round_fp8,                                                                              \
        .stream = stream,                                                                                    \
        .decode = decode,                                                                                    \
        .product = product,                                                                                  \
        __VA_ARGS__,                                                                                         \
        .rmsnorm = rmsnorm,                                                                                  \
        .gated_norm = gated_norm,                                                                            \
        .layer_norm = layer_norm,                                                                            \
        .gelu_tanh = gelu_tanh,                                                                              \
        .silu_mul = silu_mul,                                                                                \
        .scale_add = scale_add,                                                                              \
        .log_softmax = log_softmax,                                                                          \
        .divergence = divergence,                                                                            \
        .attend = attend,                                                                                    \
        .attend_weights = attend_weights,                                                                    \
        .attend_finish = attend_finish,                                                                      \
        .conv_row = conv_row,                                                                                \
        .l2norm = l2norm,                                                                                    \
        .delta = delta,                                                                                      \
        .delta_replay = delta_replay,                                                                        \
        .delta_chunk = delta_chunk,                                                                          \
    }
#endif
