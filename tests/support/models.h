/* What tests of whole models share: opening one, and the goldens an outside implementation made. */
#ifndef TESTS_SUPPORT_MODELS_H
#define TESTS_SUPPORT_MODELS_H
#include "checkpoint/checkpoint.h"
#include "engine/engine.h"

struct loaded {
    struct checkpoint checkpoint;
    struct backend backend;
    struct model model;
};

/* Aborts the test with the error's text on failure. */
void load_model(struct loaded *l, const char *path, const struct backend_options *o);
void load_model_overridden(struct loaded *l, const char *path, const struct overrides *overrides,
                           const struct backend_options *o);
void unload_model(struct loaded *l);
/* The folder with larger material ($QUENCH_SHARED: models/study, data/...), or NULL; says SKIP when unset. */
const char *shared_folder(const char *what);
double row_error(const float *got, const float *want, int64_t n); /* |got - want| / |want| */
void must(bool ok, const struct err *e);                          /* aborts with the text */
#endif
