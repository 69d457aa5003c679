#include "cli/flags.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool same_name(const char *name, const char *word, size_t len)
{
    for (size_t i = 0; i < len; i++)
        if (name[i] != (word[i] == '_' ? '-' : word[i]) || !name[i]) return false;
    return !name[len];
}

static const struct flag *find(const struct flag *flags, const char *word, size_t len)
{
    for (const struct flag *f = flags; f->help; f++) {
        if (same_name(f->name, word, len)) return f;
        if (f->letter && len == 2 && word[0] == '-' && word[1] == f->letter) return f;
    }
    return NULL;
}

/* --no-x where there is a switch --x. */
static const struct flag *find_negated(const struct flag *flags, const char *word, size_t len)
{
    if (len < 6 || (strncmp(word, "--no-", 5) != 0 && strncmp(word, "--no_", 5) != 0)) return NULL;
    for (const struct flag *f = flags; f->help; f++)
        if (f->kind == FLAG_SWITCH && same_name(f->name + 2, word + 5, len - 5)) return f;
    return NULL;
}

const struct flag *flags_find(const struct flag *flags, const char *name)
{
    for (const struct flag *f = flags; f->help; f++)
        if (same_name(f->name, name, strlen(name)) || same_name(f->name + 2, name, strlen(name))) return f;
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

static bool set_switch(const struct flag *f, const char *value, struct err *e)
{
    bool on = strcmp(value, "true") == 0 || strcmp(value, "1") == 0;
    if (!on && strcmp(value, "false") != 0 && strcmp(value, "0") != 0)
        return err_set(e, ERR_ARGUMENT, "%s: expected true or false, found '%s'", f->name, value);
    *(bool *)f->out = on;
    return true;
}

static bool add_item(const struct flag *f, const char *value, struct err *e)
{
    struct text_list *list = f->out;
    if (list->n == TEXT_LIST_MAX)
        return err_set(e, ERR_ARGUMENT, "%s: at most %d times", f->name, TEXT_LIST_MAX);
    list->items[list->n++] = value;
    return true;
}

bool flags_set(const struct flag *f, const char *value, struct err *e)
{
    char *end;
    errno = 0;
    switch (f->kind) {
    case FLAG_SWITCH: return set_switch(f, value, e);
    case FLAG_TEXT: *(const char **)f->out = value; return true;
    case FLAG_INT: *(int64_t *)f->out = strtoll(value, &end, 10); break;
    case FLAG_NUMBER: *(double *)f->out = strtod(value, &end); break;
    case FLAG_CHOICE: return set_choice(f, value, e);
    default: return add_item(f, value, e);
    }
    if (*value && !*end && errno == 0) return true;
    return err_set(e, ERR_ARGUMENT, "%s: expected %s, found '%s'", f->name,
                   f->kind == FLAG_INT ? "a whole number" : "a number", value);
}

struct words {
    char **argv;
    int argc, at;
};

/* A word that cannot be a flag: "-" and what does not begin with one. */
static bool is_value(const char *word)
{
    return word[0] != '-' || !word[1];
}

/* The flag's value or values: behind '=' or the next words. */
static bool take_value(const struct flag *f, const char *word, size_t len, struct words *w, struct err *e)
{
    if (f->kind == FLAG_SWITCH && word[len]) return err_set(e, ERR_ARGUMENT, "%s takes no value", f->name);
    if (f->kind == FLAG_SWITCH) return set_switch(f, "true", e);
    const char *value = word[len] ? word + len + 1 : w->at + 1 < w->argc ? w->argv[++w->at] : NULL;
    if (!value) return err_set(e, ERR_ARGUMENT, "%s needs a value: %s", f->name, f->value);
    if (!flags_set(f, value, e)) return false;
    while (f->kind == FLAG_WORDS && !word[len] && w->at + 1 < w->argc && is_value(w->argv[w->at + 1]))
        if (!flags_set(f, w->argv[++w->at], e)) return false;
    return true;
}

static bool take_flag(const struct flag *flags, struct words *w, bool *seen, struct err *e)
{
    const char *word = w->argv[w->at];
    size_t len = strcspn(word, "=");
    const struct flag *f = find(flags, word, len), *negated = f ? NULL : find_negated(flags, word, len);
    if (!f && !negated) return err_set(e, ERR_ARGUMENT, "unknown flag '%.*s'", (int)len, word);
    if (seen) seen[(f ? f : negated) - flags] = true;
    if (f) return take_value(f, word, len, w, e);
    if (word[len]) return err_set(e, ERR_ARGUMENT, "%.*s takes no value", (int)len, word);
    return set_switch(negated, "false", e);
}

bool flags_parse(const struct command *c, const struct flag *flags, int argc, char **argv,
                 const char **arguments, bool *help, bool *seen, struct err *e)
{
    struct words w = { argv, argc, 0 };
    int n = 0;
    bool only_arguments = false;
    for (int i = 0; i < argc && strcmp(argv[i], "--") != 0; i++)
        *help = *help || strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0;
    if (*help) return true;
    for (; w.at < argc; w.at++) {
        const char *word = argv[w.at];
        if (only_arguments || is_value(word)) {
            if (n == abs(c->n_arguments))
                return err_set(e, ERR_ARGUMENT, "'%s': one argument too many", word);
            arguments[n++] = word;
        } else if (strcmp(word, "--") == 0)
            only_arguments = true;
        else if (!take_flag(flags, &w, seen, e))
            return false;
    }
    return n == c->n_arguments || c->n_arguments < 0 ||
           err_set(e, ERR_ARGUMENT, "expected: quench %s %s", c->name, c->arguments);
}

void flags_help(const struct command *c, const struct flag *flags)
{
    printf("quench %s %s\n\n%s\n\n", c->name, c->arguments, c->purpose);
    for (const struct flag *f = flags; f->help; f++) {
        char left[64];
        if (!*f->help) continue;
        int n = f->letter ? snprintf(left, sizeof left, "-%c, %s", f->letter, f->name)
                          : snprintf(left, sizeof left, "%s", f->name);
        if (f->value) snprintf(left + n, sizeof left - (size_t)n, " %s", f->value);
        printf("  %-34s %s\n", left, f->help);
    }
}
