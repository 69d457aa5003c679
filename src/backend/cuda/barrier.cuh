/* Barriers in shared memory, and copies to there that arrive at one (compute capability 9.0). */
#ifndef BACKEND_CUDA_BARRIER_CUH
#define BACKEND_CUDA_BARRIER_CUH
#include <stdint.h>

namespace {

__device__ __forceinline__ uint32_t shared_at(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

__device__ __forceinline__ void barrier_init(uint64_t *b, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_at(b)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t *b)
{
    asm volatile("{.reg .b64 s; mbarrier.arrive.shared::cta.b64 s, [%0];}" ::"r"(shared_at(b)) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint64_t *b, int phase)
{
    asm volatile("{.reg .pred done;\n"
                 "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;}" ::"r"(shared_at(b)), "r"(phase) : "memory");
}

/* Arrives when what this thread has asked for by copy_async16 lies there. */
__device__ __forceinline__ void barrier_arrive_copied(uint64_t *b)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_at(b)) : "memory");
}

/* A place in a ring, and how often it has come round. */
struct ring_place {
    int slot, phase;
    __device__ __forceinline__ void advance(int slots)
    {
        if (++slot == slots) slot = 0, phase ^= 1;
    }
};

#if __CUDA_ARCH__ >= 900
/* Arrives, and lets the barrier wait for bytes that are copied. */
__device__ __forceinline__ void barrier_expect(uint64_t *b, int bytes)
{
    asm volatile("{.reg .b64 s; mbarrier.arrive.expect_tx.shared::cta.b64 s, [%0], %1;}" ::"r"(shared_at(b)), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void copy_bulk(uint32_t to, const void *from, int bytes, uint64_t *b)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
                 "r"(bytes), "r"(shared_at(b))
                 : "memory");
}
#endif

} /* namespace */
#endif
