/* Normalisation form C by Unicode 9, whatever version the library has; linear in the text. */
#ifndef TOKENIZER_NFC_H
#define TOKENIZER_NFC_H
#include "base/err.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct nfc_char {
    int32_t code;
    uint8_t order; /* canonical combining class */
};

/* Buffers that live from one text to the next. Zero-initialise. */
struct nfc {
    char *text; /* the result, when it differs from the input */
    size_t bytes, capacity;
    struct nfc_char *chars, *sorted; /* one segment, decomposed */
    int32_t *codes;
    size_t n_chars, chars_capacity;
    bool has_later; /* the last text held a character that unicode_stand_in() changes */
};

/* Replaces *text, which is UTF-8, by its NFC: itself when nothing changes, else memory of n until the next
 * call. */
bool nfc_normalize(struct nfc *n, const char **text, size_t *bytes, struct err *e);
void nfc_deinit(struct nfc *n);
#endif
