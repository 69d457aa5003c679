/* How work below cli/ tells the user what it does, without printing. Every entry may be NULL; a NULL struct
 * too. */
#ifndef BASE_REPORT_H
#define BASE_REPORT_H
#include <stdint.h>

struct report {
    void *ctx;
    void (*progress)(void *ctx, const char *what, uint64_t done,
                     uint64_t total);          /* done == total ends a bar */
    void (*warn)(void *ctx, const char *text); /* something a user should know, in one sentence */
};

static inline void report_progress(const struct report *r, const char *what, uint64_t done, uint64_t total)
{
    if (r && r->progress) r->progress(r->ctx, what, done, total);
}
void report_warn(const struct report *r, const char *format, ...) __attribute__((format(printf, 2, 3)));
#endif
