/* What the tests of this folder share: cmocka, a folder under /tmp, the demo checkpoint quantized, copied,
 * patched or rewritten. Run from the root of the tree. */
#ifndef TESTS_QUANTIZE_FIXTURE_H
#define TESTS_QUANTIZE_FIXTURE_H
#include "backend/ops.h"
#include "base/doc.h"
#include "base/file.h"
#include "checkpoint/checkpoint.h"
#include "num/bf16.h"
#include "quantize/quantize.h"
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cmocka.h>

#define DEMO        "models/demo"
#define CALIBRATION "data/calibration.jsonl"

struct fixture {
    char path[64];
    struct backend backend;
    struct report report;
    char warnings[4000]; /* one a line */
};

static inline void fixture_warn(void *ctx, const char *text)
{
    struct fixture *f = ctx;
    size_t n = strlen(f->warnings);
    snprintf(f->warnings + n, sizeof f->warnings - n, "%s\n", text);
}

static inline void fixture_init(struct fixture *f)
{
    struct err e = { 0 };
    const char *device = getenv("QUENCH_DEVICE"); /* cuda, or nothing */
    struct backend_options options = { .device =
                                           device && strcmp(device, "cuda") == 0 ? DEVICE_CUDA : DEVICE_CPU,
                                       .threads = 2 };
    *f = (struct fixture){ .path = "/tmp/quench-test-XXXXXX" };
    f->report = (struct report){ .ctx = f, .warn = fixture_warn };
    assert_non_null(mkdtemp(f->path));
    if (!backend_create(&f->backend, &options, &e)) fail_msg("%s", e.text);
}

static inline void fixture_deinit(struct fixture *f)
{
    backend_destroy(&f->backend);
    assert_true(file_remove_tree(f->path, NULL));
}

/* Path of something in the fixture's folder; each call reuses one of 64 buffers. */
static inline const char *in(const struct fixture *f, const char *name)
{
    static char paths[64][512];
    static int next;
    char *out = paths[next++ % 64];
    snprintf(out, sizeof paths[0], "%s/%s", f->path, name);
    return out;
}

/* A few short samples: seconds, not minutes, also under sanitizers. */
static inline struct quantize_options fixture_options(struct fixture *f, const char *source,
                                                      const char *destination)
{
    return (struct quantize_options){ .source = source,
                                      .destination = destination,
                                      .calibration = CALIBRATION,
                                      .method = QUANTIZE_NEAREST,
                                      .num_calibration_samples = 2,
                                      .max_seq_length = 64,
                                      .threads = 2,
                                      .backend = &f->backend,
                                      .report = &f->report };
}

static inline struct quantize_result must_run(const struct quantize_options *o)
{
    struct quantize_result r;
    struct err e = { 0 };
    if (!quantize_run(o, &r, &e)) fail_msg("%s", e.text);
    return r;
}

static inline bool has_partial(const char *destination)
{
    char path[600];
    snprintf(path, sizeof path, "%s.quench-partial", destination);
    return file_exists(path);
}

/* The run fails with a message that contains `want`, makes no destination and keeps the work folder. */
static inline void must_fail_keeping(const struct quantize_options *o, enum err_code code, const char *want)
{
    struct quantize_result r;
    struct err e = { 0 };
    bool existed = file_exists(o->destination);
    if (quantize_run(o, &r, &e)) fail_msg("no error, expected '%s'", want);
    if (!strstr(e.text, want)) fail_msg("expected '%s', found '%s'", want, e.text);
    if (code != e.code) fail_msg("code %d: %s", e.code, e.text);
    assert_int_equal(existed, file_exists(o->destination));
    assert_true(has_partial(o->destination));
}

/* The run fails with a message that contains `want` and leaves neither the destination nor anything partial.
 */
static inline void must_fail(const struct quantize_options *o, enum err_code code, const char *want)
{
    struct quantize_result r;
    struct err e = { 0 };
    bool existed = file_exists(o->destination);
    if (quantize_run(o, &r, &e)) fail_msg("no error, expected '%s'", want);
    if (!strstr(e.text, want)) fail_msg("expected '%s', found '%s'", want, e.text);
    if (code != e.code) fail_msg("code %d: %s", e.code, e.text);
    assert_int_equal(existed, file_exists(o->destination));
    assert_false(has_partial(o->destination));
}

static inline void must_open(struct checkpoint *c, const char *path)
{
    struct err e = { 0 };
    if (!checkpoint_open(c, path, &e)) fail_msg("%s", e.text);
}

static inline const struct tensor *must_find(const struct checkpoint *c, const char *format, ...)
{
    char name[300];
    va_list args;
    va_start(args, format);
    vsnprintf(name, sizeof name, format, args);
    va_end(args);
    const struct tensor *t = checkpoint_find(c, name);
    if (!t) fail_msg("no tensor '%s'", name);
    return t;
}

/* Two results have the same tensors, to the byte. */
static inline void same_tensors(const char *left, const char *right)
{
    struct checkpoint a, b;
    must_open(&a, left);
    must_open(&b, right);
    assert_int_equal(a.n_tensors, b.n_tensors);
    for (size_t i = 0; i < a.n_tensors; i++) {
        const struct tensor *x = a.tensors[i], *y = must_find(&b, "%s", x->name);
        assert_int_equal(x->bytes, y->bytes);
        if (memcmp(x->data, y->data, x->bytes) != 0) fail_msg("%s: other bytes", x->name);
    }
    checkpoint_close(&a);
    checkpoint_close(&b);
}

static inline float f32_at(const struct tensor *t)
{
    float x;
    assert_int_equal(t->dtype, DTYPE_F32);
    memcpy(&x, t->data, 4);
    return x;
}

static inline float bf16_at(const struct tensor *t, int64_t i)
{
    bf16 x;
    memcpy(&x, t->data + 2 * i, 2);
    return bf16_to_f32(x);
}

static inline void write_text(const char *path, const char *text)
{
    struct err e = { 0 };
    if (!file_write(path, text, strlen(text), &e)) fail_msg("%s", e.text);
}

/* The demo checkpoint under a name of its own. */
static inline void copy_demo(const struct fixture *f, const char *name)
{
    static const char *const files[] = { "config.json",
                                         "generation_config.json",
                                         "model-00001-of-00002.safetensors",
                                         "model-00002-of-00002.safetensors",
                                         "model.safetensors.index.json",
                                         "tokenizer.json",
                                         "tokenizer_config.json" };
    struct err e = { 0 };
    char from[200], to[600];
    assert_int_equal(mkdir(in(f, name), 0777), 0);
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        snprintf(from, sizeof from, DEMO "/%s", files[i]);
        snprintf(to, sizeof to, "%s/%s", in(f, name), files[i]);
        if (!file_copy(from, to, &e)) fail_msg("%s", e.text);
    }
}

/* Sets n BF16 elements of a tensor, from element `at` on, to one value. */
static inline void patch(const struct fixture *f, const char *folder, const char *tensor, int64_t at,
                         int64_t n, float x)
{
    struct checkpoint c;
    must_open(&c, in(f, folder));
    const struct tensor *t = must_find(&c, "%s", tensor);
    int shard = 0;
    while (t->data < c.shards[shard].map.data ||
           t->data >= c.shards[shard].map.data + c.shards[shard].map.bytes)
        shard++;
    off_t offset = t->data - c.shards[shard].map.data + 2 * at;
    char path[700];
    snprintf(path, sizeof path, "%s/%s", in(f, folder), c.shard_names[shard]);
    int fd = open(path, O_WRONLY);
    assert_true(fd >= 0);
    bf16 value = bf16_from_f32(x);
    for (int64_t i = 0; i < n; i++) assert_int_equal(pwrite(fd, &value, 2, offset + 2 * i), 2);
    close(fd);
    checkpoint_close(&c);
}

/* A folder with config.json (the demo's, changed by the caller) and one model.safetensors of these tensors.
 */
static inline void write_checkpoint(const struct fixture *f, const char *name, json_t *config,
                                    const struct tensor *tensors, size_t n)
{
    struct err e = { 0 };
    struct safetensors_writer *w;
    char path[600];
    assert_int_equal(mkdir(in(f, name), 0777), 0);
    snprintf(path, sizeof path, "%s/config.json", in(f, name));
    char *text = json_dumps(config, 0);
    write_text(path, text);
    free(text);
    snprintf(path, sizeof path, "%s/model.safetensors", in(f, name));
    if (!safetensors_writer_create(&w, path, tensors, n, &e)) fail_msg("%s", e.text);
    for (size_t i = 0; i < n; i++)
        if (!safetensors_writer_append(w, tensors[i].data, tensors[i].bytes, &e)) fail_msg("%s", e.text);
    if (!safetensors_writer_finish(w, &e)) fail_msg("%s", e.text);
}

static inline json_t *demo_config(void)
{
    struct err e = { 0 };
    json_t *config;
    if (!doc_load(&config, DEMO "/config.json", 1 << 20, &e)) fail_msg("%s", e.text);
    return config;
}

static inline bool ends_in(const char *name, const char *end)
{
    size_t n = strlen(name), m = strlen(end);
    return n >= m && strcmp(name + n - m, end) == 0;
}
#endif
