/* quench bench MODEL --prompts FILE --speculative-config JSON: what drafting gains on these prompts. */
#ifndef CLI_BENCH_SPECULATIVE_H
#define CLI_BENCH_SPECULATIVE_H
#include "cli/common.h"

struct bench_speculative {
    const struct common *common;
    const char *model, *prompts;
    int64_t max_tokens;
    bool json;
};
bool bench_speculative(const struct bench_speculative *b, struct err *e);
#endif
