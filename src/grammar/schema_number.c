/* Numbers between bounds, digit by digit. Integers are exact over all of 64 bits. Other numbers between
 * bounds are written without exponent and with at most 15 significant digits beside a bound, so that reading
 * them as a double cannot carry them over it. */
#include "grammar/schema.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { DOUBLE_DIGITS = 15, MULTIPLES_MAX = 20000, MULTIPLE_STATES_MAX = 1000 };

static const uint64_t TEN_TO_18 = 1000000000000000000u;

static int32_t digits(struct rules *r, int low, int high)
{
    return expr_range(r, '0' + low, '0' + high);
}

static int32_t any_digits(struct rules *r, int64_t least, int64_t most)
{
    return expr_repeat(r, digits(r, 0, 9), least, most);
}

/* Texts of n digits from low to high. */
static int32_t same_length(struct rules *r, const char *low, const char *high, int n)
{
    if (n == 0) return expr_empty(r);
    if (strspn(low, "0") >= (size_t)n && strspn(high, "9") >= (size_t)n) return any_digits(r, n, n);
    int a = low[0] - '0', b = high[0] - '0';
    if (a == b) return SEQ(r, digits(r, a, a), same_length(r, low + 1, high + 1, n - 1));
    static const char zeros[] = "0000000000000000000", nines[] = "9999999999999999999";
    struct expr_list parts = { 0 };
    expr_list_add(r, &parts, SEQ(r, digits(r, a, a), same_length(r, low + 1, nines, n - 1)));
    if (b - a > 1) expr_list_add(r, &parts, SEQ(r, digits(r, a + 1, b - 1), any_digits(r, n - 1, n - 1)));
    expr_list_add(r, &parts, SEQ(r, digits(r, b, b), same_length(r, zeros, high + 1, n - 1)));
    return expr_list_alt(r, &parts);
}

/* Integers from low to high, without sign. */
static int32_t whole(struct rules *r, uint64_t low, uint64_t high)
{
    struct expr_list parts = { 0 };
    if (low > high) return expr_none(r);
    uint64_t end = 9;
    for (int n = 1; n <= 19; n++, end = n < 19 ? end * 10 + 9 : UINT64_MAX) {
        if (low > end) continue;
        char a[24], b[24];
        uint64_t last = high < end ? high : end;
        snprintf(a, sizeof a, "%llu", (unsigned long long)low);
        snprintf(b, sizeof b, "%llu", (unsigned long long)last);
        expr_list_add(r, &parts, same_length(r, a, b, n));
        if (last == high) break;
        low = last + 1;
    }
    return expr_list_alt(r, &parts);
}

static uint64_t magnitude(int64_t x)
{
    return x < 0 ? 0 - (uint64_t)x : (uint64_t)x;
}

static int32_t integers(struct rules *r, int64_t low, int64_t high)
{
    int32_t positive = high < 0 ? expr_none(r) : whole(r, low > 0 ? (uint64_t)low : 0, (uint64_t)high);
    if (low >= 0) return positive;
    int32_t negative = whole(r, high < 0 ? magnitude(high) : 1, magnitude(low));
    return ALT(r, positive, SEQ(r, expr_text(r, "-"), negative));
}

struct bounds {
    const json_t *low, *high; /* NULL: none */
    bool excludes_low, excludes_high;
};

static double number_of(const json_t *x)
{
    return json_number_value(x);
}

static void bound(struct schema *s, const json_t *schema, const char *keyword, bool is_low, bool excludes,
                  struct bounds *b)
{
    const json_t *x = json_object_get(schema, keyword);
    if (!x) return;
    if (!json_is_number(x)) {
        schema_refuse(s, keyword, "must be a number");
        return;
    }
    const json_t **known = is_low ? &b->low : &b->high;
    double have = *known ? number_of(*known) : 0, is = number_of(x);
    if (*known && (is_low ? is < have : is > have)) return;
    if (*known && is == have && !excludes) return;
    *known = x;
    *(is_low ? &b->excludes_low : &b->excludes_high) = excludes;
}

static struct bounds bounds_of(struct schema *s, const json_t *schema)
{
    struct bounds b = { 0 };
    bound(s, schema, "minimum", true, false, &b);
    bound(s, schema, "exclusiveMinimum", true, true, &b);
    bound(s, schema, "maximum", false, false, &b);
    bound(s, schema, "exclusiveMaximum", false, true, &b);
    return b;
}

/* The least integer that the bound allows; false: none of 64 bits. */
static bool integer_low(const json_t *x, bool excludes, int64_t *out)
{
    if (json_is_integer(x)) {
        *out = json_integer_value(x);
        return !excludes || (*out < INT64_MAX && ++*out);
    }
    double v = ceil(number_of(x));
    if (excludes && v == number_of(x)) v += 1;
    if (v >= 0x1p63) return false;
    *out = v < -0x1p63 ? INT64_MIN : (int64_t)v;
    return true;
}

static bool integer_high(const json_t *x, bool excludes, int64_t *out)
{
    if (json_is_integer(x)) {
        *out = json_integer_value(x);
        return !excludes || (*out > INT64_MIN && (--*out, true));
    }
    double v = floor(number_of(x));
    if (excludes && v == number_of(x)) v -= 1;
    if (v < -0x1p63) return false;
    *out = v >= 0x1p63 ? INT64_MAX : (int64_t)v;
    return true;
}

/* Multiples of m without sign and not 0, of any size: one rule for each digit count and remainder. */
static int32_t multiples(struct rules *r, int64_t m)
{
    enum { DIGITS = JSON_DIGITS };
    int32_t *now = calloc((size_t)m, sizeof *now), *next = calloc((size_t)m, sizeof *next), first = 0;
    if (!now || !next) rules_fail(r, ERR_MEMORY, "no memory for a grammar");
    for (int left = 0; left < DIGITS && !r->failed; left++) { /* digits that may follow */
        for (int64_t rest = 0; rest < m && !r->failed; rest++) {
            struct expr_list parts = { 0 };
            if (rest == 0) expr_list_add(r, &parts, expr_empty(r));
            for (int d = 0; left > 0 && d < 10; d++)
                expr_list_add(r, &parts, SEQ(r, digits(r, d, d), expr_call(r, now[(rest * 10 + d) % m])));
            next[rest] = rules_add(r, "multiples", expr_list_alt(r, &parts));
        }
        int32_t *t = now;
        now = next;
        next = t;
    }
    if (!r->failed) {
        struct expr_list parts = { 0 };
        for (int d = 1; d < 10; d++)
            expr_list_add(r, &parts, SEQ(r, digits(r, d, d), expr_call(r, now[d % m])));
        first = expr_list_alt(r, &parts);
    }
    free(now);
    free(next);
    return first;
}

static int32_t few_multiples(struct rules *r, int64_t m, int64_t low, int64_t high)
{
    struct expr_list parts = { 0 };
    int64_t x = low / m * m;
    for (x = x < low ? x + m : x; x <= high && !r->failed; x += m) {
        char text[24];
        snprintf(text, sizeof text, "%lld", (long long)x);
        expr_list_add(r, &parts, expr_text(r, text));
        if (x > INT64_MAX - m) break;
    }
    return expr_list_alt(r, &parts);
}

static int32_t integer(struct schema *s, const struct bounds *b, int64_t m)
{
    struct rules *r = s->r;
    int64_t low = -(int64_t)(TEN_TO_18 - 1), high = (int64_t)(TEN_TO_18 - 1);
    if (b->low && !integer_low(b->low, b->excludes_low, &low)) return expr_none(r);
    if (b->high && !integer_high(b->high, b->excludes_high, &high)) return expr_none(r);
    if (!b->high && low > high) high = INT64_MAX;
    if (!b->low && high < low) low = INT64_MIN;
    if (low > high) return expr_none(r);
    if (m == 1) return b->low || b->high ? integers(r, low, high) : expr_call(r, s->j.integer);
    if (((uint64_t)high - (uint64_t)low) / (uint64_t)m <= MULTIPLES_MAX)
        return few_multiples(r, m, low, high);
    if ((b->low && low != 0 && low != 1) || b->high)
        return schema_refuse(s, "multipleOf", "beside bounds allows more than %d values: narrow the bounds",
                             MULTIPLES_MAX);
    if (m > MULTIPLE_STATES_MAX)
        return schema_refuse(s, "multipleOf", "over %d needs bounds on both sides", MULTIPLE_STATES_MAX);
    int32_t some = expr_call(r, rules_add(r, "multiples", multiples(r, m)));
    int32_t with_sign = b->low ? some : SEQ(r, OPTIONAL(r, expr_text(r, "-")), some);
    return b->low && low == 1 ? with_sign : ALT(r, expr_text(r, "0"), with_sign);
}

/* A bound's size as decimal digits. */
struct decimal {
    bool is_negative;
    uint64_t whole;
    char fraction[DOUBLE_DIGITS + 1]; /* padded with zeros */
};

static int length_of(uint64_t x)
{
    int n = 1;
    while (x >= 10) x /= 10, n++;
    return n;
}

static bool decimal_of(struct schema *s, const json_t *x, struct decimal *out)
{
    char text[64] = { 0 };
    double v = number_of(x);
    out->is_negative = v < 0;
    if (fabs(v) >= 1e15) {
        schema_refuse(s, "minimum, maximum", "beyond 1e15 are supported for integers only");
        return false;
    }
    for (int n = 0; n <= DOUBLE_DIGITS; n++) {
        snprintf(text, sizeof text, "%.*f", n, fabs(v));
        if (strtod(text, NULL) == fabs(v)) break;
    }
    out->whole = strtoull(text, NULL, 10);
    memset(out->fraction, '0', DOUBLE_DIGITS);
    out->fraction[DOUBLE_DIGITS] = 0;
    const char *point = strchr(text, '.');
    size_t n = point ? strlen(point + 1) : 0;
    if (point) memcpy(out->fraction, point + 1, n);
    if (strtod(text, NULL) == fabs(v) && (int)n + length_of(out->whole) <= DOUBLE_DIGITS) return true;
    schema_refuse(s, "minimum, maximum", "with more than %d digits are supported for integers only",
                  DOUBLE_DIGITS);
    return false;
}

/* The digits after the point of numbers whose part before it is that of a bound. */
struct fraction {
    struct rules *r;
    const char *low, *high; /* digits; NULL: free on that side */
    bool excludes_low, excludes_high;
    int most;
};

static bool may_stop(const struct fraction *f, int at, bool low, bool high)
{
    bool is_low = low && strspn(f->low + at, "0") == strlen(f->low + at);
    bool is_high = high && strspn(f->high + at, "0") == strlen(f->high + at);
    return (!low || (is_low && !f->excludes_low)) && (!high || !is_high || !f->excludes_high);
}

/* After `at` digits; low, high: these were the bound's. */
static int32_t fraction_digits(const struct fraction *f, int at, bool low, bool high)
{
    struct rules *r = f->r;
    if (!low && !high)
        return at == 0 ? OPTIONAL(r, SEQ(r, expr_text(r, "."), any_digits(r, 1, f->most)))
                       : any_digits(r, 0, f->most - at);
    struct expr_list parts = { 0 }, all = { 0 };
    int a = low ? f->low[at] - '0' : -1, b = high ? f->high[at] - '0' : 10;
    if (at < f->most && a <= b) {
        if (low && high && a == b)
            expr_list_add(r, &parts, SEQ(r, digits(r, a, a), fraction_digits(f, at + 1, true, true)));
        else {
            if (low)
                expr_list_add(r, &parts, SEQ(r, digits(r, a, a), fraction_digits(f, at + 1, true, false)));
            if (b - a > 1)
                expr_list_add(r, &parts, SEQ(r, digits(r, a + 1, b - 1), any_digits(r, 0, f->most - at - 1)));
            if (high)
                expr_list_add(r, &parts, SEQ(r, digits(r, b, b), fraction_digits(f, at + 1, false, true)));
        }
    }
    int32_t more = expr_list_alt(r, &parts);
    if (at == 0) more = SEQ(r, expr_text(r, "."), more);
    if (may_stop(f, at, low, high)) expr_list_add(r, &all, expr_empty(r));
    expr_list_add(r, &all, more);
    return expr_list_alt(r, &all);
}

/* Numbers without sign from low to high (NULL: no limit), with at most `most` digits after the point. */
static int32_t decimals(struct rules *r, const struct decimal *low, bool excludes_low,
                        const struct decimal *high, bool excludes_high, int most)
{
    struct fraction f = { r, low->fraction, high ? high->fraction : NULL, excludes_low, excludes_high, most };
    int room = DOUBLE_DIGITS - length_of(high && high->whole > low->whole ? high->whole : low->whole);
    if (f.most > room) f.most = room;
    char a[24], b[24];
    snprintf(a, sizeof a, "%llu", (unsigned long long)low->whole);
    snprintf(b, sizeof b, "%llu", (unsigned long long)(high ? high->whole : 0));
    if (high && low->whole > high->whole) return expr_none(r);
    if (high && low->whole == high->whole) return SEQ(r, expr_text(r, a), fraction_digits(&f, 0, true, true));
    uint64_t end = high ? high->whole - 1 : 999999999999999u;
    int32_t first = SEQ(r, expr_text(r, a), fraction_digits(&f, 0, true, false));
    int32_t middle = SEQ(r, whole(r, low->whole + 1, end), fraction_digits(&f, 0, false, false));
    if (!high) return ALT(r, first, middle);
    return ALT(r, first, middle, SEQ(r, expr_text(r, b), fraction_digits(&f, 0, false, true)));
}

static int32_t number(struct schema *s, const struct bounds *b, int most)
{
    static const struct decimal zero = { .fraction = "000000000000000" };
    struct decimal low = { 0 }, high = { 0 };
    struct rules *r = s->r;
    struct expr_list parts = { 0 };
    if ((b->low && !decimal_of(s, b->low, &low)) || (b->high && !decimal_of(s, b->high, &high))) return 0;
    if (!b->high || !high.is_negative) {
        bool from_zero = !b->low || low.is_negative;
        expr_list_add(r, &parts,
                      decimals(r, from_zero ? &zero : &low, !from_zero && b->excludes_low,
                               b->high ? &high : NULL, b->excludes_high, most));
    }
    if (!b->low || low.is_negative) {
        bool to_zero = !b->high || !high.is_negative; /* -0 is 0 */
        bool is_below = b->excludes_high && (!to_zero || number_of(b->high) == 0);
        int32_t size =
            decimals(r, to_zero ? &zero : &high, is_below, b->low ? &low : NULL, b->excludes_low, most);
        expr_list_add(r, &parts, SEQ(r, expr_text(r, "-"), size));
    }
    return expr_list_alt(r, &parts);
}

int32_t schema_number(struct schema *s, const json_t *schema, bool is_integer)
{
    struct bounds b = bounds_of(s, schema);
    const json_t *multiple = json_object_get(schema, "multipleOf");
    double m = multiple ? number_of(multiple) : 1;
    if (s->r->failed) return 0;
    if (multiple && (!json_is_number(multiple) || m <= 0))
        return schema_refuse(s, "multipleOf", "must be over 0");
    if (multiple ? m == floor(m) && m < 0x1p53 : is_integer) return integer(s, &b, (int64_t)m);
    if (!multiple && !b.low && !b.high) return expr_call(s->r, s->j.number);
    if (!multiple) return number(s, &b, DOUBLE_DIGITS - 1);
    for (int n = 1; n < DOUBLE_DIGITS && !is_integer; n++) {
        char text[24];
        snprintf(text, sizeof text, "1e-%d", n);
        if (strtod(text, NULL) == m) return number(s, &b, n);
    }
    return schema_refuse(s, "multipleOf", "must be an integer or, of numbers, 0.1, 0.01 and so on");
}
