#include "cli/flags.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct flag *find(const struct flag *flags, const char *word, size_t len)
{
    for (const struct flag *f = flags; f->help; f++) {
        if (strlen(f->name) == len && memcmp(f->name, word, len) == 0) return f;
        if (f->letter && len == 2 && word[0] == '-' && word[1] == f->letter) return f;
    }
    return NULL;
}

static bool set_choice(const struct flag *f, const char *value, struct err *e)
{
    char all[256] = "";
    for (int i = 0; f->choices[i]; i++) {
        if (strcmp(f->choices[i], value) == 0) {
            *(int *)f->out = i;
            return true;
        }
        snprintf(all + strlen(all), sizeof all - strlen(all), "%s%s", i ? ", " : "", f->choices[i]);
    }
    return err_set(e, ERR_ARGUMENT, "%s: expected one of %s, found '%s'", f->name, all, value);
}

static bool set_value(const struct flag *f, const char *value, struct err *e)
{
    char *end;
    errno = 0;
    switch (f->kind) {
    case FLAG_TEXT: *(const char **)f->out = value; return true;
    case FLAG_INT: *(int64_t *)f->out = strtoll(value, &end, 10); break;
    case FLAG_NUMBER: *(double *)f->out = strtod(value, &end); break;
    case FLAG_CHOICE: return set_choice(f, value, e);
    default: {
        struct text_list *list = f->out;
        if (list->n == TEXT_LIST_MAX)
            return err_set(e, ERR_ARGUMENT, "%s: at most %d times", f->name, TEXT_LIST_MAX);
        list->items[list->n++] = value;
        return true;
    }
    }
    if (*value && !*end && errno == 0) return true;
    return err_set(e, ERR_ARGUMENT, "%s: expected %s, found '%s'", f->name,
                   f->kind == FLAG_INT ? "a whole number" : "a number", value);
}

bool flags_parse(const struct command *c, const struct flag *flags, int argc, char **argv,
                 const char **arguments, bool *help, struct err *e)
{
    int n = 0;
    bool only_arguments = false;
    for (int i = 0; i < argc && strcmp(argv[i], "--") != 0; i++)
        *help = *help || strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0;
    if (*help) return true;
    for (int i = 0; i < argc; i++) {
        char *word = argv[i];
        if (only_arguments || word[0] != '-' || !word[1]) {
            if (n == c->n_arguments) return err_set(e, ERR_ARGUMENT, "'%s': one argument too many", word);
            arguments[n++] = word;
            continue;
        }
        only_arguments = strcmp(word, "--") == 0;
        if (only_arguments) continue;
        size_t len = strcspn(word, "=");
        const struct flag *f = find(flags, word, len);
        if (!f) return err_set(e, ERR_ARGUMENT, "unknown flag '%.*s'", (int)len, word);
        if (f->kind == FLAG_SWITCH && !word[len]) {
            *(bool *)f->out = true;
            continue;
        }
        if (f->kind == FLAG_SWITCH) return err_set(e, ERR_ARGUMENT, "%s takes no value", f->name);
        const char *value = word[len] ? word + len + 1 : i + 1 < argc ? argv[++i] : NULL;
        if (!value) return err_set(e, ERR_ARGUMENT, "%s needs a value: %s", f->name, f->value);
        if (!set_value(f, value, e)) return false;
    }
    return n == c->n_arguments || err_set(e, ERR_ARGUMENT, "expected: quench %s %s", c->name, c->arguments);
}

void flags_help(const struct command *c, const struct flag *flags)
{
    printf("quench %s %s\n\n%s\n\n", c->name, c->arguments, c->purpose);
    for (const struct flag *f = flags; f->help; f++) {
        char left[64];
        int n = f->letter ? snprintf(left, sizeof left, "-%c, %s", f->letter, f->name)
                          : snprintf(left, sizeof left, "%s", f->name);
        if (f->value) snprintf(left + n, sizeof left - (size_t)n, " %s", f->value);
        printf("  %-34s %s\n", left, f->help);
    }
}
