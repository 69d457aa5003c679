#include "image/resize.h"
#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { RATIO_MAX = 200, CHANNELS = 3, BITS_MAX = 22 };

static int64_t at_least(int64_t x, int64_t least)
{
    return x > least ? x : least;
}

/* counted: as how many the frames count once their sides are rounded. */
static bool fit(int64_t *out_height, int64_t *out_width, double h, double w, double frames, double counted,
                const struct resize_rule *rule, struct err *e)
{
    double f = (double)rule->factor;
    if (fmax(h, w) / fmin(h, w) > RATIO_MAX)
        return err_set(e, ERR_LIMIT, "%.0f x %.0f pixels: one side is more than %d times the other", w, h,
                       RATIO_MAX);
    double rows = nearbyint(h / f) * f, cols = nearbyint(w / f) * f; /* halves to even */
    if (counted * rows * cols > (double)rule->pixels_max) {
        double shrink = sqrt(frames * h * w / (double)rule->pixels_max);
        rows = fmax(f, floor(h / shrink / f) * f);
        cols = fmax(f, floor(w / shrink / f) * f);
    } else if (counted * rows * cols < (double)rule->pixels_min) {
        double grow = sqrt((double)rule->pixels_min / (frames * h * w));
        rows = ceil(h * grow / f) * f;
        cols = ceil(w * grow / f) * f;
    }
    *out_height = at_least((int64_t)rows, rule->factor);
    *out_width = at_least((int64_t)cols, rule->factor);
    return true;
}

bool resize_fit(int64_t *out_height, int64_t *out_width, int64_t height, int64_t width,
                const struct resize_rule *rule, struct err *e)
{
    return fit(out_height, out_width, (double)height, (double)width, 1, 1, rule, e);
}

bool resize_fit_clip(int64_t *out_height, int64_t *out_width, int64_t height, int64_t width, int64_t frames,
                     const struct resize_rule *rule, struct err *e)
{
    double f = (double)rule->factor, h = (double)height, w = (double)width;
    if (h < f || w < f) {
        double grow = fmax(f / h, f / w);
        h = trunc(h * grow);
        w = trunc(w * grow);
    }
    return fit(out_height, out_width, h, w, (double)frames, 2 * nearbyint((double)frames / 2), rule, e);
}

/* For each output place of one axis, where its inputs begin, how many there are, and their weights in units
 * of 2^-bits. */
struct axis {
    int64_t n, taps;
    int64_t *first, *count; /* [n] */
    int32_t *weights;       /* [n][taps] */
    int bits;
};

static double cubic(double x)
{
    const double a = -0.5;
    x = fabs(x);
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? ((a * x - 5 * a) * x + 8 * a) * x - 4 * a : 0;
}

static void axis_free(struct axis *x)
{
    free(x->first);
    free(x->count);
    free(x->weights);
}

static bool axis_room(struct axis *x, double **real, struct err *e)
{
    size_t n = (size_t)x->n, taps = (size_t)x->taps;
    x->first = calloc(n, sizeof *x->first);
    x->count = calloc(n, sizeof *x->count);
    x->weights = calloc(n, taps * sizeof *x->weights);
    *real = calloc(n, taps * sizeof **real);
    if (x->first && x->count && x->weights && *real) return true;
    return err_memory(e, "weights of a resampling", n * taps * (sizeof **real + sizeof *x->weights));
}

/* The largest share of one place, from which the number of bits follows. */
static double real_weights(const struct axis *x, double *real, int64_t in)
{
    double scale = (double)in / (double)x->n, wide = fmax(1, scale), support = 2 * wide, most = 0;
    for (int64_t i = 0; i < x->n; i++) {
        double center = scale * ((double)i + 0.5), sum = 0, *w = real + i * x->taps;
        x->first[i] = at_least((int64_t)(center - support + 0.5), 0);
        int64_t end = (int64_t)(center + support + 0.5);
        x->count[i] = (end < in ? end : in) - x->first[i];
        for (int64_t j = 0; j < x->count[i]; j++)
            sum += w[j] = cubic(((double)(j + x->first[i]) - center + 0.5) / wide);
        for (int64_t j = 0; j < x->count[i]; j++) most = fmax(most, w[j] /= sum);
    }
    return most;
}

static bool axis_make(struct axis *x, int64_t in, int64_t out, struct err *e)
{
    double *real = NULL;
    *x = (struct axis){ .n = out };
    x->taps = 2 * (int64_t)ceil(2 * fmax(1, (double)in / (double)out)) + 1;
    bool ok = axis_room(x, &real, e);
    double most = ok ? real_weights(x, real, in) : 0;
    while (x->bits < BITS_MAX && (int)(0.5 + most * (double)(1 << (x->bits + 1))) < 1 << 15) x->bits++;
    for (int64_t i = 0; ok && i < out * x->taps; i++)
        x->weights[i] = (int32_t)(real[i] * (double)(1 << x->bits) + (real[i] < 0 ? -0.5 : 0.5));
    free(real);
    return ok;
}

static uint8_t clamp(int32_t sum, int bits)
{
    sum >>= bits;
    return (uint8_t)(sum < 0 ? 0 : sum > 255 ? 255 : sum);
}

static void resize_row(uint8_t *out, const uint8_t *in, const struct axis *x)
{
    for (int64_t i = 0; i < x->n; i++) {
        const int32_t *w = x->weights + i * x->taps;
        const uint8_t *from = in + x->first[i] * CHANNELS;
        int32_t sum[CHANNELS] = { 1 << (x->bits - 1), 1 << (x->bits - 1), 1 << (x->bits - 1) };
        for (int64_t j = 0; j < x->count[i]; j++)
            for (int c = 0; c < CHANNELS; c++) sum[c] += from[j * CHANNELS + c] * w[j];
        for (int c = 0; c < CHANNELS; c++) out[i * CHANNELS + c] = clamp(sum[c], x->bits);
    }
}

/* One row of the result: `bytes` samples, each from the rows above one another. */
static void mix_rows(uint8_t *out, const uint8_t *in, int64_t bytes, const int32_t *w, int64_t n, int bits)
{
    enum { TOGETHER = 256 };
    for (int64_t at = 0; at < bytes; at += TOGETHER) {
        int64_t some = bytes - at < TOGETHER ? bytes - at : TOGETHER;
        int32_t sum[TOGETHER];
        for (int64_t i = 0; i < some; i++) sum[i] = 1 << (bits - 1);
        for (int64_t j = 0; j < n; j++)
            for (int64_t i = 0; i < some; i++) sum[i] += in[j * bytes + at + i] * w[j];
        for (int64_t i = 0; i < some; i++) out[at + i] = clamp(sum[i], bits);
    }
}

static bool resize_columns(uint8_t *out, int64_t out_height, const uint8_t *in, int64_t height, int64_t width,
                           struct err *e)
{
    struct axis y;
    int64_t row = width * CHANNELS;
    bool ok = axis_make(&y, height, out_height, e);
    for (int64_t i = 0; ok && i < out_height; i++)
        mix_rows(out + i * row, in + y.first[i] * row, row, y.weights + i * y.taps, y.count[i], y.bits);
    axis_free(&y);
    return ok;
}

bool resize_bicubic(uint8_t *out, int64_t out_height, int64_t out_width, const uint8_t *in, int64_t height,
                    int64_t width, struct err *e)
{
    struct axis x = { 0 };
    uint8_t *middle = NULL;
    bool ok = true, turns = out_width != width, stands = out_height != height;
    uint64_t bytes = (uint64_t)height * (uint64_t)out_width * CHANNELS;
    if (turns) {
        uint8_t *to = stands ? middle = malloc(bytes) : out;
        ok = (to || err_memory(e, "pixels", bytes)) && axis_make(&x, width, out_width, e);
        for (int64_t y = 0; ok && y < height; y++)
            resize_row(to + y * out_width * CHANNELS, in + y * width * CHANNELS, &x);
        axis_free(&x);
        in = to;
    }
    if (ok && stands)
        ok = resize_columns(out, out_height, in, height, out_width, e);
    else if (ok && !turns)
        memcpy(out, in, bytes);
    free(middle);
    return ok;
}
