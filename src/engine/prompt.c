#include "engine/prompt.h"
#include <inttypes.h>
#include <stdlib.h>

static bool count_rows(int64_t *out, const int32_t *tokens, int64_t n, int64_t image_token,
                       const struct picture *pictures, int n_pictures, struct err *e)
{
    int64_t places = 0;
    *out = n;
    for (int64_t i = 0; i < n; i++) places += tokens[i] == image_token;
    for (int i = 0; i < n_pictures; i++) *out += pictures[i].height * pictures[i].width - 1;
    return places == n_pictures ||
           err_set(e, ERR_ARGUMENT, "the prompt has places for %" PRId64 " images, %d given", places,
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

bool prompt_create(struct prompt *out, const int32_t *tokens, int64_t n, int64_t image_token,
                   const struct picture *pictures, int n_pictures, int64_t first, struct err *e)
{
    *out = (struct prompt){ 0 };
    int64_t total, position = first, at = 0;
    if (!count_rows(&total, tokens, n, image_token, pictures, n_pictures, e)) return false;
    out->rows = malloc((size_t)total * sizeof *out->rows + 1);
    if (!out->rows) return err_memory(e, "prompt", (uint64_t)total * sizeof *out->rows);
    out->n = total;
    for (int64_t i = 0; i < n; i++) {
        if (tokens[i] == image_token) {
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
