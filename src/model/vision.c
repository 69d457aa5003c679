#include "model/vision.h"
#include "base/arena.h"
#include "model/bind.h"
#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NAME_BYTES = 256 };
static const float NORM_EPS = 1e-6f; /* in the released code, not in config.json */
static const double THETA = 10000;   /* likewise */

struct affine {
    struct weight *w;
    float *bias;
};

struct norm {
    float *gain, *bias;
};

struct block {
    struct norm norm1, norm2;
    struct affine qkv, proj, fc1, fc2;
};

struct vision {
    struct model *model;
    const struct config *config;
    const char *prefix; /* "model.visual." or "visual." */
    struct affine patch;
    float *positions; /* host: [side * side][hidden], a table of places in a square */
    struct block *blocks;
    struct norm norm;
    struct affine fc1, fc2; /* merger */
};

/* Binding. */

static const char *full_name(char text[NAME_BYTES], const struct vision *v, int block, const char *part)
{
    if (block < 0)
        snprintf(text, NAME_BYTES, "%s%s", v->prefix, part);
    else
        snprintf(text, NAME_BYTES, "%sblocks.%d.%s", v->prefix, block, part);
    return text;
}

static bool bind_affine(struct vision *v, struct affine *out, int block, const char *module, int64_t rows,
                        int64_t cols, struct err *e)
{
    char name[NAME_BYTES], bias[NAME_BYTES + 8];
    full_name(name, v, block, module);
    snprintf(bias, sizeof bias, "%s.bias", name);
    return bind_linear(v->model, &out->w, name, rows, cols, e) &&
           bind_vector(v->model, &out->bias, bias, rows, 0, e);
}

static bool bind_norm(struct vision *v, struct norm *out, int block, const char *module, struct err *e)
{
    char name[NAME_BYTES], full[NAME_BYTES + 8];
    full_name(name, v, block, module);
    snprintf(full, sizeof full, "%s.weight", name);
    if (!bind_vector(v->model, &out->gain, full, v->config->vision.hidden, 0, e)) return false;
    snprintf(full, sizeof full, "%s.bias", name);
    return bind_vector(v->model, &out->bias, full, v->config->vision.hidden, 0, e);
}

static bool bind_block(struct vision *v, int i, struct err *e)
{
    struct block *b = &v->blocks[i];
    int64_t hidden = v->config->vision.hidden, inner = v->config->vision.intermediate;
    return bind_norm(v, &b->norm1, i, "norm1", e) && bind_norm(v, &b->norm2, i, "norm2", e) &&
           bind_affine(v, &b->qkv, i, "attn.qkv", 3 * hidden, hidden, e) &&
           bind_affine(v, &b->proj, i, "attn.proj", hidden, hidden, e) &&
           bind_affine(v, &b->fc1, i, "mlp.linear_fc1", inner, hidden, e) &&
           bind_affine(v, &b->fc2, i, "mlp.linear_fc2", hidden, inner, e);
}

static int64_t merged_width(const struct config *c)
{
    return c->vision.hidden * c->vision.merge * c->vision.merge;
}

static bool bind_once(struct vision *v, struct err *e)
{
    const struct config *c = v->config;
    char name[NAME_BYTES];
    int64_t merged = merged_width(c);
    return bind_patches(v->model, &v->patch.w, full_name(name, v, -1, "patch_embed.proj.weight"),
                        c->vision.hidden, c->vision.channels, c->vision.temporal_patch, c->vision.patch, e) &&
           bind_vector(v->model, &v->patch.bias, full_name(name, v, -1, "patch_embed.proj.bias"),
                       c->vision.hidden, 0, e) &&
           bind_host_table(v->model, &v->positions, full_name(name, v, -1, "pos_embed.weight"),
                           c->vision.n_positions, c->vision.hidden, e) &&
           bind_norm(v, &v->norm, -1, "merger.norm", e) &&
           bind_affine(v, &v->fc1, -1, "merger.linear_fc1", merged, merged, e) &&
           bind_affine(v, &v->fc2, -1, "merger.linear_fc2", c->vision.out_hidden, merged, e);
}

static bool bind_all(struct vision *v, struct err *e)
{
    int depth = v->config->vision.depth;
    bool ok = bind_once(v, e);
    for (int i = 0; ok && i < depth; i++) ok = bind_block(v, i, e);
    return ok || err_note(e, "%s", v->model->checkpoint->path);
}

static bool find_tower(struct vision *v, struct err *e)
{
    const struct checkpoint *c = v->model->checkpoint;
    v->prefix = checkpoint_find(c, "model.visual.patch_embed.proj.weight") ? "model.visual." : "visual.";
    if (!v->config->has_vision)
        return err_set(e, ERR_UNSUPPORTED,
                       "%s: config.json has no vision_config: this model does not see images", c->path);
    if (v->config->image_token < 0)
        return err_set(e, ERR_FORMAT, "%s: config.json has a vision_config but no image_token_id", c->path);
    return true;
}

bool vision_create(struct vision **out, struct model *m, struct err *e)
{
    struct vision *v = calloc(1, sizeof *v);
    *out = v;
    if (!v) return err_memory(e, "vision tower", sizeof *v);
    v->model = m;
    v->config = m->config;
    v->blocks = calloc((size_t)m->config->vision.depth + 1, sizeof *v->blocks);
    bool ok =
        v->blocks || err_memory(e, "vision tower", (uint64_t)m->config->vision.depth * sizeof *v->blocks);
    if (ok && find_tower(v, e) && bind_all(v, e)) return true;
    vision_free(v);
    *out = NULL;
    return false;
}

static void free_affine(const struct vision *v, struct affine *a)
{
    v->model->backend->ops->weight_free(v->model->backend->queue, a->w);
    v->model->backend->ops->memory_free(v->model->backend->queue, a->bias);
}

static void free_norm(const struct vision *v, struct norm *n)
{
    v->model->backend->ops->memory_free(v->model->backend->queue, n->gain);
    v->model->backend->ops->memory_free(v->model->backend->queue, n->bias);
}

void vision_free(struct vision *v)
{
    if (!v) return;
    for (int i = 0; v->blocks && i < v->config->vision.depth; i++) {
        struct block *b = &v->blocks[i];
        struct affine *parts[] = { &b->qkv, &b->proj, &b->fc1, &b->fc2 };
        for (int p = 0; p < 4; p++) free_affine(v, parts[p]);
        free_norm(v, &b->norm1);
        free_norm(v, &b->norm2);
    }
    free_affine(v, &v->patch);
    free_affine(v, &v->fc1);
    free_affine(v, &v->fc2);
    free_norm(v, &v->norm);
    free(v->blocks);
    free(v->positions);
    free(v);
}

/* One picture. Row by row operations take a part of the rows at a time, so that scratch does not grow with
 * the picture; attention has all of them. */
struct run {
    struct vision *v;
    const struct ops *op;
    struct queue *q;
    int64_t height, width, n, part; /* patches; rows of a part, whole blocks of merge x merge */
    void *memory;                   /* the backend's, holds what follows */
    struct mat x, qkv, att, angle;  /* [n] */
    struct mat in, h, inner;        /* [part]: patches, a norm or a result, the mlp's hidden rows */
    struct mat merged, rows;        /* [part / merge^2] */
    float *host;                    /* [part][hidden]: places on their way to the backend */
};

static struct mat take(struct arena *a, int64_t rows, int64_t cols)
{
    return mat_of(arena_take(a, rows, (uint64_t)cols * sizeof(float), 64), rows, cols);
}

static void layout(struct run *r, struct arena *a)
{
    const struct config *c = r->v->config;
    int64_t hidden = c->vision.hidden, unit = (int64_t)c->vision.merge * c->vision.merge;
    r->x = take(a, r->n, hidden);
    r->qkv = take(a, r->n, 3 * hidden);
    r->att = take(a, r->n, hidden);
    r->angle = take(a, r->n, hidden / c->vision.n_heads / 2);
    r->in = take(a, r->part, r->v->patch.w->cols);
    r->h = take(a, r->part, hidden);
    r->inner = take(a, r->part, c->vision.intermediate);
    r->merged = take(a, r->part / unit, merged_width(c));
    r->rows = take(a, r->part / unit, c->vision.out_hidden);
}

static struct step_limits limits_of(const struct run *r)
{
    int64_t all[] = { r->qkv.cols, r->in.cols, r->inner.cols, r->merged.cols, r->rows.cols }, cols = 0;
    for (int i = 0; i < 5; i++) cols = all[i] > cols ? all[i] : cols;
    return (struct step_limits){ .rows = r->part, .cols = cols, .together = r->n };
}

static bool make_room(struct run *r, struct err *e)
{
    struct arena a = { 0 };
    layout(r, &a);
    if (a.overflow) return err_set(e, ERR_LIMIT, "an image of %lld patches is too large", (long long)r->n);
    if (!r->op->memory_create(r->q, &r->memory, a.used, e)) return false;
    a = (struct arena){ .memory = r->memory, .size = a.used };
    layout(r, &a);
    uint64_t bytes = (uint64_t)(r->part * r->h.cols) * sizeof *r->host;
    r->host = malloc(bytes);
    if (!r->host) return err_memory(e, "positions of patches", bytes);
    struct step_limits limits = limits_of(r);
    return r->op->reserve(r->q, &limits, e);
}

static struct mat part_of(struct mat m, int64_t first, int64_t n)
{
    m.data += first * m.stride;
    m.rows = n;
    return m;
}

static void upload(struct run *r, struct mat to, const float *from)
{
    r->op->upload(r->q, to.data, from, (uint64_t)(to.rows * to.cols) * sizeof *from);
}

/* Where patch number i lies, by rows and columns of patches. */
static void locate(const struct run *r, int64_t i, int64_t *row, int64_t *column)
{
    int64_t merge = r->v->config->vision.merge, block = i / (merge * merge), in = i % (merge * merge);
    *row = block / (r->width / merge) * merge + in / merge;
    *column = block % (r->width / merge) * merge + in % merge;
}

/* One axis of the table of places stretched over n patches, corners aligned: between entries low and high. */
struct between {
    int64_t low, high;
    float share; /* of high */
};

static struct between between(int64_t i, int64_t n, int64_t side)
{
    double at = n > 1 ? (double)(i * (side - 1)) / (double)(n - 1) : 0;
    int64_t low = (int64_t)at;
    return (struct between){ low, low + 1 < side ? low + 1 : side - 1, (float)(at - (double)low) };
}

static void place(const struct run *r, float *out, int64_t i)
{
    int64_t hidden = r->h.cols, side = (int64_t)lround(sqrt((double)r->v->config->vision.n_positions));
    int64_t row, column;
    locate(r, i, &row, &column);
    struct between y = between(row, r->height, side), x = between(column, r->width, side);
    const float *from[] = { r->v->positions + (y.low * side + x.low) * hidden,
                            r->v->positions + (y.low * side + x.high) * hidden,
                            r->v->positions + (y.high * side + x.low) * hidden,
                            r->v->positions + (y.high * side + x.high) * hidden };
    float share[] = { (1 - y.share) * (1 - x.share), (1 - y.share) * x.share, y.share * (1 - x.share),
                      y.share * x.share };
    for (int64_t c = 0; c < hidden; c++)
        out[c] =
            share[0] * from[0][c] + share[1] * from[1][c] + share[2] * from[2][c] + share[3] * from[3][c];
}

/* The first half of a head's pairs turns with the patch's row, the second with its column. */
static bool set_angles(struct run *r, struct err *e)
{
    int64_t pairs = r->angle.cols, half = pairs / 2;
    uint64_t bytes = (uint64_t)(r->n * pairs) * sizeof(float);
    float *angle = malloc(bytes);
    if (!angle) return err_memory(e, "positions of patches", bytes);
    for (int64_t i = 0; i < r->n; i++) {
        int64_t at[2];
        locate(r, i, &at[0], &at[1]);
        for (int64_t j = 0; j < pairs; j++)
            angle[i * pairs + j] =
                (float)at[j / half] * (float)pow(THETA, -(double)(j % half) / (double)half);
    }
    upload(r, r->angle, angle);
    free(angle);
    return true;
}

static void apply(const struct run *r, struct mat y, struct mat x, const struct affine *a, enum activation f)
{
    r->op->matmul(r->q, y, x, a->w);
    r->op->add_bias(r->q, y, a->bias, f);
}

static void embed(struct run *r, const float *patches, int64_t first, int64_t n)
{
    struct mat x = part_of(r->x, first, n), h = part_of(r->h, 0, n), in = part_of(r->in, 0, n);
    upload(r, in, patches + first * in.cols);
    apply(r, x, in, &r->v->patch, ACTIVATION_NONE);
    for (int64_t i = 0; i < n; i++) place(r, r->host + i * h.cols, first + i);
    upload(r, h, r->host);
    r->op->add(r->q, x, h);
}

static void attend(struct run *r, const struct block *b)
{
    int heads = r->v->config->vision.n_heads;
    for (int64_t at = 0, n; at < r->n; at += n) {
        n = r->n - at < r->part ? r->n - at : r->part;
        struct mat h = part_of(r->h, 0, n);
        r->op->layer_norm(r->q, h, part_of(r->x, at, n), b->norm1.gain, b->norm1.bias, NORM_EPS);
        apply(r, part_of(r->qkv, at, n), h, &b->qkv, ACTIVATION_NONE);
    }
    struct mat queries_keys = { r->qkv.data, r->n, 2 * r->x.cols, r->qkv.stride };
    r->op->rotate(r->q, queries_keys, 2 * heads, r->angle);
    r->op->attention_all(r->q, r->att, r->qkv, heads);
}

/* x += proj(att); x += fc2(GELU(fc1(norm(x)))) */
static void finish_block(struct run *r, const struct block *b, int64_t at, int64_t n)
{
    struct mat x = part_of(r->x, at, n), h = part_of(r->h, 0, n), inner = part_of(r->inner, 0, n);
    apply(r, h, part_of(r->att, at, n), &b->proj, ACTIVATION_NONE);
    r->op->add(r->q, x, h);
    r->op->layer_norm(r->q, h, x, b->norm2.gain, b->norm2.bias, NORM_EPS);
    apply(r, inner, h, &b->fc1, ACTIVATION_GELU_TANH);
    apply(r, h, inner, &b->fc2, ACTIVATION_NONE);
    r->op->add(r->q, x, h);
}

/* The rows of a block lie one after the other, so that joining them is reading them as one. */
static void merge(struct run *r, float *out, int64_t at, int64_t n)
{
    int64_t unit = r->merged.cols / r->h.cols;
    struct mat h = part_of(r->h, 0, n), joined = mat_of(h.data, n / unit, r->merged.cols);
    struct mat inner = part_of(r->merged, 0, n / unit), rows = part_of(r->rows, 0, n / unit);
    r->op->layer_norm(r->q, h, part_of(r->x, at, n), r->v->norm.gain, r->v->norm.bias, NORM_EPS);
    apply(r, inner, joined, &r->v->fc1, ACTIVATION_GELU);
    apply(r, rows, inner, &r->v->fc2, ACTIVATION_NONE);
    r->op->download(r->q, out + at / unit * rows.cols, rows.data,
                    (uint64_t)(rows.rows * rows.cols) * sizeof *out);
}

static bool run_tower(struct run *r, float *out, const float *patches, struct err *e)
{
    int depth = r->v->config->vision.depth;
    if (!set_angles(r, e)) return false;
    for (int64_t at = 0; at < r->n; at += r->part)
        embed(r, patches, at, r->n - at < r->part ? r->n - at : r->part);
    for (int i = 0; i < depth; i++) {
        attend(r, &r->v->blocks[i]);
        report_progress(r->v->model->report, "image", (uint64_t)i, (uint64_t)depth);
        for (int64_t at = 0; at < r->n; at += r->part)
            finish_block(r, &r->v->blocks[i], at, r->n - at < r->part ? r->n - at : r->part);
    }
    for (int64_t at = 0; at < r->n; at += r->part)
        merge(r, out, at, r->n - at < r->part ? r->n - at : r->part);
    report_progress(r->v->model->report, "image", (uint64_t)depth, (uint64_t)depth);
    return r->op->wait(r->q, e);
}

bool vision_run(struct vision *v, float *out, const float *patches, int64_t height, int64_t width,
                struct err *e)
{
    const struct backend *b = v->model->backend;
    int64_t merge = v->config->vision.merge, unit = merge * merge, part = b->step_rows / unit * unit;
    assert(height > 0 && width > 0 && height % merge == 0 && width % merge == 0);
    struct run r = {
        .v = v, .op = b->ops, .q = b->queue, .height = height, .width = width, .n = height * width
    };
    r.part = part < unit ? unit : part < r.n ? part : r.n;
    bool ok = make_room(&r, e) && run_tower(&r, out, patches, e);
    b->ops->memory_free(b->queue, r.memory);
    free(r.host);
    return ok;
}
