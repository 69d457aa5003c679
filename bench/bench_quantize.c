/* usage: bench_quantize SRC DST_PREFIX [SAMPLES]
 * Source bytes a second, as CSV, each row the median of three; all read the source from the page cache and
 * end in fsync. copy: every file of SRC copied and synced, the bound for anything that reads and writes a
 * checkpoint. pack: a recipe without measured input scales: planning, packing, writing, census. quantize: the
 * card's recipe, calibrated on SAMPLES (default 4) lines of data/calibration.jsonl, 2048 tokens each.
 * DST_PREFIX.N are created and removed. */
#include "backend/ops.h"
#include "base/clock.h"
#include "base/file.h"
#include "quantize/quantize.h"
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>

enum { RUNS = 3 };

struct bench {
    const char *source;
    char destination[4096];
    struct backend backend;
    int64_t samples;
    struct quantize_result result;
};

static const char *const experts[] = { "re:.*mlp\\.experts\\.\\d+\\.(gate|up|down)_proj$" };
static const char *const dense[] = { "re:.*self_attn\\.(q|k|v|o)_proj$",
                                     "re:.*shared_expert\\.(gate|up|down)_proj$" };
static const struct recipe_group groups[] = { { "group_0", SCHEME_NVFP4A16, experts, 1 },
                                              { "group_1", SCHEME_FP8_DYNAMIC, dense, 2 } };
static const char *const rest[] = {
    "lm_head",       "re:.*mlp\\.gate$", "re:.*mlp\\.shared_expert_gate$", "re:.*linear_attn.*",
    "re:.*visual.*", "re:.*mtp.*"
};
static const struct recipe weights_only = {
    .name = "weights only", .groups = groups, .n_groups = 2, .ignore = rest, .n_ignore = 6
};

static bool run_copy(struct bench *b, struct err *e)
{
    DIR *dir = opendir(b->source);
    bool ok = dir && mkdir(b->destination, 0777) == 0;
    for (struct dirent *d; ok && (d = readdir(dir));) {
        char *from = file_join(b->source, d->d_name), *to = file_join(b->destination, d->d_name);
        ok = from && to && (file_is_folder(from) || file_copy(from, to, e));
        free(from);
        free(to);
    }
    if (dir) closedir(dir);
    return ok;
}

static bool run_with(struct bench *b, const struct recipe *recipe, struct err *e)
{
    struct quantize_options o = { .source = b->source,
                                  .destination = b->destination,
                                  .calibration = "data/calibration.jsonl",
                                  .num_calibration_samples = b->samples,
                                  .recipe = recipe,
                                  .method = QUANTIZE_NEAREST,
                                  .backend = &b->backend };
    return quantize_run(&o, &b->result, e);
}

static bool run_pack(struct bench *b, struct err *e)
{
    return run_with(b, &weights_only, e);
}

static bool run_quantize(struct bench *b, struct err *e)
{
    return run_with(b, NULL, e);
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static bool measure(struct bench *b, const char *prefix, const char *what,
                    bool (*run)(struct bench *, struct err *), struct err *e)
{
    double seconds[RUNS], calibrate[RUNS];
    for (int i = 0; i < RUNS; i++) {
        snprintf(b->destination, sizeof b->destination, "%s.%d", prefix, i);
        b->result = (struct quantize_result){ .bytes_in = b->result.bytes_in };
        double start = clock_seconds();
        if (!run(b, e)) return false;
        seconds[i] = clock_seconds() - start;
        calibrate[i] = b->result.calibrate_seconds;
        if (!file_remove_tree(b->destination, e)) return false;
    }
    qsort(seconds, RUNS, sizeof *seconds, by_value);
    qsort(calibrate, RUNS, sizeof *calibrate, by_value);
    struct rusage use;
    getrusage(RUSAGE_SELF, &use);
    double megabytes = (double)b->result.bytes_in / 1e6;
    printf("%s,%.1f,%.3f,%.3f,%.1f,%lld,%ld\n", what, megabytes, seconds[RUNS / 2], calibrate[RUNS / 2],
           megabytes / seconds[RUNS / 2], (long long)b->result.tokens, use.ru_maxrss / 1024);
    return true;
}

int main(int argc, char **argv)
{
    struct err e = { 0 };
    struct bench b = { .samples = argc > 3 ? atoll(argv[3]) : 4 };
    struct backend_options options = { .device = DEVICE_CPU };
    if (argc < 3) {
        fprintf(stderr, "usage: bench_quantize SRC DST_PREFIX [SAMPLES]\n");
        return 2;
    }
    b.source = argv[1];
    bool ok = backend_create(&b.backend, &options, &e);
    printf("what,source_mb,seconds,calibrate_seconds,source_mb_per_s,calibration_tokens,peak_rss_mib\n");
    /* pack runs first: it fills in how many bytes of tensors there are, and warms the page cache for all */
    ok = ok && measure(&b, argv[2], "pack", run_pack, &e) && measure(&b, argv[2], "copy", run_copy, &e) &&
         measure(&b, argv[2], "quantize", run_quantize, &e);
    backend_destroy(&b.backend);
    if (!ok) fprintf(stderr, "bench_quantize: %s\n", e.text);
    return ok ? 0 : 1;
}
