/* What a check found: one sentence a kind, however many tensors it is true of. The first few names are kept
 * and all are counted, so that a checkpoint with thirty thousand bad scales still gives a report one can
 * read. */
#ifndef QUANTIZE_FINDINGS_H
#define QUANTIZE_FINDINGS_H
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { FINDING_NAMES = 3 };

struct finding {
    int step; /* the caller's: which check */
    bool is_fault;
    char *what;                 /* the sentence without names */
    char *names[FINDING_NAMES]; /* the first ones; NULL: fewer */
    int64_t n_names;            /* all of them */
    double measure;             /* of the worst */
    char *detail;               /* says what the measure is; NULL: none */
};

struct findings {
    struct finding *items;
    size_t n, capacity;
    bool incomplete; /* memory ran out: something was not recorded */
};

/* Adds to the finding of the same step and sentence, or begins one. name may be NULL; with detail, the one
 * with the largest measure is kept. Texts are copied. */
struct finding_note {
    int step;
    bool is_fault;
    const char *what, *name;
    double measure;
    const char *detail;
};
void findings_add(struct findings *f, const struct finding_note *note);
int64_t findings_count(const struct findings *f, int step, bool faults); /* step -1: of all */
/* "WHAT (worst: DETAIL): NAME, NAME, NAME and N more", malloc'd; NULL when out of memory. */
char *findings_sentence(const struct finding *f);
void findings_deinit(struct findings *f); /* accepts a zeroed one */
#endif
