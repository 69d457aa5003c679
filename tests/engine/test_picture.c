/* A picture's way into a prompt, against Hugging Face transformers in float32 (tests/golden/README.md): pixel
 * values, positions, logits; the rule of positions on the vectors; several pictures; any split into steps. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "engine/cuts.h"
#include "engine/prompt.h"
#include "image/patches.h"
#include "support/models.h"
#include "support/videos.h"
#include "tokenizer/tokenizer.h"
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct backend_options tested = { .device = DEVICE_CPU };

static const void *values(const struct safetensors *f, const char *name, int64_t *n)
{
    const struct tensor *t = safetensors_find(f, name);
    assert_non_null(t);
    if (n) *n = t->shape[0];
    return t->data;
}

static int64_t argmax(const float *x, int64_t n)
{
    int64_t best = 0;
    for (int64_t i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return best;
}

/* The golden's token list has the placeholder once a row; a prompt before pictures has it once a picture. */
static int64_t collapse(int32_t *out, const int32_t *ids, int64_t n, int64_t place)
{
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i++)
        if (ids[i] != place || i == 0 || ids[i - 1] != place) out[kept++] = ids[i];
    return kept;
}

static void check_pixels(const struct safetensors *f, const char *image, const struct model *m)
{
    struct patch_rule rule;
    struct image picture;
    struct patches p;
    struct err e = { 0 };
    const struct config *c = m->config;
    int64_t n;
    const float *want = values(f, "pixel_values", &n);
    const int32_t *grid = values(f, "grid_thw", NULL);
    must(patch_rule_load(&rule, m->checkpoint->path, c->vision.patch, c->vision.temporal_patch,
                         c->vision.merge, &e),
         &e);
    must(image_load(&picture, image, NULL, &e), &e);
    must(patches_make(&p, &picture, &rule, &e), &e);
    assert_int_equal(p.height, grid[1]);
    assert_int_equal(p.width, grid[2]);
    assert_int_equal(p.cols, 1536);
    float worst = 0;
    for (int64_t i = 0; i < n * p.cols; i++) worst = fmaxf(worst, fabsf(p.values[i] - want[i]));
    printf("note: %s: pixel values differ by %g at most\n", image, (double)worst);
    assert_true(worst <= 1e-6f); /* one step of a sample would be 2 / 255 */
    patches_free(&p);
    image_free(&picture);
}

struct logits_check {
    const float *want;
    int64_t vocab;
    double worst;
    int differ;
};

static void check_logits(struct logits_check *c, int64_t at, const float *logits)
{
    const float *want = c->want + at * c->vocab;
    double d = 0, w = 0;
    for (int64_t i = 0; i < c->vocab; i++) {
        d += ((double)logits[i] - want[i]) * ((double)logits[i] - want[i]);
        w += (double)want[i] * want[i];
    }
    double error = sqrt(d / w);
    if (!(error <= c->worst)) c->worst = error;
    c->differ += argmax(logits, c->vocab) != argmax(want, c->vocab);
}

static void check_split(struct model *m, const struct prompt *p, int64_t step, struct logits_check *c)
{
    struct engine *g;
    struct err e = { 0 };
    int handle;
    must(engine_create(&g, m, &(struct engine_options){ .context = 128, .kv = KV_F32 }, &e), &e);
    must(engine_open(g, &handle, &e), &e);
    for (int64_t at = 0, n; at < p->n; at += n) {
        struct mat hidden;
        n = p->n - at < step ? p->n - at : step;
        must(engine_step(g, &(struct engine_run){ .handle = handle, .rows = p->rows + at, .n = n }, 1,
                         &hidden, &e),
             &e);
        for (int64_t i = 0; i < n; i++) check_logits(c, at + i, engine_logits_host(g, hidden, &i, 1));
    }
    assert_int_equal(engine_length(g, handle), p->n);
    assert_int_equal(engine_position(g, handle), p->rows[p->n - 1].position[0] + 1);
    engine_free(g);
}

/* The rows up to the picture and a little on, then plain tokens: their positions are the engine's to know. */
static void check_tokens_after(struct model *m, const struct prompt *p, struct logits_check *c)
{
    enum { LAST = 5 };
    struct engine *g;
    struct err e = { 0 };
    int handle;
    const float *logits;
    must(engine_create(&g, m, &(struct engine_options){ .context = 128, .kv = KV_F32 }, &e), &e);
    must(engine_open(g, &handle, &e), &e);
    must(engine_prefill_rows(g, handle, p->rows, p->n - LAST, &logits, NULL, &e), &e);
    check_logits(c, p->n - LAST - 1, logits);
    for (int64_t i = p->n - LAST; i < p->n; i++) {
        must(engine_prefill(g, handle, &p->rows[i].token, 1, &logits, NULL, &e), &e);
        check_logits(c, i, logits);
    }
    engine_free(g);
}

/* What the head guesses by the definition (model.h): beside each hidden row the embedding of the row that
 * comes after, a picture's too, at the position of the former. `next` comes after the prompt. */
static int32_t defined_guess(struct model *m, const struct prompt *p, int32_t next)
{
    enum { ROWS = 64, PAGES = 1 };
    struct layer_state states[64] = { 0 };
    struct row rows[ROWS];
    struct step *step;
    struct err e = { 0 };
    int64_t index[ROWS];
    int32_t pages[PAGES] = { 0 }, guess;
    struct span span = { .n = p->n, .pages = pages };
    assert_true(p->n <= ROWS && m->config->n_layers < 64);
    for (int i = 0; i <= m->config->n_layers; i++)
        must(layer_state_create(&states[i], m, i, KV_F32, PAGES, 1, &e), &e);
    must(step_create(&step, m, ROWS, 1, ROWS, &e), &e);
    for (int64_t i = 0; i < p->n; i++) {
        rows[i] = i + 1 < p->n ? p->rows[i + 1] : (struct row){ .token = next };
        memcpy(rows[i].position, p->rows[i].position, sizeof rows[i].position);
        index[i] = i;
    }
    struct mat hidden = step_run(step, &(struct step_rows){ p->rows, p->n, &span, 1, false }, states);
    struct mat row = step_mtp(step, &(struct step_rows){ rows, p->n, &span, 1, false }, hidden, index,
                              &states[m->config->n_layers]);
    step_draft(step, &guess, row, &(int64_t){ 0 }, 1);
    must(m->backend->ops->wait(m->backend->queue, &e), &e);
    step_free(step);
    for (int i = 0; i <= m->config->n_layers; i++) layer_state_free(&states[i], m);
    return guess;
}

/* The engine, a few rows a step, shows its head the same. */
static void check_guesses(struct model *m, const struct prompt *p)
{
    enum { TRIES = 12 };
    struct engine *g;
    struct err e = { 0 };
    int different = 0;
    int32_t last = -1;
    must(engine_create(&g, m, &(struct engine_options){ .context = 128, .step_rows = 7, .drafts = 1 }, &e),
         &e);
    for (int32_t i = 0; i < TRIES; i++) {
        struct engine_draft draft = { .next = 40 + 37 * i, .n = 1 };
        must(engine_open(g, &draft.handle, &e), &e);
        must(engine_prefill_rows(g, draft.handle, p->rows, p->n, NULL, NULL, &e), &e);
        must(engine_draft(g, &draft, 1, &e), &e);
        assert_int_equal(draft.tokens[0], defined_guess(m, p, draft.next));
        different += draft.tokens[0] != last;
        last = draft.tokens[0];
        engine_close(g, draft.handle);
    }
    assert_true(different > TRIES / 2);
    engine_free(g);
}

/* most: relative error of a row; see test_vision.c for what bounds the study model's. */
static void check_model(const char *model, const char *golden, const char *image, double most)
{
    struct loaded l;
    struct safetensors f;
    struct picture_reader *reader;
    struct picture picture;
    struct prompt p;
    struct err e = { 0 };
    int32_t tokens[64];
    int64_t n;
    must(safetensors_open(&f, golden, &e), &e);
    load_model(&l, model, &tested);
    check_pixels(&f, image, &l.model);
    must(picture_reader_create(&reader, &l.model, &e), &e);
    must(picture_read(reader, &picture, image, NULL, &e), &e);
    const int32_t *ids = values(&f, "ids", &n), *positions = values(&f, "position_ids", NULL);
    int64_t image_token = l.model.config->image_token;
    must(prompt_create(&p, tokens, collapse(tokens, ids, n, image_token),
                       (struct place_tokens){ image_token, -1 }, &picture, 1, 0, &e),
         &e);
    assert_int_equal(p.n, n);
    for (int64_t i = 0; i < n; i++) {
        assert_int_equal(p.rows[i].token, ids[i]);
        assert_int_equal(!p.rows[i].embedding, ids[i] != image_token);
        for (int k = 0; k < 3; k++) assert_int_equal(p.rows[i].position[k], positions[k * n + i]);
    }
    static const int64_t steps[] = { 64, 1, 7 };
    for (int i = 0; i < 3; i++) {
        struct logits_check c = { .want = values(&f, "logits", NULL), .vocab = l.model.config->vocab_size };
        check_split(&l.model, &p, steps[i], &c);
        if (i == 0) check_tokens_after(&l.model, &p, &c);
        printf("note: %s on %s, %d rows a step: logits of a picture's prompt %.1e\n", model, l.backend.name,
               (int)steps[i], c.worst);
        assert_true(c.worst <= most);
        assert_int_equal(c.differ, 0);
    }
    must(model_bind_mtp(&l.model, true, &e), &e);
    check_guesses(&l.model, &p);
    prompt_free(&p);
    picture_free(&picture);
    picture_reader_free(reader);
    unload_model(&l);
    safetensors_close(&f);
}

/* Five frames: the third pair has its frame twice. */
enum { FRAMES = 5, PAIRS = 3 };
struct clip {
    struct loaded l;
    struct safetensors golden;
    struct picture_reader *reader;
    struct picture pairs[PAIRS];
    struct patches patches[PAIRS];
    char *url;
};

static void open_clip(struct clip *c)
{
    static const char *const files[FRAMES] = {
        "tests/golden/demo/frames/0.png", "tests/golden/demo/frames/1.png", "tests/golden/demo/frames/2.png",
        "tests/golden/demo/frames/3.png", "tests/golden/demo/frames/4.png"
    };
    struct err e = { 0 };
    c->url = video_url(files, FRAMES);
    must(safetensors_open(&c->golden, "tests/golden/demo/golden_video.safetensors", &e), &e);
    load_model(&c->l, "models/demo", &tested);
    must(picture_reader_create(&c->reader, &c->l.model, &e), &e);
    assert_int_equal(picture_count_video(c->reader, c->url), PAIRS);
    must(picture_open_video(c->reader, c->pairs, c->patches, c->url, NULL, &e), &e);
}

static void close_clip(struct clip *c)
{
    for (int i = 0; i < PAIRS; i++) {
        picture_free(&c->pairs[i]);
        patches_free(&c->patches[i]);
    }
    free(c->url);
    picture_reader_free(c->reader);
    unload_model(&c->l);
    safetensors_close(&c->golden);
}

/* Of each pair what goes into the tower, and what comes out. */
static void check_pairs(struct clip *c)
{
    const float *pixels = values(&c->golden, "pixel_values", NULL),
                *want = values(&c->golden, "vision_out", NULL);
    const int32_t *grid = values(&c->golden, "grid_thw", NULL);
    struct err e = { 0 };
    float worst = 0;
    double off = 0, all = 0;
    assert_int_equal(grid[0], PAIRS);
    for (int i = 0; i < PAIRS; i++) {
        struct patches *p = &c->patches[i];
        struct picture *seen = &c->pairs[i];
        assert_int_equal(p->height, grid[1]);
        assert_int_equal(p->width, grid[2]);
        for (int64_t k = 0; k < p->height * p->width * p->cols; k++)
            worst = fmaxf(worst, fabsf(p->values[k] - *pixels++));
        must(picture_see(c->reader, seen, p, &e), &e);
        for (int64_t k = 0; k < seen->height * seen->width * seen->cols; k++, want++) {
            off += ((double)seen->rows[k] - *want) * ((double)seen->rows[k] - *want);
            all += (double)*want * *want;
        }
    }
    assert_true(worst <= 1e-6f);
    assert_true(sqrt(off / all) <= 1e-5);
}

/* The golden's text as tokens, these as rows. */
static void lay_clip(struct prompt *p, struct clip *c)
{
    struct tokenizer *tokenizer;
    struct token_list text = { 0 };
    struct err e = { 0 };
    int32_t tokens[128];
    int64_t n, bytes, rows = 0, video = c->l.model.config->video_token;
    const int32_t *ids = values(&c->golden, "ids", &n), *positions = values(&c->golden, "position_ids", NULL);
    const char *prompt = values(&c->golden, "prompt", &bytes);
    int64_t kept = collapse(tokens, ids, n, video);
    must(tokenizer_load(&tokenizer, "models/demo", &e), &e);
    must(tokenizer_encode(tokenizer, &text, prompt, (size_t)bytes, 0, &e), &e);
    assert_int_equal(text.n, kept);
    assert_memory_equal(text.ids, tokens, (size_t)kept * sizeof *tokens);
    must(prompt_create(p, tokens, kept, (struct place_tokens){ -1, video }, c->pairs, PAIRS, 0, &e), &e);
    assert_int_equal(p->n, n);
    for (int64_t i = 0; i < n; i++) {
        assert_int_equal(p->rows[i].token, ids[i]);
        rows += p->rows[i].embedding != NULL;
        for (int k = 0; k < 3; k++) assert_int_equal(p->rows[i].position[k], positions[k * n + i]);
    }
    assert_int_equal(rows, PAIRS * c->pairs[0].height * c->pairs[0].width);
    free(text.ids);
    tokenizer_free(tokenizer);
}

static void a_video_matches_its_golden(void **state)
{
    (void)state;
    static const int64_t steps[] = { 128, 7 };
    struct clip c = { 0 };
    struct prompt p;
    open_clip(&c);
    check_pairs(&c);
    lay_clip(&p, &c);
    for (int i = 0; i < 2; i++) {
        struct logits_check l = { .want = values(&c.golden, "logits", NULL),
                                  .vocab = c.l.model.config->vocab_size };
        check_split(&c.l.model, &p, steps[i], &l);
        printf("note: demo on %s, %d rows a step: logits of a video's prompt %.1e\n", c.l.backend.name,
               (int)steps[i], l.worst);
        assert_true(l.worst <= 3e-5);
        assert_int_equal(l.differ, 0);
    }
    prompt_free(&p);
    close_clip(&c);
}

static void demo_matches_its_golden(void **state)
{
    (void)state;
    check_model("models/demo", "tests/golden/demo/golden_image.safetensors",
                "tests/golden/demo/golden_image.png", 3e-5);
}

static void study_matches_its_golden(void **state)
{
    (void)state;
    const char *shared = shared_folder("an image for the study model");
    char model[512], golden[512], image[512];
    if (!shared) skip();
    snprintf(model, sizeof model, "%s/models/study", shared);
    snprintf(golden, sizeof golden, "%s/models/study-golden/golden_image.safetensors", shared);
    snprintf(image, sizeof image, "%s/models/study-golden/golden_image.png", shared);
    check_model(model, golden, image, 2e-3);
}

/* The worked case of model_vectors.json. */
static void positions_follow_the_vectors(void **state)
{
    (void)state;
    enum { IMAGE = 99 };
    static const char *const axes[] = { "T", "H", "W" };
    static const int32_t tokens[] = { 1, 2, 3, IMAGE, 4, 5 };
    float rows[6 * 4] = { 0 };
    struct picture picture = { 2, 3, 4, rows };
    struct prompt p;
    struct err e = { 0 };
    json_t *root = json_load_file("tests/golden/model_vectors.json", JSON_DECODE_INT_AS_REAL, NULL);
    assert_non_null(root);
    const json_t *want = json_object_get(json_object_get(root, "mrope"), "positions_case");
    must(prompt_create(&p, tokens, 6, (struct place_tokens){ IMAGE, -1 }, &picture, 1, 0, &e), &e);
    assert_int_equal(p.n, 11);
    for (int64_t i = 0; i < p.n; i++)
        for (int k = 0; k < 3; k++)
            assert_int_equal(p.rows[i].position[k],
                             (int)json_real_value(json_array_get(json_object_get(want, axes[k]), (size_t)i)));
    assert_ptr_equal(p.rows[8].embedding, rows + 5 * 4);
    prompt_free(&p);
    json_decref(root);
}

static void several_pictures_and_what_is_refused(void **state)
{
    (void)state;
    enum { IMAGE = 99 };
    static const int32_t tokens[] = { IMAGE, 1, IMAGE, IMAGE };
    float rows[8] = { 0 };
    struct picture pictures[] = { { 1, 1, 1, rows }, { 3, 1, 1, rows + 1 }, { 2, 2, 1, rows + 4 } };
    struct prompt p;
    struct err e = { 0 };
    must(prompt_create(&p, tokens, 4, (struct place_tokens){ IMAGE, -1 }, pictures, 3, 10, &e), &e);
    static const int32_t want[][3] = { { 10, 10, 10 }, { 11, 11, 11 }, { 12, 12, 12 },
                                       { 12, 13, 12 }, { 12, 14, 12 }, { 15, 15, 15 },
                                       { 15, 15, 16 }, { 15, 16, 15 }, { 15, 16, 16 } };
    assert_int_equal(p.n, 9);
    for (int i = 0; i < 9; i++) assert_memory_equal(p.rows[i].position, want[i], sizeof want[i]);
    assert_ptr_equal(p.rows[8].embedding, rows + 7);
    prompt_free(&p);
    assert_false(prompt_create(&p, tokens, 4, (struct place_tokens){ IMAGE, -1 }, pictures, 2, 0, &e));
    assert_int_equal(e.code, ERR_ARGUMENT);
    assert_string_equal(e.text, "the prompt has places for 3 images, 2 given");
}

/* What is known is kept behind a picture, and behind a video, not behind each pair of its frames. */
static void a_video_is_not_cut_inside(void **state)
{
    (void)state;
    enum { VIDEO = 98 };
    static const int32_t tokens[] = { VIDEO, VIDEO, 1 };
    static const uint8_t salt[32];
    struct picture pairs[] = { { 8, 10, 1, NULL }, { 8, 10, 1, NULL } };
    struct cut_rules rules = { .interval = 4096 };
    struct prompt p;
    struct cuts cuts;
    struct err e = { 0 };
    must(prompt_create(&p, tokens, 3, (struct place_tokens){ -1, VIDEO }, pairs, 2, 0, &e), &e);
    for (int goes_on = 0; goes_on < 2; goes_on++) {
        struct cut_picture places[] = { { .height = 8, .width = 10, .goes_on = goes_on },
                                        { .first = 80, .height = 8, .width = 10 } };
        must(cuts_make(&cuts, &rules, &p, places, 2, salt, &e), &e);
        assert_int_equal(cuts.n, 2 - goes_on);
        assert_int_equal(cuts.items[0].at, goes_on ? 160 : 80);
        cuts_free(&cuts);
    }
    prompt_free(&p);
}

/* Two pictures see nothing of each other before the language model: the second's rows are those it has alone.
 */
static void a_picture_after_another(void **state)
{
    (void)state;
    struct loaded l;
    struct picture_reader *reader;
    struct picture a, b;
    struct err e = { 0 };
    load_model(&l, "models/demo", &tested);
    must(picture_reader_create(&reader, &l.model, &e), &e);
    must(picture_read(reader, &a, "tests/golden/demo/golden_image.png", NULL, &e), &e);
    must(picture_read(reader, &b, "tests/golden/demo/golden_image.png", NULL, &e), &e);
    assert_int_equal(a.height, 3);
    assert_int_equal(a.width, 5);
    assert_memory_equal(a.rows, b.rows, (size_t)(a.height * a.width * a.cols) * sizeof *a.rows);
    picture_free(&a);
    picture_free(&b);
    assert_false(picture_read(reader, &a, "tests/golden/demo/reference.json", NULL, &e));
    assert_null(a.rows);
    picture_reader_free(reader);
    unload_model(&l);
}

int main(void)
{
    const char *device = getenv("QUENCH_DEVICE");
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(demo_matches_its_golden),
        cmocka_unit_test(study_matches_its_golden),
        cmocka_unit_test(a_video_matches_its_golden),
        cmocka_unit_test(positions_follow_the_vectors),
        cmocka_unit_test(several_pictures_and_what_is_refused),
        cmocka_unit_test(a_video_is_not_cut_inside),
        cmocka_unit_test(a_picture_after_another),
    };
    if (device && strcmp(device, "cuda") == 0)
        tested = (struct backend_options){ .device = DEVICE_CUDA, .shared_memory = true };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
