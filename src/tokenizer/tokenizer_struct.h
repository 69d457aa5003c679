/* What a tokenizer consists of; for the files of this folder. */
#ifndef TOKENIZER_TOKENIZER_STRUCT_H
#define TOKENIZER_TOKENIZER_STRUCT_H
#include "tokenizer/added.h"
#include "tokenizer/bpe.h"
#include "tokenizer/split.h"
#include "tokenizer/tokenizer.h"

struct token {
    uint32_t at, bytes; /* in struct tokenizer's bytes; 0 bytes: an id without meaning */
};
struct tokenizer {
    struct token *tokens; /* by id */
    int32_t n_tokens;
    bool *is_special; /* by id */
    char *bytes;
    size_t n_bytes;
    bool has_nfc;
    struct split split;
    struct bpe bpe;
    struct added_set added;
};
#endif
