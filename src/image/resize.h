/* The size at which the vision tower sees a picture, and the resampling to it. */
#ifndef IMAGE_RESIZE_H
#define IMAGE_RESIZE_H
#include "base/err.h"
#include <stdint.h>

/* Multiples of `factor` near height x width with min to max pixels, the shape kept as well as that allows.
 * ERR_LIMIT where one side is more than 200 times the other. Source: transformers, smart_resize of
 * models/qwen2_vl/image_processing_qwen2_vl.py. */
struct resize_rule {
    int64_t factor, pixels_min, pixels_max;
};
bool resize_fit(int64_t *out_height, int64_t *out_width, int64_t height, int64_t width,
                const struct resize_rule *rule, struct err *e);

/* The same for each of `frames` frames of a clip, with min and max pixels in all; sides shorter than `factor`
 * grow to it first. Source: transformers, smart_resize of models/qwen3_vl/video_processing_qwen3_vl.py. */
bool resize_fit_clip(int64_t *out_height, int64_t *out_width, int64_t height, int64_t width, int64_t frames,
                     const struct resize_rule *rule, struct err *e);

/* RGB, [height][width][3]. Cubic convolution, a = -0.5, widened where the picture shrinks; rows first, into
 * bytes, then columns; weights of 15 bits. Source: torchvision's antialiased resize of uint8 on a CPU, which
 * is what the released preprocessor uses. */
bool resize_bicubic(uint8_t *out, int64_t out_height, int64_t out_width, const uint8_t *in, int64_t height,
                    int64_t width, struct err *e);
#endif
