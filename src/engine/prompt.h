/* A prompt of text and pictures as rows of steps. */
#ifndef ENGINE_PROMPT_H
#define ENGINE_PROMPT_H
#include "engine/picture.h"

struct prompt {
    struct row *rows; /* owned; embeddings are the pictures' */
    int64_t n;
};

/* Tokens that stand for pictures, an image and a pair of a video's frames; -1: none does. */
struct place_tokens {
    int64_t image, video;
};
bool place_tokens_have(struct place_tokens t, int32_t token);

/* tokens hold one place for each picture, in order; it becomes the picture's rows. Positions begin at
 * `first`: those of text count up, three times the same; rows of a picture have that number for time, and
 * added to it their own row and column for height and width; what follows goes on past the largest. Source:
 * the rule of transformers, get_rope_index of models/qwen3_5_moe. Another number of pictures than of their
 * tokens is ERR_ARGUMENT. pictures: borrow, until the rows have been through a step; where one's rows are
 * NULL yet, so are their embeddings. */
bool prompt_create(struct prompt *out, const int32_t *tokens, int64_t n, struct place_tokens places,
                   const struct picture *pictures, int n_pictures, int64_t first, struct err *e);
void prompt_free(struct prompt *p); /* accepts a zeroed one */
#endif
