/* Pages of a mapped file: asked for before they are needed, and given back once used, so that the resident
 * size does not grow with the checkpoint. They come back from the file when touched. */
#ifndef BASE_PAGES_H
#define BASE_PAGES_H
#include <stdint.h>
#include <sys/mman.h>
#include <unistd.h>

static inline void pages_release(const uint8_t *data, uint64_t bytes)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), begin = (uintptr_t)data, end = begin + bytes;
    begin = (begin + page - 1) / page * page;
    end = end / page * page;
    if (begin < end) madvise((void *)begin, end - begin, MADV_DONTNEED);
}

static inline void pages_read_ahead(const uint8_t *data, uint64_t bytes)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), begin = (uintptr_t)data / page * page;
    if (bytes > 0) madvise((void *)begin, (uintptr_t)data + bytes - begin, MADV_WILLNEED);
}
#endif
