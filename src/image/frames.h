/* Videos that a client has cut into frames: data:video/jpeg;base64,FRAME,FRAME,... as vLLM takes them, each a
 * file that image.h reads. No container is: there is no decoder of videos here. */
#ifndef IMAGE_FRAMES_H
#define IMAGE_FRAMES_H
#include "image/patches.h"
#include <stdbool.h>

enum { FRAMES_LEAST = 2, FRAMES_MOST = 768 }; /* of a video */

/* How many frames such a URL has, FRAMES_MOST + 1 for any number above; 0: it is no such URL. */
int64_t frames_count(const char *source);

/* The patches of each rule->frames frames in turn, of which there are several [frames_count / rule->frames,
 * rounded up]; the last frame is repeated where some are missing. rule: patch_rule_load_video's. All frames
 * are of one size. limits: of each frame; FRAMES_PIXELS_MAX of all of them besides. One frame is decoded at a
 * time. On failure nothing is held. */
#define FRAMES_PIXELS_MAX (UINT64_C(1) << 30)
bool frames_patches(struct patches *out, const char *source, const struct patch_rule *rule,
                    const struct image_limits *limits, struct err *e);
#endif
