/* Command-line flags by table: --name VALUE, --name=VALUE, -x VALUE, switches; "--" ends flags. A command's
 * --help is printed from the same table. */
#ifndef CLI_FLAGS_H
#define CLI_FLAGS_H
#include "base/err.h"
#include <stdint.h>

enum flag_kind { FLAG_SWITCH, FLAG_TEXT, FLAG_INT, FLAG_NUMBER, FLAG_LIST, FLAG_CHOICE };

enum { TEXT_LIST_MAX = 16 }; /* repeats of a flag */

struct text_list {
    const char *items[TEXT_LIST_MAX];
    int n;
};

struct flag {
    const char *name; /* with its dashes: "--threads" */
    char letter;      /* 'p' for -p; 0: none */
    enum flag_kind kind;
    void *out;                  /* bool *, const char **, int64_t *, double *, struct text_list *, int * */
    const char *value, *help;   /* help: NULL ends a table */
    const char *const *choices; /* FLAG_CHOICE: NULL-terminated; *out gets the index */
};

struct command {
    const char *name, *arguments, *purpose;
    int n_arguments; /* exactly */
};

/* Parses the words after the command; positionals go to `arguments`. *help is set when --help was given
 * (nothing else is checked). */
bool flags_parse(const struct command *c, const struct flag *flags, int argc, char **argv,
                 const char **arguments, bool *help, struct err *e);
void flags_help(const struct command *c, const struct flag *flags);
#endif
