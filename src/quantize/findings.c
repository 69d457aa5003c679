/* Takes notes one by one, gives them grouped by sentence in the order in which the sentences first came up.
 */
#include "quantize/findings.h"
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct finding *find(const struct findings *f, const struct finding_note *note)
{
    for (size_t i = 0; i < f->n; i++) {
        struct finding *x = &f->items[i];
        if (x->step == note->step && x->is_fault == note->is_fault && strcmp(x->what, note->what) == 0)
            return x;
    }
    return NULL;
}

static struct finding *begin(struct findings *f, const struct finding_note *note)
{
    if (f->n == f->capacity) {
        size_t capacity = f->capacity ? 2 * f->capacity : 16;
        struct finding *items = realloc(f->items, capacity * sizeof *items);
        if (!items) return NULL;
        f->items = items;
        f->capacity = capacity;
    }
    char *what = strdup(note->what);
    if (!what) return NULL;
    f->items[f->n] = (struct finding){ .step = note->step, .is_fault = note->is_fault, .what = what };
    return &f->items[f->n++];
}

static bool copy_text(char **out, const char *text)
{
    char *copy = strdup(text);
    if (!copy) return false;
    free(*out);
    *out = copy;
    return true;
}

void findings_add(struct findings *f, const struct finding_note *note)
{
    struct finding *x = find(f, note);
    bool ok = true;
    if (!x) x = begin(f, note);
    if (!x) {
        f->incomplete = true;
        return;
    }
    /* written so that a NaN, which compares with nothing, counts as the worst */
    if (note->detail && (!x->detail || !(note->measure <= x->measure))) {
        ok = copy_text(&x->detail, note->detail);
        x->measure = note->measure;
    }
    if (note->name) {
        if (x->n_names < FINDING_NAMES) ok = copy_text(&x->names[x->n_names], note->name) && ok;
        x->n_names += ok;
    }
    f->incomplete = f->incomplete || !ok;
}

int64_t findings_count(const struct findings *f, int step, bool faults)
{
    int64_t n = 0;
    for (size_t i = 0; i < f->n; i++)
        n += (step < 0 || f->items[i].step == step) && f->items[i].is_fault == faults;
    return n;
}

char *findings_sentence(const struct finding *f)
{
    char *text = NULL;
    size_t bytes;
    FILE *out = open_memstream(&text, &bytes);
    if (!out) return NULL;
    fputs(f->what, out);
    if (f->detail) fprintf(out, " (%s%s)", f->n_names > 1 ? "worst: " : "", f->detail);
    for (int i = 0; i < FINDING_NAMES && f->names[i]; i++) fprintf(out, "%s%s", i ? ", " : ": ", f->names[i]);
    if (f->n_names > FINDING_NAMES) fprintf(out, " and %" PRId64 " more", f->n_names - FINDING_NAMES);
    if (fclose(out) == 0) return text;
    free(text);
    return NULL;
}

void findings_deinit(struct findings *f)
{
    for (size_t i = 0; i < f->n; i++) {
        free(f->items[i].what);
        free(f->items[i].detail);
        for (int k = 0; k < FINDING_NAMES; k++) free(f->items[i].names[k]);
    }
    free(f->items);
    *f = (struct findings){ 0 };
}
