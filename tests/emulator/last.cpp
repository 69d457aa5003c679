/* Linked last: where static shared memory ends. */
#include <cstdint>
extern "C" __attribute__((section(".cuda.shared"))) uint8_t emulator_statics_end[64] = { 1 };
