#ifndef BASE_MEMORY_H
#define BASE_MEMORY_H
#include <stdint.h>
/* The most memory this process has held at once, mapped files included, in bytes; 0 where the system does not
 * say. Source: VmHWM of /proc/self/status, proc(5). */
uint64_t memory_peak(void);
/* What programs may still take without swapping, in bytes, less where this process's control group allows
 * less; 0 where the system does not say. Source: MemAvailable of /proc/meminfo, memory.max of cgroup v2. */
uint64_t memory_available(void);
#endif
