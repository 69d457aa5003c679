#include "cli/common.h"
#include "base/clock.h"
#include "tokenizer/utf8.h"
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

const char *const common_devices[] = { "auto", "cpu", "cuda", "ref", NULL };
const char *const common_masks[] = { "best", "generic", "avx2", "avx512", "avx512bf16", "amx", NULL };
const char *const common_kv[] = { "auto", "f32", "bf16", "fp8", "int8_per_token_head", "int8", NULL };
const char *const common_activations[] = { "bf16", "fp4", NULL };
const char *const common_inputs[] = { "f32", "int8", NULL };

static bool is_gpu(const struct backend *b)
{
    return strcmp(b->ops->name, "cuda") == 0;
}

enum kv_dtype common_kv_dtype(const struct common *c, const struct backend *b)
{
    static const enum kv_dtype of[] = { KV_F32, KV_F32, KV_BF16, KV_FP8, KV_INT8, KV_INT8 };
    return c->kv == 0 && c->inputs && is_gpu(b) ? KV_BF16 : of[c->kv];
}

const char *common_kv_name(enum kv_dtype d)
{
    static const char *const names[] = {
        [KV_F32] = "f32", [KV_BF16] = "bf16", [KV_FP8] = "fp8", [KV_INT8] = "int8_per_token_head"
    };
    return names[d];
}

/* One bar at a time; the only state of this file that changes, and only for display. */
static struct {
    const char *what;
    double begin, shown;
} bar;

static void draw(void *ctx, const char *what, uint64_t done, uint64_t total)
{
    (void)ctx;
    double now = clock_seconds();
    if (bar.what != what) {
        bar.what = what;
        bar.begin = bar.shown = now;
    }
    bool ends = done >= total;
    if (now - bar.begin < 0.5 || (now - bar.shown < 0.1 && !ends)) {
        if (ends) bar.what = NULL;
        return;
    }
    bar.shown = now;
    int filled = total ? (int)(30 * done / total) : 30;
    double left = done ? (now - bar.begin) * (double)(total - done) / (double)done : 0;
    fprintf(stderr, "\r%-12s [%.*s%*s] %3d %%  %s %.0f s\033[K", what, filled,
            "##############################", 30 - filled, "", total ? (int)(100 * done / total) : 100,
            ends ? "took" : "left", ends ? now - bar.begin : left);
    if (ends) {
        fputc('\n', stderr);
        bar.what = NULL;
    }
    fflush(stderr);
}

static void warn(void *ctx, const char *text)
{
    (void)ctx;
    fprintf(stderr, "%squench: note: %s\n", bar.what ? "\n" : "", text);
}

struct report common_report(const struct common *c)
{
    if (c->quiet) return (struct report){ 0 };
    return (struct report){ .progress = isatty(STDERR_FILENO) ? draw : NULL, .warn = warn };
}

int common_fail(const struct command *command, const struct err *e)
{
    fprintf(stderr, "quench %s: %s\n", command->name, e->text);
    return e->code == ERR_ARGUMENT ? 2 : 1;
}

bool common_parse(const struct command *command, const struct flag *flags, int argc, char **argv,
                  const char **arguments, int *status)
{
    struct err e = { 0 };
    bool help = false;
    if (!flags_parse(command, flags, argc, argv, arguments, &help, NULL, &e)) {
        *status = common_fail(command, &e);
        fprintf(stderr, "try: quench %s --help\n", command->name);
        return false;
    }
    if (!help) return true;
    flags_help(command, flags);
    *status = 0;
    return false;
}

bool common_check_kv(const struct common *c, const struct backend *b, struct err *e)
{
    return common_kv_dtype(c, b) != KV_INT8 || b->kv_int8 ||
           err_set(
               e, ERR_ARGUMENT,
               "--kv-cache-dtype: %s: expected auto, f32, bf16 or fp8 on a GPU; take fp8, which is as small, "
               "or --device cpu",
               common_kv_name(KV_INT8));
}

bool common_backend(struct backend *b, const struct common *c, struct err *e)
{
    if (c->threads < 0 || c->threads > 1024)
        return err_set(e, ERR_ARGUMENT, "--threads: expected 1 to 1024, found %lld", (long long)c->threads);
    static const enum device devices[] = { DEVICE_AUTO, DEVICE_CPU, DEVICE_CUDA, DEVICE_REF };
    struct backend_options o = { .device = devices[c->device],
                                 .threads = (int)c->threads,
                                 .isa = (enum cpu_isa)c->mask,
                                 .rounded = c->inputs,
                                 .fp4_activations = c->fp4 };
    if (!backend_create(b, &o, e)) return false;
    if (!common_check_kv(c, b, e)) {
        backend_destroy(b);
        return false;
    }
    if (!c->quiet && is_gpu(b)) fprintf(stderr, "quench: device: %s\n", b->name);
    return true;
}

static bool speculative_refused(const char *key, const char *what, struct err *e)
{
    return err_set(e, ERR_ARGUMENT, "--speculative-config: field '%s': %s", key, what);
}

static bool is_same_folder(const char *a, const char *b)
{
    char *x = a ? realpath(a, NULL) : NULL, *y = b ? realpath(b, NULL) : NULL;
    bool same = a && b && (strcmp(a, b) == 0 || (x && y && strcmp(x, y) == 0));
    free(x);
    free(y);
    return same;
}

static bool read_speculative(int *drafts, const json_t *o, const char *model, struct err *e)
{
    const char *key;
    json_t *v;
    bool has_method = false;
    *drafts = 1; /* as many as there are MTP layers, which is what vLLM takes without the field */
    json_object_foreach((json_t *)o, key, v)
    {
        if (strcmp(key, "method") == 0) {
            const char *method = json_string_value(v);
            /* the second is vLLM's older name */
            has_method = method && (strcmp(method, "mtp") == 0 || strcmp(method, "qwen3_next_mtp") == 0);
            if (!has_method) return speculative_refused(key, "the only method is \"mtp\"", e);
        } else if (strcmp(key, "num_speculative_tokens") == 0) {
            json_int_t n = json_integer_value(v);
            if (n < 1 || n > DRAFTS_MAX) return speculative_refused(key, "expected 1 to 8", e);
            *drafts = (int)n;
        } else if (strcmp(key, "model") == 0) {
            if (!is_same_folder(json_string_value(v), model))
                return speculative_refused(
                    key, "the MTP head is part of MODEL; leave the field out, or give MODEL again", e);
        } else
            return speculative_refused(
                key, "not known here; fields are method, num_speculative_tokens and model", e);
    }
    return has_method || err_set(e, ERR_ARGUMENT, "--speculative-config: field 'method' is missing");
}

bool common_drafts(int *drafts, const struct common *c, const char *model, struct err *e)
{
    json_error_t fault;
    *drafts = 0;
    if (!c->speculative) return true;
    json_t *o = json_loads(c->speculative, JSON_REJECT_DUPLICATES, &fault);
    if (!o) return err_set(e, ERR_ARGUMENT, "--speculative-config: not JSON: %s", fault.text);
    bool ok = json_is_object(o) ? read_speculative(drafts, o, model, e)
                                : err_set(e, ERR_ARGUMENT, "--speculative-config: expected an object");
    json_decref(o);
    return ok;
}

static bool read_overrides(json_t **out, const char *text, struct err *e)
{
    *out = NULL;
    if (!text) return true;
    bool ok = doc_parse(out, text, strlen(text), e) &&
              (json_is_object(*out) || err_set(e, ERR_ARGUMENT, "expected an object"));
    if (ok) return true;
    if (e && e->code == ERR_FORMAT) e->code = ERR_ARGUMENT;
    json_decref(*out);
    return err_note(e, "--hf-overrides");
}

bool common_checkpoint(struct checkpoint *k, const struct common *c, const char *path, struct err *e)
{
    json_t *fields;
    *k = (struct checkpoint){ 0 };
    if (!c || (!c->overrides && c->rope_yarn == 0)) return checkpoint_open(k, path, e);
    if (!(c->rope_yarn == 0 || (c->rope_yarn >= 1 && isfinite(c->rope_yarn))))
        return err_set(e, ERR_ARGUMENT, "--rope-yarn: expected 1 or more, found %g", c->rope_yarn);
    if (!read_overrides(&fields, c->overrides, e)) return false;
    bool ok = checkpoint_open_overridden(k, path, &(struct overrides){ fields, c->rope_yarn }, e);
    json_decref(fields);
    return ok;
}

bool common_open_files(struct opened *o, const struct common *c, const char *path, struct err *e)
{
    *o = (struct opened){ 0 };
    if (common_checkpoint(&o->checkpoint, c, path, e) && tokenizer_load(&o->tokenizer, path, e)) return true;
    common_close(o);
    return false;
}

bool common_bind(struct opened *o, struct backend *b, const struct report *report, struct err *e)
{
    if (model_init(&o->model, &o->checkpoint, b, report, e) && model_bind_all(&o->model, e)) return true;
    common_close(o);
    return false;
}

bool common_open(struct opened *o, const struct common *c, const char *path, struct backend *b,
                 const struct report *report, struct err *e)
{
    return common_open_files(o, c, path, e) && common_bind(o, b, report, e);
}

/* The files, opened by a thread of their own. */
struct files {
    struct opened *o;
    const struct common *common;
    const char *path;
    struct err error;
    bool ok;
};

static void *open_files(void *ctx)
{
    struct files *f = ctx;
    f->ok = common_open_files(f->o, f->common, f->path, &f->error);
    return NULL;
}

bool common_start(struct backend *b, struct opened *o, const struct common *c, const char *path,
                  struct err *e)
{
    struct files f = { .o = o, .common = c, .path = path };
    pthread_t thread;
    *b = (struct backend){ 0 };
    errno = pthread_create(&thread, NULL, open_files, &f);
    if (errno != 0) return err_errno(e, "thread");
    bool ok = common_backend(b, c, e);
    pthread_join(thread, NULL);
    if (ok && !f.ok && e) *e = f.error;
    if (ok && f.ok) return true;
    if (f.ok) common_close(o);
    if (ok) backend_destroy(b);
    *b = (struct backend){ 0 };
    return false;
}

bool common_bind_mtp(struct opened *o, int drafts, struct err *e)
{
    return !drafts || model_bind_mtp(&o->model, true, e);
}

void common_close(struct opened *o)
{
    model_deinit(&o->model);
    tokenizer_free(o->tokenizer);
    checkpoint_close(&o->checkpoint);
    *o = (struct opened){ 0 };
}

json_t *common_json_path(const char *path)
{
    size_t n = strlen(path), used = 0;
    char *text = malloc(3 * n + 1);
    while (text && n > 0) {
        int length = utf8_scan((const unsigned char *)path, n);
        size_t taken = length > 0 ? (size_t)length : length < 0 ? (size_t)-length : n;
        memcpy(text + used, length > 0 ? path : "\xef\xbf\xbd", length > 0 ? taken : 3);
        used += length > 0 ? taken : 3;
        path += taken;
        n -= taken;
    }
    json_t *string = text ? json_stringn(text, used) : NULL;
    free(text);
    return string;
}

char *common_bytes(char *out, size_t size, uint64_t bytes)
{
    static const char *const units[] = { "B", "kB", "MB", "GB", "TB" };
    double x = (double)bytes;
    int unit = 0;
    for (; x >= 1000 && unit < 4; unit++) x /= 1000;
    snprintf(out, size, unit ? "%.2f %s" : "%.0f %s", x, units[unit]);
    return out;
}
