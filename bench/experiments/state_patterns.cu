/* How fast states of 64 KB are read, changed and written back: what delta_states could reach. usage: state_patterns */
#include <cstdint>
#include <cstdio>
#include <algorithm>
#include <vector>
#include <cuda_runtime.h>
static __device__ __forceinline__ uint32_t at(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }
static __device__ __forceinline__ void init(uint64_t *b, int n) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at(b)), "r"(n) : "memory"); }
static __device__ __forceinline__ void expect(uint64_t *b, int n) { asm volatile("{.reg .b64 s; mbarrier.arrive.expect_tx.shared::cta.b64 s, [%0], %1;}" ::"r"(at(b)), "r"(n) : "memory"); }
static __device__ __forceinline__ void wait(uint64_t *b, int ph)
{
    asm volatile("{.reg .pred done;\nagain: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;}" ::"r"(at(b)), "r"(ph) : "memory");
}
static __device__ __forceinline__ void load(void *to, const void *from, int n, uint64_t *b)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(at(to)), "l"(from), "r"(n), "r"(at(b)) : "memory");
}
static __device__ __forceinline__ void store(void *to, const void *from, int n)
{
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\ncp.async.bulk.commit_group;" ::"l"(to), "r"(at(from)), "r"(n) : "memory");
}
/* plain: a block of 256 threads has 32 KB; as delta_sequences */
__global__ void __launch_bounds__(256, 4) plain(float2 *S)
{
    float2 *s = S + (size_t)(blockIdx.x / 2) * 8192 + (threadIdx.x / 32) * 64 + blockIdx.x % 2 * 32 + threadIdx.x % 32, x[16];
#pragma unroll
    for (int i = 0; i < 16; i++) x[i] = __ldcs(s + i * 512);
#pragma unroll
    for (int i = 0; i < 16; i++) x[i].x = x[i].x * 0.99f + 1e-3f, __stcs(s + i * 512, x[i]);
}
__global__ void __launch_bounds__(256, 4) rows(float4 *S) /* float4: whole rows, half of a state's rows a block */
{
    float4 *s = S + (size_t)blockIdx.x * 2048 + threadIdx.x, x[8];
#pragma unroll
    for (int i = 0; i < 8; i++) x[i] = __ldcs(s + i * 256);
#pragma unroll
    for (int i = 0; i < 8; i++) x[i].x = x[i].x * 0.99f + 1e-3f, __stcs(s + i * 256, x[i]);
}
/* ring: PLACES places of BYTES; one thread copies, all of the others touch a number each */
template <int BYTES, int PLACES, bool WRITE> __global__ void __launch_bounds__(288, 1) ring(uint8_t *S, int items)
{
    extern __shared__ __align__(128) uint8_t shared[];
    __shared__ uint64_t full[PLACES], done[PLACES];
    int mine = (items - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x;
    if (threadIdx.x == 0) for (int i = 0; i < PLACES; i++) init(&full[i], 1), init(&done[i], 8);
    if (threadIdx.x == 0) asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    __syncthreads();
    if (threadIdx.x < 256) {
        for (int n = 0; n < mine; n++) {
            wait(&full[n % PLACES], n / PLACES % 2);
            float *x = (float *)(shared + n % PLACES * BYTES) + threadIdx.x;
            for (int i = 0; i < BYTES / 1024; i++) x[i * 256] = x[i * 256] * 0.99f + 1e-3f;
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            __syncwarp();
            if (threadIdx.x % 32 == 0) asm volatile("{.reg .b64 s; mbarrier.arrive.shared::cta.b64 s, [%0];}" ::"r"(at(&done[n % PLACES])) : "memory");
        }
        return;
    }
    if (threadIdx.x > 256) return;
    auto ask = [&](int n) { expect(&full[n % PLACES], BYTES); load(shared + n % PLACES * BYTES, S + ((size_t)n * gridDim.x + blockIdx.x) * BYTES, BYTES, &full[n % PLACES]); };
    for (int n = 0; n < PLACES && n < mine; n++) ask(n);
    for (int n = 0; n < mine; n++) {
        wait(&done[n % PLACES], n / PLACES % 2);
        if (WRITE) {
            store(S + ((size_t)n * gridDim.x + blockIdx.x) * BYTES, shared + n % PLACES * BYTES, BYTES);
            if (n + PLACES < mine) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
        }
        if (n + PLACES < mine) ask(n + PLACES);
    }
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
template <class F> static void timed(const char *name, size_t bytes, F run)
{
    cudaEvent_t a, b;
    cudaEventCreate(&a), cudaEventCreate(&b);
    std::vector<float> us;
    run();
    for (int r = 0; r < 5; r++) {
        cudaEventRecord(a);
        for (int i = 0; i < 10; i++) run();
        cudaEventRecord(b);
        cudaEventSynchronize(b);
        float ms;
        cudaEventElapsedTime(&ms, a, b);
        us.push_back(ms * 100);
    }
    std::sort(us.begin(), us.end());
    printf("%-34s %8.1f us %6.2f TB/s %s\n", name, us[2], bytes / us[2] / 1e6, cudaGetErrorString(cudaGetLastError()));
    cudaEventDestroy(a), cudaEventDestroy(b);
}
template <int BYTES, int PLACES, bool WRITE = true> static void with_ring(uint8_t *S, int states)
{
    char name[64];
    snprintf(name, sizeof name, "%d places of %d KB%s", PLACES, BYTES / 1024, WRITE ? "" : ", read only");
    auto *k = ring<BYTES, PLACES, WRITE>;
    cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES * PLACES);
    int items = (int)((size_t)states * 65536 / BYTES);
    timed(name, (size_t)states * 65536 * (WRITE ? 2 : 1), [=] { k<<<132, 288, BYTES * PLACES>>>(S, items); });
}
int main()
{
    uint8_t *S;
    size_t all = 3 * 4096ull * 65536;
    cudaMalloc(&S, all);
    cudaMemset(S, 0, all);
    for (int states : { 4096, 1024, 256 }) {
        printf("%d states\n", states);
        size_t moved = (size_t)states * 65536 * 2;
        timed("plain, 64 columns a block", moved, [=] { plain<<<states * 2, 256>>>((float2 *)S); });
        timed("plain, whole rows", moved, [=] { rows<<<states * 2, 256>>>((float4 *)S); });
        with_ring<65536, 2>(S, states);
        with_ring<65536, 3>(S, states);
        with_ring<32768, 3>(S, states);
        with_ring<32768, 4>(S, states);
        with_ring<32768, 6>(S, states);
        with_ring<16384, 8>(S, states);
        with_ring<16384, 12>(S, states);
        with_ring<65536, 3, false>(S, states);
        timed("cudaMemcpy, device to device", moved, [=] { cudaMemcpyAsync(S + (size_t)states * 65536, S, (size_t)states * 65536, cudaMemcpyDeviceToDevice); });
    }
}
