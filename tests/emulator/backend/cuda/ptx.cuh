/* src/backend/cuda/ptx.cuh, of the emulator: the same names, done by the CPU. */
#ifndef BACKEND_CUDA_PTX_CUH
#define BACKEND_CUDA_PTX_CUH
#include <stdint.h>

#define SHARED_MEMORY(type, name, alignment) type *const name = (type *)emulator::dynamic_shared(alignment)

namespace {

inline void let_next_start() {}
inline void wait_for_previous() {}
template <class T> inline void now(T &) {}
inline void now(float &, float &) {}
constexpr uint32_t ABSENT = 0xffffffffu;
inline float hear(const float *from) { emulator::check_global(from, 4, 4, "a load"); return *(const volatile float *)from; }
inline float2 hear_pair(const float *from)
{
    emulator::check_global(from, 8, 8, "a load");
    return { ((const volatile float *)from)[0], ((const volatile float *)from)[1] };
}
inline void prefetch(const void *p) { emulator::check_global(p, 1, 1, "a prefetch"); }
inline void wait_for_number(const unsigned *p, unsigned n) { emulator::wait_for(p, n); }
inline void meet_128(int id) { emulator::block_meets(id, 128); }
inline void meet_256(int id) { emulator::block_meets(id, 256); }
inline float power_of_two(float x) { return exp2f(x); }

/* ---- shared memory ---- */

inline int load_shared(uint32_t at)
{
    return *(const int *)emulator::shared_bytes(at, 4, "ld.shared");
}

inline uint2 load_shared8(uint32_t at)
{
    return *(const uint2 *)emulator::shared_bytes(at, 8, "ld.shared");
}

inline uint4 load_shared16(uint32_t at)
{
    return *(const uint4 *)emulator::shared_bytes(at, 16, "ld.shared");
}

inline void store_shared(uint32_t at, int x)
{
    *(int *)emulator::shared_bytes(at, 4, "st.shared") = x;
}

inline void store_shared(uint32_t at, const uint32_t (&x)[4])
{
    memcpy(emulator::shared_bytes(at, 16, "st.shared"), x, 16);
}

inline void copy_async16(uint32_t to, const void *from, bool valid) { emulator::copy_async(to, from, 16, valid ? 16 : 0); }
inline void copy_async8(uint32_t to, const void *from) { emulator::copy_async(to, from, 8, 8); }
inline void copy_async4(uint32_t to, const void *from, bool valid) { emulator::copy_async(to, from, 4, valid ? 4 : 0); }
inline void copy_commit() { emulator::now_running->group++; }
template <int N> inline void copy_wait() { emulator::copy_wait(N); }

inline uint32_t shared_at(const void *p) { return emulator::shared_address(p); }
inline void barrier_init(uint64_t *b, int arrivals) { emulator::barrier_init(shared_at(b), arrivals); }
inline void barriers_ready() {}
inline void barrier_arrive(uint64_t *b) { emulator::barrier_arrive(shared_at(b), 0); }
inline void barrier_wait(uint32_t b, int phase) { emulator::barrier_wait(b, phase); }
inline void barrier_wait(uint64_t *b, int phase) { barrier_wait(shared_at(b), phase); }
inline void barrier_arrive_copied(uint64_t *b)
{
    copy_commit();
    copy_wait<0>();
    barrier_arrive(b);
}
inline bool elected()
{
    emulator::warp_meets(emulator::nothing, nullptr, 0xffffffffu);
    return threadIdx.x % 32 == 0;
}
inline void barrier_expect(uint32_t b, int bytes) { emulator::barrier_arrive(b, bytes); }
inline void barrier_expect(uint64_t *b, int bytes) { barrier_expect(shared_at(b), bytes); }
inline void copy_bulk(uint32_t to, const void *from, int bytes, uint32_t b) { emulator::copy_bulk(to, from, bytes, b); }
inline void copy_bulk_once(uint32_t to, const void *from, int bytes, uint32_t b) { emulator::copy_bulk(to, from, bytes, b); }
inline void copy_bulk(uint32_t to, const void *from, int bytes, uint64_t *b) { copy_bulk(to, from, bytes, shared_at(b)); }
inline void copy_tensor(uint32_t to, const void *map, int column, int row, uint64_t *b)
{
    emulator::copy_tensor(to, map, column, row, shared_at(b));
}
inline void let_copies_follow() {}
inline void let_copies_see() {}

/* ---- tensor cores ---- */

inline void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1)
{
    emulator::mma_operands o = { d, { a0, a1, a2, a3 }, { b0, b1 } };
    emulator::warp_meets(emulator::mma, &o, 0xffffffffu);
}

inline void mma_bytes(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1)
{
    emulator::mma_bytes_operands o = { d, { a0, a1, a2, a3 }, { b0, b1 } };
    emulator::warp_meets(emulator::mma_bytes, &o, 0xffffffffu);
}

inline void load_matrices(uint32_t *to, uint32_t at, int n, bool turned)
{
    emulator::matrices_operands o = { at, to, n, turned };
    emulator::warp_meets(emulator::load_matrices, &o, 0xffffffffu);
}

inline void matrices(uint32_t (&x)[4], uint32_t at) { load_matrices(x, at, 4, false); }
inline void matrices_turned(uint32_t (&x)[4], uint32_t at) { load_matrices(x, at, 4, true); }
inline void two_matrices(uint32_t &x, uint32_t &y, uint32_t at)
{
    uint32_t both[2];
    load_matrices(both, at, 2, false);
    x = both[0], y = both[1];
}
inline void two_matrices_turned(uint32_t &x, uint32_t &y, uint32_t at)
{
    uint32_t both[2];
    load_matrices(both, at, 2, true);
    x = both[0], y = both[1];
}

inline uint32_t turned(uint32_t x)
{
    emulator::shuffle_operands o = { x, 0, 0 };
    emulator::warp_meets(emulator::turn_matrix, &o, 0xffffffffu);
    return (uint32_t)o.result;
}

/* ---- clusters ---- */

inline void cluster_meet() { emulator::cluster_meets(); }
inline uint32_t address_in(uint32_t at, int rank) { return at + ((uint32_t)rank << 28); }
inline void store_there(uint32_t at, uint32_t x) { *(uint32_t *)emulator::shared_of(at & 0xfffffff, (int)(at >> 28), 4) = x; }
inline float4 load_four_of(const float *x, int rank) { return *(const float4 *)emulator::shared_of(shared_at(x), rank, 16); }

/* ---- the wide instruction ---- */

template <int N> inline void wide_mma(float (&d)[N / 8][4], const uint32_t (&a)[4], uint64_t b, bool add = true)
{
    emulator::wide_operands o = { d[0], a, 0, b, N, false, add };
    emulator::group_meets(emulator::wide_mma, &o);
}

inline void wide_mma_shared(float (&d)[8][4], uint64_t a, uint64_t b, bool add)
{
    emulator::wide_operands o = { d[0], nullptr, a, b, 64, false, add };
    emulator::group_meets(emulator::wide_mma, &o);
}

inline void wide_mma_turned(float (&d)[32][4], const uint32_t (&a)[4], uint64_t b)
{
    emulator::wide_operands o = { d[0], a, 0, b, 256, true, true };
    emulator::group_meets(emulator::wide_mma, &o);
}

inline void wide_mma_turned(float (&d)[8][4], const uint32_t (&a)[4], uint64_t b)
{
    emulator::wide_operands o = { d[0], a, 0, b, 64, true, true };
    emulator::group_meets(emulator::wide_mma, &o);
}

template <int N> inline void wide_hold(float (&)[N][4]) {}
template <int N> inline void wide_keep(uint32_t (&)[N][4]) {}
template <int N> inline void fewer_registers() {}
template <int N> inline void more_registers() {}
inline void wide_begin() {}
inline void wide_commit() {}
template <int PENDING = 0> inline void wide_wait() {}
inline void wide_show() {}

} /* namespace */
#endif
