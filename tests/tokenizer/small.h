/* The smallest tokenizer that is valid: 256 bytes, four merges, three added tokens. */
#ifndef TESTS_TOKENIZER_SMALL_H
#define TESTS_TOKENIZER_SMALL_H
#include "tokenizer/utf8.h"
#include <jansson.h>

#define SMALL_REGEX                                                                                          \
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?[\\p{L}\\p{M}]+|\\p{N}| "                            \
    "?[^\\s\\p{L}\\p{M}\\p{N}]+[\\r\\n]*"                                                                    \
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"

/* Byte b has the id b; then "ab" 256, "abc" 257, "bc" 258, space + "a" 259, "<x>" 260, "<x>y" 261, "<p>" 262
 * (the only special one). */
static inline json_t *small_json(void)
{
    json_t *vocab = json_object();
    unsigned shifted = 0x100;
    for (unsigned b = 0; b < 256; b++) {
        char key[5] = { 0 };
        utf8_put(key, (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174 ? b : shifted++);
        json_object_set_new(vocab, key, json_integer(b));
    }
    static const char *const words[] = { "ab", "abc", "bc", "\u0120a" };
    for (int i = 0; i < 4; i++) json_object_set_new(vocab, words[i], json_integer(256 + i));
    return json_pack("{s:[{s:i,s:s,s:b},{s:i,s:s,s:b},{s:i,s:s,s:b}], s:{s:s},"
                     " s:{s:s,s:[{s:s,s:{s:s},s:s,s:b},{s:s,s:b,s:b}]}, s:{s:s},"
                     " s:{s:s,s:o,s:[[s,s],[s,s],s,[s,s]]}}",
                     "added_tokens", "id", 260, "content", "<x>", "special", 0, "id", 261, "content", "<x>y",
                     "special", 0, "id", 262, "content", "<p>", "special", 1, "normalizer", "type", "NFC",
                     "pre_tokenizer", "type", "Sequence", "pretokenizers", "type", "Split", "pattern",
                     "Regex", SMALL_REGEX, "behavior", "Isolated", "invert", 0, "type", "ByteLevel",
                     "add_prefix_space", 0, "use_regex", 0, "decoder", "type", "ByteLevel", "model", "type",
                     "BPE", "vocab", vocab, "merges", "b", "c", "a", "b", "ab c", "\u0120", "a");
}
#endif
