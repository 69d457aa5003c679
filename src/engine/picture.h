/* Pictures on their way into prompts: from a file or URL to the rows that the language model reads. */
#ifndef ENGINE_PICTURE_H
#define ENGINE_PICTURE_H
#include "image/frames.h"
#include "image/image.h"
#include "image/patches.h"
#include "model/model.h"

struct picture {
    int64_t height, width; /* in rows of the language model */
    int64_t cols;          /* the model's hidden_size */
    float *rows;           /* [height * width][cols], owned, with others that picture_share made */
};

/* The vision tower and how it wants its pictures. */
struct picture_reader;
/* m: borrow. ERR_UNSUPPORTED for a model that does not see. */
bool picture_reader_create(struct picture_reader **out, struct model *m, struct err *e);
void picture_reader_free(struct picture_reader *r); /* NULL is fine */

/* source and limits as image_load takes them. */
bool picture_read(struct picture_reader *r, struct picture *out, const char *source,
                  const struct image_limits *limits, struct err *e);
/* The two halves of it. The first, on any thread, leaves out->rows NULL; the second, on the backend's, is
 * what the tower makes of them. */
bool picture_open(const struct picture_reader *r, struct picture *out, struct patches *patches,
                  const char *source, const struct image_limits *limits, struct err *e);
/* A video's pairs of frames, each a picture of its own; source as frames.h takes it. */
int64_t picture_count_video(const struct picture_reader *r, const char *source);
bool picture_open_video(const struct picture_reader *r, struct picture *out, struct patches *patches,
                        const char *source, const struct image_limits *limits, struct err *e);
bool picture_see(struct picture_reader *r, struct picture *out, const struct patches *patches, struct err *e);
/* The same picture and rows; these are freed with the last that has them. */
struct picture picture_share(const struct picture *p);
void picture_free(struct picture *p); /* on any thread; accepts a zeroed one */
#endif
