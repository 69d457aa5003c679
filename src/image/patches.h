/* A picture as the vision tower takes it: resized, normalised, cut into patches. */
#ifndef IMAGE_PATCHES_H
#define IMAGE_PATCHES_H
#include "image/image.h"
#include "image/resize.h"

/* How. From preprocessor_config.json; docs/formats.md lists the keys. */
struct patch_rule {
    int side, frames, merge; /* pixels of a patch's side; times it is repeated; patches of a side that become
                                one row of the language model */
    int64_t pixels_min, pixels_max;
    float mean[3], deviation[3]; /* of samples 0 .. 1 */
};

/* Reads dir/preprocessor_config.json. side, frames and merge are the tower's, from config.json: a file that
 * says otherwise is an error. Without the file the released model's values are taken. */
bool patch_rule_load(struct patch_rule *out, const char *dir, int side, int frames, int merge, struct err *e);

/* Likewise of videos: dir/video_preprocessor_config.json, whose numbers of pixels are a clip's. */
bool patch_rule_load_video(struct patch_rule *out, const char *dir, int side, int frames, int merge,
                           struct err *e);

struct patches {
    int64_t height, width; /* in patches; multiples of merge */
    int64_t cols;          /* 3 * frames * side * side */
    float *values;         /* [height * width][cols], owned; see below */
};

/* The resized picture has height * side rows. Patches come in blocks of merge x merge, blocks row by row,
 * patches in a block row by row; a patch is [channel][frame][row][column]. Values are (sample / 255 - mean) /
 * deviation. */
bool patches_make(struct patches *out, const struct image *image, const struct patch_rule *rule,
                  struct err *e);
/* Of rule->frames frames in place of one repeated: rgb is [frames][height][width][3], the resized picture. */
bool patches_of_frames(struct patches *out, const uint8_t *rgb, int64_t height, int64_t width,
                       const struct patch_rule *rule, struct err *e);
void patches_free(struct patches *p); /* accepts a zeroed one */
#endif
