/* CUDA's kernels as functions of the CPU: what is put before a .cu file that clang compiles as C++
 * (docs/decisions/023).
 *
 * A block's threads are fibers of one thread of the CPU. What threads do together (shuffles, barriers, tensor
 * cores) is a meeting: each leaves its operands and lets others run, the last does the work for all. Blocks
 * run one after the other, but those of a cluster, and those that wait for another, side by side. Which fiber
 * runs next is drawn: QUENCH_SEED. */
#ifndef EMULATOR_H
#define EMULATOR_H
#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <vector>

namespace emulator
{

struct block;

/* A copy under way: cp.async. */
struct copy {
    void *to;
    const void *from;
    int bytes, valid, group;
};

struct thread {
    void *stack; /* where it goes on */
    uint3 index;
    struct block *block;
    int warp, lane;
    void *base;        /* of its stack */
    const char *waits; /* for what; NULL: it does not */
    int group;         /* of copies that are asked for now; those of groups before are committed */
    std::vector<copy> copies;
};

extern thread *now_running;
const uint3 &block_index();

/* What stands for the hardware's exception: says where, and ends the process. */
[[noreturn]] void fault(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* Threads of a warp meet: work(operands of the 32 lanes, who) is done once, when all have come. */
typedef void meeting(void **operands, uint32_t who);
void warp_meets(meeting *work, void *operands, uint32_t who);
/* The same of four warps: work(operands of the 128 threads). */
void group_meets(meeting *work, void *operands);
/* Barrier `id` of the block; count 0: of all threads that are left. */
void block_meets(int id, int count);
void cluster_meets();
void wait_for(const unsigned *p, unsigned n);

/* Shared memory. Addresses as instructions take them; checked ones end in fault(). */
void *dynamic_shared(int alignment);
uint32_t shared_address(const void *p);
void *shared_bytes(uint32_t at, int bytes, const char *what);
const void *shared_of(uint32_t at, int rank, int bytes);
void check_global(const void *p, int bytes, int alignment, const char *what);

void barrier_init(uint32_t at, int arrivals);
void barrier_arrive(uint32_t at, int bytes);
void barrier_wait(uint32_t at, int phase);
void copy_async(uint32_t to, const void *from, int bytes, int valid);
void copy_wait(int groups);
void copy_bulk(uint32_t to, const void *from, int bytes, uint32_t barrier);
void copy_tensor(uint32_t to, const void *map, int column, int row, uint32_t barrier);

meeting shuffle, vote, reduce_max, reduce_min, reduce_add, nothing, mma, mma_bytes, load_matrices,
    turn_matrix, wide_mma;

struct shuffle_operands {
    uint64_t value, result;
    int from; /* lane */
};

struct reduce_operands {
    int64_t value;
    uint32_t result;
};

struct mma_operands {
    float *d;
    uint32_t a[4], b[2];
};

struct mma_bytes_operands {
    int *d;
    uint32_t a[4], b[2];
};

struct matrices_operands {
    uint32_t at, *to;
    int n; /* matrices */
    bool turned;
};

/* One wide instruction: d [n / 8][4]; a of registers, or of shared memory where a is NULL. */
struct wide_operands {
    float *d;
    const uint32_t *a;
    uint64_t a_matrix, b_matrix;
    int n;
    bool b_turned, add;
};

/* Runs it, or records it; all that a stream is asked for comes here. */
cudaError_t launch(const cudaLaunchConfig_t *c, const void *name, const std::function<void()> &call);

template <class... P, class... A>
cudaError_t launch_kernel(const cudaLaunchConfig_t *c, void (*kernel)(P...), A &&...arguments)
{
    std::tuple<P...> all(arguments...);
    return launch(c, (const void *)kernel, [kernel, all] { std::apply(kernel, all); });
}

template <class T> T shuffled(uint32_t who, T x, int from)
{
    static_assert(sizeof(T) <= 8, "shuffles are of up to 64 bits");
    shuffle_operands o = {};
    memcpy(&o.value, &x, sizeof x);
    o.from = from;
    warp_meets(shuffle, &o, who);
    memcpy(&x, &o.result, sizeof x);
    return x;
}

inline uint32_t reduced(meeting *how, uint32_t who, int64_t x)
{
    reduce_operands o = { x, 0 };
    warp_meets(how, &o, who);
    return o.result;
}

inline int lane()
{
    return now_running->lane;
}

} /* namespace emulator */

/* Vectors with copies of their own, since clang does not look at the alignment of those that it makes itself.
 */
namespace emulator
{

template <class T, class PLAIN> struct alignas(2 * sizeof(T)) two_of {
    T x, y;
    two_of() = default;
    two_of(T x, T y) : x(x), y(y)
    {
    }
    two_of(const two_of &o) : x(o.x), y(o.y)
    {
    }
    two_of(const PLAIN &o) : x(o.x), y(o.y)
    {
    }
    two_of &operator=(const two_of &o)
    {
        x = o.x, y = o.y;
        return *this;
    }
    operator PLAIN() const
    {
        return { x, y };
    }
};

template <class T, class PLAIN> struct alignas(4 * sizeof(T)) four_of {
    T x, y, z, w;
    four_of() = default;
    four_of(T x, T y, T z, T w) : x(x), y(y), z(z), w(w)
    {
    }
    four_of(const four_of &o) : x(o.x), y(o.y), z(o.z), w(o.w)
    {
    }
    four_of &operator=(const four_of &o)
    {
        x = o.x, y = o.y, z = o.z, w = o.w;
        return *this;
    }
};

typedef two_of<float, ::float2> float_two;
typedef two_of<unsigned, ::uint2> uint_two;
typedef four_of<float, ::float4> float_four;
typedef four_of<unsigned, ::uint4> uint_four;
typedef four_of<int, ::int4> int_four;

} /* namespace emulator */

#define float2      emulator::float_two
#define uint2       emulator::uint_two
#define float4      emulator::float_four
#define uint4       emulator::uint_four
#define int4        emulator::int_four
#define make_float2 emulator::float_two
#define make_uint2  emulator::uint_two
#define make_float4 emulator::float_four
#define make_uint4  emulator::uint_four

#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#undef __forceinline__
#define __shared__ __attribute__((section(".cuda.shared"))) static
#define __launch_bounds__(...)
#define __grid_constant__
#define __forceinline__           inline
#define __CUDA_ARCH__             900
#define __CUDA_ARCH_FEAT_SM90_ALL 1
#define threadIdx                 (emulator::now_running->index)
#define blockIdx                  (emulator::block_index())
#define cudaLaunchKernelEx        emulator::launch_kernel

#define __noinline__

extern dim3 gridDim, blockDim; /* of the launch under way */

template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value)
{
    return cudaFuncSetAttribute((const void *)kernel, attribute, value);
}
template <class... P> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *out, void (*kernel)(P...))
{
    return cudaFuncGetAttributes(out, (const void *)kernel);
}

using std::isfinite, std::isinf, std::isnan;

/* ---- what nvcc knows without a header ---- */

template <class T> T __ldcg(const T *p)
{
    return *p;
}
template <class T> T __ldcs(const T *p)
{
    return *p;
}
template <class T> T __ldg(const T *p)
{
    return *p;
}
template <class T> void __stcs(T *p, T x)
{
    *p = x;
}

inline void __threadfence_system()
{
}
inline void __threadfence()
{
}
inline void __syncthreads()
{
    emulator::block_meets(0, 0);
}
inline void __syncwarp(uint32_t who = 0xffffffffu)
{
    emulator::warp_meets(emulator::nothing, nullptr, who);
}

template <class T> T __shfl_sync(uint32_t who, T x, int from, int width = 32)
{
    return emulator::shuffled(who, x, (emulator::lane() & ~(width - 1)) | (from & (width - 1)));
}
template <class T> T __shfl_xor_sync(uint32_t who, T x, int mask)
{
    return emulator::shuffled(who, x, emulator::lane() ^ mask);
}
template <class T> T __shfl_up_sync(uint32_t who, T x, unsigned by)
{
    int lane = emulator::lane();
    return emulator::shuffled(who, x, lane < (int)by ? lane : lane - (int)by);
}
template <class T> T __shfl_down_sync(uint32_t who, T x, unsigned by)
{
    int lane = emulator::lane();
    return emulator::shuffled(who, x, lane + (int)by > 31 ? lane : lane + (int)by);
}

inline uint32_t __ballot_sync(uint32_t who, int x)
{
    return emulator::reduced(emulator::vote, who, x != 0);
}
inline int __any_sync(uint32_t who, int x)
{
    return __ballot_sync(who, x) != 0;
}
inline int __all_sync(uint32_t who, int x)
{
    return __ballot_sync(who, !x) == 0;
}
inline uint32_t __reduce_max_sync(uint32_t who, uint32_t x)
{
    return emulator::reduced(emulator::reduce_max, who, x);
}
inline int __reduce_max_sync(uint32_t who, int x)
{
    return (int)emulator::reduced(emulator::reduce_max, who, x);
}
inline uint32_t __reduce_min_sync(uint32_t who, uint32_t x)
{
    return emulator::reduced(emulator::reduce_min, who, x);
}
inline int __reduce_min_sync(uint32_t who, int x)
{
    return (int)emulator::reduced(emulator::reduce_min, who, x);
}
inline int __reduce_add_sync(uint32_t who, int x)
{
    return (int)emulator::reduced(emulator::reduce_add, who, x);
}

inline int __float2int_rn(float x)
{
    return x != x ? 0 : (int)lrintf(x);
}

inline int __popc(uint32_t x)
{
    return __builtin_popcount(x);
}

inline int __ffs(int x)
{
    return __builtin_ffs(x);
}

template <class T, class U> T atomicAdd(T *p, U x)
{
    T before = *p;
    *p = (T)(before + (T)x);
    return before;
}
template <class T, class U> T atomicMax(T *p, U x)
{
    T before = *p;
    if ((T)x > before) *p = (T)x;
    return before;
}

template <class T> T min(T x, T y)
{
    return y < x ? y : x;
}
template <class T> T max(T x, T y)
{
    return x < y ? y : x;
}

inline float __uint_as_float(uint32_t x)
{
    return __builtin_bit_cast(float, x);
}
inline uint32_t __float_as_uint(float x)
{
    return __builtin_bit_cast(uint32_t, x);
}
inline float __int_as_float(int x)
{
    return __builtin_bit_cast(float, x);
}
inline int __float_as_int(float x)
{
    return __builtin_bit_cast(int, x);
}
inline float __fadd_rn(float x, float y)
{
    return x + y;
}
inline float __fmul_rn(float x, float y)
{
    return x * y;
}
inline float __expf(float x)
{
    return expf(x);
}
inline float __fdividef(float x, float y)
{
    return x / y;
}
inline float rsqrtf(float x)
{
    return 1.0f / sqrtf(x);
}

inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t take)
{
    uint64_t both = (uint64_t)y << 32 | x;
    uint32_t z = 0;
    for (int i = 0; i < 4; i++) z |= (uint32_t)(both >> 8 * (take >> 4 * i & 7) & 0xff) << 8 * i;
    return z;
}

inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t n)
{
    return (uint32_t)(((uint64_t)high << 32 | low) << n % 32 >> 32);
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t n)
{
    return (uint32_t)(((uint64_t)high << 32 | low) >> n % 32);
}

inline int __dp4a(int x, int y, int sum)
{
    for (int i = 0; i < 4; i++) sum += (int8_t)(x >> 8 * i) * (int8_t)(y >> 8 * i);
    return sum;
}

inline uint32_t __vsub4(uint32_t x, uint32_t y)
{
    uint32_t z = 0;
    for (int i = 0; i < 4; i++) z |= (uint32_t)(uint8_t)((x >> 8 * i) - (y >> 8 * i)) << 8 * i;
    return z;
}

inline size_t __cvta_generic_to_shared(const void *p)
{
    return emulator::shared_address(p);
}
inline void *__cvta_shared_to_generic(size_t at)
{
    return emulator::shared_bytes((uint32_t)at, 0, "a conversion");
}

#endif
