/* quench doctor: findings about the machine, a checkpoint and a server, one line each with what to do. */
#ifndef CLI_DOCTOR_H
#define CLI_DOCTOR_H
#include "cli/common.h"

enum doctor_state { DOCTOR_OK, DOCTOR_WARN, DOCTOR_FAIL };

struct doctor {
    const struct common *common;
    const char *model; /* NULL: none, as url */
    const char *url;
    int64_t port;
    const char *root; /* in front of /proc and /sys: "" */
    json_t *lines;    /* owned; NULL: print */
    int counts[3];    /* by state */
    struct backend backend;
};

/* advice: what to do; NULL: nothing. */
void doctor_say(struct doctor *d, enum doctor_state state, const char *check, const char *advice,
                const char *format, ...) __attribute__((format(printf, 5, 6)));

/* Processor, threads, memory, huge pages, GPU, files, port, clock. Leaves d->backend open where there is one.
 */
void doctor_machine(struct doctor *d);
/* Checkpoint, tokenizer, template, memory it needs, page cache. */
void doctor_model(struct doctor *d);
/* A running server: alive, ready, models, key. */
void doctor_server(struct doctor *d);
#endif
