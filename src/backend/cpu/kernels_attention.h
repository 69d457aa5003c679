/* Kernels of one ISA: attention. Included by kernels_*.c only. Keys meet queries in tiles of tokens by heads,
 * so that a key is widened once for several heads and the sums across a vector are taken together. */
#ifndef BACKEND_CPU_KERNELS_ATTENTION_H
#define BACKEND_CPU_KERNELS_ATTENTION_H
#include "backend/cpu/kernels_dense.h"

#if defined(__AVX512F__)
enum { TILE_TOKENS = 4, TILE_HEADS = 4, TILE_VECTORS = 4 };
#else
enum { TILE_TOKENS = 2, TILE_HEADS = 4, TILE_VECTORS = 2 };
#endif
enum { TILE = TILE_TOKENS * TILE_HEADS, FETCH_TOKENS = 8 };

/* Elements, of INT8 without their scale. */
INLINE vec kv_vec(const void *base, const enum kv_dtype dtype, int64_t at)
{
    if (dtype == KV_F32) return vload((const float *)base + at);
    if (dtype == KV_BF16) return vload_bf16((const uint16_t *)base + at);
    if (dtype == KV_INT8) return vload_i8((const int8_t *)base + at);
    return vfrom_e4m3(vload_u8((const uint8_t *)base + at));
}

INLINE float kv_one(const void *base, const enum kv_dtype dtype, int64_t at)
{
    if (dtype == KV_F32) return ((const float *)base)[at];
    if (dtype == KV_BF16) return bf16_to_f32(((const bf16 *)base)[at]);
    if (dtype == KV_INT8) return ((const int8_t *)base)[at];
    return e4m3_to_f32(((const e4m3 *)base)[at]);
}

INLINE void kv_fetch(const void *base, const enum kv_dtype dtype, int64_t at, int64_t n)
{
    const int64_t each = kv_element_bytes(dtype);
    for (int64_t i = 0; i < n * each; i += 64) __builtin_prefetch((const char *)base + at * each + i, 0, 2);
}

/* Where token t's head begins. */
INLINE int64_t kv_at(const struct kv_cache *kv, const int32_t *pages, int64_t t, int64_t column)
{
    return pages[t / KV_PAGE] * kv_page_stride(kv) + t % KV_PAGE * kv->n_kv_heads * kv->head_dim + column;
}

/* scores[h * n + t - first] times the scale of token t's key or value, of tokens [first, end), which lie in
 * one page. */
INLINE void scale_page(float *scores, int64_t n, const struct attend_group *g, void *side, int64_t first,
                       int64_t end)
{
    float factors[KV_PAGE];
    const float *scales = kv_scales(g->kv, side, g->pages[first / KV_PAGE]) + g->kv_head;
    for (int64_t t = first; t < end; t++) factors[t - first] = scales[t % KV_PAGE * g->kv->n_kv_heads];
    for (int h = 0; h < g->n_heads; h++)
        for (int64_t t = 0; t < end - first; t++) scores[h * n + t] *= factors[t];
}

/* out[i] = sum of a[i]'s lanes: halves, quarters, .. are added, whatever the other vectors hold. */
INLINE void sums_across(float out[TILE], vec a[TILE])
{
#if defined(__AVX512F__)
    static const int32_t low[4][16] = { { 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23 },
                                        { 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27 },
                                        { 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29 },
                                        { 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30 } };
#pragma GCC unroll 4
    for (int level = 0, half = TILE / 2; level < 4; level++, half /= 2) {
        __m512i from = _mm512_loadu_si512(low[level]),
                upper = _mm512_add_epi32(from, _mm512_set1_epi32(half));
#pragma GCC unroll 8
        for (int i = 0; i < half; i++) {
            __m512 x = (__m512)a[2 * i], y = (__m512)a[2 * i + 1];
            a[i] = (vec)_mm512_permutex2var_ps(x, from, y) + (vec)_mm512_permutex2var_ps(x, upper, y);
        }
    }
    vstore(out, a[0]);
#else
    for (int i = 0; i < TILE; i++) out[i] = vsum(a[i]);
#endif
}

/* scores[h * n + t] of up to TILE_HEADS heads and TILE_TOKENS tokens; at: where their keys begin. A tile is
 * always computed whole, so a score has the same bits wherever it stands. */
INLINE void score_tile(float *scores, int64_t n, const float *qg, const void *keys, const enum kv_dtype dtype,
                       const int64_t at[TILE_TOKENS], int dim, float scale, int heads, int tokens)
{
    vec sum[TILE];
    const float *query[TILE_HEADS];
    float dots[TILE];
    for (int h = 0; h < TILE_HEADS; h++) query[h] = qg + (int64_t)2 * dim * (h < heads ? h : 0);
#pragma GCC unroll 16
    for (int i = 0; i < TILE; i++) sum[i] = (vec){ 0 };
    int d = 0;
    for (; d + VL <= dim; d += VL) {
        vec key[TILE_TOKENS];
#pragma GCC unroll 4
        for (int t = 0; t < TILE_TOKENS; t++) key[t] = kv_vec(keys, dtype, at[t] + d);
#pragma GCC unroll 4
        for (int h = 0; h < TILE_HEADS; h++) {
            vec q = vload(query[h] + d);
#pragma GCC unroll 4
            for (int t = 0; t < TILE_TOKENS; t++)
                sum[h * TILE_TOKENS + t] = q * key[t] + sum[h * TILE_TOKENS + t];
        }
    }
    sums_across(dots, sum);
    for (int h = 0; h < heads; h++)
        for (int t = 0; t < tokens; t++) {
            float dot = dots[h * TILE_TOKENS + t];
            for (int i = d; i < dim; i++) dot += query[h][i] * kv_one(keys, dtype, at[t] + i);
            scores[h * n + t] = dot * scale;
        }
}

/* scores[h * n + t - first] of tokens [first, end), which lie in one page. */
INLINE void score_page(float *scores, int64_t n, const struct attend_group *g, const enum kv_dtype dtype,
                       int64_t first, int64_t end)
{
    const struct kv_cache *kv = g->kv;
    int dim = kv->head_dim;
    int64_t column = (int64_t)g->kv_head * dim;
    float scale = 1 / sqrtf((float)dim);
    for (int64_t t = first; t < end; t += TILE_TOKENS) {
        int tokens = end - t < TILE_TOKENS ? (int)(end - t) : TILE_TOKENS;
        int64_t at[TILE_TOKENS];
        for (int i = 0; i < TILE_TOKENS; i++) at[i] = kv_at(kv, g->pages, t + (i < tokens ? i : 0), column);
        int64_t ahead = t + FETCH_TOKENS < end ? t + FETCH_TOKENS : end - 1;
        for (int i = 0; i < TILE_TOKENS; i++)
            if (ahead + i < end) kv_fetch(kv->keys, dtype, kv_at(kv, g->pages, ahead + i, column), dim);
        for (int h = 0; h < g->n_heads; h += TILE_HEADS)
            score_tile(scores + h * n + t - first, n, g->qg + (int64_t)2 * dim * h, kv->keys, dtype, at, dim,
                       scale, g->n_heads - h < TILE_HEADS ? g->n_heads - h : TILE_HEADS, tokens);
    }
    if (dtype == KV_INT8) scale_page(scores, n, g, kv->keys, first, end);
}

/* scores[t] = e^(scores[t] - top), their largest; returns their sum. */
INLINE float softmax(float *scores, int64_t n, float *top)
{
    int64_t t = 0;
    vec most = vset(scores[0]), sum = { 0 };
    for (; t + VL <= n; t += VL) most = vmax(vload(scores + t), most);
    *top = vmaximum(most);
    for (; t < n; t++) *top = scores[t] > *top ? scores[t] : *top;
    for (t = 0; t + VL <= n; t += VL) {
        vec p = vexp(vload(scores + t) - *top);
        vstore(scores + t, p);
        sum += p;
    }
    for (; t < n; t++) {
        vec p = vexp(vset(scores[t] - *top));
        scores[t] = p[0];
        sum[0] += p[0];
    }
    return vsum(sum);
}

/* y[h * stride + v * VL ..] += scores[h * n + t] * value t, `tokens` values `line` apart. */
INLINE void mix_tile(float *y, int64_t stride, const float *scores, int64_t n, const void *values,
                     const enum kv_dtype dtype, int64_t at, int64_t ahead, int64_t line, int64_t tokens,
                     const int heads, const int vectors)
{
    vec sum[TILE_HEADS][TILE_VECTORS];
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sum[h][v] = vload(y + h * stride + v * VL);
    for (int64_t t = 0; t < tokens; t++, at += line) {
        vec value[TILE_VECTORS];
        if (ahead >= 0) kv_fetch(values, dtype, ahead + t * line, vectors * VL);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) value[v] = kv_vec(values, dtype, at + v * VL);
#pragma GCC unroll 4
        for (int h = 0; h < heads; h++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sum[h][v] = scores[h * n + t] * value[v] + sum[h][v];
    }
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) vstore(y + h * stride + v * VL, sum[h][v]);
}

INLINE void mix_heads(float *y, const float *scores, int64_t n, const struct kv_cache *kv,
                      const enum kv_dtype dtype, int64_t at, int64_t ahead, int64_t tokens, const int heads)
{
    int dim = kv->head_dim, d = 0;
    int64_t line = (int64_t)kv->n_kv_heads * dim, stride = dim + 2;
    for (; d + TILE_VECTORS * VL <= dim; d += TILE_VECTORS * VL)
        mix_tile(y + d, stride, scores, n, kv->values, dtype, at + d, ahead < 0 ? ahead : ahead + d, line,
                 tokens, heads, TILE_VECTORS);
    for (; d + VL <= dim; d += VL)
        mix_tile(y + d, stride, scores, n, kv->values, dtype, at + d, ahead < 0 ? ahead : ahead + d, line,
                 tokens, heads, 1);
    for (int h = 0; h < heads; h++)
        for (int i = d; i < dim; i++)
            for (int64_t t = 0; t < tokens; t++)
                y[h * stride + i] += scores[h * n + t] * kv_one(kv->values, dtype, at + t * line + i);
}

INLINE void attend_dtype(const struct attend_group *g, const enum kv_dtype dtype, int64_t first, int64_t end,
                         float *out, float *scores)
{
    const struct kv_cache *kv = g->kv;
    int dim = kv->head_dim;
    int64_t n = end - first, column = (int64_t)g->kv_head * dim;
    for (int64_t t = first, stop; t < end; t = stop) {
        stop = end - t < KV_PAGE ? end : t + KV_PAGE;
        score_page(scores + t - first, n, g, dtype, t, stop);
    }
    memset(out, 0, (size_t)g->n_heads * (size_t)(dim + 2) * sizeof *out);
    for (int h = 0; h < g->n_heads; h++) {
        float *sums = out + (int64_t)h * (dim + 2) + dim;
        sums[1] = softmax(scores + h * n, n, &sums[0]);
    }
    for (int64_t t = first, stop; t < end; t = stop) {
        stop = end - t < KV_PAGE ? end : t + KV_PAGE;
        int64_t at = kv_at(kv, g->pages, t, column),
                ahead = stop < end ? kv_at(kv, g->pages, stop, column) : -1;
        if (dtype == KV_INT8) scale_page(scores + t - first, n, g, kv->values, t, stop);
        int h = 0;
        for (; h + TILE_HEADS <= g->n_heads; h += TILE_HEADS)
            mix_heads(out + (int64_t)h * (dim + 2), scores + h * n + t - first, n, kv, dtype, at,
                      h ? -1 : ahead, stop - t, TILE_HEADS);
        for (; h < g->n_heads; h++)
            mix_heads(out + (int64_t)h * (dim + 2), scores + h * n + t - first, n, kv, dtype, at,
                      h ? -1 : ahead, stop - t, 1);
    }
}

static void attend(const struct attend_group *g, int64_t first, int64_t end, float *out, float *scores)
{
    if (g->kv->dtype == KV_F32)
        attend_dtype(g, KV_F32, first, end, out, scores);
    else if (g->kv->dtype == KV_BF16)
        attend_dtype(g, KV_BF16, first, end, out, scores);
    else if (g->kv->dtype == KV_FP8)
        attend_dtype(g, KV_FP8, first, end, out, scores);
    else
        attend_dtype(g, KV_INT8, first, end, out, scores);
}

static void attend_weights(float *scores, int64_t n, float scale, float *top, float *sum, float *factor)
{
    for (int i = 0; i < PANEL; i += VL) {
        vec old = vload(top + i), most = vload(scores + i), add = { 0 };
        for (int64_t t = 1; t < n; t++) most = vmax(most, vload(scores + t * PANEL + i));
        most = vmax(old, most * scale);
        vec shrink = vexp(old - most);
        for (int64_t t = 0; t < n; t++) {
            vec p = vexp(vload(scores + t * PANEL + i) * scale - most);
            vstore(scores + t * PANEL + i, p);
            add += p;
        }
        vstore(top + i, most);
        vstore(factor + i, shrink);
        vstore(sum + i, vload(sum + i) * shrink + add);
    }
}

static void attend_finish(float *y, const struct attend_group *g, const float *parts, int64_t stride,
                          int n_parts)
{
    int dim = g->kv->head_dim;
    for (int h = 0; h < g->n_heads; h++, y += dim, parts += dim + 2) {
        const float *gate = g->qg + (int64_t)(2 * h + 1) * dim;
        float top = -INFINITY, total = 0, share[ATTEND_PARTS_MAX];
        for (int p = 0; p < n_parts; p++) top = parts[p * stride + dim] > top ? parts[p * stride + dim] : top;
        for (int p = 0; p < n_parts; p++) {
            share[p] = expf(parts[p * stride + dim] - top);
            total += share[p] * parts[p * stride + dim + 1];
        }
        for (int p = 0; p < n_parts; p++) share[p] /= total;
        int d = 0;
        for (; d + VL <= dim; d += VL) {
            vec sum = { 0 };
            for (int p = 0; p < n_parts; p++) sum = vload(parts + p * stride + d) * share[p] + sum;
            vstore(y + d, sum * vsigmoid(vload(gate + d)));
        }
        for (; d < dim; d++) {
            float sum = 0;
            for (int p = 0; p < n_parts; p++) sum += parts[p * stride + d] * share[p];
            y[d] = sum * vsigmoid(vset(gate[d]))[0];
        }
    }
}
#endif
