/* Threads, blocks, and what they wait for. Built without ASan, whose shadow is asked where instructions touch memory. */
#include "machine.h"
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <sys/mman.h>
#include <unistd.h>

dim3 gridDim, blockDim;

namespace emulator {

thread *now_running;
machine m;

uint32_t drawn(uint32_t below)
{
    m.random = m.random * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(((m.random >> 32) * below) >> 32);
}

/* ---- fibers ---- */

extern "C" void emulator_switch(void **from, void *to);
__asm__(".text\n"
        "emulator_switch:\n"
        "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
        "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
        "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");

constexpr size_t STACK = 256 << 10, GUARD = 4096;

static void *take_stack()
{
    if (!m.stacks.empty()) {
        void *s = m.stacks.back();
        m.stacks.pop_back();
        return s;
    }
    void *s = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (s == MAP_FAILED || mprotect(s, GUARD, PROT_NONE)) fault("no memory for a stack");
    return s;
}

static void run_thread();

static void prepare(thread *t)
{
    void **top = (void **)((char *)t->base + STACK) - 1; /* as after a call */
    *--top = (void *)run_thread;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    t->stack = top;
}

/* Static shared memory is the same for all blocks: what another block's threads have there is put aside. */
__attribute__((noinline)) static void copy_plain(uint8_t *to, const uint8_t *from, size_t n)
{
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(n)::"memory");
}

static void fill_plain(uint8_t *to, int value, size_t n)
{
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(value) : "memory");
}

static void show_statics(block *b)
{
    if (m.shown == b) return;
    size_t n = m.statics_end - m.statics;
    if (m.shown && m.resident.size() > 1) {
        if (!m.shown->statics) m.shown->statics = (uint8_t *)malloc(n);
        copy_plain(m.shown->statics, m.statics, n);
        if (b->statics) copy_plain(m.statics, b->statics, n);
    }
    m.shown = b;
}

static void go_to(thread *t)
{
    void **from = now_running ? &now_running->stack : &m.main_stack;
    if (t == now_running) return;
    now_running = t;
    if (t) show_statics(t->block);
    emulator_switch(from, t ? t->stack : m.main_stack);
}

/* A thread of the block that can go on, the last one's warp first. */
static thread *next_of(block *b, int warp)
{
    if (!b->ready_warps) return nullptr;
    if (warp < 0 || !b->warps[warp].ready || drawn(16) == 0) {
        int first = (int)drawn((uint32_t)b->n_warps);
        do first = first + 1 == b->n_warps ? 0 : first + 1;
        while (!(b->ready_warps >> first & 1));
        warp = first;
    }
    struct warp &w = b->warps[warp];
    uint32_t turned = m.turn ? w.ready >> m.turn | w.ready << (32 - m.turn) : w.ready;
    return &w.lanes[(m.turn + __builtin_ctz(turned)) & 31];
}

static void set_ready(thread *t)
{
    t->block->warps[t->warp].ready |= 1u << t->lane;
    t->block->ready_warps |= 1u << t->warp;
}

static void set_waiting(thread *t)
{
    struct warp &w = t->block->warps[t->warp];
    w.ready &= ~(1u << t->lane);
    if (!w.ready) t->block->ready_warps &= ~(1u << t->warp);
}

static bool do_a_copy(block *b);

/* Lets others run. */
static void leave()
{
    thread *t = now_running;
    block *b = t->block;
    thread *next = next_of(b, t->warp);
    while (!next && do_a_copy(b)) next = next_of(b, t->warp);
    go_to(next);
}

/* Not ready: runs again once somebody sets it so. */
static void wait(const char *what)
{
    now_running->waits = what;
    set_waiting(now_running);
    leave();
    now_running->waits = nullptr;
}

/* ---- meetings of a warp ---- */

static void try_meeting(struct warp &w, uint32_t who, meeting *work)
{
    who &= w.alive;
    if (!who || (w.arrived & who) != who) return;
    for (int i = 0; i < 32; i++)
        if (who >> i & 1 && (w.work[i] != work || (w.who[i] & w.alive) != who))
            fault("lane %d of the warp is at another instruction than the others, or names other lanes", i);
    w.arrived &= ~who;
    work(w.operands, who);
    for (int i = 0; i < 32; i++)
        if (who >> i & 1) set_ready(&w.lanes[i]);
}

void warp_meets(meeting *work, void *operands, uint32_t who)
{
    thread *t = now_running;
    struct warp &w = t->block->warps[t->warp];
    if (!(who >> t->lane & 1)) fault("a lane that is not in the mask 0x%x", who);
    w.operands[t->lane] = operands;
    w.work[t->lane] = work;
    w.who[t->lane] = who;
    w.arrived |= 1u << t->lane;
    set_waiting(t);
    try_meeting(w, who, work);
    if (w.ready >> t->lane & 1) {
        if (drawn(32) == 0) leave();
        return;
    }
    t->waits = "others of its warp";
    leave();
    t->waits = nullptr;
}

void group_meets(meeting *work, void *operands)
{
    thread *t = now_running;
    block *b = t->block;
    struct group &g = b->groups[t->warp / 4];
    g.operands[t->index.x % 128] = operands;
    if (++g.arrived < 128) {
        g.work = work;
        wait("others of its four warps");
        return;
    }
    if (g.work != work) fault("four warps are at different instructions");
    g.arrived = 0;
    work(g.operands, 0);
    for (int i = 0; i < 4; i++)
        for (int lane = 0; lane < 32; lane++) set_ready(&b->warps[t->warp / 4 * 4 + i].lanes[lane]);
}

/* ---- barriers of a block, and of a cluster ---- */

static void open_barrier(block_barrier &x)
{
    x.arrived = 0;
    for (thread *t : x.waiting) set_ready(t);
    x.waiting.clear();
}

void block_meets(int id, int count)
{
    thread *t = now_running;
    block *b = t->block;
    if (id < 0 || id > 15) fault("barrier %d of a block; there are 16", id);
    block_barrier &x = b->barriers[id];
    if (x.arrived && x.count != count) fault("barrier %d: of %d threads and of %d", id, x.count, count);
    x.count = count;
    if (++x.arrived == (count ? count : b->alive)) {
        open_barrier(x);
        if (drawn(2)) leave();
        return;
    }
    x.waiting.push_back(t);
    wait(id ? "a named barrier" : "__syncthreads");
}

void cluster_meets()
{
    block_barrier &x = m.cluster;
    int all = 0;
    for (block *b : m.resident) all += b->alive;
    if (++x.arrived == all) {
        open_barrier(x);
        return;
    }
    x.waiting.push_back(now_running);
    wait("the cluster");
}

void wait_for(const unsigned *p, unsigned n)
{
    while (*(volatile const unsigned *)p < n) {
        m.polls.push_back({ now_running, p, n });
        wait("a number that other blocks write");
    }
}

static bool wake_polls()
{
    size_t kept = 0, n = m.polls.size();
    for (size_t i = 0; i < n; i++) {
        if (*m.polls[i].p >= m.polls[i].n)
            set_ready(m.polls[i].t);
        else
            m.polls[kept++] = m.polls[i];
    }
    m.polls.resize(kept);
    return kept < n;
}

/* ---- barriers in shared memory ---- */

static mbarrier &barrier_at(uint32_t at)
{
    shared_bytes(at, 8, "a barrier");
    auto found = now_running->block->mbarriers.find(at);
    if (found == now_running->block->mbarriers.end()) fault("the barrier at shared address 0x%x was never made", at);
    return found->second;
}

void barrier_init(uint32_t at, int arrivals)
{
    shared_bytes(at, 8, "a barrier");
    if (arrivals < 1 || arrivals >= 1 << 20) fault("a barrier of %d arrivals", arrivals);
    mbarrier b = {};
    b.arrivals = b.pending = arrivals;
    now_running->block->mbarriers[at] = b;
}

static void try_phase(mbarrier &b)
{
    if (b.pending || b.bytes) return;
    b.phase ^= 1;
    b.pending = b.arrivals;
    b.unseen = b.copied;
    b.copied = false;
    for (thread *t : b.waiting) set_ready(t);
    b.waiting.clear();
}

static void check_bytes(const mbarrier &b)
{
    if (b.bytes >= 1 << 20 || b.bytes <= -(1 << 20)) fault("a barrier waits for %d bytes, more than it counts", b.bytes);
}

void barrier_arrive(uint32_t at, int bytes)
{
    mbarrier &b = barrier_at(at);
    b.bytes += bytes;
    check_bytes(b);
    if (b.pending == 0) fault("the barrier at shared address 0x%x: more than its %d arrivals", at, b.arrivals);
    b.pending--;
    try_phase(b);
    if (drawn(8) == 0) leave();
}

void barrier_wait(uint32_t at, int phase)
{
    mbarrier &b = barrier_at(at);
    if (phase != 0 && phase != 1) fault("phase %d of a barrier", phase);
    while (b.phase == phase) {
        b.waiting.push_back(now_running);
        wait("a barrier in shared memory");
    }
    b.unseen = false;
}

/* ---- shared memory ---- */

constexpr uint32_t DYNAMIC = 1024, STATICS = 1 << 24;

void *dynamic_shared(int alignment)
{
    block *b = now_running->block;
    if (((uintptr_t)b->dynamic & (uintptr_t)(alignment - 1)) != 0) fault("shared memory aligned to %d", alignment);
    return b->dynamic;
}

uint32_t shared_address(const void *p)
{
    block *b = now_running->block;
    const uint8_t *at = (const uint8_t *)p;
    if (at >= m.statics && at < m.statics_end) return STATICS + (uint32_t)(at - m.statics);
    /* an address may be made and not used: those that are used are checked */
    return DYNAMIC + (uint32_t)(at - b->arena);
}

static uint8_t *shared_pointer(const block *b, uint8_t *statics, uint32_t at)
{
    if (at >= STATICS && at - STATICS < m.statics_end - m.statics) return statics + (at - STATICS);
    if (at >= DYNAMIC && at - DYNAMIC < ARENA) return b->arena + (at - DYNAMIC);
    return nullptr;
}

void *shared_bytes(uint32_t at, int bytes, const char *what)
{
    block *b = now_running->block;
    uint8_t *p = shared_pointer(b, m.statics, at);
    if (bytes == 0 && p) return p;
    if (!p || __asan_region_is_poisoned(p, (size_t)bytes))
        fault("%s: %d bytes at shared address 0x%x, which is byte %d of the %zu that the launch asked for", what, bytes, at,
              (int)(p && at < STATICS ? p - b->dynamic : (int)at), m.shared);
    if (bytes <= 16 && (bytes & (bytes - 1)) == 0 && (uintptr_t)p & (uintptr_t)(bytes - 1))
        fault("%s: shared address 0x%x is no multiple of %d", what, at, bytes);
    return p;
}

const void *shared_of(uint32_t at, int rank, int bytes)
{
    shared_bytes(at, bytes, "mapa");
    if (rank < 0 || rank >= (int)m.resident.size()) fault("block %d of a cluster of %zu", rank, m.resident.size());
    block *b = m.resident[(size_t)rank];
    return shared_pointer(b, b == m.shown ? m.statics : b->statics, at);
}

void check_global(const void *p, int bytes, int alignment, const char *what)
{
    if ((uintptr_t)p % (uintptr_t)alignment) fault("%s: address %p is no multiple of %d", what, p, alignment);
    void *bad = __asan_region_is_poisoned((void *)p, (size_t)bytes);
    if (!bad) return;
    fprintf(stderr, "emulator: %s of %d bytes at %p: byte %td is nobody's\n", what, bytes, p, (char *)bad - (char *)p);
    __asan_describe_address(bad);
    fault("%s outside of memory", what);
}

/* ---- copies: at once, or as late as may be, as drawn ---- */

static void do_copy(copy &c)
{
    if (c.bytes == 0) return;
    copy_plain((uint8_t *)c.to, (const uint8_t *)c.from, (size_t)c.valid);
    fill_plain((uint8_t *)c.to + c.valid, 0, (size_t)(c.bytes - c.valid));
    c.bytes = 0;
}

void copy_async(uint32_t to, const void *from, int bytes, int valid)
{
    thread *t = now_running;
    copy c = { shared_bytes(to, bytes, "cp.async"), from, bytes, valid, t->group };
    if ((uintptr_t)from % (uintptr_t)bytes) fault("cp.async of %d bytes from %p", bytes, from);
    if (valid) check_global(from, valid, bytes, "cp.async");
    if (drawn(2)) {
        do_copy(c);
        return;
    }
    t->copies.push_back(c);
}

void copy_wait(int groups)
{
    thread *t = now_running;
    size_t kept = 0, n = t->copies.size();
    for (size_t i = 0; i < n; i++) {
        if (t->copies[i].group < t->group - groups)
            do_copy(t->copies[i]);
        else
            t->copies[kept++] = t->copies[i];
    }
    t->copies.resize(kept);
}

static void do_bulk(block *b, bulk &c)
{
    for (const bulk_row &r : c.rows) {
        if (r.from)
            copy_plain(r.to, r.from, (size_t)r.bytes);
        else
            fill_plain(r.to, 0, (size_t)r.bytes);
    }
    mbarrier &x = b->mbarriers[c.barrier];
    x.bytes -= c.bytes;
    x.copied = true;
    check_bytes(x);
    try_phase(x);
}

/* One of those that are under way is done; false: none is. */
static bool do_a_copy(block *b)
{
    size_t n = b->under_way.size();
    if (n == 0) return false;
    size_t i = drawn((uint32_t)n);
    bulk c = std::move(b->under_way[i]);
    b->under_way[i] = std::move(b->under_way[n - 1]);
    b->under_way.pop_back();
    do_bulk(b, c);
    return true;
}

static void begin_bulk(bulk &&c)
{
    block *b = now_running->block;
    if (drawn(2))
        do_bulk(b, c);
    else
        b->under_way.push_back(std::move(c));
}

void copy_bulk(uint32_t to, const void *from, int bytes, uint32_t barrier)
{
    barrier_at(barrier);
    if (bytes < 0 || bytes % 16 || to % 16 || (uintptr_t)from % 16)
        fault("cp.async.bulk of %d bytes from %p to shared address 0x%x: all are to be multiples of 16", bytes, from, to);
    uint8_t *p = (uint8_t *)shared_bytes(to, bytes, "cp.async.bulk");
    if (bytes) check_global(from, bytes, 16, "cp.async.bulk");
    begin_bulk({ { { p, (const uint8_t *)from, bytes } }, bytes, barrier });
}

/* Lines of 16-byte pieces, which where swizzled change places within 128 bytes. */
void copy_tensor(uint32_t to, const void *map, int column, int row, uint32_t barrier)
{
    const tensor_map *t = (const tensor_map *)map;
    barrier_at(barrier);
    if (t->magic != TENSOR_MAP) fault("a tensor map that nobody made");
    if (to % 128) fault("cp.async.bulk.tensor to shared address 0x%x, no multiple of 128", to);
    int line = t->box[0] * t->each, in_piece = 16 / t->each, bytes = line * t->box[1];
    uint8_t *p = (uint8_t *)shared_bytes(to, bytes, "cp.async.bulk.tensor");
    bulk c = { {}, bytes, barrier };
    for (int r = 0; r < t->box[1]; r++)
        for (int piece = 0; piece < line / 16; piece++) {
            uint32_t at = (uint32_t)(r * line + piece * 16), where = to + at;
            if (t->swizzled) where ^= (where >> 7 & 7) << 4;
            int64_t y = row + r, x = column + piece * in_piece;
            bool in = y >= 0 && y < t->rows && x >= 0 && x < t->cols;
            const uint8_t *from = in ? (const uint8_t *)t->data + y * t->pitch + x * t->each : nullptr;
            int whole = !in ? 16 : t->cols - x < in_piece ? (int)(t->cols - x) * t->each : 16;
            uint8_t *dest = p + (int)(where - to);
            if (in) check_global(from, whole, 16, "cp.async.bulk.tensor");
            c.rows.push_back({ dest, from, whole });
            if (whole < 16) c.rows.push_back({ dest + whole, nullptr, 16 - whole });
        }
    begin_bulk(std::move(c));
}

/* ---- launches ---- */

const uint3 &block_index()
{
    return now_running->block->index;
}

static void run_thread()
{
    thread *t = now_running;
    (*m.call)();
    block *b = t->block;
    struct warp &w = b->warps[t->warp];
    set_waiting(t);
    w.alive &= ~(1u << t->lane);
    b->alive--;
    for (int i = 0; i < 32; i++)
        if (w.arrived >> i & 1) try_meeting(w, w.who[i], w.work[i]);
    block_barrier &x = b->barriers[0];
    if (x.arrived && x.arrived == b->alive) open_barrier(x);
    t->waits = nullptr;
    if (b->alive == 0) {
        while (do_a_copy(b)) {
        }
        for (auto &each : b->mbarriers)
            if (each.second.unseen || each.second.copied)
                fault("the block ends before anybody has seen the bytes that the barrier at shared address 0x%x waits for",
                      each.first);
    }
    leave();
    abort(); /* nobody runs what has ended */
}

static block *make_block(int n_warps)
{
    block *b = new block();
    b->n_warps = n_warps;
    b->warps = new warp[(size_t)n_warps]();
    for (int i = 0; i < 32 * n_warps; i++) {
        thread *t = &b->warps[i / 32].lanes[i % 32];
        t->index = { (unsigned)i, 0, 0 };
        t->block = b;
        t->warp = i / 32;
        t->lane = i % 32;
        t->base = take_stack();
    }
    b->arena = (uint8_t *)aligned_alloc(1024, ARENA);
    return b;
}

/* One that has ended, if it had as many threads; its shared memory is as it was left. */
static block *take_block(int n_warps)
{
    if (m.ended.empty()) return make_block(n_warps);
    block *b = m.ended.back();
    m.ended.pop_back();
    return b;
}

static void forget_blocks()
{
    for (block *b : m.ended) {
        for (int i = 0; i < 32 * b->n_warps; i++) m.stacks.push_back(b->warps[i / 32].lanes[i % 32].base);
        __asan_unpoison_memory_region(b->arena, ARENA);
        free(b->arena);
        delete[] b->warps;
        delete b;
    }
    m.ended.clear();
}

static void begin_block(uint3 index, int threads)
{
    block *b = take_block((threads + 31) / 32);
    b->index = index;
    b->alive = threads;
    b->dynamic = b->arena;
    if (b->launch != m.launch) {
        __asan_unpoison_memory_region(b->arena, ARENA);
        fill_plain(b->arena, 0xff, m.shared);
        __asan_poison_memory_region(b->arena + m.shared, ARENA - m.shared);
        b->launch = m.launch;
    }
    for (int i = 0; i < threads; i++) {
        thread *t = &b->warps[i / 32].lanes[i % 32];
        t->group = 0;
        t->copies.clear();
        prepare(t);
        b->warps[i / 32].alive |= 1u << t->lane;
        set_ready(t);
    }
    m.resident.push_back(b);
}

static void end_block(block *b)
{
    free(b->statics);
    b->statics = nullptr;
    b->mbarriers.clear();
    if (m.shown == b) m.shown = nullptr;
    m.ended.push_back(b);
}

static void describe_waiting()
{
    for (block *b : m.resident)
        for (int i = 0; i < b->n_warps; i++)
            for (thread &t : b->warps[i].lanes)
                if (t.waits && (t.lane == 0 || t.waits != (&t - 1)->waits))
                    fprintf(stderr, "emulator: block (%u, %u, %u), thread %u waits for %s\n", b->index.x, b->index.y, b->index.z,
                            t.index.x, t.waits);
}

/* Runs all that are resident as far as they come; false: they wait for blocks that are not. */
static bool run_resident()
{
    while (!m.resident.empty()) {
        bool moved = wake_polls();
        for (size_t i = 0; i < m.resident.size(); i++) {
            block *b = m.resident[i];
            thread *t = next_of(b, -1);
            while (!t && b->alive && do_a_copy(b)) t = next_of(b, -1);
            if (!t) continue;
            moved = true;
            go_to(t);
        }
        bool all_ended = true;
        for (block *b : m.resident) all_ended = all_ended && b->alive == 0;
        if (all_ended) {
            for (block *b : m.resident) end_block(b);
            m.resident.clear();
        } else if (!moved) {
            return false;
        }
    }
    return true;
}

void run_grid(const void *name, const std::function<void()> &call, dim3 grid, dim3 block_size, size_t shared, unsigned cluster)
{
    m.name = name;
    m.call = &call;
    m.shared = shared;
    m.turn = (int)drawn(32);
    m.launch++;
    fill_plain(m.statics, 0xff, m.statics_end - m.statics);
    if (!m.ended.empty() && m.ended[0]->n_warps != (int)(block_size.x + 31) / 32) forget_blocks();
    gridDim = grid;
    blockDim = block_size;
    bool backwards = drawn(2);
    uint64_t all = (uint64_t)grid.x * grid.y * grid.z;
    for (uint64_t first = 0; first < all; first += cluster) {
        uint64_t from = backwards ? all - cluster - first : first;
        for (uint64_t i = from; i < from + cluster; i++)
            begin_block({ (unsigned)(i % grid.x), (unsigned)(i / grid.x % grid.y), (unsigned)(i / grid.x / grid.y) },
                        (int)block_size.x);
        if (!run_resident() && (m.polls.empty() || first + cluster >= all)) {
            describe_waiting();
            fault("nobody can go on");
        }
    }
    m.name = nullptr;
}

/* ---- faults ---- */

static void say_where()
{
    char name[512] = "?";
    if (!m.name) return;
    __sanitizer_symbolize_pc((char *)m.name + 1, "%f", name, sizeof name);
    fprintf(stderr, "emulator: kernel %s\nemulator: grid (%u, %u, %u), blocks of %u threads, %zu bytes of shared memory\n", name,
            gridDim.x, gridDim.y, gridDim.z, blockDim.x, m.shared);
    if (!now_running) return;
    uint3 b = now_running->block->index;
    fprintf(stderr, "emulator: block (%u, %u, %u), thread %u\n", b.x, b.y, b.z, now_running->index.x);
}

void fault(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    fprintf(stderr, "emulator: ");
    vfprintf(stderr, format, list);
    fprintf(stderr, "\n");
    va_end(list);
    say_where();
    __sanitizer_print_stack_trace();
    _exit(1);
}

/* What libraries keep is theirs. */
extern "C" const char *__asan_default_options()
{
    return "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0";
}

extern "C" void __asan_on_error()
{
    say_where();
}

extern "C" void __ubsan_on_report()
{
    say_where();
}

} /* namespace emulator */
