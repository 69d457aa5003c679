#include "server/response_store.h"
#include "base/clock.h"
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum { BUCKETS = 1024 };

struct entry {
    struct stored_response response; /* first: what callers hold is the entry */
    struct entry *next;              /* of the bucket */
    struct entry *older, *newer;     /* by use */
    atomic_int holders;              /* the store is one */
    uint64_t owner;
    double since;
    size_t bytes;
    char id[RESPONSE_ID_MAX];
    char texts[];
};

struct response_store {
    pthread_mutex_t lock; /* of all below; nothing is copied or freed under it */
    struct entry *buckets[BUCKETS];
    struct entry *oldest, *newest; /* used longest ago, last */
    size_t bytes, bytes_max;
    double seconds_max;
};

bool response_store_create(struct response_store **out, size_t bytes_max, double seconds_max, struct err *e)
{
    struct response_store *s = *out = calloc(1, sizeof *s);
    if (!s) return err_memory(e, "a store of responses", sizeof *s);
    s->bytes_max = bytes_max;
    s->seconds_max = seconds_max;
    pthread_mutex_init(&s->lock, NULL);
    return true;
}

void response_store_release(const struct stored_response *r)
{
    struct entry *n = (struct entry *)r;
    if (n && atomic_fetch_sub(&n->holders, 1) == 1) free(n);
}

void response_store_free(struct response_store *s)
{
    if (!s) return;
    for (struct entry *n = s->oldest, *newer; n; n = newer) {
        newer = n->newer;
        response_store_release(&n->response);
    }
    pthread_mutex_destroy(&s->lock);
    free(s);
}

/* FNV-1a */
static struct entry **bucket_of(struct response_store *s, const char *id)
{
    uint64_t h = 14695981039346656037u;
    for (; *id; id++) h = (h ^ (unsigned char)*id) * 1099511628211u;
    return &s->buckets[(h ^ h >> 32) % BUCKETS];
}

static struct entry **place_of(struct response_store *s, const char *id, uint64_t owner)
{
    struct entry **at = bucket_of(s, id);
    while (*at && ((*at)->owner != owner || strcmp((*at)->id, id) != 0)) at = &(*at)->next;
    return at;
}

static void unlink_use(struct response_store *s, struct entry *n)
{
    *(n->older ? &n->older->newer : &s->oldest) = n->newer;
    *(n->newer ? &n->newer->older : &s->newest) = n->older;
}

static void link_newest(struct response_store *s, struct entry *n)
{
    n->older = s->newest;
    n->newer = NULL;
    *(s->newest ? &s->newest->newer : &s->oldest) = n;
    s->newest = n;
}

/* Out of the store and on to the list of those to be released, which is held together by `next`. */
static void take_out(struct response_store *s, struct entry **place, struct entry **gone)
{
    struct entry *n = *place;
    *place = n->next;
    unlink_use(s, n);
    s->bytes -= n->bytes;
    n->next = *gone;
    *gone = n;
}

static void release_all(struct entry *gone)
{
    for (struct entry *next; gone; gone = next) {
        next = gone->next;
        response_store_release(&gone->response);
    }
}

static struct entry *entry_create(const char *id, uint64_t owner, const struct stored_response *r,
                                  size_t bytes)
{
    struct entry *n = malloc(bytes);
    if (!n) return NULL;
    *n = (struct entry){ .owner = owner, .since = clock_seconds(), .bytes = bytes };
    atomic_init(&n->holders, 1);
    strcpy(n->id, id);
    memcpy(n->texts, r->body, r->body_bytes);
    memcpy(n->texts + r->body_bytes, r->messages, r->messages_bytes);
    n->response =
        (struct stored_response){ n->texts, r->body_bytes, n->texts + r->body_bytes, r->messages_bytes };
    return n;
}

bool response_store_put(struct response_store *s, const char *id, uint64_t owner,
                        const struct stored_response *r)
{
    size_t bytes = sizeof(struct entry) + r->body_bytes + r->messages_bytes;
    struct entry *gone = NULL, *n;
    if (strlen(id) >= RESPONSE_ID_MAX || bytes > s->bytes_max || !(n = entry_create(id, owner, r, bytes)))
        return false;
    pthread_mutex_lock(&s->lock);
    struct entry **same = place_of(s, id, owner);
    if (*same) take_out(s, same, &gone);
    while (s->oldest && s->bytes_max - s->bytes < bytes)
        take_out(s, place_of(s, s->oldest->id, s->oldest->owner), &gone);
    struct entry **bucket = bucket_of(s, id);
    n->next = *bucket;
    *bucket = n;
    link_newest(s, n);
    s->bytes += bytes;
    pthread_mutex_unlock(&s->lock);
    release_all(gone);
    return true;
}

const struct stored_response *response_store_get(struct response_store *s, const char *id, uint64_t owner)
{
    struct entry *gone = NULL, *found = NULL;
    pthread_mutex_lock(&s->lock);
    struct entry **place = place_of(s, id, owner);
    if (*place && clock_seconds() - (*place)->since > s->seconds_max) {
        take_out(s, place, &gone);
    } else if (*place) {
        found = *place;
        atomic_fetch_add(&found->holders, 1);
        unlink_use(s, found);
        link_newest(s, found);
    }
    pthread_mutex_unlock(&s->lock);
    release_all(gone);
    return found ? &found->response : NULL;
}

bool response_store_delete(struct response_store *s, const char *id, uint64_t owner)
{
    struct entry *gone = NULL;
    pthread_mutex_lock(&s->lock);
    struct entry **place = place_of(s, id, owner);
    if (*place) take_out(s, place, &gone);
    pthread_mutex_unlock(&s->lock);
    bool known = gone && clock_seconds() - gone->since <= s->seconds_max;
    release_all(gone);
    return known;
}

size_t response_store_bytes(struct response_store *s)
{
    pthread_mutex_lock(&s->lock);
    size_t bytes = s->bytes;
    pthread_mutex_unlock(&s->lock);
    return bytes;
}
