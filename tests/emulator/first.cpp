/* Linked first: where static shared memory begins. */
#include <cstdint>
extern "C" __attribute__((section(".cuda.shared"))) uint8_t emulator_statics_begin[64] = { 1 };
