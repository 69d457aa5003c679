/* What templates may call: filters, tests and methods, each with the names of its parameters, and functions.
 */
#ifndef TOKENIZER_JINJA_BUILTINS_H
#define TOKENIZER_JINJA_BUILTINS_H
#include "tokenizer/jinja/value.h"

enum { BUILTIN_PARAMETERS = 4 };

struct builtin {
    const char *name;
    int required; /* arguments, of the parameters */
    const char *parameters[BUILTIN_PARAMETERS];
    /* args: one for each parameter, absent where left out. */
    struct value (*call)(struct run *r, struct value v, const struct value *args);
};
extern const struct builtin builtins_filters[], builtins_tests[],
    builtins_methods[]; /* ended by a NULL name */

int builtins_find(const struct builtin *table, struct span name);  /* row, or -1 */
int builtins_parameter(const struct builtin *b, struct span name); /* index, or -1 */
int builtins_parameters(const struct builtin *b);                  /* how many */

/* Functions take any keywords. */
struct value_dict;
bool builtins_is_function(struct span name);
struct value builtins_function(struct run *r, struct span name, const struct value *args, size_t n,
                               const struct value_dict *keywords);
#endif
