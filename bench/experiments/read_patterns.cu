#include <cuda.h>
#include <cuda_runtime.h>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <algorithm>
#include <vector>
#define CK(x) do { cudaError_t e_ = (x); if (e_ != cudaSuccess) { printf("%s:%d %s\n", __FILE__, __LINE__, cudaGetErrorString(e_)); exit(1); } } while (0)
constexpr int ROW = 4096, BLOCK = 512, CREW = 16;
__device__ __forceinline__ void waitprev() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void letnext() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ uint32_t sa(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void binit(uint64_t *b, int n) { asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(sa(b)), "r"(n) : "memory"); }
__device__ __forceinline__ void bexpect(uint32_t b, int n) { asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(b), "r"(n) : "memory"); }
__device__ __forceinline__ void barrive(uint32_t b) { asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(b) : "memory"); }
__device__ __forceinline__ void bwait(uint32_t b, int parity)
{
    asm volatile("{\n.reg .pred p;\nAG_%=:\nmbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n@p bra DN_%=;\nbra AG_%=;\nDN_%=:\n}" ::"r"(b), "r"(parity) : "memory");
}
__device__ __forceinline__ void bulk(uint32_t to, const void *from, int n, uint32_t bar)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(n), "r"(bar) : "memory");
}
__device__ __forceinline__ void tma(uint32_t to, const CUtensorMap *m, int x, int y, uint32_t bar)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to), "l"(m), "r"(x), "r"(y), "r"(bar) : "memory");
}
__device__ __forceinline__ void cpa(uint32_t to, const void *from) { asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory"); }
struct args { const uint8_t *data; int tiles; uint32_t *out; int row0; };
/* 0 cp.async as stream.cuh; 1 TMA 64x8 swizzled; 2 TMA 128x8; 3 bulk 8 x 256; 4 bulk 2 KB contiguous; 5 block tiles 8 x 4 KB; 6 loads by lane pattern; 7 loads contiguous; 8 bulk 512 x 8 by teams of 8 warps */
template <int MODE, int STAGES>
__global__ void __launch_bounds__(BLOCK, 1) reader(args a, const __grid_constant__ CUtensorMap map)
{
    extern __shared__ __align__(1024) uint8_t raw[];
    uint8_t *ring = (uint8_t *)(((size_t)raw + 1023) & ~(size_t)1023);
    __shared__ uint64_t full[CREW][16], empty[16];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t x = 0;
    letnext();
    constexpr int SB = MODE == 8 ? 4096 : 2048; /* bytes of a stage of a warp: of one tile */
    if (MODE >= 1 && MODE <= 5 || MODE == 8) {
        if (MODE == 5) {
            if (threadIdx.x < STAGES) { binit(&full[0][threadIdx.x], 1); binit(&empty[threadIdx.x], CREW); }
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
            __syncthreads();
        } else {
            if (lane < STAGES) binit(&full[warp][lane], 1);
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
            __syncwarp();
        }
    }
    uint32_t mine = sa(ring) + warp * STAGES * SB;
    int team = MODE == 8 ? warp / 8 : 0, teams = MODE == 8 ? 2 : 1;
    auto ask = [&](int i) { /* the i-th tile of this warp into stage i % STAGES */
        int tile = (blockIdx.x + (i * teams + team) * gridDim.x);
        if (tile >= a.tiles) { if (MODE == 0) asm volatile("cp.async.commit_group;" ::: "memory"); return; }
        uint32_t to = mine + i % STAGES * SB, bar = sa(&full[warp][i % STAGES]);
        const uint8_t *t = a.data + (size_t)tile * 8 * ROW;
        if (MODE == 0) {
            const uint8_t *f = t + lane / 4 * ROW + warp * 256 + lane % 4 * 16;
            for (int u = 0; u < 2; u++) { cpa(to + u * 1024 + lane * 16, f + u * 128); cpa(to + u * 1024 + 512 + lane * 16, f + u * 128 + 64); }
            asm volatile("cp.async.commit_group;" ::: "memory");
        } else if (MODE == 1) {
            if (lane == 0) bexpect(bar, 2048), tma(to, &map, warp * 128, a.row0 + tile * 8, bar), tma(to + 1024, &map, warp * 128 + 64, a.row0 + tile * 8, bar);
        } else if (MODE == 2) {
            if (lane == 0) bexpect(bar, 2048), tma(to, &map, warp * 128, a.row0 + tile * 8, bar);
        } else if (MODE == 3) {
            if (lane == 0) bexpect(bar, 2048);
            __syncwarp();
            if (lane < 8) bulk(to + lane * 256, t + lane * ROW + warp * 256, 256, bar);
        } else if (MODE == 4) {
            if (lane == 0) bexpect(bar, 2048), bulk(to, t + warp * 2048, 2048, bar);
        } else if (MODE == 8) {
            if (lane == 0) bexpect(bar, 4096);
            __syncwarp();
            if (lane < 8) bulk(to + lane * 512, t + lane * ROW + warp % 8 * 512, 512, bar);
        }
    };
    if (MODE == 5) {
        auto ask5 = [&](int i) {
            int tile = blockIdx.x + i * gridDim.x;
            if (tile >= a.tiles) return;
            uint32_t bar = sa(&full[0][i % STAGES]);
            if (lane == 0) bexpect(bar, 32768);
            __syncwarp();
            if (lane < 8) bulk(sa(ring) + i % STAGES * 32768 + lane * 4096, a.data + (size_t)tile * 8 * ROW + lane * ROW, 4096, bar);
        };
        if (warp == 0) for (int i = 0; i < STAGES; i++) ask5(i);
        waitprev();
        for (int i = 0;; i++) {
            int tile = blockIdx.x + i * gridDim.x;
            if (tile >= a.tiles) break;
            bwait(sa(&full[0][i % STAGES]), i / STAGES & 1);
            const uint8_t *p = ring + i % STAGES * 32768 + warp * 2048;
            for (int u = 0; u < 4; u++) { uint4 v = *(const uint4 *)(p + u * 512 + lane * 16); x ^= v.x ^ v.y ^ v.z ^ v.w; }
            __syncwarp();
            if (lane == 0) barrive(sa(&empty[i % STAGES]));
            if (warp == (i % CREW)) { bwait(sa(&empty[i % STAGES]), i / STAGES & 1); ask5(i + STAGES); }
        }
    } else if (MODE == 6 || MODE == 7) {
        uint4 v[STAGES][4];
        auto load = [&](int i, uint4 (&r)[4]) {
            int tile = blockIdx.x + i * gridDim.x;
            if (tile >= a.tiles) tile = blockIdx.x;
            const uint8_t *f = a.data + (size_t)tile * 8 * ROW;
            if (MODE == 6) f += lane / 4 * ROW + warp * 256 + lane % 4 * 16; else f += warp * 2048 + lane * 16;
            for (int u = 0; u < 4; u++) asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(r[u].x), "=r"(r[u].y), "=r"(r[u].z), "=r"(r[u].w) : "l"(f + u * (MODE == 6 ? 64 : 512)));
        };
#pragma unroll
        for (int i = 0; i < STAGES; i++) load(i, v[i]);
        waitprev();
        int n = (a.tiles - blockIdx.x + gridDim.x - 1) / gridDim.x;
        for (int i = 0; i < n; i += STAGES) {
#pragma unroll
            for (int s = 0; s < STAGES; s++) {
                if (i + s >= n) break;
                for (int u = 0; u < 4; u++) x ^= v[s][u].x ^ v[s][u].y ^ v[s][u].z ^ v[s][u].w;
                load(i + s + STAGES, v[s]);
            }
        }
    } else {
        for (int i = 0; i < STAGES; i++) ask(i);
        waitprev();
        for (int i = 0;; i++) {
            int tile = (blockIdx.x + (i * teams + team) * gridDim.x);
            if (tile >= a.tiles) break;
            if (MODE == 0) asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 1) : "memory");
            else bwait(sa(&full[warp][i % STAGES]), i / STAGES & 1);
            const uint8_t *p = ring + warp * STAGES * SB + i % STAGES * SB;
            for (int u = 0; u < SB / 512; u++) { uint4 v = *(const uint4 *)(p + u * 512 + lane * 16); x ^= v.x ^ v.y ^ v.z ^ v.w; }
            if (MODE != 0) __syncwarp();
            ask(i + STAGES);
        }
    }
    if (x == 0x12345678) a.out[threadIdx.x] = x;
}
template <int MODE, int STAGES> void run(const char *name, uint8_t *data, uint32_t *out, CUtensorMap *m64, CUtensorMap *m128, int blocks)
{
    size_t shared = (MODE == 5 ? STAGES * 32768 : MODE == 6 || MODE == 7 ? 0 : (size_t)STAGES * CREW * (MODE == 8 ? 4096 : 2048)) + 1024;
    auto k = reader<MODE, STAGES>;
    CK(cudaFuncSetAttribute(k, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared));
    CK(cudaFuncSetAttribute(k, cudaFuncAttributePreferredSharedMemoryCarveout, 100));
    cudaStream_t s;
    CK(cudaStreamCreate(&s));
    for (int what = 0; what < 2; what++) {
        int tiles = what ? 31040 : 1544, layers = what ? 1 : 20;
        cudaGraph_t g; cudaGraphExec_t e;
        CK(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
        for (int l = 0; l < layers; l++) {
            args a = { data + (size_t)l * 1552 * 8 * ROW, tiles, out, l * 1552 * 8 };
            cudaLaunchConfig_t c = {};
            cudaLaunchAttribute at[1];
            c.gridDim = dim3(blocks); c.blockDim = dim3(BLOCK); c.dynamicSmemBytes = shared; c.stream = s;
            at[0].id = cudaLaunchAttributeProgrammaticStreamSerialization; at[0].val.programmaticStreamSerializationAllowed = 1;
            c.attrs = at; c.numAttrs = 1;
            CK(cudaLaunchKernelEx(&c, k, a, MODE == 1 ? *m64 : *m128));
        }
        CK(cudaStreamEndCapture(s, &g));
        CK(cudaGraphInstantiate(&e, g, 0));
        cudaEvent_t b, f; cudaEventCreate(&b); cudaEventCreate(&f);
        std::vector<float> t;
        for (int r = 0; r < 12; r++) {
            cudaEventRecord(b, s); cudaGraphLaunch(e, s); cudaEventRecord(f, s);
            CK(cudaStreamSynchronize(s));
            float ms; cudaEventElapsedTime(&ms, b, f); if (r >= 2) t.push_back(ms * 1000 / layers);
        }
        std::sort(t.begin(), t.end());
        double bytes = (double)tiles * 8 * ROW;
        printf("%-28s ring %3zu KB blocks %d %s %7.2f us  %.2f TB/s\n", name, shared / 1024, blocks, what ? "head " : "layer", t[5], bytes / t[5] / 1e6);
    }
}
int main()
{
    uint8_t *data; uint32_t *out;
    size_t rows = 31040 * 8 + 64;
    CK(cudaMalloc(&data, rows * ROW)); CK(cudaMalloc(&out, 4096)); CK(cudaMemset(data, 1, rows * ROW));
    void *f; cudaDriverEntryPointQueryResult q;
    CK(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &f, cudaEnableDefault, &q));
    auto enc = (CUresult(*)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *, const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill))f;
    CUtensorMap m[2];
    for (int i = 0; i < 2; i++) {
        cuuint64_t dims[2] = { 2048, rows }, strides[1] = { ROW };
        cuuint32_t box[2] = { i ? 128u : 64u, 8 }, es[2] = { 1, 1 };
        CUresult r = enc(&m[i], CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, data, dims, strides, box, es, CU_TENSOR_MAP_INTERLEAVE_NONE, i ? CU_TENSOR_MAP_SWIZZLE_NONE : CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
        if (r) printf("encode %d\n", r);
    }
    for (int blocks : { 132, 128 }) {
        run<0, 2>("cp.async", data, out, m, m + 1, blocks);
        run<0, 3>("cp.async", data, out, m, m + 1, blocks);
        run<1, 2>("TMA 64x8 swizzled", data, out, m, m + 1, blocks);
        run<1, 3>("TMA 64x8 swizzled", data, out, m, m + 1, blocks);
        run<2, 2>("TMA 128x8", data, out, m, m + 1, blocks);
        run<2, 3>("TMA 128x8", data, out, m, m + 1, blocks);
        run<3, 2>("bulk 8 x 256", data, out, m, m + 1, blocks);
        run<3, 3>("bulk 8 x 256", data, out, m, m + 1, blocks);
        run<4, 2>("bulk 2 KB", data, out, m, m + 1, blocks);
        run<4, 3>("bulk 2 KB", data, out, m, m + 1, blocks);
        run<5, 2>("block 8 x 4 KB", data, out, m, m + 1, blocks);
        run<5, 3>("block 8 x 4 KB", data, out, m, m + 1, blocks);
        run<6, 2>("loads, lanes of a tile", data, out, m, m + 1, blocks);
        run<7, 2>("loads, contiguous", data, out, m, m + 1, blocks);
        run<8, 1>("bulk 8 x 512 teams", data, out, m, m + 1, blocks);
        run<8, 2>("bulk 8 x 512 teams", data, out, m, m + 1, blocks);
        run<0, 6>("cp.async", data, out, m, m + 1, blocks);
        run<1, 6>("TMA 64x8 swizzled", data, out, m, m + 1, blocks);
        run<3, 6>("bulk 8 x 256", data, out, m, m + 1, blocks);
    }
    CK(cudaDeviceSynchronize());
}
