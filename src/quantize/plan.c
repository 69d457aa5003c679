/* Takes an open checkpoint and a recipe, gives the list of jobs. Every error that the names, shapes and
 * dtypes of the source can cause is found here. */
#include "quantize/plan.h"
#include "num/fp8.h"
#include "num/nvfp4.h"
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MODULE_BYTES = 512 };
static const char WEIGHT[] = ".weight";

int plan_outputs_of(enum scheme scheme)
{
    return scheme == SCHEME_NVFP4 ? 4 : scheme == SCHEME_NVFP4A16 || scheme == SCHEME_FP8 ? 3 : 2;
}

/* The tensor's module: its name without ".weight"; false when it ends in something else. */
static bool module_of(char module[MODULE_BYTES], const char *tensor)
{
    size_t n = strlen(tensor), end = sizeof WEIGHT - 1;
    if (n <= end || n - end >= MODULE_BYTES || strcmp(tensor + n - end, WEIGHT) != 0) return false;
    memcpy(module, tensor, n - end);
    module[n - end] = 0;
    return true;
}

static void expert_module(char module[MODULE_BYTES], const char *tensor, size_t stem, int expert,
                          enum expert_part part)
{
    snprintf(module, MODULE_BYTES, "%.*s.%d.%s", (int)stem, tensor, expert, expert_part_name[part]);
}

/* Which modules exist and what the recipe says of each. */

/* Calls visit for every module behind a tensor; class_name is "" for what is not a Linear. */
struct visit {
    void *ctx;
    bool (*call)(void *ctx, const char *module, const char *class_name, const struct place *place,
                 struct err *e);
};

static bool visit_fused(const char *tensor, size_t stem, bool gate_up, int n_experts, const struct visit *v,
                        struct err *e)
{
    char module[MODULE_BYTES];
    struct place place;
    for (int i = 0; i < n_experts; i++)
        for (int part = gate_up ? PART_GATE : PART_DOWN; part <= (gate_up ? PART_UP : PART_DOWN); part++) {
            expert_module(module, tensor, stem, i, (enum expert_part)part);
            module_place(&place, module, true);
            if (!v->call(v->ctx, module, "Linear", &place, e)) return false;
        }
    return true;
}

static bool visit_tensor(const char *tensor, int n_dims, int n_experts, const struct visit *v, struct err *e)
{
    char module[MODULE_BYTES];
    struct place place;
    size_t stem;
    bool gate_up;
    if (n_dims == 3 && module_is_fused(tensor, &stem, &gate_up))
        return visit_fused(tensor, stem, gate_up, n_experts, v, e);
    if (!module_of(module, tensor)) return true;
    bool linear = n_dims == 2 && module_place(&place, module, true);
    if (!linear) place = (struct place){ .section = PLACE_OTHER, .layer = -1, .expert = -1 };
    return v->call(v->ctx, module, linear ? "Linear" : "", &place, e);
}

struct ignoring {
    const struct quantization *rules;
    struct module_list list;
};

/* A Linear left alone is listed; so is anything else that a target would catch, since readers go by names. */
static bool ignore_module(void *ctx, const char *module, const char *class_name, const struct place *place,
                          struct err *e)
{
    struct ignoring *g = ctx;
    bool hit = quantization_scheme(g->rules, module, class_name) != SCHEME_NONE, linear = *class_name != 0;
    if (linear && !hit && !quantization_ignores(g->rules, module, class_name))
        return err_set(e, ERR_ARGUMENT, "module '%s' is neither targeted nor ignored", module);
    if (linear && hit && !quantization_agrees(g->rules, module))
        return err_set(e, ERR_ARGUMENT,
                       "module '%s' is a target of two schemes, and readers differ in which one they take",
                       module);
    if (place->section == PLACE_DRAFT || hit == linear) return true;
    return module_list_add(&g->list, module, place, e);
}

/* The patterns keep readers from building the MTP head quantized, whatever they call its parts. */
static bool append_draft(json_t *ignore, struct err *e)
{
    return (json_array_append_new(ignore, json_string("re:.*mtp.*")) == 0 &&
            json_array_append_new(ignore, json_string("re:^mtp.*")) == 0) ||
           err_memory(e, "ignore list", 0);
}

/* The recipe's own rules, as a reader would apply them. */
static bool parse_rules(struct quantization **out, const struct recipe *r, struct err *e)
{
    json_t *root = NULL, *ignore = json_array();
    bool ok = ignore || err_memory(e, "ignore list", 0);
    *out = NULL;
    for (size_t i = 0; ok && i < r->n_ignore; i++)
        ok = json_array_append_new(ignore, json_string(r->ignore[i])) == 0 || err_memory(e, "ignore list", 0);
    ok = ok && append_draft(ignore, e) && recipe_config(&root, r, ignore, e) &&
         quantization_parse(out, root, e);
    json_decref(ignore);
    json_decref(root);
    return ok || err_note(e, "recipe '%s'", r->name);
}

bool plan_block(json_t **out, size_t *n_ignored, const struct plan_names *names, const struct recipe *r,
                struct err *e)
{
    struct quantization *rules;
    *out = NULL;
    if (!parse_rules(&rules, r, e)) return false;
    struct ignoring g = { .rules = rules };
    struct visit visit = { &g, ignore_module };
    json_t *ignore = json_array();
    bool ok = ignore || err_memory(e, "ignore list", 0);
    for (size_t i = 0; ok && i < names->n; i++)
        ok = visit_tensor(names->names[i], names->n_dims[i], names->n_experts, &visit, e) ||
             err_note(e, "recipe '%s'", r->name);
    *n_ignored = g.list.n;
    ok = ok && module_list_append_to(&g.list, ignore, e) && append_draft(ignore, e) &&
         recipe_config(out, r, ignore, e);
    json_decref(ignore);
    module_list_deinit(&g.list);
    quantization_free(rules);
    return ok;
}

static bool make_block(struct plan *p, const struct checkpoint *c, const struct recipe *r, struct err *e)
{
    const char **names = malloc((c->n_tensors + 1) * sizeof *names);
    int *n_dims = malloc((c->n_tensors + 1) * sizeof *n_dims);
    bool ok = (names && n_dims) || err_memory(e, "tensor names", c->n_tensors * sizeof *names);
    for (size_t i = 0; ok && i < c->n_tensors; i++) {
        names[i] = c->tensors[i]->name;
        n_dims[i] = c->tensors[i]->n_dims;
    }
    struct plan_names list = { names, n_dims, c->n_tensors, c->config.n_experts };
    ok = ok && plan_block(&p->block, &p->n_ignored, &list, r, e);
    free(names);
    free(n_dims);
    return ok;
}

/* Jobs. */

static bool check_shape(const struct tensor *t, const int64_t *want, int n, struct err *e)
{
    char found[100];
    struct tensor expected = { .n_dims = n };
    memcpy(expected.shape, want, (size_t)n * sizeof *want);
    if (t->n_dims == n && memcmp(t->shape, want, (size_t)n * sizeof *want) == 0) return true;
    char text[100];
    return err_set(e, ERR_FORMAT, "tensor '%s': shape %s, config.json asks for %s", t->name,
                   tensor_shape_text(t, found, sizeof found),
                   tensor_shape_text(&expected, text, sizeof text));
}

static bool check_matrix(const struct matrix *m, struct err *e)
{
    if (m->source->dtype != DTYPE_BF16)
        return err_set(e, ERR_UNSUPPORTED, "tensor '%s': %s cannot be packed as %s, only BF16 can",
                       m->source->name, dtype_name(m->source->dtype), scheme_name(m->scheme));
    if (module_is_router(m->module))
        return err_set(
            e, ERR_UNSUPPORTED,
            "module '%s': %s: readers build this one unquantized, so it must be on the ignore list",
            m->module, scheme_name(m->scheme));
    if (scheme_measures(m->scheme) && m->input == INPUT_NONE)
        return err_set(e, ERR_UNSUPPORTED,
                       "module '%s': %s needs a measured input and only modules of decoder layers have one; "
                       "NVFP4A16, FP8_DYNAMIC and FP8_BLOCK are possible",
                       m->module, scheme_name(m->scheme));
    if (!scheme_is_nvfp4(m->scheme)) return true;
    if (m->cols % NVFP4_GROUP == 0) return true;
    return err_set(e, ERR_UNSUPPORTED,
                   "tensor '%s': %" PRId64 " columns are not a multiple of %d, as %s needs", m->source->name,
                   m->cols, NVFP4_GROUP, scheme_name(m->scheme));
}

static size_t *expert_slot(const struct plan *p, int layer, int expert, enum expert_part part)
{
    return &p->experts[((size_t)layer * (size_t)p->config->n_experts + (size_t)expert) * N_PARTS + part];
}

/* Takes the matrix with its module's name. */
static bool add_matrix(struct plan *p, struct matrix m, struct err *e)
{
    if (p->n_matrices == p->matrices_capacity) {
        size_t capacity = p->matrices_capacity ? 2 * p->matrices_capacity : 1024;
        struct matrix *matrices = realloc(p->matrices, capacity * sizeof *matrices);
        if (!matrices) {
            free(m.module);
            return err_memory(e, "plan", capacity * sizeof *matrices);
        }
        p->matrices = matrices;
        p->matrices_capacity = capacity;
    }
    if (m.expert >= 0) *expert_slot(p, m.layer, m.expert, m.part) = p->n_matrices;
    p->matrices[p->n_matrices++] = m;
    p->needs_inputs = p->needs_inputs || scheme_measures(m.scheme);
    return check_matrix(&p->matrices[p->n_matrices - 1], e);
}

/* Layer and expert that the config does not have would be packed without a measured input. */
static bool check_place(const struct plan *p, const struct place *place, const char *tensor, struct err *e)
{
    if (place->section != PLACE_LAYER) return true;
    if (place->layer < p->config->n_layers && place->expert < p->config->n_experts) return true;
    if (place->expert < 0)
        return err_set(e, ERR_FORMAT, "tensor '%s': layer %" PRId64 "; config.json has %d layers", tensor,
                       place->layer, p->config->n_layers);
    return err_set(e, ERR_FORMAT,
                   "tensor '%s': layer %" PRId64 ", expert %" PRId64
                   "; config.json has %d layers of %d experts",
                   tensor, place->layer, place->expert, p->config->n_layers, p->config->n_experts);
}

static bool plan_plain(struct plan *p, struct job *j, const struct quantization *rules, struct err *e)
{
    const struct tensor *t = j->source;
    char module[MODULE_BYTES];
    struct place place;
    if (t->n_dims != 2 || !module_of(module, t->name) || !module_place(&place, module, true)) return true;
    enum scheme scheme = quantization_scheme(rules, module, "Linear");
    if (scheme == SCHEME_NONE) return true;
    if (!check_place(p, &place, t->name, e)) return false;
    struct matrix m = { .module = strdup(module),
                        .source = t,
                        .data = t->data,
                        .rows = t->shape[0],
                        .cols = t->shape[1],
                        .scheme = scheme,
                        .layer = (int)place.layer,
                        .expert = (int)place.expert,
                        .part = place.part,
                        .input = module_input(&place),
                        .partner = SIZE_MAX };
    if (!m.module) return err_memory(e, "plan", sizeof module);
    j->n = 1;
    return add_matrix(p, m, e);
}

static bool plan_fused_part(struct plan *p, const struct tensor *t, size_t stem, int expert,
                            enum expert_part part, enum scheme scheme, struct err *e)
{
    char module[MODULE_BYTES];
    struct place place;
    expert_module(module, t->name, stem, expert, part);
    if (!module_place(&place, module, true) || place.expert != expert)
        return err_set(e, ERR_FORMAT, "tensor '%s': experts of no decoder layer", t->name);
    if (!check_place(p, &place, t->name, e)) return false;
    int64_t rows = part == PART_DOWN ? t->shape[1] : t->shape[1] / 2, cols = t->shape[2];
    uint64_t row_bytes = (uint64_t)cols * dtype_bytes(t->dtype);
    uint64_t row = (uint64_t)expert * (uint64_t)t->shape[1] + (part == PART_UP ? (uint64_t)rows : 0);
    struct matrix m = { .module = strdup(module),
                        .source = t,
                        .data = t->data + row * row_bytes,
                        .rows = rows,
                        .cols = cols,
                        .scheme = scheme,
                        .layer = (int)place.layer,
                        .expert = expert,
                        .part = part,
                        .input = module_input(&place),
                        .partner = SIZE_MAX };
    return m.module ? add_matrix(p, m, e) : err_memory(e, "plan", sizeof module);
}

/* The scheme of all matrices in a fused tensor: one, or the tensor could be neither split nor copied. */
static bool fused_scheme(enum scheme *out, const struct tensor *t, size_t stem, bool gate_up, int n_experts,
                         const struct quantization *rules, struct err *e)
{
    char module[MODULE_BYTES];
    for (int i = 0; i < n_experts; i++)
        for (int part = gate_up ? PART_GATE : PART_DOWN; part <= (gate_up ? PART_UP : PART_DOWN); part++) {
            expert_module(module, t->name, stem, i, (enum expert_part)part);
            enum scheme s = quantization_scheme(rules, module, "Linear");
            if (i == 0 && part != PART_UP) *out = s;
            if (s != *out)
                return err_set(
                    e, ERR_UNSUPPORTED,
                    "module '%s': %s, but %s for others of tensor '%s': one scheme for all of them", module,
                    scheme_name(s), scheme_name(*out), t->name);
        }
    return true;
}

static bool plan_fused(struct plan *p, struct job *j, const struct quantization *rules, struct err *e)
{
    const struct tensor *t = j->source;
    const struct config *c = p->config;
    enum scheme scheme = SCHEME_NONE;
    size_t stem;
    bool gate_up;
    module_is_fused(t->name, &stem, &gate_up);
    if (!fused_scheme(&scheme, t, stem, gate_up, c->n_experts, rules, e)) return false;
    if (scheme == SCHEME_NONE) return true;
    int64_t gate_up_shape[] = { c->n_experts, 2 * c->moe_intermediate, c->hidden_size };
    int64_t down_shape[] = { c->n_experts, c->hidden_size, c->moe_intermediate };
    if (!check_shape(t, gate_up ? gate_up_shape : down_shape, 3, e)) return false;
    for (int i = 0; i < c->n_experts; i++)
        for (int part = gate_up ? PART_GATE : PART_DOWN; part <= (gate_up ? PART_UP : PART_DOWN); part++)
            if (!plan_fused_part(p, t, stem, i, (enum expert_part)part, scheme, e)) return false;
    j->n = p->n_matrices - j->first;
    return true;
}

/* Bytes of files come in this order, so that the source is read straight through. */
static int by_shard_and_bytes(const void *a, const void *b, void *shard_of)
{
    const struct job *x = a, *y = b;
    const int *shard = shard_of;
    if (shard[x->first] != shard[y->first]) return shard[x->first] < shard[y->first] ? -1 : 1;
    if (x->source->data != y->source->data) return x->source->data < y->source->data ? -1 : 1;
    return strcmp(x->source->name, y->source->name); /* tensors without elements share an address */
}

static bool make_jobs(struct plan *p, const struct checkpoint *c, const struct quantization *rules,
                      struct err *e)
{
    size_t n_slots = (size_t)p->config->n_layers * (size_t)p->config->n_experts * N_PARTS, stem;
    p->jobs = calloc(c->n_tensors + 1, sizeof *p->jobs);
    p->experts = malloc((n_slots + 1) * sizeof *p->experts);
    if (!p->jobs || !p->experts) return err_memory(e, "plan", c->n_tensors * sizeof *p->jobs);
    for (size_t i = 0; i < n_slots; i++) p->experts[i] = SIZE_MAX;
    p->n_jobs = c->n_tensors;
    for (size_t i = 0; i < p->n_jobs; i++) p->jobs[i] = (struct job){ .source = c->tensors[i], .first = i };
    qsort_r(p->jobs, p->n_jobs, sizeof *p->jobs, by_shard_and_bytes, c->tensor_shard);
    for (size_t i = 0; i < p->n_jobs; i++) {
        struct job *j = &p->jobs[i];
        bool gate_up, fused = j->source->n_dims == 3 && module_is_fused(j->source->name, &stem, &gate_up);
        j->first = p->n_matrices;
        if (!(fused ? plan_fused(p, j, rules, e) : plan_plain(p, j, rules, e))) return false;
    }
    return true;
}

/* Readers look at one expert of a layer and take all others for the same: a layer is packed whole, in one
 * scheme. */
static bool check_layer(const struct plan *p, int layer, struct err *e)
{
    size_t first = *expert_slot(p, layer, 0, PART_GATE);
    for (int i = 0; i < p->config->n_experts; i++)
        for (int part = 0; part < N_PARTS; part++) {
            size_t at = *expert_slot(p, layer, i, (enum expert_part)part);
            enum scheme want = first == SIZE_MAX ? SCHEME_NONE : p->matrices[first].scheme;
            enum scheme have = at == SIZE_MAX ? SCHEME_NONE : p->matrices[at].scheme;
            if (have != want)
                return err_set(
                    e, ERR_UNSUPPORTED,
                    "layer %d: scheme of expert 0's gate_proj is %s, of expert %d's %s %s: the matrices of "
                    "one layer's experts must all be there, in one scheme",
                    layer, scheme_name(want), i, expert_part_name[part], scheme_name(have));
        }
    return true;
}

static bool pair_experts(struct plan *p, struct err *e)
{
    for (int layer = 0; layer < p->config->n_layers; layer++) {
        if (!check_layer(p, layer, e)) return false;
        for (int i = 0; i < p->config->n_experts; i++) {
            size_t gate = *expert_slot(p, layer, i, PART_GATE), up = *expert_slot(p, layer, i, PART_UP);
            if (gate == SIZE_MAX || !scheme_is_nvfp4(p->matrices[gate].scheme)) continue;
            p->matrices[gate].partner = up;
            p->matrices[up].partner = gate;
        }
    }
    return true;
}

static size_t find_matrix(const struct plan *p, const char *module, const size_t *among, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (strcmp(p->matrices[among[i]].module, module) == 0) return among[i];
    return SIZE_MAX;
}

/* Links a matrix to the next of its set. All of the set that the checkpoint has must be of one scheme. */
static bool join_set(struct plan *p, struct matrix *m, const struct checkpoint *c, const size_t *dense,
                     size_t n_dense, struct err *e)
{
    size_t stem, at = 0, n = 0;
    const char *const *set = module_fusion(m->module, &stem);
    if (!set) return true;
    for (; set[n]; n++)
        if (strcmp(m->module + stem, set[n]) == 0) at = n;
    for (size_t i = n - 1; i > 0; i--) { /* backwards, so that the last one found is the next */
        char other[MODULE_BYTES], tensor[MODULE_BYTES + sizeof WEIGHT];
        snprintf(other, sizeof other, "%.*s%s", (int)stem, m->module, set[(at + i) % n]);
        snprintf(tensor, sizeof tensor, "%s%s", other, WEIGHT);
        size_t found = find_matrix(p, other, dense, n_dense);
        enum scheme scheme = found == SIZE_MAX ? SCHEME_NONE : p->matrices[found].scheme;
        if (scheme != m->scheme && checkpoint_find(c, tensor))
            return err_set(e, ERR_UNSUPPORTED,
                           "module '%s' is %s, '%s' is %s: readers run them as one product, so they need one "
                           "scheme",
                           m->module, scheme_name(m->scheme), other,
                           scheme == SCHEME_NONE ? "not quantized" : scheme_name(scheme));
        if (found != SIZE_MAX && scheme_is_nvfp4(scheme)) m->partner = found;
    }
    return true;
}

static bool join_dense(struct plan *p, const struct checkpoint *c, struct err *e)
{
    size_t n = 0, *dense = malloc((p->n_matrices + 1) * sizeof *dense);
    bool ok = dense || err_memory(e, "plan", p->n_matrices * sizeof *dense);
    for (size_t i = 0; ok && i < p->n_matrices; i++)
        if (p->matrices[i].expert < 0) dense[n++] = i;
    for (size_t i = 0; ok && i < n; i++) ok = join_set(p, &p->matrices[dense[i]], c, dense, n, e);
    free(dense);
    return ok;
}

/* Outputs. */

static bool add_output(struct plan *p, const char *stem, const char *suffix, enum dtype dtype, int n_dims,
                       const int64_t *shape, struct err *e)
{
    struct tensor *t = &p->outputs[p->n_outputs];
    char *name;
    if (asprintf(&name, "%s%s", stem, suffix) < 0) return err_memory(e, "tensor name", strlen(stem));
    *t = (struct tensor){ .name = name, .dtype = dtype, .n_dims = n_dims, .bytes = dtype_bytes(dtype) };
    p->n_outputs++;
    memcpy(t->shape, shape, (size_t)n_dims * sizeof *shape);
    t->bytes *= (uint64_t)tensor_elements(t); /* no larger than a source tensor, which fits */
    return true;
}

static bool add_fp8(struct plan *p, const struct matrix *m, struct err *e)
{
    bool fixed = m->scheme == SCHEME_FP8, block = m->scheme == SCHEME_FP8_BLOCK;
    int64_t one[] = { 1 }, whole[] = { m->rows, m->cols };
    int64_t scales[] = { block ? fp8_blocks(m->rows) : m->rows, block ? fp8_blocks(m->cols) : 1 };
    return add_output(p, m->module, WEIGHT, DTYPE_F8_E4M3, 2, whole, e) &&
           add_output(p, m->module, ".weight_scale", DTYPE_BF16, fixed ? 1 : 2, fixed ? one : scales, e) &&
           (!fixed || add_output(p, m->module, ".input_scale", DTYPE_BF16, 1, one, e));
}

static bool add_packed(struct plan *p, const struct matrix *m, struct err *e)
{
    int64_t one[] = { 1 };
    if (!scheme_is_nvfp4(m->scheme)) return add_fp8(p, m, e);
    int64_t codes[] = { m->rows, m->cols / 2 }, groups[] = { m->rows, m->cols / NVFP4_GROUP };
    return add_output(p, m->module, ".weight_packed", DTYPE_U8, 2, codes, e) &&
           add_output(p, m->module, ".weight_scale", DTYPE_F8_E4M3, 2, groups, e) &&
           add_output(p, m->module, ".weight_global_scale", DTYPE_F32, 1, one, e) &&
           (m->scheme == SCHEME_NVFP4A16 ||
            add_output(p, m->module, ".input_global_scale", DTYPE_F32, 1, one, e));
}

static bool make_outputs(struct plan *p, struct err *e)
{
    size_t n = 0;
    for (size_t i = 0; i < p->n_jobs; i++) n += p->jobs[i].n == 0;
    for (size_t i = 0; i < p->n_matrices; i++) n += (size_t)plan_outputs_of(p->matrices[i].scheme);
    p->outputs = calloc(n + 1, sizeof *p->outputs);
    if (!p->outputs) return err_memory(e, "plan", n * sizeof *p->outputs);
    for (size_t i = 0; i < p->n_jobs; i++) {
        const struct job *j = &p->jobs[i];
        if (j->n == 0 &&
            !add_output(p, j->source->name, "", j->source->dtype, j->source->n_dims, j->source->shape, e))
            return false;
        for (size_t k = j->first; k < j->first + j->n; k++)
            if (!add_packed(p, &p->matrices[k], e)) return false;
    }
    return true;
}

/* Formats that quantization_config does not announce still show in the tensors' names. */
static bool check_source(const struct checkpoint *c, struct err *e)
{
    static const char *const marks[] = { ".weight_packed", ".weight_scale", ".weight_scale_2",
                                         ".weight_scale_inv" };
    const char *config = c->quantization ? "config.json has a quantization_config" : NULL;
    if (config)
        return err_set(e, ERR_ARGUMENT, "%s: already quantized: %s; the source must be BF16", c->path,
                       config);
    for (size_t i = 0; i < c->n_tensors; i++)
        for (size_t k = 0; k < sizeof marks / sizeof *marks; k++) {
            const char *name = c->tensors[i]->name;
            size_t n = strlen(name), m = strlen(marks[k]);
            if (n > m && strcmp(name + n - m, marks[k]) == 0)
                return err_set(e, ERR_ARGUMENT,
                               "%s: already quantized: it has a tensor '%s'; the source must be BF16",
                               c->path, name);
        }
    return true;
}

bool plan_create(struct plan *p, const struct checkpoint *c, const struct recipe *r, struct err *e)
{
    struct quantization *rules = NULL;
    *p = (struct plan){ .config = &c->config };
    bool ok = check_source(c, e) && make_block(p, c, r, e) && quantization_parse(&rules, p->block, e) &&
              make_jobs(p, c, rules, e) && pair_experts(p, e) && join_dense(p, c, e) && make_outputs(p, e);
    quantization_free(rules);
    if (ok && p->n_matrices == 0)
        ok = err_set(e, ERR_ARGUMENT, "%s: recipe '%s' matches none of its modules", c->path, r->name);
    if (!ok) plan_deinit(p);
    return ok;
}

void plan_deinit(struct plan *p)
{
    for (size_t i = 0; i < p->n_matrices; i++) free(p->matrices[i].module);
    for (size_t i = 0; i < p->n_outputs; i++) free((void *)(uintptr_t)p->outputs[i].name);
    free(p->jobs);
    free(p->matrices);
    free(p->outputs);
    free(p->experts);
    json_decref(p->block);
    *p = (struct plan){ 0 };
}
