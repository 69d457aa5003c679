#include "backend/cuda/load.h"
#include "base/pool.h"
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum { THREADS_MOST = 8, PIECE = 1 << 20, BUFFERS = 2 };

struct loader {
    struct pool *pool;
    unsigned char *pinned; /* [threads][BUFFERS][PIECE] */
    struct turn {
        cudaEvent_t taken[BUFFERS]; /* the device has what was in the buffer */
        int next;
    } turn[THREADS_MOST];
};

struct piece {
    int load;
    uint64_t at;
};

struct loading {
    struct queue *q;
    struct load *list;
    const struct piece *pieces;
    atomic_llong *nan; /* [n] lowest NaN */
    atomic_int status; /* cudaError_t of what failed */
};

/* The first NaN among E4M3 bytes, or -1. */
static int64_t find_nan(const uint8_t *bytes, int64_t n)
{
    enum { BLOCK = 4096 };
    for (int64_t at = 0; at < n; at += BLOCK) {
        int64_t count = n - at < BLOCK ? n - at : BLOCK;
        uint8_t found = 0;
        for (int64_t i = 0; i < count; i++) found |= (bytes[at + i] & 0x7f) == 0x7f;
        for (int64_t i = 0; found && i < count; i++)
            if ((bytes[at + i] & 0x7f) == 0x7f) return at + i;
    }
    return -1;
}

static void note_nan(atomic_llong *lowest, long long at)
{
    long long now = atomic_load(lowest);
    while ((now < 0 || at < now) && !atomic_compare_exchange_weak(lowest, &now, at)) {
    }
}

static void load_piece(void *ctx, int64_t item, int thread)
{
    struct loading *l = ctx;
    struct loader *loader = l->q->loader;
    const struct piece *p = &l->pieces[item];
    const struct load *load = &l->list[p->load];
    struct turn *turn = &loader->turn[thread];
    int buffer = turn->next;
    uint64_t bytes = load->bytes - p->at < PIECE ? load->bytes - p->at : PIECE;
    uint8_t *pinned = loader->pinned + ((size_t)thread * BUFFERS + (size_t)buffer) * PIECE;
    turn->next = (buffer + 1) % BUFFERS;
    cudaError_t status = cudaEventSynchronize(turn->taken[buffer]);
    memcpy(pinned, (const char *)load->from + p->at, bytes);
    int64_t nan = load->is_e4m3 ? find_nan(pinned, (int64_t)bytes) : -1;
    if (nan >= 0) note_nan(&l->nan[p->load], (long long)p->at + nan);
    if (status == cudaSuccess)
        status =
            cudaMemcpyAsync((char *)load->to + p->at, pinned, bytes, cudaMemcpyHostToDevice, l->q->stream);
    if (status == cudaSuccess) status = cudaEventRecord(turn->taken[buffer], l->q->stream);
    if (status != cudaSuccess) atomic_store(&l->status, (int)status);
}

static bool make(struct queue *q, struct loader *l, int threads, struct err *e)
{
    size_t bytes = (size_t)threads * BUFFERS * PIECE;
    if (!pool_create(&l->pool, threads, e)) return false;
    if (cudaHostAlloc((void **)&l->pinned, bytes, cudaHostAllocDefault) != cudaSuccess) {
        cudaGetLastError();
        l->pinned = NULL;
        return err_memory(e, "loading", bytes);
    }
    for (int i = 0; i < threads * BUFFERS; i++)
        if (!queue_check(
                q, cudaEventCreateWithFlags(&l->turn[i / BUFFERS].taken[i % BUFFERS], cudaEventDisableTiming),
                "loading"))
            return err_set(e, ERR_IO, "GPU: %s: %s", q->failed, q->failure);
    return true;
}

void cuda_load_end(struct queue *q)
{
    struct loader *l = q->loader;
    if (!l) return;
    cudaStreamSynchronize(q->stream);
    for (int i = 0; i < THREADS_MOST * BUFFERS; i++)
        if (l->turn[i / BUFFERS].taken[i % BUFFERS])
            cudaEventDestroy(l->turn[i / BUFFERS].taken[i % BUFFERS]);
    cudaFreeHost(l->pinned);
    pool_free(l->pool);
    free(l);
    q->loader = NULL;
}

static bool begin(struct queue *q, struct err *e)
{
    int threads = pool_default_threads() < THREADS_MOST ? pool_default_threads() : THREADS_MOST;
    if (q->loader) return true;
    q->loader = calloc(1, sizeof *q->loader);
    if (!q->loader) return err_memory(e, "loading", sizeof *q->loader);
    if (make(q, q->loader, threads, e)) return true;
    cuda_load_end(q); /* half of one would be taken for a whole one by the next load */
    return false;
}

static int64_t count_pieces(const struct load *list, int n)
{
    int64_t pieces = 0;
    for (int i = 0; i < n; i++) pieces += (int64_t)((list[i].bytes + PIECE - 1) / PIECE);
    return pieces;
}

static void list_pieces(struct piece *out, const struct load *list, int n)
{
    for (int i = 0; i < n; i++)
        for (uint64_t at = 0; at < list[i].bytes; at += PIECE) *out++ = (struct piece){ i, at };
}

bool cuda_load(struct queue *q, struct load *list, int n, struct err *e)
{
    int64_t n_pieces = count_pieces(list, n);
    struct piece *pieces = malloc((size_t)n_pieces * sizeof *pieces + 1);
    atomic_llong *nan = malloc((size_t)n * sizeof *nan + 1);
    bool ok = (pieces && nan) || err_memory(e, "loading", (uint64_t)n_pieces * sizeof *pieces);
    if (ok && begin(q, e)) {
        struct loading l = { .q = q, .list = list, .pieces = pieces, .nan = nan };
        for (int i = 0; i < n; i++) atomic_init(&nan[i], -1);
        list_pieces(pieces, list, n);
        pool_run(q->loader->pool, n_pieces, load_piece, &l);
        for (int i = 0; i < n; i++) list[i].nan_at = atomic_load(&nan[i]);
        queue_check(q, (cudaError_t)atomic_load(&l.status), "loading");
        ok = !queue_failed(q) || err_set(e, ERR_IO, "GPU: %s: %s", q->failed, q->failure);
    } else {
        ok = false;
    }
    free(pieces);
    free(nan);
    return ok;
}
