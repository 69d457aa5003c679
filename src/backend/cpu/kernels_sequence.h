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

enum { DELTA_WIDE = DELTA_COLUMNS / VL < 4 ? DELTA_COLUMNS / VL : 4 }; /* vectors of columns at a time */

/* Columns of S side by side: DELTA_WIDE vectors, or one with `live` columns. */
struct columns {
    const float *from; /* row r at from + r * stride */
    float *to;         /* where they go once changed; may be `from` */
    int64_t stride, to_stride;
    int live;
};

INLINE vec load_columns(const float *p, int live)
{
    return live < VL ? vload_part(p, live) : vload(p);
}

INLINE void store_columns(float *p, vec v, int live)
{
    if (live < VL)
        vstore_part(p, v, live);
    else
        vstore(p, v);
}

/* S <- decay S + k d^T for each past token, and of what comes of it p = S^T k, w = S^T q for the next one, if
 * there is one. past_count: 0, 1, or -1 for what past->n says. */
INLINE void sweep(vec p[4], vec w[4], const struct columns *c, int dk, const struct delta_past *past,
                  const float *k, const float *q, const int n, const int past_count)
{
    const float *from = c->from;
    float *to = c->to;
    vec d[4], s[4];
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) {
        p[i] = w[i] = (vec){ 0 };
        if (past_count == 1) d[i] = load_columns(past->update + i * VL, c->live);
    }
    for (int r = 0; r < dk; r++, from += c->stride, to += c->to_stride) {
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) s[i] = load_columns(from + i * VL, c->live);
        if (past_count == 1)
#pragma GCC unroll 4
            for (int i = 0; i < n; i++) s[i] = vmuladd(vset(past->key[r]), d[i], past->decay[0] * s[i]);
        for (int64_t t = 0, at = 0; past_count < 0 && t < past->n; t++, at += past->stride)
#pragma GCC unroll 4
            for (int i = 0; i < n; i++)
                s[i] = vmuladd(vset(past->key[at + r]), load_columns(past->update + at + i * VL, c->live),
                               past->decay[at] * s[i]);
        if (past_count != 0)
#pragma GCC unroll 4
            for (int i = 0; i < n; i++) store_columns(to + i * VL, s[i], c->live);
        if (!k) continue;
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
            p[i] = vmuladd(vset(k[r]), s[i], p[i]);
            w[i] = vmuladd(vset(q[r]), s[i], w[i]);
        }
    }
}

INLINE void sweep_past(vec p[4], vec w[4], const struct columns *c, int dk, const struct delta_past *past,
                       const float *k, const float *q, const int n)
{
    if (past->n == 0)
        sweep(p, w, c, dk, past, k, q, n, 0);
    else if (past->n == 1)
        sweep(p, w, c, dk, past, k, q, n, 1);
    else
        sweep(p, w, c, dk, past, k, q, n, -1);
}

/* What the columns of a head share of each token. */
struct delta_tokens {
    float decay[ROWS_EXACT], kq[ROWS_EXACT];
};

/* n vectors of columns for all tokens, so that this part of S stays in the first caches. S is read once a
 * token, while the token before changes it: with p = S^T k and w = S^T q of the old state, d = beta (v - e^g
 * p) and o = e^g w + (k.q) d. */
INLINE void delta_columns(const struct delta_head *h, const struct delta_tokens *tokens, int64_t n_tokens,
                          int column, const int n, int live)
{
    struct columns c = { h->S + column, h->S + column, h->dv, h->dv, live };
    struct delta_past past = h->past;
    float kept[4 * VL];
    past.update += column;
    for (int64_t t = 0; t <= n_tokens; t++) {
        const float *q = h->q + t * h->stride, *k = h->k + t * h->stride, *v = h->v + t * h->stride + column;
        vec p[4], w[4];
        if (h->copy && t == n_tokens && t > 1) return; /* none needs what the last one makes of it */
        if (h->copy && t == 2) {
            c.to = h->copy;
            c.to_stride = DELTA_COLUMNS;
        }
        sweep_past(p, w, &c, h->dk, &past, t < n_tokens ? k : NULL, q, n);
        if (t == n_tokens) return;
        c.from = c.to;
        c.stride = c.to_stride;
        float decay = tokens->decay[t], *d = h->copy ? h->update + t * h->update_stride + column : kept;
#pragma GCC unroll 4
        for (int i = 0; i < n; i++) {
            vec x = h->beta[t * h->gate_stride] * (load_columns(v + i * VL, live) - decay * p[i]);
            store_columns(d + i * VL, x, live);
            store_columns(h->o + t * h->o_stride + column + i * VL, decay * w[i] + tokens->kq[t] * x, live);
        }
        past = (struct delta_past){ k, d, &tokens->decay[t], 1, 0 };
    }
}

static void delta(const struct delta_head *h, int64_t n_tokens)
{
    struct delta_tokens tokens;
    int c = 0;
    assert(n_tokens <= ROWS_EXACT);
    for (int64_t t = 0; t < n_tokens; t++) {
        tokens.decay[t] = expf(h->log_decay[t * h->gate_stride]);
        tokens.kq[t] = dot(h->k + t * h->stride, h->q + t * h->stride, h->dk);
    }
    for (; c + DELTA_WIDE * VL <= h->dv; c += DELTA_WIDE * VL)
        delta_columns(h, &tokens, n_tokens, c, DELTA_WIDE, VL);
    for (; c < h->dv; c += VL) delta_columns(h, &tokens, n_tokens, c, 1, h->dv - c < VL ? h->dv - c : VL);
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
        .quantize_int8 = quantize_int8,                                                                      \
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
        .delta_chunk = delta_chunk,                                                                          \
    }
#endif
