/* The order of a verification, and its steps on names and shapes. */
#include "quantize/verify.h"
#include "base/file.h"
#include "model/bind.h"
#include "base/pages.h"
#include "quantize/verify_steps.h"
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

enum { NAME_BYTES = 640 };

const char *verify_name(enum verify_step s)
{
    static const char *const names[VERIFY_STEPS] = { "files", "modules", "layers", "scales",
                                                     "fused", "mtp",     "source", "score" };
    return names[s];
}

const char *verify_unit(enum verify_step s)
{
    static const char *const units[VERIFY_STEPS] = { "tensors",        "linear modules", "layers",
                                                     "scale tensors",  "pairs",          "tensors",
                                                     "source tensors", "scored tokens" };
    return units[s];
}

int64_t verify_faults(const struct verify_result *r)
{
    return findings_count(&r->findings, -1, true);
}

static void finish(struct verify_steps *v, enum verify_step step, int64_t n)
{
    v->result->steps[step].done = true;
    v->result->steps[step].n = n;
}

static bool ends_in(const char *name, const char *end)
{
    size_t n = strlen(name), m = strlen(end);
    return n >= m && strcmp(name + n - m, end) == 0;
}

/* Files. */

/* A checkpoint that does not open has one fault, the message; a folder that is none, or memory, is an error.
 */
static bool open_model(struct verify_steps *v, bool *opened, struct err *e)
{
    struct err why = { 0 };
    const char *path = v->options->path;
    if (!file_is_folder(path))
        return err_set(e, ERR_IO, "%s: %s", path, file_exists(path) ? "not a folder" : "no such folder");
    *opened = checkpoint_open(&v->model, path, &why);
    if (!*opened && why.code == ERR_MEMORY) return err_set(e, why.code, "%s", why.text);
    if (!*opened) verify_steps_note(v, VERIFY_FILES, true, NULL, why.text);
    finish(v, VERIFY_FILES, (int64_t)v->model.n_tensors);
    return true;
}

/* Modules. */

static enum quantization_origin origin(const struct verify_steps *v)
{
    return quantization_origin(v->model.quantization);
}

/* Compared with compressed-tensors' own rules, or with what another tool's list hints at: readers that go by
 * the list build another format, those that go by the tensors do not. */
static void note_disagreement(struct verify_steps *v, const char *module, enum scheme said, enum storage s)
{
    static const char *const stored[] = { "plain weights", "NVFP4", "FP8", "FP8 in blocks" };
    char what[200];
    snprintf(what, sizeof what, "quantization_config says %s, the file holds %s",
             said == SCHEME_NONE ? "not quantized" : scheme_name(said), stored[s]);
    verify_steps_note(v, VERIFY_MODULES, origin(v) == QUANTIZATION_COMPRESSED_TENSORS, module, what);
}

/* An expert that is also a slice of a fused tensor: readers differ in which one they take. */
static bool is_fused_too(const struct checkpoint *c, const struct stored *s)
{
    char name[NAME_BYTES];
    const char *experts = strstr(s->name, ".experts.");
    if (s->place.expert < 0 || !experts) return false;
    snprintf(name, sizeof name, "%.*s.experts.%s", (int)(experts - s->name), s->name,
             s->place.part == PART_DOWN ? "down_proj" : "gate_up_proj");
    return checkpoint_find(c, name);
}

static void check_module(struct verify_steps *v, const struct stored *s)
{
    const struct config *c = &v->model.config;
    bool draft = s->place.section == PLACE_DRAFT, expert = s->place.expert >= 0;
    if (s->unsound) verify_steps_note(v, VERIFY_MODULES, true, s->name, s->unsound);
    if (s->part.both)
        verify_steps_note(v, VERIFY_MODULES, true, s->name, "both weight and weight_packed are there");
    if (is_fused_too(&v->model, s))
        verify_steps_note(v, VERIFY_MODULES, true, s->name, "experts are there twice, fused and one by one");
    if (s->place.section == PLACE_LAYER &&
        (s->place.layer >= c->n_layers || (expert && s->place.expert >= c->n_experts)))
        verify_steps_note(v, VERIFY_MODULES, true, s->name,
                          "belongs to a layer or expert that config.json does not have");
    if (s->part.storage == STORED_PLAIN && (s->part.scale || s->part.global || s->part.input))
        verify_steps_note(v, VERIFY_MODULES, true, s->name, "scales lie beside a weight that needs none");
    /* plain MTP weights that the config would have quantized are the next step's, which says what to do */
    enum scheme said = quantization_scheme(v->model.quantization, s->name, "Linear");
    if (!linear_agrees(s->part.storage, said) && !(draft && s->part.storage == STORED_PLAIN))
        note_disagreement(v, s->name, said, s->part.storage);
    v->result->modules[s->scheme]++;
}

/* Matrices inside a fused tensor, of the text layers: stored as they are. Returns how many. */
static int64_t check_fused(struct verify_steps *v, const struct tensor *t, size_t stem, bool gate_up)
{
    char module[NAME_BYTES];
    int64_t n = 0;
    for (int i = 0; i < v->model.config.n_experts; i++)
        for (int part = gate_up ? PART_GATE : PART_DOWN; part <= (gate_up ? PART_UP : PART_DOWN);
             part++, n++) {
            snprintf(module, sizeof module, "%.*s.%d.%s", (int)stem, t->name, i, expert_part_name[part]);
            enum scheme s = quantization_scheme(v->model.quantization, module, "Linear");
            if (s != SCHEME_NONE) note_disagreement(v, module, s, STORED_PLAIN);
            v->result->modules[s]++;
        }
    return n;
}

/* Scales that belong to no weight, and names that only other formats than the announced one have. */
static void check_part(struct verify_steps *v, const struct tensor *t)
{
    enum { COMPRESSED = 1 << QUANTIZATION_COMPRESSED_TENSORS, MODELOPT = 1 << QUANTIZATION_MODELOPT };
    static const struct {
        const char *end;
        int origins; /* bits of those that write it */
    } parts[] = {
        { ".weight_scale", COMPRESSED | MODELOPT },
        { ".weight_global_scale", COMPRESSED },
        { ".input_global_scale", COMPRESSED },
        { ".weight_packed", COMPRESSED },
        { ".input_scale", COMPRESSED | MODELOPT },
        { ".weight_scale_2", MODELOPT },
        { ".weight_scale_inv", 1 << QUANTIZATION_BLOCK_FP8 },
        { ".weight_shape", 0 },
    };
    char module[NAME_BYTES];
    struct linear l = { 0 };
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        if (!ends_in(t->name, parts[i].end)) continue;
        snprintf(module, sizeof module, "%.*s", (int)(strlen(t->name) - strlen(parts[i].end)), t->name);
        bool found = linear_find(&l, &v->model, module);
        bool used = t == l.codes || t == l.scale || t == l.global || t == l.input;
        if (!(parts[i].origins >> origin(v) & 1) || (found && !used))
            verify_steps_note(v, VERIFY_MODULES, true, t->name,
                              "names of another format (compressed-tensors, ModelOpt, block FP8, packed "
                              "integers) than quantization_config announces");
        else if (!found)
            verify_steps_note(v, VERIFY_MODULES, true, t->name, "a scale whose weight is missing");
    }
}

/* Readers match by name whatever the class: a norm that a target catches is built quantized. */
static void check_other(struct verify_steps *v, const struct tensor *t)
{
    char module[NAME_BYTES];
    struct place place;
    size_t n = strlen(t->name), end = strlen(".weight");
    if (!ends_in(t->name, ".weight") || n - end >= sizeof module) return;
    snprintf(module, sizeof module, "%.*s", (int)(n - end), t->name);
    if ((t->n_dims == 2 && module_place(&place, module, true)) || strncmp(module, "mtp.", 4) == 0) return;
    if (origin(v) == QUANTIZATION_COMPRESSED_TENSORS &&
        quantization_scheme(v->model.quantization, module, "") != SCHEME_NONE)
        verify_steps_note(v, VERIFY_MODULES, true, module,
                          "quantization_config quantizes what is no linear module");
}

static void check_modules(struct verify_steps *v)
{
    const struct checkpoint *c = &v->model;
    int64_t n = (int64_t)v->list.n;
    bool vision = false, gate_up;
    size_t stem;
    for (size_t i = 0; i < v->list.n; i++) check_module(v, &v->list.items[i]);
    for (size_t i = 0; i < c->n_tensors; i++) {
        const struct tensor *t = c->tensors[i];
        if (t->n_dims == 3 && module_is_fused(t->name, &stem, &gate_up) && strncmp(t->name, "mtp.", 4) != 0)
            n += check_fused(v, t, stem, gate_up);
        check_part(v, t);
        check_other(v, t);
        vision = vision || strstr(t->name, "visual.");
    }
    if (c->config.has_vision && !vision)
        verify_steps_note(v, VERIFY_MODULES, false, NULL,
                          "config.json describes a vision tower, no tensor of one is there");
    finish(v, VERIFY_MODULES, n);
}

/* Layers. */

static void release(const struct checkpoint *c)
{
    for (int i = 0; i < c->n_shards; i++) pages_release(c->shards[i].map.data, c->shards[i].map.bytes);
}

/* True when the work may go on: done, or a fault was noted. */
static bool note_unless_memory(struct verify_steps *v, bool ok, const struct err *why, struct err *e)
{
    if (ok) return true;
    if (why->code == ERR_MEMORY) return err_set(e, why->code, "%s", why->text);
    verify_steps_note(v, VERIFY_LAYERS, true, NULL, why->text);
    return true;
}

static bool bind_layers(struct verify_steps *v, struct model *m, struct err *e)
{
    const struct config *c = m->config;
    for (int i = 0; i < c->n_layers; i++) {
        struct err why = { 0 };
        bool bound = model_bind_layer(m, i, &why);
        model_free_layer(m, i);
        release(&v->model);
        if (!note_unless_memory(v, bound, &why, e)) return false;
        report_progress(v->options->report, "layers", (uint64_t)i + 1, (uint64_t)c->n_layers);
    }
    struct err why = { 0 };
    bool head =
        c->tie_word_embeddings || bind_linear(m, &m->head, "lm_head", c->vocab_size, c->hidden_size, &why);
    return note_unless_memory(v, head, &why, e);
}

/* Binds as a run would, one layer in memory at a time. */
static bool check_layers(struct verify_steps *v, struct err *e)
{
    struct model m;
    struct err why = { 0 };
    bool ok = model_init(&m, &v->model, v->options->backend, NULL, &why);
    if (ok) {
        ok = bind_layers(v, &m, e);
        model_deinit(&m);
    } else {
        ok = note_unless_memory(v, false, &why, e);
    }
    finish(v, VERIFY_LAYERS, v->model.config.n_layers);
    return ok;
}

/* The whole. */

static bool run_steps(struct verify_steps *v, struct err *e)
{
    if (!stored_find(&v->list, &v->model, e)) return false;
    check_modules(v);
    if (!check_layers(v, e)) return false;
    verify_steps_scales(v);
    if (!verify_steps_fused(v, e)) return false;
    verify_steps_mtp(v);
    return !v->options->source || verify_steps_source(v, e);
}

bool verify_run(struct verify_result *r, const struct verify_options *o, struct err *e)
{
    struct verify_steps v = { .options = o, .result = r };
    bool opened = false;
    *r = (struct verify_result){ 0 };
    bool ok = open_model(&v, &opened, e) && (!opened || run_steps(&v, e));
    if (ok && r->findings.incomplete) ok = err_memory(e, "findings", r->findings.n);
    stored_deinit(&v.list);
    checkpoint_close(&v.model);
    return ok;
}

void verify_deinit(struct verify_result *r)
{
    findings_deinit(&r->findings);
}

void verify_score(struct verify_result *r, double perplexity, double source, int64_t vocab_size,
                  const char *failure)
{
    /* A quantized model may well be some percent worse; twice as bad means it is broken in a way that the
     * other checks do not know. */
    enum { SUSPICIOUS_RATIO = 2 };
    char what[600];
    struct finding_note note = { .step = VERIFY_SCORE, .is_fault = true, .what = what };
    r->steps[VERIFY_SCORE].done = true;
    r->perplexity = perplexity;
    r->source_perplexity = source;
    if (failure) {
        snprintf(what, sizeof what, "the text could not be scored: %s", failure);
        findings_add(&r->findings, &note);
    } else if (!isfinite(perplexity) || perplexity >= (double)vocab_size) {
        snprintf(what, sizeof what, "perplexity %g is no better than guessing among %" PRId64 " tokens",
                 perplexity, vocab_size);
        findings_add(&r->findings, &note);
    } else if (source > 0 && !(perplexity < SUSPICIOUS_RATIO * source)) {
        snprintf(what, sizeof what, "perplexity %.4f is %.1f times the source's", perplexity,
                 perplexity / source);
        note.is_fault = false;
        findings_add(&r->findings, &note);
    }
}
