/* Any bytes as tokenizer.json: creation refuses them, or what it made encodes and decodes a text with
 * everything in it. */
#include "tokenizer/tokenizer.h"
#include "tokenizer/utf8.h"
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const char text[] =
    "  Hello\t w\u00f6rld, it's 'S '\u017ft 12 \u0661\u216b!!\r\n\r\n \n x<x>y<p><x <|im_end|>abcabc "
    "ab\u180e\u2028"
    "e\u0301\u0327 \u1100\u1161\u11a8 \u304b\u3099 \u0958 \U0001d15e \U00011935\U00011930 "
    "\U00031350\U0001e4ec\u0897 "
    "\U0001F469\u200d\U0001F4BB "
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaabcabcabc     ";

static void check(const struct tokenizer *t, unsigned flags)
{
    struct token_list list = { 0 };
    struct err e = { 0 };
    char *decoded = NULL;
    size_t bytes = 0;
    if (tokenizer_encode(t, &list, text, sizeof text, flags, &e)) {
        for (size_t i = 0; i < list.n; i++)
            if (list.ids[i] < 0 || list.ids[i] >= tokenizer_size(t)) abort();
        if (!tokenizer_decode(t, list.ids, list.n, true, &decoded, &bytes, &e)) abort();
        if (utf8_valid_prefix(decoded, bytes) != bytes) abort();
    } else if (list.n != 0) {
        abort();
    }
    free(decoded);
    free(list.ids);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct tokenizer *t = NULL;
    struct err e = { 0 };
    if (!tokenizer_create(&t, (const char *)data, size, NULL, 0, &e)) return 0;
    check(t, 0);
    check(t, TOKENIZE_DATA);
    tokenizer_free(t);
    return 0;
}
