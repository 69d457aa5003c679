/* FNV-1a, 64 bits: tells torn or foreign data from ours, not an attacker's. */
#ifndef QUANTIZE_DIGEST_H
#define QUANTIZE_DIGEST_H
#include <stddef.h>
#include <stdint.h>

static const uint64_t DIGEST_START = 0xcbf29ce484222325u;

static inline uint64_t digest(uint64_t h, const void *data, size_t bytes)
{
    const unsigned char *p = data;
    for (size_t i = 0; i < bytes; i++) h = (h ^ p[i]) * 0x100000001b3u;
    return h;
}
#endif
