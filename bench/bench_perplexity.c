/* bench_perplexity MODEL TEXT [CHUNKS]: tokens a second of perplexity over the first CHUNKS (default 40)
 * chunks of 512 tokens, for 1 to all threads, each the median of three runs after one that warms up, as CSV.
 * This is prefill: long rows through every product, and the whole vocabulary scored. */
#include "base/clock.h"
#include "base/file.h"
#include "eval/perplexity.h"
#include "tokenizer/tokenizer.h"
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>

enum { RUNS = 3, TEXT_BYTES_MAX = 1 << 28 };

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static bool read_tokens(struct token_list *list, const char *model, const char *path, struct err *e)
{
    struct tokenizer *t = NULL;
    char *text = NULL;
    size_t bytes;
    bool ok = tokenizer_load(&t, model, e) && file_read(&text, &bytes, path, TEXT_BYTES_MAX, e) &&
              (tokenizer_encode(t, list, text, bytes, 0, e) || err_note(e, "%s", path));
    free(text);
    tokenizer_free(t);
    return ok;
}

static bool time_runs(struct model *m, const struct token_list *list, int64_t chunks, int threads,
                      struct err *e)
{
    double seconds[RUNS];
    struct perplexity_options o = { .max_chunks = 1 };
    struct perplexity_result r;
    if (!perplexity_run(&r, m, list->ids, (int64_t)list->n, &o, e)) return false;
    o.max_chunks = chunks;
    for (int i = 0; i < RUNS; i++) {
        double begin = clock_seconds();
        if (!perplexity_run(&r, m, list->ids, (int64_t)list->n, &o, e)) return false;
        seconds[i] = clock_seconds() - begin;
    }
    qsort(seconds, RUNS, sizeof *seconds, by_value);
    printf("%d,%.1f,%lld\n", threads, (double)(r.scored + r.chunks) / seconds[RUNS / 2], (long long)r.chunks);
    fflush(stdout);
    return true;
}

/* A backend lays weights out for itself, so each thread count loads the model anew. */
static bool measure(const struct checkpoint *c, const struct token_list *list, int64_t chunks, int threads,
                    struct err *e)
{
    struct backend b = { 0 };
    struct model m = { 0 };
    struct backend_options o = { .device = DEVICE_CPU, .threads = threads };
    bool ok = backend_create(&b, &o, e) && model_init(&m, c, &b, NULL, e) && model_bind_all(&m, e) &&
              time_runs(&m, list, chunks, threads, e);
    model_deinit(&m);
    backend_destroy(&b);
    return ok;
}

static int threads_here(void)
{
    cpu_set_t set;
    return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
}

int main(int argc, char **argv)
{
    struct err e = { 0 };
    struct checkpoint c = { 0 };
    struct token_list list = { 0 };
    int64_t chunks = argc > 3 ? atoll(argv[3]) : 40;
    if (argc < 3 || chunks < 1) {
        fprintf(stderr, "usage: bench_perplexity MODEL TEXT [CHUNKS]\n");
        return 2;
    }
    bool ok = checkpoint_open(&c, argv[1], &e) && read_tokens(&list, argv[1], argv[2], &e);
    if (ok) printf("threads,tokens_per_second,chunks\n");
    for (int n = 1; ok && n <= threads_here(); n++) ok = measure(&c, &list, chunks, n, &e);
    free(list.ids);
    checkpoint_close(&c);
    if (!ok) fprintf(stderr, "bench_perplexity: %s\n", e.text);
    return ok ? 0 : 1;
}
