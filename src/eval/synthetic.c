#include "eval/synthetic.h"
#include "quantize/synth_values.h"
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { N_RUNS = 4, ALIGN = 64 };

/* A kind of values that tensors share: the first whose name's end and dtype fit. */
static const struct {
    const char *name;
    enum dtype dtype;
    uint64_t bytes; /* more than one tensor of a layer; the embedding's rows repeat after 16,384 */
} kinds[N_RUNS] = {
    { "codes.weight_packed", DTYPE_U8, 32u << 20 },
    { "groups.weight_scale", DTYPE_F8_E4M3, 16u << 20 },
    { "codes.weight", DTYPE_F8_E4M3, 32u << 20 },
    { "values.weight", DTYPE_BF16, 64u << 20 },
};

struct run_of_values {
    uint8_t *data;
    uint64_t mapped;
};

static bool ends_in(const char *name, const char *end)
{
    size_t n = strlen(name), m = strlen(end);
    return n >= m && strcmp(name + n - m, end) == 0;
}

/* -1: values of its own. */
static int run_for(const struct tensor *t)
{
    if (t->dtype == DTYPE_U8) return 0;
    if (t->dtype == DTYPE_F8_E4M3) return ends_in(t->name, "_scale") ? 1 : 2;
    return t->dtype == DTYPE_BF16 && synth_values_are_weights(t) ? 3 : -1;
}

/* The first round of the run is memory, the others show it again. Shared memory, not the heap's: a backend
 * may tell the system that it is done with pages of a checkpoint, and they must still be there. */
static bool map_rounds(struct run_of_values *r, uint64_t round, int fd, struct err *e)
{
    r->data = mmap(NULL, r->mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (r->data == MAP_FAILED) {
        r->data = NULL;
        return err_errno(e, "mmap");
    }
    for (uint64_t at = 0; at < r->mapped; at += round)
        if (mmap(r->data + at, round, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED)
            return err_errno(e, "mmap");
    return true;
}

static bool create_run(struct run_of_values *r, uint64_t round, uint64_t rounds, struct err *e)
{
    int fd = memfd_create("quench", MFD_CLOEXEC);
    bool ok = fd >= 0 && ftruncate(fd, (off_t)round) == 0;
    r->mapped = round * rounds;
    ok = ok ? map_rounds(r, round, fd, e) : err_errno(e, "memory for random weights");
    if (fd >= 0) close(fd);
    return ok;
}

static bool create_runs(struct synthetic *s, const struct synth_values *values, struct err *e)
{
    uint64_t largest[N_RUNS] = { 0 };
    const struct tensor_list *l = &s->synth.tensors;
    s->runs = calloc(N_RUNS + 1, sizeof *s->runs);
    if (!s->runs) return err_memory(e, "random weights", N_RUNS * sizeof *s->runs);
    for (size_t i = 0; i < l->n; i++) {
        int kind = run_for(&l->items[i]);
        if (kind >= 0 && l->items[i].bytes > largest[kind]) largest[kind] = l->items[i].bytes;
    }
    for (int k = 0; k < N_RUNS; k++) {
        uint64_t round = kinds[k].bytes;
        struct tensor t = { .name = kinds[k].name, .dtype = kinds[k].dtype };
        if (!largest[k]) continue;
        /* a tensor begins anywhere in the first round */
        if (!create_run(&s->runs[k], round, largest[k] / round + 2, e)) return false;
        synth_values_fill(values, s->runs[k].data, &t, 0, round, NULL);
    }
    return true;
}

static uint64_t hash(const char *name)
{
    uint64_t h = 0xcbf29ce484222325u;
    for (; *name; name++) h = (h ^ (uint8_t)*name) * 0x100000001b3u;
    return (h ^ h >> 32) * 0x9e3779b97f4a7c15u >> 20;
}

static uint64_t aligned(uint64_t bytes)
{
    return (bytes + ALIGN - 1) / ALIGN * ALIGN;
}

static bool place_tensors(struct synthetic *s, const struct synth_values *values, struct err *e)
{
    struct tensor_list *l = &s->synth.tensors;
    uint64_t small = 0, at = 0;
    for (size_t i = 0; i < l->n; i++)
        if (run_for(&l->items[i]) < 0) small += aligned(l->items[i].bytes);
    if (!create_run(&s->runs[N_RUNS], small + 1, 1, e)) return false;
    uint8_t *own = s->runs[N_RUNS].data;
    for (size_t i = 0; i < l->n; i++) {
        struct tensor *t = &l->items[i];
        int kind = run_for(t);
        if (kind >= 0) {
            t->data = s->runs[kind].data + hash(t->name) % (kinds[kind].bytes / ALIGN) * ALIGN;
            continue;
        }
        synth_values_fill(values, own + at, t, 0, t->bytes, NULL);
        t->data = own + at;
        at += aligned(t->bytes);
    }
    return true;
}

/* name[:layers=N][:format=NAME]; spec is cut at the colons. */
static bool parse(char *spec, int64_t *layers, const struct recipe **recipe, struct err *e)
{
    char *rest;
    *recipe = recipe_card();
    *layers = 0;
    strtok_r(spec, ":", &rest);
    for (char *word; (word = strtok_r(NULL, ":", &rest));) {
        char *end = word;
        if (strncmp(word, "layers=", 7) == 0) *layers = strtoll(word + 7, &end, 10);
        if (strncmp(word, "layers=", 7) == 0 && end > word + 7 && !*end && *layers > 0) continue;
        if (strncmp(word, "format=", 7) == 0) {
            *recipe = recipe_builtin(word + 7);
            if (*recipe || strcmp(word + 7, "bf16") == 0) continue;
        }
        return err_set(e, ERR_ARGUMENT,
                       "'%s': expected layers=N or format=bf16, card, fast, nvfp4 or nvfp4a16", word);
    }
    return true;
}

static bool create(struct synthetic *s, char *spec, const char *what, struct err *e)
{
    json_t *config = NULL;
    char *folder = NULL;
    int64_t layers;
    const struct recipe *recipe;
    struct synth_values *values = NULL;
    bool ok = parse(spec, &layers, &recipe, e) && synth_load_config(&config, &folder, spec, e) &&
              synth_init(&s->synth, config, what, layers, recipe, e) && synth_values_create(&values, 0, e) &&
              create_runs(s, values, e) && place_tensors(s, values, e);
    synth_values_free(values);
    json_decref(config);
    free(folder);
    return ok;
}

bool synthetic_create(struct synthetic *s, const char *what, struct err *e)
{
    *s = (struct synthetic){ 0 };
    char *spec = strdup(what);
    bool ok = spec ? create(s, spec, what, e) : err_memory(e, "name", strlen(what));
    free(spec);
    if (!ok) synthetic_destroy(s);
    return ok;
}

void synthetic_destroy(struct synthetic *s)
{
    for (int k = 0; s->runs && k <= N_RUNS; k++)
        if (s->runs[k].data) munmap(s->runs[k].data, s->runs[k].mapped);
    free(s->runs);
    synth_deinit(&s->synth);
    *s = (struct synthetic){ 0 };
}
