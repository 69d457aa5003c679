/* The engine's inside, for engine.c and snapshot.c. */
#ifndef ENGINE_SEQUENCE_H
#define ENGINE_SEQUENCE_H
#include "engine/engine.h"

struct sequence {
    bool open, tentative; /* the last step's rows wait for engine_keep */
    int64_t length;
    int64_t shift; /* of the next token's position against `length`: pictures take more rows than positions */
    int32_t kept;  /* rows of the slot's log that count */
    int64_t head_length;          /* rows in the MTP head's cache */
    int64_t fresh_first, n_fresh; /* rows of the last step that the head has not seen; 0: none */
    int64_t n_pages;
    int32_t *pages; /* [pages_each] */
};

/* What was kept of a sequence. Its state is that of slot `sequences` + its own number. */
struct snapshot {
    bool used;
    int64_t length, shift, head_length, n_pages;
    int32_t *pages; /* [pages_each] */
};

struct engine {
    struct model *model;
    struct engine_options o;
    struct step *step;
    struct layer_state *states; /* [n_layers + 1], the last the MTP head's */
    struct sequence *sequences;
    int64_t pages_each, n_free, logits_rows;
    int32_t *page_memory; /* every sequence's and snapshot's list, then the free list, then holders */
    int32_t *free_pages;
    int32_t *holders;           /* [pages] sequences and snapshots that have it in their list */
    struct snapshot *snapshots; /* [snapshots] */
    struct row *rows;           /* [step_rows] of the last step */
    struct span *spans;
    struct mat hidden;
    struct row *head_rows; /* [step_rows] of the MTP head's, with the hidden row that each goes with */
    int64_t *head_index;
    struct span *head_spans;
    int32_t *guesses;   /* [sequences] */
    float *host_logits; /* [logits_rows][vocab] */
    uint32_t *allowed;  /* the backend's: see engine_allow; NULL: everything */
};

/* Layers with a state: the MTP head's too where there are drafts. */
int engine_states(const struct engine *g);
int32_t engine_take_page(struct engine *g); /* one must be free */
void engine_let_page(struct engine *g, int32_t page);
#endif
