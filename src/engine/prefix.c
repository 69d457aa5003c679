#include "engine/prefix.h"
#include <stdlib.h>
#include <string.h>

struct entry {
    uint8_t key[32];
    int snapshot;          /* -1: it is in host memory */
    struct parcel *parcel; /* or NULL */
    uint64_t used;         /* when */
    bool offered;          /* to the disk */
};

struct prefix_cache {
    struct engine *engine;
    struct disk_cache *disk; /* or NULL */
    struct entry *entries;
    int64_t n, capacity;
    uint64_t clock, host_bytes, host_most;
};

bool prefix_create(struct prefix_cache **out, struct engine *g, uint64_t host_bytes, struct disk_cache *disk,
                   struct err *e)
{
    struct prefix_cache *p = *out = calloc(1, sizeof *p);
    if (!p) return err_memory(e, "prefix cache", sizeof *p);
    p->engine = g;
    p->host_most = host_bytes;
    p->disk = disk;
    return true;
}

static void drop(struct prefix_cache *p, struct entry *x)
{
    if (x->snapshot >= 0) snapshot_drop(p->engine, x->snapshot);
    if (x->parcel) p->host_bytes -= parcel_bytes(x->parcel);
    parcel_free(x->parcel);
    *x = p->entries[--p->n];
}

void prefix_clear(struct prefix_cache *p)
{
    while (p->n > 0) drop(p, &p->entries[0]);
    if (p->disk) disk_cache_clear(p->disk);
}

void prefix_free(struct prefix_cache *p)
{
    if (!p) return;
    while (p->n > 0) drop(p, &p->entries[0]);
    free(p->entries);
    free(p);
}

static struct entry *find(const struct prefix_cache *p, const uint8_t key[32])
{
    for (int64_t i = 0; i < p->n; i++)
        if (memcmp(p->entries[i].key, key, 32) == 0) return &p->entries[i];
    return NULL;
}

/* Of snapshots, or of parcels; NULL: none. */
static struct entry *oldest(struct prefix_cache *p, bool snapshots)
{
    struct entry *best = NULL;
    for (int64_t i = 0; i < p->n; i++) {
        struct entry *x = &p->entries[i];
        if ((x->snapshot >= 0) == snapshots && (!best || x->used < best->used)) best = x;
    }
    return best;
}

static bool wants_file(const struct prefix_cache *p, const struct entry *x)
{
    return p->disk && !x->offered && x->snapshot >= 0;
}

/* Into host memory, if there is room or older parcels make some, and to the disk if it is not there. */
static void retire(struct prefix_cache *p, struct entry *x)
{
    struct parcel *parcel = NULL;
    bool to_disk = wants_file(p, x) && disk_cache_has_room(p->disk);
    if ((p->host_most > 0 || to_disk) && parcel_pack_snapshot(&parcel, p->engine, x->snapshot, NULL) &&
        to_disk)
        disk_cache_put(p->disk, x->key, parcel);
    if (!parcel || parcel_bytes(parcel) > p->host_most) {
        parcel_free(parcel);
        drop(p, x);
        return;
    }
    snapshot_drop(p->engine, x->snapshot);
    x->snapshot = -1;
    x->parcel = parcel;
    p->host_bytes += parcel_bytes(parcel);
    while (p->host_bytes > p->host_most) drop(p, oldest(p, false));
}

bool prefix_store(struct prefix_cache *p)
{
    struct entry *last = NULL;
    struct parcel *parcel;
    for (int64_t i = 0; i < p->n; i++) {
        struct entry *x = &p->entries[i];
        if (wants_file(p, x) && (!last || x->used > last->used)) last = x;
    }
    if (!last || !disk_cache_has_room(p->disk)) return false;
    last->offered = true;
    if (!parcel_pack_snapshot(&parcel, p->engine, last->snapshot, NULL)) return true;
    disk_cache_put(p->disk, last->key, parcel);
    parcel_free(parcel);
    return true;
}

bool prefix_give_up(struct prefix_cache *p)
{
    struct entry *x = oldest(p, true);
    if (x) retire(p, x);
    return x;
}

static bool begin(struct prefix_cache *p, int handle, const struct entry *x)
{
    return x->parcel ? parcel_unpack(x->parcel, p->engine, handle)
                     : snapshot_begin(p->engine, handle, x->snapshot);
}

int64_t prefix_begin(struct prefix_cache *p, int handle, const struct cuts *cuts, int64_t end)
{
    for (int64_t i = cuts->n - 1; i >= 0; i--) {
        if (cuts->items[i].at >= end) continue;
        struct entry *x = find(p, cuts->items[i].key);
        if (!x) continue;
        x->used = ++p->clock;
        if (begin(p, handle, x)) return cuts->items[i].at;
    }
    return 0;
}

int64_t prefix_depth(const struct prefix_cache *p, const struct cuts *cuts, int64_t end)
{
    int64_t i = cuts->n - 1;
    while (i >= 0 && (cuts->items[i].at >= end || !find(p, cuts->items[i].key))) i--;
    return i < 0 ? 0 : cuts->items[i].at;
}

bool prefix_knows(const struct prefix_cache *p, const struct cut *cut)
{
    const struct entry *x = find(p, cut->key);
    return x && x->snapshot >= 0;
}

static bool grow(struct prefix_cache *p)
{
    if (p->n < p->capacity) return true;
    int64_t capacity = p->capacity ? 2 * p->capacity : 64;
    struct entry *grown = realloc(p->entries, (size_t)capacity * sizeof *grown);
    if (!grown) return false;
    p->entries = grown;
    p->capacity = capacity;
    return true;
}

void prefix_add(struct prefix_cache *p, int handle, const struct cut *cut)
{
    struct entry fresh = { .used = ++p->clock }, *known = find(p, cut->key);
    if (known && known->snapshot >= 0) {
        known->used = fresh.used;
        return;
    }
    if (known) drop(p, known);
    memcpy(fresh.key, cut->key, sizeof fresh.key);
    fresh.offered = p->disk && disk_cache_has(p->disk, cut->key);
    if (!grow(p)) return; /* a cache: without memory it only knows less */
    while (!snapshot_take(p->engine, handle, &fresh.snapshot))
        if (!prefix_give_up(p)) return;
    p->entries[p->n++] = fresh;
}
