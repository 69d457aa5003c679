/* The vision tower and its merger: a picture's patches in, rows of the language model's width out, which
 * stand in a prompt for the picture. Bound when pictures are wanted: text needs none of it. Source:
 * docs/numerics.md names the equations. */
#ifndef MODEL_VISION_H
#define MODEL_VISION_H
#include "model/model.h"

struct vision;
/* m: borrow. ERR_UNSUPPORTED for a checkpoint without a tower. */
bool vision_create(struct vision **out, struct model *m, struct err *e);
void vision_free(struct vision *v); /* NULL is fine */

/* patches: [height * width][channels * frames * side * side], in blocks of merge x merge patches, blocks row
 * by row, as image/patches.h makes them. height and width count patches, multiples of merge. out: [height *
 * width / merge^2][hidden_size]. Both in host memory. */
bool vision_run(struct vision *v, float *out, const float *patches, int64_t height, int64_t width,
                struct err *e);
#endif
