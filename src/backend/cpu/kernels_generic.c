/* The kernels for any machine: the compiler's baseline vectors. */
#include "backend/cpu/kernels_sequence.h"

CPU_KERNELS(generic, "generic", 4, .spin = spin);
