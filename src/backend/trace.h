/* A backend around another one that keeps account of its operations: calls, bytes that had to move,
 * multiplications, and time where asked for. Kernels know nothing of it. */
#ifndef BACKEND_TRACE_H
#define BACKEND_TRACE_H
#include "backend/ops.h"

enum trace_mode {
    TRACE_OFF,   /* operations pass through */
    TRACE_BYTES, /* count; reads picks back, so that experts are those of the step */
    TRACE_TIME,  /* count, and time each operation; it is complete when its call returns */
};

/* One operation, or the products with weights of one name, format and shape. */
struct trace_entry {
    const char *op, *label;    /* "matmul", "attention"; label "" but for products */
    enum weight_format format; /* of a product, and of experts (gate_proj's of the first) */
    int64_t rows, cols;        /* of its weights; 0: not a product */
    uint64_t calls;
    uint64_t bytes; /* weights read, each once a call; KV lines read; recurrent state read and written. 0:
                       only activations, which stay in caches when a step has few rows */
    uint64_t flops; /* of products: 2 per weight and row */
    double seconds;
};

/* What a weight is called in the account. */
struct trace_label {
    const struct weight *weight;
    const char *label; /* borrow */
};

/* `out` runs on `inner` (borrowed) and shares its weights and memory. */
bool trace_create(struct backend *out, const struct backend *inner, struct err *e);
void trace_destroy(struct backend *b); /* accepts a zeroed one */
/* Products are told apart by these; before, and for weights not named, they are one entry. */
bool trace_set_labels(struct backend *b, const struct trace_label *labels, int64_t n, struct err *e);
void trace_start(struct backend *b, enum trace_mode mode); /* from zero */
/* The account, valid until the next trace_start or trace_set_labels. Entries without calls are in it. */
const struct trace_entry *trace_entries(const struct backend *b, int *n);
/* Experts that the routed rows picked, each once a layer and step; *steps: how many such sets. */
uint64_t trace_experts(const struct backend *b, uint64_t *steps);

/* Bytes of the weights as a product reads them: elements and scales. */
uint64_t trace_weight_bytes(const struct weight *w);
#endif
