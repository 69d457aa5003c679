/* What a process that dies of a fault leaves behind: which signal, where, and the last requests - who asked
 * for what and how far it had come, nothing of what was said. Lines of JSON, written by a signal handler on
 * SIGSEGV, SIGABRT, SIGBUS, SIGFPE and SIGILL; then the signal does what it would have done. One for the
 * process. */
#ifndef SERVER_CRASH_H
#define SERVER_CRASH_H
#include "base/err.h"
#include <stdbool.h>
#include <stdint.h>

/* The last so many, and before them whatever is still under way. */
enum { CRASH_REQUESTS = 1024, CRASH_ID = 129 };

struct crash_request {
    char id[CRASH_ID];
    const char *path, *state; /* literals; state NULL: it is over */
    uint64_t owner;           /* of the API key; 0: none */
    double began;             /* clock_seconds */
    double seconds;           /* once it is over */
    int status;               /* of the answer; 0: none yet */
    bool stream;
    int64_t body_bytes, prompt_tokens, cached_tokens, answer_tokens;
};

/* From now on. path: appended to, made where it is missing, for its owner only; NULL: standard error.
 * version: borrowed. */
bool crash_arm(const char *path, const char *version, struct err *e);
void crash_disarm(void); /* signals do what they did before; the requests are forgotten */
/* A stack for the handler, for a thread that may run out of its own. Freed when the thread ends. */
void crash_own_stack(void);
/* *place: 0 for a request that is new. One thread only. Does nothing while not armed. */
void crash_note(uint64_t *place, const struct crash_request *r);
#endif
