/* Checkpoints that differ from a good one in a few places: tensors dropped, renamed, added or with other
 * bytes, config.json with another value. Written as one model.safetensors. */
#ifndef TESTS_QUANTIZE_VARIANT_H
#define TESTS_QUANTIZE_VARIANT_H
#include "checkpoint/temp.h"
#include "quantize/fixture.h"

enum { EDITS = 6 };
struct edit {
    const char *tensor; /* NULL: no more edits */
    enum { EDIT_BYTES, EDIT_DROP, EDIT_RENAME, EDIT_ADD, EDIT_FLATTEN, EDIT_DTYPE } kind;
    const char *name; /* EDIT_RENAME: the new one; EDIT_ADD: a copy under this name */
    uint64_t at, n;   /* EDIT_BYTES: n times these bytes from `at` on */
    const void *bytes;
    size_t size;
    enum dtype dtype; /* EDIT_DTYPE: of as many bytes an element */
};
struct variant_of {
    struct edit edits[EDITS];
    const char *config, *value; /* dotted path and JSON; NULL value: deleted */
};

static inline void variant_bytes(struct tensor *t, const struct edit *d, uint8_t **owned)
{
    *owned = malloc(t->bytes);
    memcpy(*owned, t->data, t->bytes);
    for (uint64_t i = 0; i < d->n; i++) {
        assert_true(d->at + (i + 1) * d->size <= t->bytes);
        memcpy(*owned + d->at + i * d->size, d->bytes, d->size);
    }
    t->data = *owned;
}

/* Returns how many tensors there are afterwards. */
static inline size_t variant_edit(struct tensor *all, size_t n, const struct edit *d, uint8_t **owned)
{
    size_t i = 0;
    while (i < n && strcmp(all[i].name, d->tensor) != 0) i++;
    if (i == n) fail_msg("no tensor '%s'", d->tensor);
    struct tensor *t = &all[i];
    switch (d->kind) {
    case EDIT_BYTES: variant_bytes(t, d, owned); break;
    case EDIT_RENAME: t->name = d->name; break;
    case EDIT_DTYPE: t->dtype = d->dtype; break;
    case EDIT_DROP: *t = all[--n]; break;
    case EDIT_ADD:
        all[n] = *t;
        all[n++].name = d->name;
        break;
    default: /* the same elements in one row */ t->shape[0] = tensor_elements(t); t->n_dims = 1;
    }
    return n;
}

/* Writes the variant of the checkpoint `good` into the fixture's folder `name`. */
static inline void variant_write(const struct fixture *f, const char *name, const char *good,
                                 const struct variant_of *v)
{
    struct checkpoint c;
    uint8_t *owned[EDITS] = { 0 };
    must_open(&c, good);
    size_t n = c.n_tensors;
    struct tensor *all = malloc((n + EDITS) * sizeof *all);
    for (size_t i = 0; i < n; i++) all[i] = *c.tensors[i];
    for (size_t i = 0; i < EDITS && v->edits[i].tensor; i++)
        n = variant_edit(all, n, &v->edits[i], &owned[i]);
    json_t *config = json_deep_copy(c.config_json);
    if (v->config) json_change(config, v->config, v->value);
    assert_true(file_remove_tree(in(f, name), NULL));
    write_checkpoint(f, name, config, all, n);
    json_decref(config);
    for (int i = 0; i < EDITS; i++) free(owned[i]);
    free(all);
    checkpoint_close(&c);
}

/* Without the tensors that begin so. */
static inline void variant_without(const struct fixture *f, const char *name, const char *good,
                                   const char *prefix, const char *config_path, const char *value)
{
    struct checkpoint c;
    size_t n = 0;
    must_open(&c, good);
    struct tensor *all = malloc((c.n_tensors + 1) * sizeof *all);
    for (size_t i = 0; i < c.n_tensors; i++)
        if (strncmp(c.tensors[i]->name, prefix, strlen(prefix)) != 0) all[n++] = *c.tensors[i];
    json_t *config = json_deep_copy(c.config_json);
    if (config_path) json_change(config, config_path, value);
    assert_true(file_remove_tree(in(f, name), NULL));
    write_checkpoint(f, name, config, all, n);
    json_decref(config);
    free(all);
    checkpoint_close(&c);
}
#endif
