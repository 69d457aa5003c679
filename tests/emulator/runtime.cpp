/* The CUDA runtime as far as the backend calls it: an H200 whose streams do at once what they are asked for. Its functions
 * have the names and the meaning that NVIDIA documents. */
#include "machine.h"
#include <cstdio>
#include <cstdlib>
#include <cuda.h>
#include <map>

namespace emulator {

enum { SHARED_OPTIN = 227 * 1024, SHARED_DEFAULT = 48 * 1024 };

struct recorded {
    std::vector<std::function<void()>> calls;
};

static recorded *recording; /* NULL: none is */
static std::map<const void *, int> shared_most;
extern "C" uint8_t emulator_statics_begin[], emulator_statics_end[];

static cudaError_t run(std::function<void()> call)
{
    if (recording)
        recording->calls.push_back(std::move(call));
    else
        call();
    return cudaSuccess;
}

static void begin()
{
    const char *seed = getenv("QUENCH_SEED");
    if (m.statics) return;
    m.random = seed ? strtoull(seed, nullptr, 0) : 1;
    m.statics = emulator_statics_begin;
    m.statics_end = emulator_statics_end;
}

cudaError_t launch(const cudaLaunchConfig_t *c, const void *name, const std::function<void()> &call)
{
    auto most = shared_most.find(name);
    unsigned cluster = 1;
    for (unsigned i = 0; i < c->numAttrs; i++)
        if (c->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = c->attrs[i].val.clusterDim.x;
    if (c->dynamicSmemBytes > (size_t)(most == shared_most.end() ? SHARED_DEFAULT : most->second)) return cudaErrorInvalidValue;
    if (c->blockDim.x == 0 || c->blockDim.x > 1024 || c->gridDim.y > 65535 || c->gridDim.z > 65535 || c->gridDim.x % cluster)
        return cudaErrorInvalidConfiguration;
    dim3 grid = c->gridDim, size = c->blockDim;
    size_t shared = c->dynamicSmemBytes;
    begin();
    return run([=] { run_grid(name, call, grid, size, shared, cluster); });
}

/* What nobody has written is NaN. */
static cudaError_t take(void **out, size_t bytes)
{
    if (posix_memalign(out, 256, bytes)) return cudaErrorMemoryAllocation;
    memset(*out, 0xff, bytes);
    return cudaSuccess;
}

static CUresult encode(CUtensorMap *out, CUtensorMapDataType type, cuuint32_t n, void *data, const cuuint64_t *size,
                       const cuuint64_t *stride, const cuuint32_t *box, const cuuint32_t *, CUtensorMapInterleave,
                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill)
{
    bool is_bf16 = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    unsigned each = is_bf16 ? 2 : 8;
    if ((!is_bf16 && type != CU_TENSOR_MAP_DATA_TYPE_INT64) || n != 2 ||
        swizzle != (is_bf16 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE) || (uintptr_t)data % 16 || stride[0] % 16 ||
        (is_bf16 && box[0] * each > 128) || box[0] * each % 16 || box[0] > 256 || box[1] > 256 || size[0] == 0 || size[1] == 0 ||
        size[0] > UINT32_MAX || size[1] > UINT32_MAX)
        return CUDA_ERROR_INVALID_VALUE;
    tensor_map t = { TENSOR_MAP,    data,    (int64_t)size[1], (int64_t)size[0], (int64_t)stride[0], { (int)box[0], (int)box[1] },
                     (int)each, is_bf16 };
    static_assert(sizeof t <= sizeof *out, "a map is 128 bytes");
    memcpy(out, &t, sizeof t);
    return CUDA_SUCCESS;
}

} /* namespace emulator */

using namespace emulator;

extern "C" {

cudaError_t cudaGetDeviceCount(int *n) { return *n = 1, cudaSuccess; }
cudaError_t cudaGetLastError(void) { return cudaSuccess; }
const char *cudaGetErrorString(cudaError_t e)
{
    return e == cudaErrorInvalidValue           ? "invalid argument"
           : e == cudaErrorInvalidConfiguration ? "invalid configuration argument"
           : e == cudaErrorMemoryAllocation     ? "out of memory"
                                                : "no error";
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int)
{
    const char *sms = getenv("QUENCH_SMS");
    memset(p, 0, sizeof *p);
    snprintf(p->name, sizeof p->name, "emulator of one H200");
    p->major = 9;
    p->multiProcessorCount = sms ? atoi(sms) : 132;
    p->sharedMemPerBlockOptin = SHARED_OPTIN;
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *a, const void *)
{
    memset(a, 0, sizeof *a);
    a->binaryVersion = 90;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int *n, const void *, const cudaLaunchConfig_t *c)
{
    cudaDeviceProp p;
    cudaGetDeviceProperties(&p, 0);
    /* two small blocks side by side */
    *n = p.multiProcessorCount * (c->blockDim.x <= 256 ? 2 : 1) / (int)(c->numAttrs > 1 ? c->attrs[1].val.clusterDim.x : 1);
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attribute, int value)
{
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || value > SHARED_OPTIN) return cudaErrorInvalidValue;
    shared_most[kernel] = value;
    return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *, void **out, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult *found)
{
    *out = (void *)encode;
    *found = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

/* ---- memory ---- */

cudaError_t cudaMallocAsync(void **out, size_t bytes, cudaStream_t) { return take(out, bytes); }
cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned) { return take(out, bytes); }
cudaError_t cudaFreeAsync(void *p, cudaStream_t) { return free(p), cudaSuccess; }
cudaError_t cudaFreeHost(void *p) { return free(p), cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t *available, size_t *all) { return *available = *all = (size_t)16 << 30, cudaSuccess; }
cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *p, int) { return *p = nullptr, cudaSuccess; }
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void *) { return cudaSuccess; }

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, cudaMemcpyKind, cudaStream_t)
{
    return run([=] { memmove(to, from, bytes); });
}

cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t)
{
    return run([=] { memset(p, value, bytes); });
}

/* ---- streams, events, graphs ---- */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned) { return *s = (cudaStream_t)malloc(1), cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t s) { return free(s), cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return recording ? cudaErrorStreamCaptureUnsupported : cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *e) { return *e = (cudaEvent_t)malloc(1), cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) { return cudaEventCreate(e); }
cudaError_t cudaEventDestroy(cudaEvent_t e) { return free(e), cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t, cudaEvent_t) { return *ms = 1, cudaSuccess; }

cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) { return recording = new recorded(), cudaSuccess; }
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *graph)
{
    *graph = (cudaGraph_t)recording;
    recording = nullptr;
    return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t graph, unsigned long long)
{
    return *exec = (cudaGraphExec_t) new recorded(*(recorded *)graph), cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t)
{
    for (auto &call : ((recorded *)exec)->calls) call();
    return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete (recorded *)graph, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { return delete (recorded *)exec, cudaSuccess; }

} /* extern "C" */
