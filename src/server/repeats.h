/* Whether the last tokens of an answer are one run of tokens, several times over. Source: vLLM,
 * RepetitionDetectionParams. */
#ifndef SERVER_REPEATS_H
#define SERVER_REPEATS_H
#include "base/err.h"
#include <stdbool.h>
#include <stdint.h>

struct repeats_rule {
    int size_min, size_max; /* tokens of the run; size_max 0: it is not looked for */
    int64_t count;          /* times, 2 or more */
};

struct repeats;
bool repeats_create(struct repeats **out, const struct repeats_rule *rule, struct err *e);
void repeats_free(struct repeats *r); /* NULL is fine */
/* The token came; true: the answer ends in such a run. Takes size_max steps. */
bool repeats_push(struct repeats *r, int32_t id);
#endif
