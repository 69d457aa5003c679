#include "image/data_url.h"
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

static int digit(char c)
{
    if (c >= 'A' && c <= 'Z') return c - 'A';
    if (c >= 'a' && c <= 'z') return c - 'a' + 26;
    if (c >= '0' && c <= '9') return c - '0' + 52;
    return c == '+' ? 62 : c == '/' ? 63 : -1;
}

static bool is_space(char c)
{
    return c == ' ' || c == '\n' || c == '\r' || c == '\t';
}

/* text[0 .. n) without the padding at its end. */
static bool decode(uint8_t *out, size_t *bytes, const char *text, size_t n, size_t offset, struct err *e)
{
    uint32_t held = 0;
    int n_held = 0;
    *bytes = 0;
    for (size_t i = 0; i < n; i++) {
        if (is_space(text[i])) continue;
        int d = digit(text[i]);
        if (d < 0) return err_set(e, ERR_FORMAT, "byte %zu is not a base64 digit", offset + i);
        held = held << 6 | (uint32_t)d;
        if (++n_held < 4) continue;
        out[(*bytes)++] = (uint8_t)(held >> 16);
        out[(*bytes)++] = (uint8_t)(held >> 8);
        out[(*bytes)++] = (uint8_t)held;
        held = 0;
        n_held = 0;
    }
    if (n_held == 1) return err_set(e, ERR_FORMAT, "one base64 digit too many, or some are missing");
    if (n_held > 1) out[(*bytes)++] = (uint8_t)(held >> (n_held == 2 ? 4 : 10));
    if (n_held > 2) out[(*bytes)++] = (uint8_t)(held >> 2);
    return true;
}

bool data_url_decode(uint8_t **data, size_t *bytes, const char *url, uint64_t bytes_max, struct err *e)
{
    static const char mark[] = ";base64";
    const size_t mark_bytes = sizeof mark - 1;
    const char *comma = strchr(url, ',');
    *data = NULL;
    *bytes = 0;
    if (!comma || (size_t)(comma - url) < mark_bytes ||
        strncasecmp(comma - mark_bytes, mark, mark_bytes) != 0)
        return err_set(e, ERR_FORMAT, "expected data:TYPE;base64,DIGITS");
    return data_url_digits(data, bytes, comma + 1, strlen(comma + 1), (size_t)(comma + 1 - url), bytes_max,
                           e);
}

bool data_url_digits(uint8_t **data, size_t *bytes, const char *text, size_t n, size_t offset,
                     uint64_t bytes_max, struct err *e)
{
    *data = NULL;
    *bytes = 0;
    while (n > 0 && (text[n - 1] == '=' || is_space(text[n - 1]))) n--;
    if (n / 4 > bytes_max / 3)
        return err_set(e, ERR_LIMIT, "%zu base64 digits hold more than %" PRIu64 " bytes", n, bytes_max);
    *data = malloc(n / 4 * 3 + 3);
    if (!*data) return err_memory(e, "base64", n / 4 * 3 + 3);
    return decode(*data, bytes, text, n, offset, e);
}

bool data_url_encode(char **url, const uint8_t *data, size_t bytes, struct err *e)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    static const char start[] = "data:image/x;base64,";
    char *to = *url = malloc(sizeof start + (bytes + 2) / 3 * 4);
    if (!to) return err_memory(e, "base64", bytes);
    memcpy(to, start, sizeof start - 1);
    to += sizeof start - 1;
    for (size_t i = 0; i < bytes; i += 3) {
        size_t n = bytes - i < 3 ? bytes - i : 3;
        uint32_t held =
            (uint32_t)data[i] << 16 | (n > 1 ? (uint32_t)data[i + 1] << 8 : 0) | (n > 2 ? data[i + 2] : 0);
        for (size_t k = 0; k < 4; k++) *to++ = k <= n ? digits[held >> (18 - 6 * k) & 63] : '=';
    }
    *to = 0;
    return true;
}
