#include "engine/picture.h"
#include "model/vision.h"
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>

struct picture_reader {
    struct model *model;
    struct vision *vision;
    struct patch_rule rule, video_rule;
};

static bool load_rule(struct picture_reader *r, struct err *e)
{
    const struct config *c = r->model->config;
    if (c->vision.channels != 3)
        return err_set(e, ERR_UNSUPPORTED, "vision_config.in_channels is %d, only 3 is supported",
                       c->vision.channels);
    const char *dir = r->model->checkpoint->path;
    return patch_rule_load(&r->rule, dir, c->vision.patch, c->vision.temporal_patch, c->vision.merge, e) &&
           patch_rule_load_video(&r->video_rule, dir, c->vision.patch, c->vision.temporal_patch,
                                 c->vision.merge, e);
}

bool picture_reader_create(struct picture_reader **out, struct model *m, struct err *e)
{
    struct picture_reader *r = calloc(1, sizeof *r);
    *out = r;
    if (!r) return err_memory(e, "vision tower", sizeof *r);
    r->model = m;
    if (vision_create(&r->vision, m, e) && load_rule(r, e)) return true;
    picture_reader_free(r);
    *out = NULL;
    return false;
}

void picture_reader_free(struct picture_reader *r)
{
    if (!r) return;
    vision_free(r->vision);
    free(r);
}

/* As large as the tower makes it of these patches. */
static struct picture sized(const struct picture_reader *r, const struct patches *p)
{
    const struct config *c = r->model->config;
    return (struct picture){ p->height / c->vision.merge, p->width / c->vision.merge, c->hidden_size, NULL };
}

bool picture_open(const struct picture_reader *r, struct picture *out, struct patches *patches,
                  const char *source, const struct image_limits *limits, struct err *e)
{
    struct image image;
    *out = (struct picture){ 0 };
    *patches = (struct patches){ 0 };
    bool ok = image_load(&image, source, limits, e) && patches_make(patches, &image, &r->rule, e);
    image_free(&image);
    if (ok) *out = sized(r, patches);
    return ok;
}

int64_t picture_count_video(const struct picture_reader *r, const char *source)
{
    return (frames_count(source) + r->video_rule.frames - 1) / r->video_rule.frames;
}

bool picture_open_video(const struct picture_reader *r, struct picture *out, struct patches *patches,
                        const char *source, const struct image_limits *limits, struct err *e)
{
    if (!frames_patches(patches, source, &r->video_rule, limits, e)) return false;
    for (int64_t i = 0, n = picture_count_video(r, source); i < n; i++) out[i] = sized(r, &patches[i]);
    return true;
}

/* Rows lie behind the number of pictures that have them. */
struct shared {
    atomic_int holders;
    _Alignas(64) float rows[];
};

static struct shared *shared_of(float *rows)
{
    return (struct shared *)(void *)((char *)rows - offsetof(struct shared, rows));
}

static bool make_rows(struct picture *p, struct err *e)
{
    uint64_t bytes = (uint64_t)(p->height * p->width * p->cols) * sizeof *p->rows,
             each = sizeof(struct shared);
    struct shared *s = aligned_alloc(each, sizeof *s + (bytes + each - 1) / each * each);
    if (!s) return err_memory(e, "image", bytes);
    atomic_init(&s->holders, 1);
    p->rows = s->rows;
    return true;
}

bool picture_see(struct picture_reader *r, struct picture *out, const struct patches *p, struct err *e)
{
    if (!make_rows(out, e)) return false;
    if (vision_run(r->vision, out->rows, p->values, p->height, p->width, e)) return true;
    picture_free(out);
    return false;
}

bool picture_read(struct picture_reader *r, struct picture *out, const char *source,
                  const struct image_limits *limits, struct err *e)
{
    struct patches patches;
    bool ok = picture_open(r, out, &patches, source, limits, e) && picture_see(r, out, &patches, e);
    patches_free(&patches);
    return ok;
}

struct picture picture_share(const struct picture *p)
{
    if (p->rows) atomic_fetch_add(&shared_of(p->rows)->holders, 1);
    return *p;
}

void picture_free(struct picture *p)
{
    if (p->rows && atomic_fetch_sub(&shared_of(p->rows)->holders, 1) == 1) free(shared_of(p->rows));
    *p = (struct picture){ 0 };
}
