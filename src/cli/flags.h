/* Command-line flags by table: --name VALUE, --name=VALUE, -x VALUE, switches, also as --no-name; '_' in a
 * name is '-'; "--" ends flags. A command's --help is printed from the same table. */
#ifndef CLI_FLAGS_H
#define CLI_FLAGS_H
#include "base/err.h"
#include <stdint.h>

enum flag_kind {
    FLAG_SWITCH,
    FLAG_TEXT,
    FLAG_INT,
    FLAG_NUMBER,
    FLAG_LIST,  /* a value each time */
    FLAG_WORDS, /* a list of all words until the next flag */
    FLAG_CHOICE
};

enum { TEXT_LIST_MAX = 16 }; /* items of a list */

struct text_list {
    const char *items[TEXT_LIST_MAX];
    int n;
};

struct flag {
    const char *name; /* with its dashes: "--threads" */
    char letter;      /* 'p' for -p; 0: none */
    enum flag_kind kind;
    void *out;                  /* bool *, const char **, int64_t *, double *, struct text_list *, int * */
    const char *value, *help;   /* help: "": not shown; NULL ends a table */
    const char *const *choices; /* FLAG_CHOICE: NULL-terminated; *out gets the index */
};

struct command {
    const char *name, *arguments, *purpose;
    int n_arguments; /* exactly; -n: up to n, those that lack stay as they are */
};

/* Parses the words after the command; positionals go to `arguments`. *help is set when --help was given
 * (nothing else is checked). seen: [flags] set for those that were given; or NULL. */
bool flags_parse(const struct command *c, const struct flag *flags, int argc, char **argv,
                 const char **arguments, bool *help, bool *seen, struct err *e);
/* Gives one flag a value as if it had been parsed; of a list the next item. A switch takes true and false. */
bool flags_set(const struct flag *f, const char *value, struct err *e);
/* By its name with or without dashes in front; NULL: there is none. */
const struct flag *flags_find(const struct flag *flags, const char *name);
void flags_help(const struct command *c, const struct flag *flags);
#endif
