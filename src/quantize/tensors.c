/* Tensors in the order of the source's files: the source is read ahead of, packed in pieces on all threads,
 * and what comes out goes to the writer's thread. Takes the plan, gives shards and a result per matrix. */
#include "num/fp8.h"
#include "num/nvfp4.h"
#include "base/pages.h"
#include "quantize/run.h"
#include "quantize/source.h"
#include <stdlib.h>
#include <string.h>

enum { SLICE_BYTES = 8 << 20, AHEAD_BYTES = 64 << 20 };

uint64_t run_matrix_bytes(const struct matrix *m)
{
    return (uint64_t)m->rows * (uint64_t)m->cols * dtype_bytes(m->source->dtype);
}

/* Rows [first, first + n) as a matrix of its own. */
static struct matrix piece_of(const struct matrix *m, int64_t first, int64_t n)
{
    struct matrix piece = *m;
    piece.data += (uint64_t)first * (uint64_t)m->cols * dtype_bytes(m->source->dtype);
    piece.rows = n;
    return piece;
}

/* Asks the system to read what follows `data` in its file, in large steps. */
static void read_ahead(struct run *r, const uint8_t *data, uint64_t bytes)
{
    const struct checkpoint *c = &r->source;
    const uint8_t *end = data + bytes;
    for (int i = 0; i < c->n_shards; i++) {
        const struct file_map *map = &c->shards[i].map;
        if (data < map->data || data >= map->data + map->bytes) continue;
        uint64_t left = (uint64_t)(map->data + map->bytes - end);
        bool is_inside = r->ahead >= end && r->ahead <= map->data + map->bytes;
        if (is_inside && (uint64_t)(r->ahead - end) >= AHEAD_BYTES / 2) return;
        if (!is_inside) r->ahead = end;
        uint64_t n = left < AHEAD_BYTES ? left : AHEAD_BYTES;
        if (end + n > r->ahead) pages_read_ahead(r->ahead, (uint64_t)(end + n - r->ahead));
        r->ahead = end + n;
        return;
    }
}

/* Packing. */

static bool absmax_of(struct run *r, float *out, size_t index, struct err *e)
{
    const struct matrix *m = &r->plan.matrices[index];
    int64_t n = packer_piece_rows(m);
    for (int64_t at = 0; r->absmax[index] < 0 && at < m->rows; at += n) {
        struct matrix piece = piece_of(m, at, m->rows - at < n ? m->rows - at : n);
        float top;
        if (!source_check_at(&r->source, piece.data, e) || !packer_absmax(&r->packer, &top, &piece, e))
            return false;
        *out = at == 0 || top > *out ? top : *out;
        if (n < m->rows) pages_release(piece.data, run_matrix_bytes(&piece));
    }
    if (r->absmax[index] < 0) r->absmax[index] = m->rows ? *out : 0;
    *out = r->absmax[index];
    return true;
}

/* gate and up, or q, k and v, run as one product, so one scale serves them: the largest maximum's. */
bool run_absmax(struct run *r, float *out, size_t index, struct err *e)
{
    const struct matrix *all = r->plan.matrices;
    if (!absmax_of(r, out, index, e)) return false;
    for (size_t i = all[index].partner; i != SIZE_MAX && i != index; i = all[i].partner) {
        float other;
        if (!absmax_of(r, &other, i, e)) return false;
        *out = other > *out ? other : *out;
    }
    return true;
}

static bool pack_piece(struct run *r, struct packed *sum, const struct matrix *piece, float absmax,
                       const struct curvature *c, const struct outlet *to, struct err *e)
{
    struct packed p;
    r->packer.codes = to->room(to->ctx, (uint64_t)piece->rows * (uint64_t)piece->cols, e);
    if (!r->packer.codes || !packer_run(&r->packer, &p, piece, absmax, c, e) ||
        !to->put(to->ctx, p.codes_bytes, e))
        return false;
    bool is_common = piece->scheme == SCHEME_FP8; /* one scale for all pieces */
    if (is_common) sum->scales_bytes = 0;
    memcpy(r->scales + sum->scales_bytes, p.scales, p.scales_bytes);
    sum->codes_bytes += p.codes_bytes;
    sum->scales_bytes += p.scales_bytes;
    sum->difference += p.difference;
    sum->total += p.total;
    sum->global = p.global;
    pages_release(piece->data, run_matrix_bytes(piece));
    return true;
}

bool run_pack(struct run *r, struct packed *out, size_t index, const struct curvature *c,
              const struct outlet *to, struct err *e)
{
    const struct matrix *m = &r->plan.matrices[index];
    int64_t n = packer_piece_rows(m);
    float absmax = 0;
    *out = (struct packed){ .scales = r->scales };
    if (!(scheme_is_nvfp4(m->scheme) ? run_absmax(r, &absmax, index, e) : absmax_of(r, &absmax, index, e)))
        return false;
    for (int64_t at = 0; at < m->rows; at += n) {
        struct matrix piece = piece_of(m, at, m->rows - at < n ? m->rows - at : n);
        read_ahead(r, piece.data, run_matrix_bytes(&piece));
        if (!source_check_at(&r->source, piece.data, e) || !pack_piece(r, out, &piece, absmax, c, to, e))
            return false;
    }
    return true;
}

uint64_t run_piece_bytes(const struct plan *p)
{
    uint64_t largest = 0;
    for (size_t i = 0; i < p->n_matrices; i++) {
        const struct matrix *m = &p->matrices[i];
        uint64_t bytes = (uint64_t)packer_piece_rows(m) * (uint64_t)m->cols;
        largest = bytes > largest ? bytes : largest;
    }
    return largest;
}

static uint64_t scales_bytes(const struct plan *p)
{
    uint64_t largest = 0;
    for (size_t i = 0; i < p->n_matrices; i++) {
        const struct matrix *m = &p->matrices[i];
        uint64_t bytes = (uint64_t)m->rows * (uint64_t)m->cols / NVFP4_GROUP + (uint64_t)m->rows * 4;
        largest = bytes > largest ? bytes : largest;
    }
    return largest;
}

bool run_prepare_packing(struct run *r, struct err *e)
{
    const struct plan *p = &r->plan;
    uint64_t scales = scales_bytes(p);
    r->absmax = malloc((p->n_matrices + 1) * sizeof *r->absmax);
    r->scales = malloc(scales + 1);
    if (!r->absmax || !r->scales)
        return err_memory(e, "packing buffers", p->n_matrices * sizeof *r->absmax + scales);
    for (size_t i = 0; i < p->n_matrices; i++) r->absmax[i] = -1;
    return packer_init(&r->packer, p, r->options.threads, e);
}

/* Writing. */

static void *writer_outlet_room(void *ctx, uint64_t bytes, struct err *e)
{
    return writer_room(ctx, bytes, e);
}

static bool writer_outlet_put(void *ctx, uint64_t bytes, struct err *e)
{
    return writer_put(ctx, bytes, e);
}

static void report_done(struct run *r, uint64_t bytes)
{
    r->done += bytes;
    report_progress(r->options.report, "quantize", r->done, r->result->bytes_in);
}

static bool copy_tensor(struct run *r, const struct tensor *t, uint64_t *skip, struct err *e)
{
    uint64_t at = *skip < t->bytes ? *skip : t->bytes;
    *skip -= at;
    r->done += at;
    for (uint64_t n; at < t->bytes; at += n) {
        n = t->bytes - at < SLICE_BYTES ? t->bytes - at : SLICE_BYTES;
        read_ahead(r, t->data + at, n);
        if (!source_check_at(&r->source, t->data + at, e) ||
            !writer_put_mapped(r->writer, t->data + at, n, e) || !writer_mark(r->writer, 0, NULL, e))
            return false;
        report_done(r, n);
    }
    return true;
}

/* Largest measured input of a matrix that has one. */
static float largest_input(const struct run *r, const struct matrix *m)
{
    bool measured = r->calibration.tokens > 0 && m->layer >= 0 && m->input != INPUT_NONE;
    return measured ? calibration_input(&r->calibration, m->layer, m->input, m->expert) : 0;
}

static bool copy_spooled(struct run *r, const struct spooled *item, struct err *e)
{
    uint64_t bytes = item->codes_bytes + item->scales_bytes;
    for (uint64_t at = 0, n; at < bytes; at += n) {
        uint64_t left =
            at < item->codes_bytes ? item->codes_bytes - at : bytes - at; /* one tensor at a time */
        n = left < SLICE_BYTES ? left : SLICE_BYTES;
        void *room = writer_room(r->writer, n, e);
        if (!room || !spool_read(&r->spool, room, n, item->at + at, e) || !writer_put(r->writer, n, e))
            return false;
    }
    return true;
}

const struct curvature *run_plain(const struct run *r)
{
    static const struct curvature plain = { 0 }, four_over_six = { .four_over_six = true };
    switch (r->options.method) {
    case QUANTIZE_NEAREST: return NULL;
    case QUANTIZE_FOUR_OVER_SIX: return &four_over_six;
    case QUANTIZE_AUTO:
    case QUANTIZE_MSE:
    case QUANTIZE_GPTQ: break;
    }
    return &plain;
}

/* Codes and scales: packs what the calibration has not packed already. */
static bool put_matrix(struct run *r, struct matrix_result *result, size_t index, struct err *e)
{
    const struct spooled *item = spool_find(&r->spool, index);
    struct outlet to = { r->writer, writer_outlet_room, writer_outlet_put };
    struct packed packed;
    if (item) {
        *result = item->result;
        return copy_spooled(r, item, e);
    }
    if (!run_pack(r, &packed, index, run_plain(r), &to, e) ||
        !writer_put_copy(r->writer, packed.scales, packed.scales_bytes, e))
        return false;
    *result = (struct matrix_result){ .difference = packed.difference,
                                      .total = packed.total,
                                      .global = packed.global };
    return true;
}

/* What maps the largest measured input to 448 * 6, or divided into it gives 448; 1 and 2^-7 where every input
 * was zero. */
static bool write_input_scale(const struct run *r, const struct matrix *m, float top, struct err *e)
{
    if (top == 0)
        report_warn(r->options.report, "module '%s': every calibration input is zero; its input scale is %s",
                    m->module, m->scheme == SCHEME_FP8 ? "2^-7" : "1");
    float global = nvfp4_global_scale(top);
    bf16 fixed = fp8_scale(top);
    return m->scheme == SCHEME_FP8 ? writer_put_copy(r->writer, &fixed, sizeof fixed, e)
                                   : writer_put_copy(r->writer, &global, sizeof global, e);
}

static bool write_matrix(struct run *r, size_t index, struct err *e)
{
    const struct matrix *m = &r->plan.matrices[index];
    struct matrix_result result;
    if (!put_matrix(r, &result, index, e) ||
        (scheme_is_nvfp4(m->scheme) && !writer_put_copy(r->writer, &result.global, sizeof result.global, e)))
        return false;
    result.input = largest_input(r, m);
    result.is_done = true;
    if (scheme_measures(m->scheme) && !write_input_scale(r, m, result.input, e)) return false;
    r->results[index] = result;
    report_done(r, run_matrix_bytes(m));
    return writer_mark(r->writer, index, &result, e);
}

static bool not_this_plan(const struct run *r, struct err *e)
{
    return err_set(e, ERR_FORMAT, "%s: the journal is that of another plan", r->journal.path);
}

/* outputs: of the job's first matrix. skip: bytes of output that are there already. */
static bool write_matrices(struct run *r, const struct job *j, const struct tensor **outputs, uint64_t *skip,
                           struct err *e)
{
    for (size_t k = j->first; k < j->first + j->n; k++) {
        uint64_t bytes = 0;
        for (int i = plan_outputs_of(r->plan.matrices[k].scheme); i > 0; i--) bytes += (*outputs)++->bytes;
        if (*skip >= bytes && r->results[k].is_done) {
            *skip -= bytes;
            r->done += run_matrix_bytes(&r->plan.matrices[k]);
        } else if (*skip > 0) {
            return not_this_plan(r, e);
        } else if (!write_matrix(r, k, e)) {
            return false;
        }
    }
    return true;
}

bool run_write_tensors(struct run *r, struct err *e)
{
    const struct plan *p = &r->plan;
    const struct tensor *outputs = p->outputs;
    uint64_t skip = shards_offset(r->shards);
    for (size_t i = 0; i < p->n_jobs; i++) {
        const struct job *j = &p->jobs[i];
        if (j->n == 0) outputs++;
        if (!(j->n == 0 ? copy_tensor(r, j->source, &skip, e) : write_matrices(r, j, &outputs, &skip, e)))
            return false;
    }
    return (skip == 0 || not_this_plan(r, e)) && writer_finish(r->writer, e) && shards_finish(r->shards, e);
}
