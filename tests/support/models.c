#include "support/models.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

void must(bool ok, const struct err *e)
{
    if (ok) return;
    fprintf(stderr, "unexpected error: %s\n", e->text);
    abort();
}

void load_model_overridden(struct loaded *l, const char *path, const struct overrides *overrides,
                           const struct backend_options *o)
{
    struct err e = { 0 };
    *l = (struct loaded){ 0 };
    must(checkpoint_open_overridden(&l->checkpoint, path, overrides, &e), &e);
    must(backend_create(&l->backend, o, &e), &e);
    must(model_init(&l->model, &l->checkpoint, &l->backend, NULL, &e), &e);
    must(model_bind_all(&l->model, &e), &e);
}

void load_model(struct loaded *l, const char *path, const struct backend_options *o)
{
    load_model_overridden(l, path, NULL, o);
}

void unload_model(struct loaded *l)
{
    model_deinit(&l->model);
    backend_destroy(&l->backend);
    checkpoint_close(&l->checkpoint);
}

const char *shared_folder(const char *what)
{
    const char *folder = getenv("QUENCH_SHARED");
    if (!folder) printf("SKIP: %s: QUENCH_SHARED is not set\n", what);
    return folder;
}

double row_error(const float *got, const float *want, int64_t n)
{
    double d = 0, w = 0;
    for (int64_t i = 0; i < n; i++) {
        d += ((double)got[i] - want[i]) * ((double)got[i] - want[i]);
        w += (double)want[i] * want[i];
    }
    return sqrt(d / w);
}
