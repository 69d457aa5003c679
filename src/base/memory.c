#include "base/memory.h"
#include <inttypes.h>
#include <stdio.h>

/* The first number in a file that follows `format`; 0 without. */
static uint64_t number_in(const char *path, const char *format)
{
    char line[256];
    uint64_t n = 0;
    FILE *f = fopen(path, "re");
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, format, &n) == 1) break;
    if (f) fclose(f);
    return n;
}

uint64_t memory_peak(void)
{
    return 1024 * number_in("/proc/self/status", "VmHWM: %" SCNu64);
}

uint64_t memory_available(void)
{
    uint64_t free = 1024 * number_in("/proc/meminfo", "MemAvailable: %" SCNu64);
    uint64_t most = number_in("/sys/fs/cgroup/memory.max", "%" SCNu64),
             used = number_in("/sys/fs/cgroup/memory.current", "%" SCNu64);
    if (most > 0 && (most < used || most - used < free)) free = most < used ? 0 : most - used;
    return free;
}
