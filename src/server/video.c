#include "server/video.h"
#include "image/frames.h"
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { VIDEOS_DEFAULT_MAX = 4 };

int video_most(const struct api *a)
{
    int most = a->o.max_videos;
    return most == 0 ? VIDEOS_DEFAULT_MAX : most < 0 ? 0 : most;
}

static bool add(struct prompt_text *p, const struct api *a, const char *url, const char *param,
                struct fault *f)
{
    int64_t frames = frames_count(url);
    if (!a->o.config->has_vision || a->o.config->video_token < 0)
        return fault_set(f, param, "%s: the served model takes no videos", param);
    if (frames == 0)
        return fault_set(f, param,
                         "%s: a video is taken as its frames and in no other form: expected "
                         "data:video/jpeg;base64,FRAME,FRAME,... where each FRAME is a JPEG file in base64",
                         param);
    if (frames < FRAMES_LEAST || frames > FRAMES_MOST)
        return fault_set(f, param, "%s: a video has %d to %d frames, found %s%" PRId64, param, FRAMES_LEAST,
                         FRAMES_MOST, frames > FRAMES_MOST ? "more than " : "",
                         frames > FRAMES_MOST ? FRAMES_MOST : frames);
    if (p->n_videos >= video_most(a))
        return fault_set(f, param, "%s: more than %d videos in a request", param, video_most(a));
    const char **grown = realloc(p->pictures, (size_t)(p->n_pictures + 1) * sizeof *grown);
    if (!grown) return fault_memory(f);
    p->pictures = grown;
    grown[p->n_pictures++] = url;
    p->n_videos++;
    return true;
}

bool video_part(struct prompt_text *p, const struct api *a, const json_t *part, const char *param,
                struct fault *f)
{
    const json_t *video = json_object_get(part, "video_url");
    struct param at;
    param_set(&at, json_is_string(video) ? "%s.video_url" : "%s.video_url.url", param);
    if (!json_is_string(video)) video = json_object_get(video, "url");
    if (!json_is_string(video)) return fields_wrong(f, at.text, "a data: URL", video);
    return add(p, a, json_string_value(video), at.text, f);
}

/* When the frames of the request's videos were. */
struct times {
    double fps;
    int64_t most;          /* frames of a video that are to be taken; < 0: all */
    const json_t *indices; /* NULL: one after the other */
};

static const char PARAM[] = "media_io_kwargs.video";

static bool read_indices(struct times *t, const json_t *list, struct fault *f)
{
    if (!list || json_is_null(list)) return true;
    if (!json_is_array(list)) return fields_wrong(f, PARAM, "frames_indices as an array", list);
    int64_t last = 0;
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *v = json_array_get(list, i);
        if (!json_is_integer(v) || json_integer_value(v) < last || json_integer_value(v) > INT32_MAX)
            return fault_set(f, PARAM, "%s.frames_indices: expected integers from 0 on that ascend", PARAM);
        last = json_integer_value(v);
    }
    t->indices = list;
    return true;
}

static bool read_times(struct times *t, const json_t *body, struct fault *f)
{
    const struct fields in = { body, "", f };
    const json_t *media = NULL, *video = NULL;
    float fps = 1;
    bool samples = false;
    if (!fields_object(&in, "media_io_kwargs", &media)) return false;
    const struct fields of_media = { media, "media_io_kwargs.", f };
    if (media && !fields_object(&of_media, "video", &video)) return false;
    const struct fields of_video = { video, "media_io_kwargs.video.", f };
    t->most = -1;
    if (media && !fields_refuse(&of_media, "image", "pictures are prepared as the checkpoint says"))
        return false;
    if (video && (!fields_float(&of_video, "fps", 1e-3, 1e6, &fps) ||
                  !fields_int(&of_video, "num_frames", -1, FRAMES_MOST, &t->most) ||
                  !fields_bool(&of_video, "do_sample_frames", &samples)))
        return false;
    if (samples)
        return fault_set(f, PARAM, "%s.do_sample_frames: the frames given are all taken; send those wanted",
                         PARAM);
    t->fps = (double)fps;
    return !video || read_indices(t, json_object_get(video, "frames_indices"), f);
}

static double time_of(const struct times *t, int64_t frame)
{
    const json_t *at = t->indices ? json_array_get(t->indices, (size_t)frame) : NULL;
    return (double)(at ? json_integer_value(at) : frame) / t->fps;
}

static const char PLACE[] = "<|vision_start|><|video_pad|><|vision_end|>";

/* The mean of a pair's times, and its place. */
static void write_pairs(FILE *out, const struct times *t, int64_t frames, int64_t each)
{
    for (int64_t i = 0; i < frames; i += each) {
        int64_t last = i + each - 1 < frames ? i + each - 1 : frames - 1;
        fprintf(out, "<%.1f seconds>%s", (time_of(t, i) + time_of(t, last)) / 2, PLACE);
    }
}

/* The next video among the pictures, from *at on. */
static const char *next_video(const struct prompt_text *p, int *at)
{
    while (*at < p->n_pictures && frames_count(p->pictures[*at]) == 0) ++*at;
    return *at < p->n_pictures ? p->pictures[(*at)++] : NULL;
}

static bool write_all(FILE *out, const char *text, size_t bytes, const struct prompt_text *p, int64_t each,
                      const struct times *t, struct fault *f)
{
    int at = 0;
    const char *video, *end = text + bytes;
    while ((video = next_video(p, &at))) {
        int64_t frames = frames_count(video);
        const char *place = memmem(text, (size_t)(end - text), PLACE, sizeof PLACE - 1);
        if (!place) return fault_set(f, "messages", "messages: the chat template has no place for a video");
        if (t->indices && json_array_size(t->indices) != (size_t)frames)
            return fault_set(f, PARAM, "%s.frames_indices: %zu of them, the video has %" PRId64 " frames",
                             PARAM, json_array_size(t->indices), frames);
        if (t->most >= 0 && frames > t->most)
            return fault_set(f, PARAM,
                             "%s.num_frames: %" PRId64 ", the video has %" PRId64 "; send those wanted",
                             PARAM, t->most, frames);
        fwrite(text, 1, (size_t)(place - text), out);
        write_pairs(out, t, frames, each);
        text = place + sizeof PLACE - 1;
    }
    fwrite(text, 1, (size_t)(end - text), out);
    return true;
}

bool video_places(char **text, size_t *bytes, const struct prompt_text *p, const struct api *a,
                  const json_t *body, struct fault *f)
{
    struct times t = { 0 };
    char *written = NULL;
    size_t n = 0;
    if (!read_times(&t, body, f)) return false;
    if (p->n_videos == 0) return true;
    FILE *out = open_memstream(&written, &n);
    if (!out) return fault_memory(f);
    bool ok = write_all(out, *text, *bytes, p, a->patch_rule.frames, &t, f);
    if (fclose(out) != 0) ok = fault_memory(f);
    if (!ok) {
        free(written);
        return false;
    }
    free(*text);
    *text = written;
    *bytes = n;
    return true;
}
