/* Tensors in the order of the source's files: the source is read ahead of, packed in pieces on all threads,
 * and what comes out goes to the writer's thread. Takes the plan, gives shards and a result per matrix. */
#include "num/fp8.h"
#include "num/nvfp4.h"
#include "base/pages.h"
#include "quantize/run.h"
#include "quantize/source.h"
#include <stdlib.h>
#include <string.h>

enum { SLICE_BYTES = 8 << 20, AHEAD_BYTES = 64 << 20, BATCH_WEIGHTS = 1 << 23 };

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
    struct packing in = { .matrix = piece, .absmax = absmax, .scales = r->packer.scales };
    in.codes = to->room(to->ctx, (uint64_t)piece->rows * (uint64_t)piece->cols, e);
    if (!in.codes || !packer_run(&r->packer, &p, &in, 1, c, NULL, e) || !to->put(to->ctx, p.codes_bytes, e))
        return false;
    bool is_common = piece->scheme == SCHEME_FP8; /* one scale for all pieces */
    if (is_common) sum->scales_bytes = 0;
    memcpy(r->scales + sum->scales_bytes, in.scales, p.scales_bytes);
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
    *out = (struct packed){ 0 };
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
            !writer_put_mapped(r->writer, t->data + at, n, e) || !writer_mark(r->writer, e))
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
        !writer_put_copy(r->writer, r->scales, packed.scales_bytes, e))
        return false;
    *result = (struct matrix_result){ .difference = packed.difference,
                                      .total = packed.total,
                                      .global = packed.global };
    return true;
}

/* What maps the largest measured input to 448 * 6, or divided into it gives 448; 1 and 2^-7 where every input
 * was zero. Its bytes; 0: the matrix has none. */
static size_t input_scale(const struct run *r, void *out, const struct matrix *m, float top)
{
    if (!scheme_measures(m->scheme)) return 0;
    if (top == 0)
        report_warn(r->options.report, "module '%s': every calibration input is zero; its input scale is %s",
                    m->module, m->scheme == SCHEME_FP8 ? "2^-7" : "1");
    float global = nvfp4_global_scale(top);
    bf16 fixed = fp8_scale(top);
    if (m->scheme == SCHEME_FP8) return memcpy(out, &fixed, sizeof fixed), sizeof fixed;
    return memcpy(out, &global, sizeof global), sizeof global;
}

static bool keep_result(struct run *r, size_t index, const struct matrix_result *result, struct err *e)
{
    r->results[index] = *result;
    r->results[index].is_done = true;
    report_done(r, run_matrix_bytes(&r->plan.matrices[index]));
    return writer_add(r->writer, index, &r->results[index], e);
}

static bool write_matrix(struct run *r, size_t index, struct err *e)
{
    const struct matrix *m = &r->plan.matrices[index];
    struct matrix_result result;
    char scale[sizeof(float)];
    if (!put_matrix(r, &result, index, e) ||
        (scheme_is_nvfp4(m->scheme) && !writer_put_copy(r->writer, &result.global, sizeof result.global, e)))
        return false;
    result.input = largest_input(r, m);
    return writer_put_copy(r->writer, scale, input_scale(r, scale, m, result.input), e) &&
           keep_result(r, index, &result, e) && writer_mark(r->writer, e);
}

/* Small NVFP4 matrices side by side, so that threads meet less often. */

static bool is_small(const struct matrix *m)
{
    return scheme_is_nvfp4(m->scheme) && m->rows * m->cols <= BATCH_WEIGHTS && m->rows <= PACKER_ROWS;
}

/* How many from `first` on. */
static size_t batch_of(const struct run *r, size_t first, size_t end)
{
    int64_t weights = 0, rows = 0;
    size_t n = 0;
    for (; n < PACKER_MATRICES && first + n < end; n++) {
        const struct matrix *m = &r->plan.matrices[first + n];
        weights += m->rows * m->cols;
        rows += m->rows;
        if (!is_small(m) || spool_find(&r->spool, first + n) || weights > BATCH_WEIGHTS || rows > PACKER_ROWS)
            break;
    }
    return n;
}

/* What is to be looked at for a batch, partners that lie elsewhere too, as many as can be at once. */
static bool to_look_at(struct run *r, struct packer_look *look, size_t first, size_t n, struct err *e)
{
    const struct matrix *all = r->plan.matrices;
    look->n = 0;
    for (size_t i = first; i < first + n; i++) {
        size_t j = i;
        do {
            bool is_new = r->absmax[j] < 0 && is_small(&all[j]) && look->n < PACKER_MATRICES;
            for (size_t x = 0; x < look->n; x++) is_new = is_new && look->matrices[x] != &all[j];
            if (is_new && !source_check_at(&r->source, all[j].data, e)) return false;
            if (is_new) look->matrices[look->n++] = &all[j];
            j = all[j].partner;
        } while (j != SIZE_MAX && j != i);
    }
    for (size_t i = first; i < first + n; i++) read_ahead(r, all[i].data, run_matrix_bytes(&all[i]));
    return true;
}

static void keep_absmax(struct run *r, const struct packer_look *look)
{
    for (size_t i = 0; i < look->n; i++) r->absmax[look->matrices[i] - r->plan.matrices] = look->absmax[i];
}

/* Neighbours together: threads that run are interrupted each time. */
static void release(const struct packing *in, size_t n)
{
    const uint8_t *begin = in[0].matrix->data, *end = begin;
    for (size_t i = 0; i < n; i++) {
        const struct matrix *m = in[i].matrix;
        if (m->data != end) {
            pages_release(begin, (uint64_t)(end - begin));
            begin = m->data;
        }
        end = m->data + run_matrix_bytes(m);
    }
    pages_release(begin, (uint64_t)(end - begin));
}

/* bytes: of the outputs of each. All of them take one room, in their order. Maxima that were not looked at
 * with the batch before, or were too many, are looked at here. */
static bool pack_batch(struct run *r, struct packed *out, size_t first, size_t n, const uint64_t *bytes,
                       struct packer_look *ahead, struct err *e)
{
    struct packing in[PACKER_MATRICES];
    uint64_t all = 0;
    for (size_t i = 0; i < n; i++) all += bytes[i];
    uint8_t *room = writer_room(r->writer, all, e);
    if (!room) return false;
    for (size_t i = 0; i < n; room += bytes[i++]) {
        const struct matrix *m = &r->plan.matrices[first + i];
        in[i] = (struct packing){ .matrix = m, .codes = room, .scales = room + m->rows * m->cols / 2 };
        if (!run_absmax(r, &in[i].absmax, first + i, e)) return false;
    }
    if (!packer_run(&r->packer, out, in, n, run_plain(r), ahead, e)) return false;
    keep_absmax(r, ahead);
    for (size_t i = 0; i < n; i++) {
        const struct matrix *m = in[i].matrix;
        uint8_t *end = in[i].scales + out[i].scales_bytes;
        memcpy(end, &out[i].global, sizeof out[i].global);
        input_scale(r, end + sizeof out[i].global, m, largest_input(r, m));
    }
    release(in, n);
    return writer_put(r->writer, all, e);
}

/* end: of the matrices that may follow. */
static bool write_batch(struct run *r, size_t first, size_t n, size_t end, const uint64_t *bytes,
                        struct err *e)
{
    struct packed out[PACKER_MATRICES];
    struct packer_look ahead;
    if (!to_look_at(r, &ahead, first + n, batch_of(r, first + n, end), e) ||
        !pack_batch(r, out, first, n, bytes, &ahead, e))
        return false;
    for (size_t i = 0; i < n; i++) {
        struct matrix_result result = { .difference = out[i].difference,
                                        .total = out[i].total,
                                        .global = out[i].global,
                                        .input = largest_input(r, &r->plan.matrices[first + i]) };
        if (!keep_result(r, first + i, &result, e)) return false;
    }
    return writer_mark(r->writer, e);
}

static bool not_this_plan(const struct run *r, struct err *e)
{
    return err_set(e, ERR_FORMAT, "%s: the journal is that of another plan", r->journal.path);
}

/* outputs: of the first matrix. skip: bytes of output that are there already. */
static bool write_matrices(struct run *r, size_t k, size_t end, const struct tensor **outputs, uint64_t *skip,
                           struct err *e)
{
    for (size_t n; k < end; k += n) {
        uint64_t bytes[PACKER_MATRICES] = { 0 };
        size_t batch = *skip ? 0 : batch_of(r, k, end);
        n = batch ? batch : 1;
        for (size_t i = 0; i < n; i++)
            for (int x = plan_outputs_of(r->plan.matrices[k + i].scheme); x > 0; x--)
                bytes[i] += (*outputs)++->bytes;
        if (*skip >= bytes[0] && r->results[k].is_done) {
            *skip -= bytes[0];
            r->done += run_matrix_bytes(&r->plan.matrices[k]);
        } else if (*skip > 0) {
            return not_this_plan(r, e);
        } else if (!(batch ? write_batch(r, k, n, end, bytes, e) : write_matrix(r, k, e))) {
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
        size_t end = j->first + j->n; /* of the matrices of all jobs up to the next copy */
        while (j->n > 0 && i + 1 < p->n_jobs && p->jobs[i + 1].n > 0 && p->jobs[i + 1].first == end)
            end += p->jobs[++i].n;
        if (j->n == 0) outputs++;
        if (!(j->n == 0 ? copy_tensor(r, j->source, &skip, e)
                        : write_matrices(r, j->first, end, &outputs, &skip, e)))
            return false;
    }
    return (skip == 0 || not_this_plan(r, e)) && writer_finish(r->writer, e) && shards_finish(r->shards, e);
}
