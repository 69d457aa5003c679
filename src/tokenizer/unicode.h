/* What the Unicode libraries of this machine may not know, or know too well. The reference stack (Hugging
 * Face tokenizers 0.22.2) takes general categories from Unicode 16 and normalises by Unicode 9; PCRE2 and
 * utf8proc bring tables of whatever version the system ships. Ids must not depend on that. */
#ifndef TOKENIZER_UNICODE_H
#define TOKENIZER_UNICODE_H
#include <stdbool.h>
#include <stdint.h>

/* NFC leaves it alone, and it neither composes with nor moves across the character before it; false only
 * means "perhaps not". Plain characters are also old enough for every library. */
bool unicode_is_plain(uint32_t c);
/* Assigned after Unicode 9 with a part in normalisation. The reference, which does not know it, takes it for
 * a starter that never composes: text is normalised on both sides of it separately. */
bool unicode_is_nfc_barrier(uint32_t c);
/* For letters, marks and numbers that Unicode 15 and 16 added: a character of the same category and the same
 * number of UTF-8 bytes that every library knows. Any other character stands for itself. */
uint32_t unicode_stand_in(uint32_t c);
#endif
