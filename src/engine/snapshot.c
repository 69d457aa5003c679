#include "engine/snapshot.h"
#include "engine/sequence.h"
#include <assert.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* Snapshots. */

static int32_t slot_of(const struct engine *g, int snapshot)
{
    return g->o.sequences + snapshot;
}

static void copy_pieces(const struct engine *g, const struct state_piece *to, const struct state_piece *from)
{
    const struct backend *b = g->model->backend;
    for (int i = 0; i < STATE_PIECES; i++)
        if (to[i].bytes) b->ops->copy(b->queue, to[i].data, from[i].data, to[i].bytes);
}

static void copy_slot(const struct engine *g, int32_t to, int32_t from)
{
    for (int l = 0; l < engine_states(g); l++) {
        struct state_piece a[STATE_PIECES], b[STATE_PIECES];
        layer_state_slot(a, &g->states[l], g->model, l, to);
        layer_state_slot(b, &g->states[l], g->model, l, from);
        copy_pieces(g, a, b);
    }
}

static void copy_page(const struct engine *g, int32_t to, int32_t from)
{
    for (int l = 0; l < engine_states(g); l++) {
        struct state_piece a[STATE_PIECES], b[STATE_PIECES];
        layer_state_page(a, &g->states[l], g->model, l, to);
        layer_state_page(b, &g->states[l], g->model, l, from);
        copy_pieces(g, a, b);
    }
}

bool snapshot_take(struct engine *g, int handle, int *snapshot)
{
    struct sequence *s = &g->sequences[handle];
    int at = 0;
    while (at < g->o.snapshots && g->snapshots[at].used) at++;
    assert(s->open && !s->tentative && s->kept == 0);
    if (at == g->o.snapshots) return false;
    struct snapshot *x = &g->snapshots[at];
    x->used = true;
    x->length = s->length;
    x->shift = s->shift;
    x->head_length = s->head_length;
    x->n_pages = (s->length + KV_PAGE - 1) / KV_PAGE;
    memcpy(x->pages, s->pages, (size_t)x->n_pages * sizeof *x->pages);
    for (int64_t i = 0; i < x->n_pages; i++) g->holders[x->pages[i]]++;
    copy_slot(g, slot_of(g, at), handle);
    *snapshot = at;
    return true;
}

void snapshot_drop(struct engine *g, int snapshot)
{
    struct snapshot *x = &g->snapshots[snapshot];
    while (x->n_pages > 0) engine_let_page(g, x->pages[--x->n_pages]);
    x->used = false;
}

int64_t snapshot_length(const struct engine *g, int snapshot)
{
    return g->snapshots[snapshot].length;
}

/* Pages before the first line that a sequence going on from here writes, its head's lines included. */
static int64_t full_pages(const struct engine *g, const struct snapshot *x)
{
    return (g->o.drafts && x->head_length < x->length ? x->head_length : x->length) / KV_PAGE;
}

int64_t snapshot_pages(const struct engine *g, int snapshot)
{
    const struct snapshot *x = &g->snapshots[snapshot];
    return x->n_pages - full_pages(g, x);
}

static void set_place(struct sequence *s, int64_t length, int64_t shift, int64_t head_length)
{
    s->length = length;
    s->shift = shift;
    s->head_length = head_length;
}

bool snapshot_begin(struct engine *g, int handle, int snapshot)
{
    const struct snapshot *x = &g->snapshots[snapshot];
    struct sequence *s = &g->sequences[handle];
    int64_t shared = full_pages(g, x);
    assert(s->open && s->length == 0 && s->n_pages == 0);
    if (x->n_pages - shared > g->n_free) return false;
    for (; s->n_pages < x->n_pages; s->n_pages++) {
        int32_t page = x->pages[s->n_pages];
        if (s->n_pages < shared)
            g->holders[page]++;
        else
            copy_page(g, page = engine_take_page(g), x->pages[s->n_pages]);
        s->pages[s->n_pages] = page;
    }
    copy_slot(g, handle, slot_of(g, snapshot));
    set_place(s, x->length, x->shift, x->head_length);
    return true;
}

/* Parcels: the pieces of the slot, of its log's rows that count, of the pages, layer after layer. */

struct parcel {
    struct parcel_place place;
    atomic_int holders;
    uint8_t *data;
};

/* Does with each piece what is asked: counts bytes, or moves them. */
enum move { COUNT, PACK, UNPACK };

static void move_piece(const struct engine *g, struct state_piece p, enum move move, uint8_t *data,
                       uint64_t *at)
{
    const struct backend *b = g->model->backend;
    if (p.bytes == 0) return;
    if (move == PACK) b->ops->download(b->queue, data + *at, p.data, p.bytes);
    if (move == UNPACK) b->ops->upload(b->queue, p.data, data + *at, p.bytes);
    *at += p.bytes;
}

static uint64_t move_all(const struct engine *g, int32_t slot, int32_t kept, const int32_t *pages,
                         int64_t n_pages, enum move move, uint8_t *data)
{
    uint64_t at = 0;
    const struct delta_shape *shape = &g->model->delta_shape;
    for (int l = 0; l < engine_states(g); l++) {
        struct state_piece p[STATE_PIECES];
        layer_state_slot(p, &g->states[l], g->model, l, slot);
        for (int i = 0; i < STATE_PIECES; i++) move_piece(g, p[i], move, data, &at);
        if (p[0].bytes && kept) {
            uint64_t log = (uint64_t)kept * (uint64_t)delta_log_floats(shape) * sizeof(float);
            struct state_piece rows = { delta_log_at(&g->states[l].delta, shape, slot, 0).u, log };
            move_piece(g, rows, move, data, &at);
        }
        for (int64_t k = 0; k < n_pages; k++) {
            layer_state_page(p, &g->states[l], g->model, l, pages[k]);
            for (int i = 0; i < STATE_PIECES; i++) move_piece(g, p[i], move, data, &at);
        }
    }
    return at;
}

static uint64_t page_bytes(const struct engine *g)
{
    const int32_t page = 0; /* as large as any */
    return move_all(g, 0, 0, &page, 1, COUNT, NULL) - move_all(g, 0, 0, NULL, 0, COUNT, NULL);
}

bool parcel_create(struct parcel **out, const struct parcel_place *place, struct err *e)
{
    struct parcel *p = *out = malloc(sizeof *p);
    uint8_t *data = malloc(place->bytes + !place->bytes);
    if (p && data) {
        *p = (struct parcel){ .place = *place, .holders = 1, .data = data };
        return true;
    }
    free(p);
    free(data);
    *out = NULL;
    return err_memory(e, "a sequence set aside", place->bytes);
}

static bool pack(struct parcel **out, struct engine *g, struct parcel_place place, int32_t slot,
                 const int32_t *pages, struct err *e)
{
    int32_t kept = (int32_t)place.kept;
    place.bytes = move_all(g, slot, kept, pages, place.n_pages, COUNT, NULL);
    if (!parcel_create(out, &place, e)) return false;
    move_all(g, slot, kept, pages, place.n_pages, PACK, (*out)->data);
    return true;
}

static int64_t pages_of(int64_t length)
{
    return (length + KV_PAGE - 1) / KV_PAGE;
}

bool parcel_pack(struct parcel **out, struct engine *g, int handle, struct err *e)
{
    const struct sequence *s = &g->sequences[handle];
    assert(s->open && !s->tentative);
    struct parcel_place place = { s->length, s->shift, s->head_length, pages_of(s->length), s->kept, 0 };
    return pack(out, g, place, handle, s->pages, e);
}

bool parcel_pack_snapshot(struct parcel **out, struct engine *g, int snapshot, struct err *e)
{
    const struct snapshot *x = &g->snapshots[snapshot];
    struct parcel_place place = { x->length, x->shift, x->head_length, x->n_pages, 0, 0 };
    return pack(out, g, place, slot_of(g, snapshot), x->pages, e);
}

struct parcel *parcel_hold(struct parcel *p)
{
    atomic_fetch_add(&p->holders, 1);
    return p;
}

void parcel_free(struct parcel *p)
{
    if (!p || atomic_fetch_sub(&p->holders, 1) > 1) return;
    free(p->data);
    free(p);
}

void *parcel_room(struct parcel *p)
{
    return p->data;
}

const struct parcel_place *parcel_place(const struct parcel *p)
{
    return &p->place;
}

const void *parcel_data(const struct parcel *p)
{
    return p->data;
}

uint64_t parcel_bytes(const struct parcel *p)
{
    return p->place.bytes;
}

int64_t parcel_pages(const struct parcel *p)
{
    return p->place.n_pages;
}

bool parcel_fits(const struct parcel *p, const struct engine *g, int64_t length)
{
    const struct parcel_place *x = &p->place;
    if (x->length != length || x->n_pages != pages_of(length) || x->n_pages > g->pages_each || x->kept != 0 ||
        x->head_length < 0 || x->head_length > length || x->shift > 0 || x->shift < -length)
        return false;
    return move_all(g, 0, 0, NULL, 0, COUNT, NULL) + (uint64_t)x->n_pages * page_bytes(g) == x->bytes;
}

bool parcel_unpack(const struct parcel *p, struct engine *g, int handle)
{
    struct sequence *s = &g->sequences[handle];
    const struct parcel_place *x = &p->place;
    assert(s->open && s->length == 0 && s->n_pages == 0);
    if (x->n_pages > g->n_free) return false;
    for (; s->n_pages < x->n_pages; s->n_pages++) s->pages[s->n_pages] = engine_take_page(g);
    set_place(s, x->length, x->shift, x->head_length);
    s->kept = (int32_t)x->kept;
    move_all(g, handle, s->kept, s->pages, x->n_pages, UNPACK, p->data);
    return true;
}
