#include "engine/prompt.h"
#include <inttypes.h>
#include <stdlib.h>

bool place_tokens_have(struct place_tokens t, int32_t token)
{
    return token == t.image || token == t.video;
}

static bool count_rows(int64_t *out, const int32_t *tokens, int64_t n, struct place_tokens places,
                       const struct picture *pictures, int n_pictures, struct err *e)
{
    int64_t found = 0;
    *out = n;
    for (int64_t i = 0; i < n; i++) found += place_tokens_have(places, tokens[i]);
    for (int i = 0; i < n_pictures; i++) *out += pictures[i].height * pictures[i].width - 1;
    return found == n_pictures ||
           err_set(e, ERR_ARGUMENT, "the prompt has places for %" PRId64 " images, %d given", found,
                   n_pictures);
}

/* Returns the position after it. */
static int64_t place_picture(struct row *rows, const struct picture *p, int32_t token, int64_t first)
{
    for (int64_t i = 0; i < p->height * p->width; i++)
        rows[i] = (struct row){
            .token = token,
            .position = { (int32_t)first, (int32_t)(first + i / p->width), (int32_t)(first + i % p->width) },
            .embedding = p->rows ? p->rows + i * p->cols : NULL,
        };
    return first + (p->height > p->width ? p->height : p->width);
}

bool prompt_create(struct prompt *out, const int32_t *tokens, int64_t n, struct place_tokens places,
                   const struct picture *pictures, int n_pictures, int64_t first, struct err *e)
{
    *out = (struct prompt){ 0 };
    int64_t total, position = first, at = 0;
    if (!count_rows(&total, tokens, n, places, pictures, n_pictures, e)) return false;
    out->rows = malloc((size_t)total * sizeof *out->rows + 1);
    if (!out->rows) return err_memory(e, "prompt", (uint64_t)total * sizeof *out->rows);
    out->n = total;
    for (int64_t i = 0; i < n; i++) {
        if (place_tokens_have(places, tokens[i])) {
            position = place_picture(out->rows + at, pictures, tokens[i], position);
            at += pictures->height * pictures->width;
            pictures++;
        } else {
            int32_t p = (int32_t)position++;
            out->rows[at++] = (struct row){ .token = tokens[i], .position = { p, p, p } };
        }
    }
    return true;
}

void prompt_free(struct prompt *p)
{
    free(p->rows);
    *p = (struct prompt){ 0 };
}
