/* KV caches: what earlier steps left in them, and how far one in INT8 may be off. */
#ifndef TESTS_KERNELS_CACHE_H
#define TESTS_KERNELS_CACHE_H
#include "backend/kernels_fixture.h"

enum { CACHE_PAGES = 24 };

/* That the tested backend knows, from the first. */
static int kv_dtypes(void)
{
    return cpu.kv_int8 ? KV_DTYPES : KV_INT8;
}

static size_t side_bytes(const struct kv_cache *kv)
{
    return (size_t)(CACHE_PAGES * KV_PAGE * kv_line_bytes(kv->dtype, kv->n_kv_heads, kv->head_dim));
}

static void fill_page(const struct kv_cache *kv, void *side, int32_t page)
{
    int64_t rows = (int64_t)KV_PAGE * kv->n_kv_heads, at = page * kv_page_stride(kv);
    for (int64_t i = at; i < at + rows * kv->head_dim; i++) {
        float x = random_normal();
        switch (kv->dtype) {
        case KV_F32: ((float *)side)[i] = x; break;
        case KV_BF16: ((bf16 *)side)[i] = bf16_from_f32(x); break;
        case KV_FP8: ((e4m3 *)side)[i] = e4m3_from_f32(x); break;
        case KV_INT8: ((int8_t *)side)[i] = (int8_t)(random_below(255) - 127); break;
        }
    }
    for (int64_t r = 0; r < rows && kv->dtype == KV_INT8; r++)
        kv_scales(kv, side, page)[r] = random_below(9) ? (float)random_below(1000) * 2e-5f : 0;
}

/* Both sides of one, and the same in the other. */
static void fill_caches(const struct kv_cache *kv, const struct kv_cache *copy)
{
    for (int32_t page = 0; page < CACHE_PAGES; page++) {
        fill_page(kv, kv->keys, page);
        fill_page(kv, kv->values, page);
    }
    memcpy(copy->keys, kv->keys, side_bytes(kv));
    memcpy(copy->values, kv->values, side_bytes(kv));
}

static struct kv_cache take_cache(enum kv_dtype dtype, int n_kv, int dim)
{
    struct kv_cache kv = { NULL, NULL, dtype, n_kv, dim };
    kv.keys = take(side_bytes(&kv));
    kv.values = take(side_bytes(&kv));
    return kv;
}

static void give_cache(struct kv_cache *kv)
{
    give(kv->keys);
    give(kv->values);
}

/* INT8. */

enum { CACHE_ROWS = 130 }; /* three pages */

static float largest_of(const float *x, int n)
{
    float m = 0;
    for (int i = 0; i < n; i++) m = fabsf(x[i]) > m ? fabsf(x[i]) : m;
    return m;
}

/* Rows of every size, ties, and some that are not finite. */
static void fill_rows(struct mat m)
{
    static const float sizes[] = { 1, 600, 3e37f, 1e-20f, 0x1p-100f, 0x1p-103f, 0 };
    for (int64_t r = 0; r < m.rows; r++) {
        float *x = m.data + r * m.stride, size = sizes[random_below(7)];
        for (int64_t c = 0; c < m.cols; c++) x[c] = random_below(10) ? random_normal() * size : 0;
        if (r % 16 == 1)
            for (int64_t c = 0; c < m.cols; c++)
                x[c] = c ? (float)(random_below(253) - 126) + 0.5f : 127; /* halves of a step */
        if (r % 16 == 2) x[random_below(m.cols)] = r % 32 == 2 ? NAN : -INFINITY;
    }
}

/* Half a step of the row's, which is its largest magnitude's 127th part. */
static void check_row(const int8_t *codes, float scale, const float *x, int dim)
{
    bool finite = true;
    for (int i = 0; i < dim; i++) finite = finite && isfinite(x[i]);
    float m = finite ? largest_of(x, dim) : 0;
    float step = m < 0x1p-100f ? 0 : m / 127;
    if (finite ? step != scale : !isnan(scale))
        fail_msg("a row with %g at most has scale %g on %s", (double)m, (double)scale, cpu.name);
    for (int i = 0; i < dim; i++) {
        double off = finite ? fabs(codes[i] * (double)step - (double)x[i]) : codes[i];
        if (!(off <= (step > 0 ? (double)step * 0.5001 : 0x1p-100)))
            fail_msg("a row with %g at most, on %s: %g is %d", (double)m, cpu.name, (double)x[i], codes[i]);
    }
}

static void check_side(const struct kv_cache *kv, void *side, struct mat x, const int32_t *pages)
{
    for (int64_t t = 0; t < x.rows; t++)
        for (int h = 0; h < kv->n_kv_heads; h++) {
            int64_t row = t % KV_PAGE * kv->n_kv_heads + h;
            check_row((int8_t *)side + pages[t / KV_PAGE] * kv_page_stride(kv) + row * kv->head_dim,
                      kv_scales(kv, side, pages[t / KV_PAGE])[row],
                      x.data + t * x.stride + (int64_t)h * kv->head_dim, kv->head_dim);
        }
}

static void int8_rows_case(int n_kv, int dim)
{
    static const int32_t pages[] = { 7, 0, 3 };
    struct span span = { .n = CACHE_ROWS, .pages = pages };
    struct step_rows step = { NULL, CACHE_ROWS, &span, 1, false };
    struct guarded k = filled(CACHE_ROWS, (int64_t)n_kv * dim, 3, 1),
                   v = filled(CACHE_ROWS, (int64_t)n_kv * dim, 0, 1);
    struct kv_cache kr = take_cache(KV_INT8, n_kv, dim), kc = take_cache(KV_INT8, n_kv, dim);
    fill_caches(&kr, &kc);
    fill_rows(k.m);
    fill_rows(v.m);
    ref.ops->kv_append(ref.queue, &kr, k.m, v.m, &step);
    cpu.ops->kv_append(cpu.queue, &kc, k.m, v.m, &step);
    finish();
    assert_memory_equal(kr.keys, kc.keys, side_bytes(&kr));
    assert_memory_equal(kr.values, kc.values, side_bytes(&kr));
    check_side(&kc, kc.keys, k.m, pages);
    check_side(&kc, kc.values, v.m, pages);
    drop(&k), drop(&v);
    give_cache(&kr), give_cache(&kc);
}

/* How far attention over INT8 may be from that over f32: a score moves by half a step of its key times sum|q|
 * / sqrt(dim), at most d; weights then change by factors of e^(2d) at most, and values move by half a step.
 */
static double int8_bound(const float *q, struct mat k, struct mat v, int64_t n, int kv_head, int dim)
{
    double size = 0, key = 0, value = 0;
    for (int i = 0; i < dim; i++) size += fabs((double)q[i]);
    for (int64_t t = 0; t < n; t++) {
        key = fmax(key, (double)largest_of(k.data + t * k.stride + (int64_t)kv_head * dim, dim));
        value = fmax(value, (double)largest_of(v.data + t * v.stride + (int64_t)kv_head * dim, dim));
    }
    return value * (expm1(2 * size * key / 254 / sqrt(dim)) + 1.0 / 254 + 1e-5);
}

static void int8_bound_case(int n_kv, int group, int dim)
{
    static const int32_t pages[] = { 2, 23, 5 };
    int n_heads = n_kv * group;
    struct span span = { .n = CACHE_ROWS, .pages = pages };
    struct step_rows step = { NULL, CACHE_ROWS, &span, 1, false };
    struct guarded qg = filled(CACHE_ROWS, (int64_t)n_heads * 2 * dim, 0, 0.3f),
                   k = filled(CACHE_ROWS, (int64_t)n_kv * dim, 0, 2),
                   v = filled(CACHE_ROWS, (int64_t)n_kv * dim, 0, 5), exact, got;
    struct kv_cache f32 = take_cache(KV_F32, n_kv, dim), int8 = take_cache(KV_INT8, n_kv, dim);
    both(&exact, &got, CACHE_ROWS, (int64_t)n_heads * dim);
    ref.ops->kv_append(ref.queue, &f32, k.m, v.m, &step);
    ref.ops->attention(ref.queue, exact.m, qg.m, n_heads, &f32, &step);
    cpu.ops->kv_append(cpu.queue, &int8, k.m, v.m, &step);
    cpu.ops->attention(cpu.queue, got.m, qg.m, n_heads, &int8, &step);
    check_guards(&got, "attention over INT8");
    for (int64_t r = 0; r < CACHE_ROWS; r++)
        for (int h = 0; h < n_heads; h++) {
            double most = int8_bound(qg.m.data + r * qg.m.stride + (int64_t)h * 2 * dim, k.m, v.m, r + 1,
                                     h / group, dim);
            for (int64_t c = (int64_t)h * dim; c < (int64_t)(h + 1) * dim; c++) {
                double off = fabs((double)got.m.data[r * got.m.stride + c] -
                                  (double)exact.m.data[r * exact.m.stride + c]);
                if (!(off <= most))
                    fail_msg("attention over INT8 on %s: (%d, %d) is %g off, at most %g", cpu.name, (int)r,
                             (int)c, off, most);
            }
        }
    struct guarded *all[] = { &qg, &k, &v, &exact, &got };
    for (int i = 0; i < 5; i++) drop(all[i]);
    give_cache(&f32), give_cache(&int8);
}

static void int8_caches(void)
{
    static const int dims[] = { 256, 64, 20, 1, 255, 16 };
    if (!cpu.kv_int8) return;
    reserve(300, 2048, 64, 2, 4);
    for (int d = 0; d < 6; d++) {
        int8_rows_case(1 + d % 2, dims[d]);
        int8_bound_case(1 + d % 2, 1 + (int)random_below(9), dims[d]);
    }
}
#endif
