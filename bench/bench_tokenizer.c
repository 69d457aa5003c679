/* bench_tokenizer MODEL_DIR TEXT_FILE: encodes and decodes the whole text on one thread, median of 5.
 * CSV: what,bytes,tokens,seconds_median,MB_per_s (10^6 bytes of text). */
#include "base/clock.h"
#include "base/file.h"
#include "tokenizer/tokenizer.h"
#include <stdio.h>
#include <stdlib.h>

enum { RUNS = 5 };

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print_row(const char *what, size_t bytes, size_t tokens, double seconds[RUNS])
{
    qsort(seconds, RUNS, sizeof *seconds, by_value);
    double median = seconds[RUNS / 2];
    printf("%s,%zu,%zu,%.6f,%.2f\n", what, bytes, tokens, median, (double)bytes / median / 1e6);
}

static bool run(const struct tokenizer *t, const char *text, size_t bytes, struct err *e)
{
    struct token_list list = { 0 };
    double encode[RUNS], decode[RUNS];
    bool ok = true;
    size_t decoded_bytes = 0;
    for (int i = 0; ok && i < RUNS; i++) {
        char *decoded = NULL;
        list.n = 0;
        double begin = clock_seconds();
        ok = tokenizer_encode(t, &list, text, bytes, 0, e);
        double middle = clock_seconds();
        ok = ok && tokenizer_decode(t, list.ids, list.n, false, &decoded, &decoded_bytes, e);
        encode[i] = middle - begin;
        decode[i] = clock_seconds() - middle;
        free(decoded);
    }
    if (ok) {
        puts("what,bytes,tokens,seconds_median,MB_per_s");
        print_row("encode", bytes, list.n, encode);
        print_row("decode", decoded_bytes, list.n, decode);
    }
    free(list.ids);
    return ok;
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fprintf(stderr, "usage: bench_tokenizer MODEL_DIR TEXT_FILE\n");
        return 2;
    }
    struct err e = { 0 };
    struct tokenizer *t = NULL;
    char *text = NULL;
    size_t bytes;
    bool ok = tokenizer_load(&t, argv[1], &e) && file_read(&text, &bytes, argv[2], 1 << 30, &e) &&
              run(t, text, bytes, &e);
    if (!ok) fprintf(stderr, "bench_tokenizer: %s\n", e.text);
    free(text);
    tokenizer_free(t);
    return ok ? 0 : 1;
}
