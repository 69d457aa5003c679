#include "engine/cuts.h"
#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>

static bool no_digest(struct err *e)
{
    return err_set(e, ERR_MEMORY, "no memory for SHA-256");
}

bool cuts_digest(uint8_t out[32], const void *data, uint64_t bytes, struct err *e)
{
    return EVP_Digest(data, bytes, out, NULL, EVP_sha256(), NULL) == 1 || no_digest(e);
}

static bool ends_turn(const struct cut_rules *r, const struct row *rows, int64_t end)
{
    if (r->n_turn_end == 0 || end < r->n_turn_end) return false;
    for (int i = 0; i < r->n_turn_end; i++) {
        const struct row *row = &rows[end - r->n_turn_end + i];
        if (row->token != r->turn_end[i]) return false;
    }
    return true;
}

static int64_t end_of(const struct cut_picture *p)
{
    return p->first + p->height * p->width;
}

/* What goes into a key of one row. */
struct row_identity {
    int32_t token, position[3];
    int64_t height, width, place; /* of the picture; zeros in text */
    uint8_t digest[32];
};

static struct row_identity identify(const struct row *row, int64_t at, const struct cut_picture *p)
{
    struct row_identity id = { .token = row->token,
                               .position = { row->position[0], row->position[1], row->position[2] } };
    if (!p || at < p->first) return id;
    id.height = p->height;
    id.width = p->width;
    id.place = at - p->first;
    memcpy(id.digest, p->digest, sizeof id.digest);
    return id;
}

static bool add(struct cuts *c, int64_t at, const uint8_t key[32], struct err *e)
{
    if ((c->n & (c->n - 1)) == 0) { /* room for a power of two */
        struct cut *grown = realloc(c->items, (size_t)(c->n ? 2 * c->n : 1) * sizeof *grown);
        if (!grown) return err_memory(e, "cuts", (size_t)(2 * c->n + 1) * sizeof *grown);
        c->items = grown;
    }
    c->items[c->n].at = at;
    memcpy(c->items[c->n++].key, key, 32);
    return true;
}

/* The key at a cut: of the key before and the rows since. The context has taken the rows; it begins anew. */
static bool close_key(EVP_MD_CTX *sha, uint8_t key[32])
{
    return EVP_DigestFinal_ex(sha, key, NULL) == 1 && EVP_DigestInit_ex(sha, EVP_sha256(), NULL) == 1 &&
           EVP_DigestUpdate(sha, key, 32) == 1;
}

bool cuts_make(struct cuts *out, const struct cut_rules *rules, const struct prompt *prompt,
               const struct cut_picture *pictures, int n_pictures, const uint8_t salt[32], struct err *e)
{
    uint8_t key[32];
    const struct cut_picture *p = pictures, *end = pictures + n_pictures;
    EVP_MD_CTX *sha = EVP_MD_CTX_new();
    *out = (struct cuts){ 0 };
    bool ok =
        (sha && EVP_DigestInit_ex(sha, EVP_sha256(), NULL) == 1 && EVP_DigestUpdate(sha, salt, 32) == 1) ||
        no_digest(e);
    for (int64_t i = 0, last = 0; ok && i < prompt->n; i++) {
        struct row_identity id = identify(&prompt->rows[i], i, p < end ? p : NULL);
        bool ends = p < end && i + 1 == end_of(p), picture_ends = ends && !p->goes_on;
        p += ends;
        ok = EVP_DigestUpdate(sha, &id, sizeof id) == 1 || no_digest(e);
        int64_t length = i + 1 - last;
        bool cut = length == rules->interval ||
                   (length >= DELTA_CHUNK && (picture_ends || ends_turn(rules, prompt->rows, i + 1)));
        if (!ok || !cut) continue;
        ok = (close_key(sha, key) || no_digest(e)) && add(out, i + 1, key, e);
        last = i + 1;
    }
    EVP_MD_CTX_free(sha);
    if (!ok) cuts_free(out);
    return ok;
}

void cuts_free(struct cuts *c)
{
    free(c->items);
    *c = (struct cuts){ 0 };
}

int64_t cuts_next(const struct cuts *c, int64_t done, int64_t n)
{
    for (int64_t i = 0; i < c->n; i++)
        if (c->items[i].at > done) return c->items[i].at;
    return n;
}

const struct cut *cuts_at(const struct cuts *c, int64_t rows)
{
    for (int64_t i = 0; i < c->n; i++)
        if (c->items[i].at == rows) return &c->items[i];
    return NULL;
}
