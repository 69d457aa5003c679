/* cuBLASLt: its functions found by name, and its choice of kernel kept for each shape. */
#include "backend/cuda/blas.h"
#include <dlfcn.h>
#include <stdlib.h>
#if __has_include(<cublasLt.h>)
#include <cublasLt.h>

enum { SHAPES = 32 };

struct shape {
    int64_t n, rows, cols, stride;
    size_t bytes;
    bool fp8;
};

struct plan {
    struct shape shape;
    cublasLtMatrixLayout_t w, x, y;
    cublasLtMatmulAlgo_t algorithm;
};

struct blas {
    void *library;
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t product,
        scaled; /* W transposed, x as it is, sums in f32; with a scale a row of each */
    bool has_fp8;
    struct plan plans[SHAPES];
    int n_plans, next;
    size_t (*version)(void);
    cublasStatus_t (*create)(cublasLtHandle_t *);
    cublasStatus_t (*destroy)(cublasLtHandle_t);
    cublasStatus_t (*desc_create)(cublasLtMatmulDesc_t *, cublasComputeType_t, cudaDataType_t);
    cublasStatus_t (*desc_destroy)(cublasLtMatmulDesc_t);
    cublasStatus_t (*desc_set)(cublasLtMatmulDesc_t, cublasLtMatmulDescAttributes_t, const void *, size_t);
    cublasStatus_t (*layout_create)(cublasLtMatrixLayout_t *, cudaDataType, uint64_t, uint64_t, int64_t);
    cublasStatus_t (*layout_destroy)(cublasLtMatrixLayout_t);
    cublasStatus_t (*wish_create)(cublasLtMatmulPreference_t *);
    cublasStatus_t (*wish_destroy)(cublasLtMatmulPreference_t);
    cublasStatus_t (*wish_set)(cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t, const void *,
                               size_t);
    cublasStatus_t (*choose)(cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t,
                             cublasLtMatrixLayout_t, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                             cublasLtMatmulPreference_t, int, cublasLtMatmulHeuristicResult_t[], int *);
    cublasStatus_t (*run)(cublasLtHandle_t, cublasLtMatmulDesc_t, const void *, const void *,
                          cublasLtMatrixLayout_t, const void *, cublasLtMatrixLayout_t, const void *,
                          const void *, cublasLtMatrixLayout_t, void *, cublasLtMatrixLayout_t,
                          const cublasLtMatmulAlgo_t *, void *, size_t, cudaStream_t);
};

static bool find_all(struct blas *b)
{
    const struct {
        const char *name;
        void *to;
    } all[] = { { "cublasLtGetVersion", &b->version },
                { "cublasLtCreate", &b->create },
                { "cublasLtDestroy", &b->destroy },
                { "cublasLtMatmulDescCreate", &b->desc_create },
                { "cublasLtMatmulDescDestroy", &b->desc_destroy },
                { "cublasLtMatmulDescSetAttribute", &b->desc_set },
                { "cublasLtMatrixLayoutCreate", &b->layout_create },
                { "cublasLtMatrixLayoutDestroy", &b->layout_destroy },
                { "cublasLtMatmulPreferenceCreate", &b->wish_create },
                { "cublasLtMatmulPreferenceDestroy", &b->wish_destroy },
                { "cublasLtMatmulPreferenceSetAttribute", &b->wish_set },
                { "cublasLtMatmulAlgoGetHeuristic", &b->choose },
                { "cublasLtMatmul", &b->run } };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (!(*(void **)all[i].to = dlsym(b->library, all[i].name))) return false;
    return true;
}

/* False: a library older than such scales. */
static bool scale_rows(struct blas *b)
{
#if CUBLAS_VERSION >= 120900
    int32_t mode = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
    return b->version() >= 120900 &&
           b->desc_set(b->scaled, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &mode, sizeof mode) ==
               CUBLAS_STATUS_SUCCESS &&
           b->desc_set(b->scaled, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &mode, sizeof mode) ==
               CUBLAS_STATUS_SUCCESS;
#else
    (void)b;
    return false;
#endif
}

static bool set_scales(struct blas *b, const struct blas_product *p)
{
    return b->desc_set(b->scaled, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &p->w_scale, sizeof p->w_scale) ==
               CUBLAS_STATUS_SUCCESS &&
           b->desc_set(b->scaled, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &p->x_scale, sizeof p->x_scale) ==
               CUBLAS_STATUS_SUCCESS;
}

struct blas *blas_open(void)
{
    static const char *const names[] = { "libcublasLt.so.13", "libcublasLt.so.12" };
    struct blas *b = calloc(1, sizeof *b);
    if (!b) return NULL;
    for (int i = 0; !b->library && i < 2; i++) b->library = dlopen(names[i], RTLD_NOW | RTLD_LOCAL);
    cublasOperation_t turned = CUBLAS_OP_T;
    bool ok = b->library && find_all(b) && b->create(&b->handle) == CUBLAS_STATUS_SUCCESS;
    for (int i = 0; ok && i < 2; i++) {
        cublasLtMatmulDesc_t *d = i ? &b->scaled : &b->product;
        ok = b->desc_create(d, CUBLAS_COMPUTE_32F, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS &&
             b->desc_set(*d, CUBLASLT_MATMUL_DESC_TRANSA, &turned, sizeof turned) == CUBLAS_STATUS_SUCCESS;
    }
    b->has_fp8 = ok && scale_rows(b);
    if (ok) return b;
    blas_close(b);
    return NULL;
}

static void forget(struct blas *b, struct plan *p)
{
    if (p->w) b->layout_destroy(p->w);
    if (p->x) b->layout_destroy(p->x);
    if (p->y) b->layout_destroy(p->y);
    *p = (struct plan){ 0 };
}

void blas_close(struct blas *b)
{
    if (!b) return;
    for (int i = 0; i < b->n_plans; i++) forget(b, &b->plans[i]);
    if (b->product) b->desc_destroy(b->product);
    if (b->scaled) b->desc_destroy(b->scaled);
    if (b->handle) b->destroy(b->handle);
    if (b->library) dlclose(b->library);
    free(b);
}

int blas_version(const struct blas *b)
{
    return (int)b->version();
}

/* Matrices of ours are the library's, transposed. */
static bool make(struct blas *b, struct plan *p, const struct shape *s)
{
    cublasLtMatmulPreference_t wish = NULL;
    cublasLtMatmulHeuristicResult_t found = { 0 };
    static const cublasLtMatmulPreferenceAttributes_t sides[] = {
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES
    };
    uint32_t aligned = 16, whole = CUBLASLT_REDUCTION_SCHEME_NONE;
    int n = 0;
    cudaDataType type = s->fp8 ? CUDA_R_8F_E4M3 : CUDA_R_16BF;
    bool ok =
        b->layout_create(&p->w, type, (uint64_t)s->cols, (uint64_t)s->rows, s->cols) ==
            CUBLAS_STATUS_SUCCESS &&
        b->layout_create(&p->x, type, (uint64_t)s->cols, (uint64_t)s->n, s->cols) == CUBLAS_STATUS_SUCCESS &&
        b->layout_create(&p->y, CUDA_R_32F, (uint64_t)s->rows, (uint64_t)s->n, s->stride) ==
            CUBLAS_STATUS_SUCCESS &&
        b->wish_create(&wish) == CUBLAS_STATUS_SUCCESS &&
        b->wish_set(wish, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &s->bytes, sizeof s->bytes) ==
            CUBLAS_STATUS_SUCCESS;
    /* one sum over the columns, so that a row has the same bits in every step */
    ok = ok && b->wish_set(wish, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &whole, sizeof whole) ==
                   CUBLAS_STATUS_SUCCESS;
    for (int i = 0; ok && i < 4; i++)
        ok = b->wish_set(wish, sides[i], &aligned, sizeof aligned) == CUBLAS_STATUS_SUCCESS;
    ok = ok &&
         b->choose(b->handle, s->fp8 ? b->scaled : b->product, p->w, p->x, p->y, p->y, wish, 1, &found, &n) ==
             CUBLAS_STATUS_SUCCESS &&
         n == 1;
    if (wish) b->wish_destroy(wish);
    p->algorithm = found.algo;
    p->shape = *s;
    if (!ok) forget(b, p);
    return ok;
}

static bool same(const struct shape *a, const struct shape *b)
{
    return a->n == b->n && a->rows == b->rows && a->cols == b->cols && a->stride == b->stride &&
           a->bytes == b->bytes && a->fp8 == b->fp8;
}

static const struct plan *plan_of(struct blas *b, const struct shape *s)
{
    for (int i = 0; i < b->n_plans; i++)
        if (same(&b->plans[i].shape, s)) return &b->plans[i];
    struct plan *p = &b->plans[b->next];
    forget(b, p);
    if (!make(b, p, s)) return NULL;
    b->next = (b->next + 1) % SHAPES;
    if (b->n_plans < SHAPES) b->n_plans++;
    return p;
}

bool blas_product(struct blas *b, cudaStream_t stream, const struct blas_product *r, void *work, size_t bytes)
{
    bool fp8 = r->w_scale;
    float one = 1, before = r->add ? 1 : 0, *y = r->y.data;
    if (fp8 && !(b->has_fp8 && set_scales(b, r))) return false;
    const struct plan *p =
        plan_of(b, &(struct shape){ r->y.rows, r->y.cols, r->cols, r->y.stride, bytes, fp8 });
    bool ok = p && b->run(b->handle, fp8 ? b->scaled : b->product, &one, r->w, p->w, r->x, p->x, &before, y,
                          p->y, y, p->y, &p->algorithm, work, bytes, stream) == CUBLAS_STATUS_SUCCESS;
    if (fp8 && !ok) b->has_fp8 = false;
    return ok;
}

bool blas_has_fp8(const struct blas *b)
{
    return b->has_fp8;
}
#else
struct blas *blas_open(void)
{
    return NULL;
}

void blas_close(struct blas *b)
{
    (void)b;
}

int blas_version(const struct blas *b)
{
    (void)b;
    return 0;
}

bool blas_product(struct blas *b, cudaStream_t stream, const struct blas_product *p, void *work, size_t bytes)
{
    (void)b, (void)stream, (void)p, (void)work, (void)bytes;
    return false;
}

bool blas_has_fp8(const struct blas *b)
{
    (void)b;
    return false;
}
#endif
