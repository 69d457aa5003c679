/* A model with YaRN against Hugging Face transformers in float32 (tools/make_yarn_goldens.py): the logits of
 * a text and of a picture's prompt, whose positions have three axes. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "engine/prompt.h"
#include "support/models.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct safetensors golden;
static const struct overrides yarn = { .rope_yarn = 4 };

static const void *values(const char *name, int64_t *n)
{
    const struct tensor *t = safetensors_find(&golden, name);
    assert_non_null(t);
    if (n) *n = t->shape[0];
    return t->data;
}

/* The worst of the golden's rows, the prompt read so many rows a step. */
static double worst_error(struct model *m, struct row *rows, int64_t n, int64_t step, const char *at_name,
                          const char *logits_name)
{
    struct engine *g;
    struct err e = { 0 };
    int handle;
    int64_t n_at, seen = 0, vocab = m->config->vocab_size;
    const int32_t *at = values(at_name, &n_at);
    const float *want = values(logits_name, NULL);
    double worst = 0;
    must(engine_create(&g, m, &(struct engine_options){ .context = 256, .kv = KV_F32 }, &e), &e);
    must(engine_open(g, &handle, &e), &e);
    for (int64_t done = 0, count; done < n; done += count) {
        struct mat hidden;
        count = n - done < step ? n - done : step;
        must(engine_step(g, &(struct engine_run){ .handle = handle, .rows = rows + done, .n = count }, 1,
                         &hidden, &e),
             &e);
        for (int64_t i = 0; i < count; i++) {
            if (seen == n_at || at[seen] != done + i) continue;
            double error = row_error(engine_logits_host(g, hidden, &i, 1), want + seen++ * vocab, vocab);
            if (!(error <= worst)) worst = error;
        }
    }
    assert_int_equal(seen, n_at);
    engine_free(g);
    return worst;
}

static double text_error(struct model *m, int64_t step)
{
    int64_t n;
    const int32_t *ids = values("ids", &n);
    struct row rows[256];
    assert_true(n <= 256);
    engine_text_rows(rows, ids, n, 0);
    return worst_error(m, rows, n, step, "logits_at", "logits");
}

static double picture_error(struct model *m, int64_t step)
{
    struct picture_reader *reader;
    struct picture picture;
    struct prompt p;
    struct err e = { 0 };
    int32_t tokens[64];
    int64_t n, kept = 0, image = m->config->image_token;
    const int32_t *ids = values("picture_ids", &n);
    assert_true(n <= 64);
    for (int64_t i = 0; i < n; i++) /* a placeholder a picture, not a row */
        if (ids[i] != image || i == 0 || ids[i - 1] != image) tokens[kept++] = ids[i];
    must(picture_reader_create(&reader, m, &e), &e);
    must(picture_read(reader, &picture, "tests/golden/demo/golden_image.png", NULL, &e), &e);
    must(prompt_create(&p, tokens, kept, (struct place_tokens){ image, -1 }, &picture, 1, 0, &e), &e);
    assert_int_equal(p.n, n);
    double worst = worst_error(m, p.rows, p.n, step, "picture_logits_at", "picture_logits");
    prompt_free(&p);
    picture_free(&picture);
    picture_reader_free(reader);
    return worst;
}

static void check(const struct backend_options *o)
{
    struct loaded l;
    static const int64_t steps[] = { 256, 1, 33 };
    load_model_overridden(&l, "models/demo", &yarn, o);
    for (int i = 0; i < 3; i++) {
        double text = text_error(&l.model, steps[i]), picture = picture_error(&l.model, steps[i]);
        printf("note: %s, %d rows a step: logits of a text %.1e, of a picture's prompt %.1e\n",
               l.backend.name, (int)steps[i], text, picture);
        assert_true(text <= 3e-5 && picture <= 3e-5);
    }
    unload_model(&l);
}

static void logits_are_those_of_transformers(void **state)
{
    (void)state;
    const char *device = getenv("QUENCH_DEVICE");
    if (device && strcmp(device, "cuda") == 0) {
        check(&(struct backend_options){ .device = DEVICE_CUDA, .shared_memory = true });
        return;
    }
    check(&(struct backend_options){ .device = DEVICE_CPU });
    check(&(struct backend_options){ .device = DEVICE_CPU, .isa = CPU_ISA_GENERIC });
    check(&(struct backend_options){ .device = DEVICE_REF });
}

/* What the bound above would say of a model without it, or of one without the scale. */
static void the_goldens_tell_it_apart(void **state)
{
    (void)state;
    struct loaded l;
    load_model(&l, "models/demo", &(struct backend_options){ .device = DEVICE_CPU });
    assert_true(text_error(&l.model, 256) > 1e-2);
    assert_true(picture_error(&l.model, 256) > 1e-2);
    unload_model(&l);
    load_model_overridden(&l, "models/demo", &yarn, &(struct backend_options){ .device = DEVICE_CPU });
    l.model.rope.scale = 1;
    assert_true(text_error(&l.model, 256) > 1e-3);
    assert_true(picture_error(&l.model, 256) > 1e-3);
    unload_model(&l);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(logits_are_those_of_transformers),
        cmocka_unit_test(the_goldens_tell_it_apart),
    };
    struct err e = { 0 };
    must(safetensors_open(&golden, "tests/golden/demo/golden_yarn.safetensors", &e), &e);
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    safetensors_close(&golden);
    return failed;
}
