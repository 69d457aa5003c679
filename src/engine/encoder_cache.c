#include "engine/encoder_cache.h"
#include <stdlib.h>
#include <string.h>

struct entry {
    uint8_t key[32];
    struct picture picture;
    uint64_t used; /* when */
};

struct encoder_cache {
    struct entry *entries;
    int64_t n, capacity;
    uint64_t clock, most;
    struct encoder_stats stats;
};

bool encoder_cache_create(struct encoder_cache **out, uint64_t bytes, struct err *e)
{
    struct encoder_cache *c = *out = calloc(1, sizeof *c);
    if (!c) return err_memory(e, "encoder cache", sizeof *c);
    c->most = bytes;
    return true;
}

static uint64_t bytes_of(const struct picture *p)
{
    return (uint64_t)(p->height * p->width * p->cols) * sizeof *p->rows;
}

static void drop(struct encoder_cache *c, struct entry *x)
{
    c->stats.bytes -= bytes_of(&x->picture);
    picture_free(&x->picture);
    *x = c->entries[--c->n];
}

void encoder_cache_clear(struct encoder_cache *c)
{
    while (c->n > 0) drop(c, &c->entries[c->n - 1]);
}

void encoder_cache_free(struct encoder_cache *c)
{
    if (!c) return;
    encoder_cache_clear(c);
    free(c->entries);
    free(c);
}

bool encoder_key(uint8_t out[32], const uint8_t salt[32], const struct cut_picture *p, struct err *e)
{
    struct {
        uint8_t salt[32], digest[32];
        int64_t height, width;
    } all = { .height = p->height, .width = p->width };
    memcpy(all.salt, salt, sizeof all.salt);
    memcpy(all.digest, p->digest, sizeof all.digest);
    return cuts_digest(out, &all, sizeof all, e);
}

static struct entry *find(const struct encoder_cache *c, const uint8_t key[32])
{
    for (int64_t i = 0; i < c->n; i++)
        if (memcmp(c->entries[i].key, key, 32) == 0) return &c->entries[i];
    return NULL;
}

bool encoder_cache_find(struct encoder_cache *c, const uint8_t key[32], struct picture *p)
{
    struct entry *x = find(c, key);
    c->stats.queries += c->most > 0;
    if (!x) return false;
    c->stats.hits++;
    x->used = ++c->clock;
    *p = picture_share(&x->picture);
    return true;
}

static struct entry *oldest(struct encoder_cache *c)
{
    struct entry *best = &c->entries[0];
    for (int64_t i = 1; i < c->n; i++)
        if (c->entries[i].used < best->used) best = &c->entries[i];
    return best;
}

static bool grow(struct encoder_cache *c)
{
    if (c->n < c->capacity) return true;
    int64_t capacity = c->capacity ? 2 * c->capacity : 16;
    struct entry *grown = realloc(c->entries, (size_t)capacity * sizeof *grown);
    if (!grown) return false;
    c->entries = grown;
    c->capacity = capacity;
    return true;
}

void encoder_cache_add(struct encoder_cache *c, const uint8_t key[32], const struct picture *p)
{
    uint64_t bytes = bytes_of(p);
    struct entry fresh = { .used = ++c->clock };
    if (bytes > c->most || find(c, key)) return;
    while (bytes > c->most - c->stats.bytes) drop(c, oldest(c));
    if (!grow(c)) return; /* a cache: without memory it only knows less */
    memcpy(fresh.key, key, sizeof fresh.key);
    fresh.picture = picture_share(p);
    c->entries[c->n++] = fresh;
    c->stats.bytes += bytes;
}

struct encoder_stats encoder_cache_stats(const struct encoder_cache *c)
{
    return c->stats;
}
