/* Flags of other servers: vLLM's that need no doing here, and those of SGLang and llama.cpp, which are
 * refused with the name they have here. */
#ifndef CLI_SERVE_COMPAT_H
#define CLI_SERVE_COMPAT_H
#include "cli/settings.h"

enum { COMPAT_FLAGS_MAX = 64 };

/* What the flags that need no doing were given. */
struct compat {
    bool switches[COMPAT_FLAGS_MAX];
    const char *texts[COMPAT_FLAGS_MAX];
};

/* Appends rows without help to a table with n of them; returns how many there are then. */
int compat_flags(struct flag *flags, int n, struct compat *c);
/* Values that would need doing are refused, and the others noted in a line on stderr, unless quiet. */
bool compat_check(const struct settings_source *s, const struct compat *c, bool quiet, struct err *e);
/* vLLM's other spelling of a flag, -O3 or -O.mode=3: such words become --optimization-level. */
void compat_rewrite(int argc, char **argv);
/* A word of the command line that is a flag elsewhere: false, with the flag to take instead. */
bool compat_foreign(int argc, char **argv, struct err *e);
#endif
