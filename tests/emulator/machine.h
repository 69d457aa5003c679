/* What the parts of the emulator share. */
#ifndef EMULATOR_MACHINE_H
#define EMULATOR_MACHINE_H
#include "emulator.h"
#include <unordered_map>
#include <vector>

namespace emulator
{

constexpr size_t ARENA = 232 * 1024; /* all the dynamic shared memory there is, and what lies behind it */

struct warp {
    uint32_t ready, alive, arrived; /* a bit a lane; arrived: at a meeting */
    void *operands[32];
    meeting *work[32];
    uint32_t who[32];
    thread lanes[32];
};

struct group {
    int arrived;
    meeting *work;
    void *operands[128];
};

struct block_barrier {
    int count, arrived;
    std::vector<thread *> waiting;
};

struct mbarrier {
    int arrivals, pending;
    int bytes, phase;
    bool copied, unseen; /* bytes came in this phase; in the last one, for which nobody has waited */
    std::vector<thread *> waiting;
};

struct bulk_row {
    uint8_t *to;
    const uint8_t *from; /* NULL: zeros */
    int bytes;
};

struct bulk {
    std::vector<bulk_row> rows;
    int bytes;
    uint32_t barrier;
};

struct block {
    uint3 index;
    int alive, n_warps;
    uint64_t launch; /* that its shared memory is of */
    uint32_t ready_warps;
    warp *warps;
    uint8_t *arena, *dynamic, *statics; /* statics: while another block's are shown */
    group groups[8];
    block_barrier barriers[16];
    std::unordered_map<uint32_t, mbarrier> mbarriers;
    std::vector<bulk> under_way;
};

struct poll {
    thread *t;
    const unsigned *p;
    unsigned n;
};

struct machine {
    uint64_t random;
    void *main_stack;
    std::vector<void *> stacks;
    const void *name; /* of the kernel */
    const std::function<void()> *call;
    size_t shared;
    int turn;        /* the lane that goes first */
    uint64_t launch; /* number of this one */
    std::vector<block *> resident, ended;
    block *shown; /* whose static shared memory lies there */
    uint8_t *statics, *statics_end;
    block_barrier cluster;
    std::vector<poll> polls;
};
extern machine m;

/* What CUtensorMap holds here: BF16 in the 128-byte swizzle, words of eight bytes as they are. */
constexpr uint64_t TENSOR_MAP = 0x7465736e6f72ull;
struct tensor_map {
    uint64_t magic;
    const void *data;
    int64_t rows, cols, pitch; /* pitch: bytes */
    int box[2];                /* columns, rows */
    int each;                  /* bytes */
    bool swizzled;
};

uint32_t drawn(uint32_t below);
void run_grid(const void *name, const std::function<void()> &call, dim3 grid, dim3 block, size_t shared,
              unsigned cluster);

} /* namespace emulator */
#endif
