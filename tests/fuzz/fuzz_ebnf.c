/* Input: a grammar in GBNF. */
#include "grammar_walk.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct grammar *g = NULL;
    struct err e = { 0 };
    bool ok = grammar_from_ebnf(&g, (const char *)data, bytes, &e);
    grammar_walk(g, &e, ok);
    return 0;
}
