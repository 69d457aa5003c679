#include "cli/bench_print.h"
#include "cli/commands.h"
#include "cli/common.h"
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

/* The part of cli_version in brackets. */
static json_t *commit(void)
{
    const char *begin = strchr(cli_version, '('), *end = begin ? strchr(begin, ')') : NULL;
    return end ? json_stringn(begin + 1, (size_t)(end - begin - 1)) : json_string("unknown");
}

static json_t *cpu_info(void)
{
    char line[512];
    json_t *name = NULL;
    FILE *f = fopen("/proc/cpuinfo", "r");
    while (f && !name && fgets(line, sizeof line, f)) {
        char *colon = strchr(line, ':');
        if (!colon || strncmp(line, "model name", 10) != 0) continue;
        line[strcspn(line, "\n")] = 0;
        name = json_string(colon + 2);
    }
    if (f) fclose(f);
    return name ? name : json_string("unknown");
}

static json_t *test_time(void)
{
    char text[32];
    struct tm tm;
    time_t now = time(NULL);
    strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", gmtime_r(&now, &tm));
    return json_string(text);
}

/* Without the buffer that the bandwidth is measured with, which is there from before the weights on. */
static uint64_t peak_memory(void)
{
    struct rusage usage;
    return getrusage(RUSAGE_SELF, &usage) == 0 ? 1024 * (uint64_t)usage.ru_maxrss - READ_SPEED_BYTES : 0;
}

static const char *device_of(const struct backend *b)
{
    return strncmp(b->name, "cuda", 4) == 0 ? "CUDA" : "CPU";
}

/* "avx512" of "cpu avx512, 2 threads". */
static json_t *isa(const struct backend *b)
{
    const char *space = strchr(b->name, ' ');
    size_t n = space ? strcspn(space + 1, ",") : 0;
    return space && strncmp(b->name, "cpu", 3) == 0 ? json_stringn(space + 1, n) : json_string("-");
}

static bool is_text(const char *name)
{
    return strncmp(name, "mtp.", 4) != 0 && !strstr(name, "visual.");
}

void bench_setting_count(struct bench_setting *s, const struct checkpoint *c)
{
    enum { NVFP4, FP8, BF16, F16, F32, N };
    static const char *const names[N] = { "NVFP4", "FP8", "BF16", "F16", "F32" };
    uint64_t bytes[N] = { 0 };
    s->bytes = s->parameters = 0;
    for (size_t i = 0; i < c->n_tensors; i++) {
        const struct tensor *t = c->tensors[i];
        const char *dot = strrchr(t->name, '.');
        if (!is_text(t->name) || !dot) continue;
        s->bytes += t->bytes;
        bool is_scale = strstr(dot, "_scale");
        if (!is_scale) s->parameters += (uint64_t)tensor_elements(t) * (t->dtype == DTYPE_U8 ? 2 : 1);
        bool groups = is_scale && t->dtype == DTYPE_F8_E4M3;
        int kind = t->dtype == DTYPE_U8 || groups ? NVFP4
                   : t->dtype == DTYPE_F8_E4M3    ? FP8
                   : t->dtype == DTYPE_BF16       ? BF16
                   : t->dtype == DTYPE_F16        ? F16
                                                  : F32;
        if (!is_scale || groups) bytes[kind] += t->bytes;
    }
    char *mix = s->mix, *type = s->type, size[32];
    size_t left = sizeof s->mix;
    type += snprintf(type, sizeof s->type, "%s", c->config.model_type);
    *mix = 0;
    for (int k = 0; k < N; k++) {
        if (!bytes[k]) continue;
        if (bytes[k] > s->bytes / 1000)
            type +=
                sprintf(type, "%s%s", type == s->type + strlen(c->config.model_type) ? " " : "+", names[k]);
        int n = snprintf(mix, left, "%s%s %s", mix == s->mix ? "" : ", ", names[k],
                         common_bytes(size, sizeof size, bytes[k]));
        mix += n;
        left -= (size_t)n;
    }
}

/* The samples in nanoseconds, or as tokens a second. */
static json_t *samples(const struct bench_result *r, bool as_speed)
{
    json_t *list = json_array();
    for (int i = 0; i < r->n; i++)
        json_array_append_new(list, as_speed ? json_real((double)r->tokens / r->seconds[i])
                                             : json_integer((json_int_t)(r->seconds[i] * 1e9)));
    return list;
}

static struct bench_summary speeds_of(const struct bench_result *r)
{
    double *speed = malloc((size_t)r->n * sizeof *speed);
    for (int i = 0; speed && i < r->n; i++) speed[i] = (double)r->tokens / r->seconds[i];
    struct bench_summary s = bench_summarize(speed ? speed : r->seconds, r->n);
    free(speed);
    return s;
}

/* Bytes that moved a second over bytes that could have, in percent, by the median. */
static double pct_of_bound(const struct bench_result *r)
{
    return 100 * r->total_bytes * speeds_of(r).median / r->read_bandwidth;
}

/* Multiplications that were done a second over those that the instructions could have, in percent. */
static double pct_of_peak(const struct bench_result *r)
{
    return 100 * r->product_seconds * speeds_of(r).median;
}

static const char *format_name(enum weight_format f)
{
    static const char *const names[] = { "BF16", "F16", "F32", "FP8", "NVFP4", "FP8_BLOCK" };
    return names[f];
}

static json_t *profile_json(const struct bench_result *r)
{
    json_t *list = json_array();
    for (int i = 0; i < r->n_profile; i++) {
        const struct trace_entry *x = &r->profile[i];
        if (!x->calls) continue;
        json_t *o = json_pack("{s:s, s:s, s:I, s:f, s:f, s:f}", "op", x->op, "label", x->label, "calls",
                              (json_int_t)x->calls, "seconds", x->seconds, "bytes", (double)x->bytes, "flops",
                              (double)x->flops);
        if (x->rows)
            json_object_update_new(o, json_pack("{s:s, s:I, s:I}", "format", format_name(x->format), "rows",
                                                (json_int_t)x->rows, "cols", (json_int_t)x->cols));
        json_array_append_new(list, o);
    }
    return list;
}

/* Keys of llama-bench, in its order. Those of other machines have the value that means nothing. */
static json_t *llama_part(const struct bench_setting *s, const struct bench_test *t,
                          const struct bench_result *r)
{
    struct bench_summary time = bench_summarize(r->seconds, r->n), speed = speeds_of(r);
    json_int_t rows = (json_int_t)s->step_rows;
    json_t *o = json_pack(
        "{s:o, s:i, s:o, s:s, s:s, s:o, s:s, s:I, s:I, s:I, s:I, s:i, s:s, s:b, s:i, s:s, s:s, s:i, s:s, s:i,"
        " s:b, s:b, s:s, s:b, s:b}",
        "build_commit", commit(), "build_number", 0, "cpu_info", cpu_info(), "gpu_info",
        strcmp(device_of(s->backend), "CUDA") == 0 ? s->backend->name : "", "backends", device_of(s->backend),
        "model_filename", common_json_path(s->model), "model_type", s->type, "model_size",
        (json_int_t)s->bytes, "model_n_params", (json_int_t)s->parameters, "n_batch", rows, "n_ubatch", rows,
        "n_threads", s->threads, "cpu_mask", "0x0", "cpu_strict", 0, "poll", 0, "type_k", s->kv, "type_v",
        s->kv, "n_gpu_layers", 0, "split_mode", "none", "main_gpu", 0, "no_kv_offload", 0, "flash_attn", 0,
        "tensor_split", "0.00", "use_mmap", 1, "embeddings", 0);
    json_t *more = json_pack(
        "{s:I, s:I, s:I, s:o, s:I, s:I, s:f, s:f, s:o, s:o}", "n_prompt", (json_int_t)t->n_prompt, "n_gen",
        (json_int_t)t->n_gen, "n_depth", (json_int_t)t->depth, "test_time", test_time(), "avg_ns",
        (json_int_t)(time.mean * 1e9), "stddev_ns", (json_int_t)(time.deviation * 1e9), "avg_ts", speed.mean,
        "stddev_ts", speed.deviation, "samples_ns", samples(r, false), "samples_ts", samples(r, true));
    json_object_update_new(o, more);
    return o;
}

static json_t *result_json(const struct bench_setting *s, const struct bench_test *t,
                           const struct bench_result *r)
{
    struct bench_summary time = bench_summarize(r->seconds, r->n), speed = speeds_of(r);
    json_t *o = llama_part(s, t, r);
    json_object_update_new(
        o,
        json_pack(
            "{s:i, s:s, s:o, s:s, s:s, s:s, s:f, s:I, s:I, s:I, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:I}",
            "n_sequences", t->sequences, "device", s->backend->name, "isa", isa(s->backend), "weight_mix",
            s->mix, "nvfp4_activations", s->activations, "tokens", s->content ? s->content : "random",
            "load_seconds", s->load_seconds, "median_ns", (json_int_t)(time.median * 1e9), "min_ns",
            (json_int_t)(time.min * 1e9), "max_ns", (json_int_t)(time.max * 1e9), "median_ts", speed.median,
            "read_bandwidth", r->read_bandwidth, "pct_of_bound", pct_of_bound(r), "product_speed",
            r->product_seconds > 0 ? r->flops / r->product_seconds : 0, "pct_of_peak", pct_of_peak(r),
            "flops_per_token", r->flops, "experts_per_step", r->experts_per_step, "bytes_per_token",
            r->total_bytes, "peak_memory", (json_int_t)peak_memory()));
    for (int i = 0; i < BENCH_GROUPS; i++) {
        char key[64];
        snprintf(key, sizeof key, "bytes_%s", bench_group_names[i]);
        json_object_set_new(o, key, json_real(r->bytes[i]));
    }
    if (r->profile) json_object_set_new(o, "profile", profile_json(r));
    return o;
}

/* CSV: the scalars of the object, all quoted, as llama-bench does it. */
static void csv_line(json_t *o, bool header)
{
    const char *key;
    json_t *v;
    bool first = true;
    json_object_foreach(o, key, v)
    {
        if (json_is_array(v) || json_is_object(v)) continue;
        if (!first) putchar(',');
        first = false;
        if (header) {
            fputs(key, stdout);
            continue;
        }
        putchar('"');
        for (const char *p = json_string_value(v); p && *p; p++) {
            if (*p == '"') putchar('"');
            putchar(*p);
        }
        if (json_is_integer(v)) printf("%lld", (long long)json_integer_value(v));
        if (json_is_real(v)) printf("%f", json_real_value(v));
        if (json_is_boolean(v)) putchar(json_is_true(v) ? '1' : '0');
        putchar('"');
    }
    putchar('\n');
}

/* "pp512+tg128 @ d4096 x8" */
static char *test_name(char out[80], const struct bench_test *t)
{
    int n = 0;
    *out = 0;
    if (t->n_prompt) n += snprintf(out, 80, "pp%lld", (long long)t->n_prompt);
    if (t->n_gen) n += snprintf(out + n, 80 - (size_t)n, "%stg%lld", n ? "+" : "", (long long)t->n_gen);
    if (t->depth) n += snprintf(out + n, 80 - (size_t)n, " @ d%lld", (long long)t->depth);
    if (t->sequences > 1) snprintf(out + n, 80 - (size_t)n, " x%d", t->sequences);
    return out;
}

static void md_header(void)
{
    puts("| model                          |       size |     params | backend    | threads |            "
         "test |"
         "                  t/s |   MB/token | % of bound | % of peak |");
    puts("| ------------------------------ | ---------: | ---------: | ---------- | ------: | "
         "--------------: |"
         " -------------------: | ---------: | ---------: | --------: |");
}

static void md_line(const struct bench_setting *s, const struct bench_test *t, const struct bench_result *r)
{
    char test[80], speed[80], size[32], parameters[32];
    struct bench_summary ts = speeds_of(r);
    snprintf(size, sizeof size, "%.2f GiB", (double)s->bytes / 0x1p30);
    snprintf(parameters, sizeof parameters, "%.2f B", (double)s->parameters * 1e-9);
    snprintf(speed, sizeof speed, "%.2f ± %.2f", ts.mean, ts.deviation);
    printf("| %-30s | %10s | %10s | %-10s | %7d | %15s | %21s | %10.1f | %10.1f | %9.1f |\n", s->type, size,
           parameters, device_of(s->backend), s->threads, test_name(test, t), speed, r->total_bytes * 1e-6,
           pct_of_bound(r), pct_of_peak(r));
    fflush(stdout);
}

static void md_profile(const struct bench_test *t, const struct bench_result *r)
{
    double all = 0, tokens = (double)r->tokens;
    char test[80];
    for (int i = 0; i < r->n_profile; i++) all += r->profile[i].seconds;
    printf("\n%s: where %.3f ms a token go\n", test_name(test, t), 1e3 * all / tokens);
    printf("| %-12s | %-13s | %-18s | calls/token | us/token | %% time |  MB/token |   GB/s | %% of read | "
           "GFLOP/s | %% of peak |\n",
           "operation", "weights", "");
    printf(
        "| ------------ | ------------- | ------------------ | ----------: | -------: | -----: | --------: | "
        "-----: | --------: | ------: | --------: |\n");
    for (int i = 0; i < r->n_profile; i++) {
        const struct trace_entry *x = &r->profile[i];
        char shape[64] = "";
        if (!x->calls) continue;
        if (x->rows)
            snprintf(shape, sizeof shape, "%s %lld x %lld", format_name(x->format), (long long)x->rows,
                     (long long)x->cols);
        printf("| %-12s | %-13s | %-18s | %11.2f | %8.1f | %6.1f |", x->op, x->label, shape,
               (double)x->calls / tokens, 1e6 * x->seconds / tokens, 100 * x->seconds / all);
        double speed = (double)x->bytes / x->seconds;
        if (x->bytes)
            printf(" %9.3f | %6.2f | %9.1f |", (double)x->bytes / tokens * 1e-6, speed * 1e-9,
                   100 * speed / r->read_bandwidth);
        else
            printf(" %9s | %6s | %9s |", "", "", "");
        double done = (double)x->flops / x->seconds, peak = r->product_speed[x->format];
        if (x->flops)
            printf(" %7.1f | %9.1f |\n", done * 1e-9, peak > 0 ? 100 * done / peak : 0);
        else
            printf(" %7s | %9s |\n", "", "");
    }
    putchar('\n');
}

bool bench_printer_init(struct bench_printer *p, enum bench_format format)
{
    *p = (struct bench_printer){ format, json_array() };
    return p->results;
}

void bench_printer_add(struct bench_printer *p, const struct bench_setting *s, const struct bench_test *t,
                       const struct bench_result *r)
{
    bool first = json_array_size(p->results) == 0;
    json_t *o = result_json(s, t, r);
    if (p->format == BENCH_MD) {
        if (first || r->profile) md_header();
        md_line(s, t, r);
        if (r->profile) md_profile(t, r);
    } else if (p->format == BENCH_CSV) {
        if (first) csv_line(o, true);
        csv_line(o, false);
    } else if (p->format == BENCH_JSONL) {
        json_dumpf(o, stdout, JSON_COMPACT);
        putchar('\n');
    }
    fflush(stdout);
    json_array_append_new(p->results, o);
}

static double number(const json_t *o, const char *key)
{
    return json_number_value(json_object_get(o, key));
}

/* Bytes by group, one line a test. */
static void md_bytes(const json_t *results)
{
    printf("\n| MB a token      | threads |");
    for (int g = 0; g < BENCH_GROUPS; g++) printf(" %s |", bench_group_names[g]);
    printf(" all | GFLOP a token | experts a step and layer | read GB/s | peak GFLOP/s |\n| --- |");
    for (int g = 0; g < BENCH_GROUPS + 6; g++) printf(" ---: |");
    putchar('\n');
    for (size_t i = 0; i < json_array_size(results); i++) {
        const json_t *o = json_array_get(results, i);
        struct bench_test t = { (int64_t)number(o, "n_prompt"), (int64_t)number(o, "n_gen"),
                                (int64_t)number(o, "n_depth"), (int)number(o, "n_sequences") };
        char test[80], key[64];
        printf("| %-15s | %.0f |", test_name(test, &t), number(o, "n_threads"));
        for (int g = 0; g < BENCH_GROUPS; g++) {
            snprintf(key, sizeof key, "bytes_%s", bench_group_names[g]);
            printf(" %.3f |", number(o, key) * 1e-6);
        }
        printf(" %.3f | %.3f | %.1f | %.1f | %.0f |\n", number(o, "bytes_per_token") * 1e-6,
               number(o, "flops_per_token") * 1e-9, number(o, "experts_per_step"),
               number(o, "read_bandwidth") * 1e-9, number(o, "product_speed") * 1e-9);
    }
}

void bench_printer_end(struct bench_printer *p)
{
    char bytes[32];
    const json_t *last = json_array_get(p->results, json_array_size(p->results) - 1);
    if (p->format == BENCH_JSON) {
        json_dumpf(p->results, stdout, JSON_INDENT(2));
        putchar('\n');
    } else if (p->format == BENCH_MD && last) {
        md_bytes(p->results);
        printf("\nweights %s; tokens %s; kv cache %s; loaded in %.1f s; peak memory %s\nbuild: %s, %s\n",
               json_string_value(json_object_get(last, "weight_mix")),
               json_string_value(json_object_get(last, "tokens")),
               json_string_value(json_object_get(last, "type_k")), number(last, "load_seconds"),
               common_bytes(bytes, sizeof bytes, peak_memory()),
               json_string_value(json_object_get(last, "build_commit")),
               json_string_value(json_object_get(last, "device")));
    }
    json_decref(p->results);
    p->results = NULL;
}
