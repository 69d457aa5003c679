/* Every number that multiplies a whole matrix, row or group, every number that must not be NaN, and what
 * readers assume of those numbers inside a layer. */
#include "num/e4m3.h"
#include "quantize/mtp.h"
#include "base/pages.h"
#include "quantize/verify_steps.h"
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NAME_BYTES = 640 };

/* With a value to show. */
static void note_value(struct verify_steps *v, enum verify_step step, bool is_fault, const char *name,
                       const char *what, double value, double measure)
{
    char detail[64];
    snprintf(detail, sizeof detail, "%g", value);
    findings_add(&v->result->findings, &(struct finding_note){ .step = step,
                                                               .is_fault = is_fault,
                                                               .what = what,
                                                               .name = name,
                                                               .measure = measure,
                                                               .detail = detail });
}

static bool any_nonzero_code(const struct tensor *codes)
{
    for (uint64_t i = 0; i < codes->bytes; i++)
        if (codes->data[i] & 0x77) return true; /* both nibbles without their signs */
    return false;
}

/* 2688 / absmax of weights that a network can have is far above 1; ModelOpt stores the reciprocal. */
static void check_weight_global(struct verify_steps *v, const struct stored *s)
{
    float x = stored_one(s->part.global);
    const char *name = s->part.global->name;
    bool multiplies = s->part.multiplies;
    if (!isfinite(x) || x <= 0)
        note_value(v, VERIFY_SCALES, true, name,
                   multiplies ? "weight_scale_2 is not a finite number above 0"
                              : "weight_global_scale is not a finite number above 0",
                   x, 0);
    else if (multiplies ? x > 1 : x < 1)
        note_value(v, VERIFY_SCALES, true, name,
                   multiplies
                       ? "weight_scale_2 is above 1: it multiplies, and looks like the reciprocal that "
                         "compressed-tensors stores as weight_global_scale"
                       : "weight_global_scale is below 1: it divides, and looks like the reciprocal that "
                         "ModelOpt stores as weight_scale_2",
                   x, multiplies ? x : -x);
    else if (x == 1 && any_nonzero_code(s->part.codes))
        verify_steps_note(
            v, VERIFY_SCALES, false, name,
            multiplies ? "weight_scale_2 is exactly 1 although the matrix is not zero: was it ever set?"
                       : "weight_global_scale is exactly 1 although the matrix is not zero: was it ever "
                         "set?");
}

/* Activations of thousands do occur, so a value below 1 alone proves nothing; tens of thousands do not. */
static void check_input_global(struct verify_steps *v, const struct stored *s)
{
    float x = stored_one(s->part.input);
    const char *name = s->part.input->name;
    bool multiplies = s->part.multiplies;
    if (!isfinite(x) || x <= 0)
        note_value(v, VERIFY_SCALES, true, name,
                   multiplies ? "input_scale is not a finite number above 0"
                              : "input_global_scale is not a finite number above 0",
                   x, 0);
    else if (multiplies ? x > 10 : x < 0.1f)
        note_value(v, VERIFY_SCALES, false, name,
                   multiplies
                       ? "input_scale is above 10: it looks like the reciprocal that compressed-tensors "
                         "stores as input_global_scale"
                       : "input_global_scale is below 0.1: it looks like the reciprocal that ModelOpt "
                         "stores as input_scale",
                   x, multiplies ? x : -x);
    else if (x == 1)
        verify_steps_note(v, VERIFY_SCALES, false, name,
                          multiplies
                              ? "input_scale is exactly 1: was it ever set?"
                              : "input_global_scale is exactly 1: either its calibration saw only zeros "
                                "or it was never set");
}

/* absmax / 448 of inputs: hundreds would be inputs of a hundred thousand. */
static void check_input_fixed(struct verify_steps *v, const struct stored *s)
{
    float x = stored_one(s->part.input);
    const char *name = s->part.input->name;
    if (!isfinite(x) || x <= 0)
        note_value(v, VERIFY_SCALES, true, name, "input_scale is not a finite number above 0", x, 0);
    else if (x > 250)
        note_value(v, VERIFY_SCALES, false, name,
                   "input_scale of an FP8 matrix is above 250: it multiplies, and looks like a reciprocal", x,
                   x);
    else if (x == 1)
        verify_steps_note(v, VERIFY_SCALES, false, name, "input_scale is exactly 1: was it ever set?");
}

static int64_t count_bad_groups(const struct tensor *t)
{
    int64_t n = 0;
    for (uint64_t i = 0; i < t->bytes; i++) n += (uint8_t)(t->data[i] - 1) >= 0x7e; /* not 0x01 to 0x7e */
    return n;
}

static void check_nvfp4(struct verify_steps *v, const struct stored *s)
{
    int64_t bad = count_bad_groups(s->part.scale);
    check_weight_global(v, s);
    if (s->part.input) check_input_global(v, s);
    if (bad > 0)
        note_value(v, VERIFY_SCALES, true, s->part.scale->name,
                   "group scales are zero, negative or NaN (bytes outside 0x01 to 0x7e); how many",
                   (double)bad, (double)bad);
}

static bool has_nan_code(const struct tensor *t)
{
    int64_t n = 0;
    for (uint64_t i = 0; i < t->bytes; i++) n += (t->data[i] & 0x7f) == 0x7f;
    return n > 0;
}

/* absmax / 448 of a row: one above 1 would be a weight above 448. */
static void check_fp8(struct verify_steps *v, const struct stored *s)
{
    int64_t n = tensor_elements(s->part.scale);
    bool above = false, ones = n > 0;
    float bad = 1, largest = 0;
    for (int64_t i = 0; i < n; i++) {
        float x;
        stored_widen(&x, s->part.scale, i, 1);
        if (!isfinite(x) || x <= 0) bad = x;
        above = above || x > 1;
        largest = x > largest ? x : largest;
        ones = ones && x == 1;
    }
    if (bad != 1)
        note_value(v, VERIFY_SCALES, true, s->part.scale->name,
                   "weight_scale of an FP8 matrix has values that are not finite and above 0", bad, 0);
    else if (above)
        note_value(v, VERIFY_SCALES, true, s->part.scale->name,
                   "weight_scale of an FP8 matrix is above 1: it multiplies, and looks like a reciprocal",
                   largest, largest);
    else if (ones)
        verify_steps_note(v, VERIFY_SCALES, false, s->part.scale->name,
                          "weight_scale of an FP8 matrix is exactly 1: was it ever set?");
    if (s->part.input) check_input_fixed(v, s);
    if (has_nan_code(s->part.codes))
        verify_steps_note(v, VERIFY_SCALES, true, s->part.codes->name, "FP8 codes hold NaN (0x7f or 0xff)");
}

static bool is_scale(const char *name)
{
    const char *dot = strrchr(name, '.');
    return dot && strstr(dot, "_scale");
}

/* All bits of the exponent set. */
static bool has_nonfinite(const struct tensor *t)
{
    uint16_t half, exponent = t->dtype == DTYPE_BF16 ? 0x7f80 : 0x7c00;
    uint32_t word;
    int64_t n = 0;
    for (uint64_t i = 0; t->dtype != DTYPE_F32 && i < t->bytes / 2; i++) {
        memcpy(&half, t->data + 2 * i, 2);
        n += (half & exponent) == exponent;
    }
    for (uint64_t i = 0; t->dtype == DTYPE_F32 && i < t->bytes / 4; i++) {
        memcpy(&word, t->data + 4 * i, 4);
        n += (word & 0x7f800000u) == 0x7f800000u;
    }
    return n > 0;
}

/* What is stored as it is. */
static void check_plain(struct verify_steps *v)
{
    for (size_t i = 0; i < v->model.n_tensors; i++) {
        const struct tensor *t = v->model.tensors[i];
        if (!stored_is_plain(t) || is_scale(t->name)) continue;
        if (has_nonfinite(t))
            verify_steps_note(v, VERIFY_SCALES, true, t->name, "unquantized tensors hold NaN or infinity");
        pages_release(t->data, t->bytes);
    }
}

void verify_steps_scales(struct verify_steps *v)
{
    int64_t n = 0;
    check_plain(v);
    for (size_t i = 0; i < v->list.n; i++) {
        const struct stored *s = &v->list.items[i];
        if (s->unsound || s->part.storage == STORED_PLAIN) continue;
        if (s->part.storage == STORED_NVFP4)
            check_nvfp4(v, s);
        else
            check_fp8(v, s);
        n += 1 + (s->part.global != NULL) + (s->part.input != NULL);
        pages_release(s->part.codes->data, s->part.codes->bytes);
        report_progress(v->options->report, "scales", i + 1, v->list.n);
    }
    report_progress(v->options->report, "scales", v->list.n, v->list.n);
    v->result->steps[VERIFY_SCALES].done = true;
    v->result->steps[VERIFY_SCALES].n = n;
}

/* What readers run as one. */

/* Two modules of one parent that readers join into one product. */
static const struct {
    const char *leader, *follower;
} joined[] = {
    { "gate_proj", "up_proj" },     { "q_proj", "k_proj" },       { "q_proj", "v_proj" },
    { "in_proj_qkv", "in_proj_z" }, { "in_proj_b", "in_proj_a" },
};

/* Readers take one scale for both, and the other matrix is then wrong by the ratio. Those of ModelOpt's files
 * may bring the two together first. */
static void check_joint_scale(struct verify_steps *v, const char *parent, const struct stored *a,
                              const struct stored *b, int pair)
{
    char what[200], detail[NAME_BYTES + 100];
    float x = stored_one(a->part.global), y = stored_one(b->part.global);
    bool multiplies = a->part.multiplies;
    if (x == y) return;
    double ratio = x > y ? (double)x / y : (double)y / x;
    snprintf(what, sizeof what, "%s of %s and %s differ; %s use one for both",
             multiplies ? "weight_scale_2" : "weight_global_scale", joined[pair].leader,
             joined[pair].follower, multiplies ? "some readers" : "readers");
    snprintf(detail, sizeof detail, "%g and %g, ratio %.4g, in %s", x, y, ratio, parent);
    findings_add(&v->result->findings, &(struct finding_note){ .step = VERIFY_FUSED,
                                                               .is_fault = !multiplies,
                                                               .what = what,
                                                               .name = parent,
                                                               .measure = ratio,
                                                               .detail = detail });
}

/* True: both are there. */
static bool check_pair(struct verify_steps *v, const struct stored *a, int pair)
{
    char name[NAME_BYTES], what[200];
    struct stored b;
    const char *end = joined[pair].leader;
    size_t n = strlen(a->name), m = strlen(end), stem = n - m;
    if (n <= m || n >= NAME_BYTES - 16 || a->name[stem - 1] != '.' || strcmp(a->name + stem, end) != 0)
        return false;
    snprintf(name, sizeof name, "%.*s%s", (int)stem, a->name, joined[pair].follower);
    if (!stored_get(&b, &v->model, name)) return false;
    name[stem - 1] = 0;
    if (a->scheme != b.scheme && a->place.expert < 0) { /* of experts the layer's check speaks */
        snprintf(what, sizeof what, "%s and %s have different schemes; vLLM joins them and refuses", end,
                 joined[pair].follower);
        verify_steps_note(v, VERIFY_FUSED, false, name, what);
    }
    if (!a->unsound && !b.unsound && a->part.storage == STORED_NVFP4 && b.part.storage == STORED_NVFP4)
        check_joint_scale(v, name, a, &b, pair);
    return true;
}

static int64_t check_pairs(struct verify_steps *v, const struct stored *s)
{
    int64_t n = 0;
    for (int pair = 0; pair < (int)(sizeof joined / sizeof *joined); pair++) n += check_pair(v, s, pair);
    return n;
}

/* Experts of one layer, as they pass by. */
struct layer_experts {
    int64_t with_input, without_input;
    float low[2], high[2]; /* input scales: of gate and up; of down */
    bool seen, mixed, multiplies;
    enum scheme scheme;
};

static void count_expert(struct layer_experts *l, const struct stored *s)
{
    l->mixed = l->mixed || (l->seen && l->scheme != s->scheme);
    if (!l->seen) l->scheme = s->scheme;
    l->seen = true;
    if (s->unsound || (s->part.storage != STORED_NVFP4 && s->scheme != SCHEME_FP8)) return;
    l->multiplies = s->part.multiplies || s->scheme == SCHEME_FP8;
    *(s->part.input ? &l->with_input : &l->without_input) += 1;
    if (!s->part.input) return;
    float x = stored_one(s->part.input);
    int kind = s->place.part == PART_DOWN;
    if (!isfinite(x) || x <= 0) return; /* said already */
    if (l->high[kind] == 0 || x < l->low[kind]) l->low[kind] = x;
    if (x > l->high[kind]) l->high[kind] = x;
}

static void check_layer(struct verify_steps *v, const struct layer_experts *l, int layer)
{
    enum { SPREAD_MAX = 1 << 10 };
    static const char *const kinds[] = { "gate_proj and up_proj", "down_proj" };
    char name[64], what[200], detail[100];
    snprintf(name, sizeof name, "layer %d", layer);
    if (l->mixed)
        verify_steps_note(v, VERIFY_FUSED, true, name,
                          "experts of one layer have different schemes; readers look at expert 0 only");
    if (l->with_input > 0 && l->without_input > 0)
        note_value(v, VERIFY_FUSED, true, name,
                   l->multiplies
                       ? "some experts of a layer have no input_scale, which readers leave unset; how many "
                         "matrices"
                       : "some experts of a layer have no input_global_scale, which readers leave unset; how "
                         "many matrices",
                   (double)l->without_input, (double)l->without_input);
    if (l->with_input == 0 && l->without_input > 0 && l->scheme == SCHEME_NVFP4)
        verify_steps_note(
            v, VERIFY_FUSED, false, name,
            l->multiplies
                ? "quantization_config says NVFP4 with 4-bit inputs, no expert has an input_scale"
                : "quantization_config says NVFP4 with 4-bit inputs, no expert has an input_global_scale");
    if (l->with_input == 0 && l->without_input > 0 && l->scheme == SCHEME_FP8)
        verify_steps_note(v, VERIFY_FUSED, true, name,
                          "quantization_config says FP8 with measured inputs, no expert has an input_scale");
    for (int k = 0; k < 2; k++) {
        if (l->high[k] == 0 || l->high[k] / l->low[k] < SPREAD_MAX) continue;
        snprintf(what, sizeof what,
                 "%s of %s spreads over a factor of 1024 or more between experts of a layer; readers use one "
                 "for all",
                 l->multiplies ? "input_scale" : "input_global_scale", kinds[k]);
        snprintf(detail, sizeof detail, "%g to %g in layer %d", l->low[k], l->high[k], layer);
        findings_add(&v->result->findings, &(struct finding_note){ .step = VERIFY_FUSED,
                                                                   .is_fault = true,
                                                                   .what = what,
                                                                   .name = name,
                                                                   .measure = l->high[k] / l->low[k],
                                                                   .detail = detail });
    }
}

bool verify_steps_fused(struct verify_steps *v, struct err *e)
{
    int n_layers = v->model.config.n_layers;
    int64_t pairs = 0;
    struct layer_experts *layers = calloc((size_t)n_layers + 1, sizeof *layers);
    if (!layers) return err_memory(e, "experts", (uint64_t)n_layers * sizeof *layers);
    for (size_t i = 0; i < v->list.n; i++) {
        const struct stored *s = &v->list.items[i];
        pairs += check_pairs(v, s);
        if (s->place.section == PLACE_LAYER && s->place.expert >= 0 && s->place.layer < n_layers)
            count_expert(&layers[s->place.layer], s);
    }
    for (int i = 0; i < n_layers; i++) check_layer(v, &layers[i], i);
    free(layers);
    v->result->steps[VERIFY_FUSED].done = true;
    v->result->steps[VERIFY_FUSED].n = pairs;
    return true;
}

/* The MTP head. */

static bool check_mtp_tensor(void *ctx, const struct mtp_tensor *want)
{
    struct verify_steps *v = ctx;
    const struct tensor *t = checkpoint_find(&v->model, want->name);
    if (!mtp_has(&v->model, want))
        verify_steps_note(v, VERIFY_MTP, true, want->name, "tensors of the MTP head are missing");
    else if (t && t->dtype != DTYPE_U8 &&
             (t->n_dims != want->n_dims ||
              memcmp(t->shape, want->shape, (size_t)want->n_dims * sizeof *want->shape) != 0))
        verify_steps_note(v, VERIFY_MTP, true, want->name,
                          "tensors of the MTP head do not have the shape that config.json asks for");
    return true;
}

void verify_steps_mtp(struct verify_steps *v)
{
    const struct checkpoint *c = &v->model;
    size_t n = mtp_count(c);
    bool ours = quantization_origin(c->quantization) == QUANTIZATION_COMPRESSED_TENSORS;
    char what[300], module[128];
    if (c->config.mtp_layers > 0 && n == 0) {
        snprintf(what, sizeof what, "config.json says mtp_num_hidden_layers = %d, no mtp tensor is there%s",
                 c->config.mtp_layers, ours ? ": quench merge-mtp brings them back from the source" : "");
        verify_steps_note(v, VERIFY_MTP, true, NULL, what);
    } else {
        mtp_visit(&c->config, check_mtp_tensor, v);
    }
    if (c->config.mtp_layers == 0 && n > 0)
        verify_steps_note(
            v, VERIFY_MTP, false, NULL,
            "mtp tensors are there, config.json has no mtp_num_hidden_layers: nobody will use them");
    if (mtp_uncovered(module, c))
        verify_steps_note(
            v, VERIFY_MTP, ours, module,
            "the MTP head is not quantized, yet no entry of quantization_config.ignore covers it "
            "(\"re:.*mtp.*\" would)");
    v->result->steps[VERIFY_MTP].done = true;
    v->result->steps[VERIFY_MTP].n = (int64_t)n;
}
