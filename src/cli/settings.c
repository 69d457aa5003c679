#include "cli/settings.h"
#include "base/file.h"
#include <ctype.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { FILE_BYTES_MAX = 1 << 20 };
static const char COMMAND_LINE[] = "command line";

/* QUENCH_MAX_MODEL_LEN of --max-model-len. */
static void variable_name(char out[64], const char *flag)
{
    int n = snprintf(out, 64, "QUENCH_%s", flag + strspn(flag, "-"));
    for (int i = 7; i < n && i < 63; i++) out[i] = out[i] == '-' ? '_' : (char)toupper((unsigned char)out[i]);
}

/* Keeps a text that a flag's value points into. */
static char *keep(struct settings_source *s, char *text)
{
    if (text && s->n_texts < SETTINGS_FLAGS_MAX) return s->texts[s->n_texts++] = text;
    free(text);
    return NULL;
}

/* The file. */

static json_t *scalar(const struct yaml_tree *t)
{
    json_error_t fault;
    json_t *v = t->is_plain ? json_loads(t->text, JSON_DECODE_ANY, &fault) : NULL;
    return v ? v : json_string(t->text);
}

static json_t *to_json(const struct yaml_tree *t)
{
    if (t->kind == YAML_TREE_TEXT) return scalar(t);
    json_t *out = t->kind == YAML_TREE_LIST ? json_array() : json_object();
    for (const struct yaml_tree *n = t->first; n; n = n->next) {
        if (t->kind == YAML_TREE_LIST)
            json_array_append_new(out, to_json(n));
        else
            json_object_set_new(out, n->key, to_json(n));
    }
    return out;
}

static bool set_list(const struct flag *f, const struct yaml_tree *t, struct err *e)
{
    for (const struct yaml_tree *n = t->first; n; n = n->next)
        if (n->kind != YAML_TREE_TEXT)
            return err_set(e, ERR_ARGUMENT, "%s: expected a list of texts", f->name);
        else if (!flags_set(f, n->text, e))
            return false;
    return true;
}

static bool set_from_tree(struct settings_source *s, const struct flag *f, const struct yaml_tree *t,
                          struct err *e)
{
    if (t->kind == YAML_TREE_TEXT) return flags_set(f, t->text, e);
    if (t->kind == YAML_TREE_LIST && (f->kind == FLAG_LIST || f->kind == FLAG_WORDS))
        return set_list(f, t, e);
    if (f->kind != FLAG_TEXT) return err_set(e, ERR_ARGUMENT, "%s: expected one value", f->name);
    json_t *v = to_json(t);
    char *text = keep(s, v ? json_dumps(v, JSON_COMPACT) : NULL);
    json_decref(v);
    return text ? flags_set(f, text, e) : err_memory(e, "--config", 0);
}

static bool apply_key(struct settings_source *s, const struct yaml_tree *t, const char **arguments,
                      struct err *e)
{
    if (strcmp(t->key, "model") == 0 && t->kind == YAML_TREE_TEXT) {
        if (!*arguments) *arguments = t->text;
        return true;
    }
    const struct flag *f = flags_find(s->flags, t->key);
    if (!f || strcmp(f->name, "--config") == 0)
        return err_set(e, ERR_ARGUMENT, "line %d: '%.100s' is no flag of quench %s", t->line, t->key,
                       s->command->name);
    if (s->from[f - s->flags]) return true;
    s->from[f - s->flags] = s->path;
    s->line[f - s->flags] = t->line;
    return set_from_tree(s, f, t, e) || err_note(e, "line %d", t->line);
}

static bool apply_file(struct settings_source *s, const char **arguments, struct err *e)
{
    char *text;
    size_t bytes;
    if (!file_read(&text, &bytes, s->path, FILE_BYTES_MAX, e)) return err_note(e, "--config");
    bool ok = yaml_tree_read(&s->tree, text, bytes, e);
    free(text);
    if (ok && s->tree->kind != YAML_TREE_MAP)
        ok = err_set(e, ERR_FORMAT, "expected lines such as 'port: 8000'");
    for (const struct yaml_tree *t = ok ? s->tree->first : NULL; ok && t; t = t->next)
        ok = apply_key(s, t, arguments, e);
    return ok || err_note(e, "--config: %s", s->path);
}

/* The environment. */

static bool set_words(struct settings_source *s, const struct flag *f, const char *value, struct err *e)
{
    char *text = keep(s, strdup(value)), *rest = text;
    if (!text) return err_memory(e, "the environment", 0);
    for (char *word; (word = strsep(&rest, ","));)
        if (*word && !flags_set(f, word, e)) return false;
    return true;
}

static bool apply_environment(struct settings_source *s, const char **arguments, struct err *e)
{
    if (!*arguments) *arguments = getenv("QUENCH_MODEL");
    for (const struct flag *f = s->flags; f->help; f++) {
        char name[64];
        variable_name(name, f->name);
        const char *value = getenv(name);
        if (!value || s->from[f - s->flags]) continue;
        s->from[f - s->flags] = "environment";
        bool list = f->kind == FLAG_LIST || f->kind == FLAG_WORDS;
        if (!(list ? set_words(s, f, value, e) : flags_set(f, value, e))) return err_note(e, "%s", name);
    }
    return true;
}

bool settings_parse(struct settings_source *s, int argc, char **argv, const char **arguments,
                    const char *const *path, bool *help, struct err *e)
{
    bool seen[SETTINGS_FLAGS_MAX] = { false };
    if (!flags_parse(s->command, s->flags, argc, argv, arguments, help, seen, e)) return false;
    if (*help) return true;
    for (int i = 0; s->flags[i].help; i++)
        if (seen[i]) s->from[i] = COMMAND_LINE;
    if (!apply_environment(s, arguments, e)) return false;
    s->path = *path;
    return !s->path || apply_file(s, arguments, e);
}

void settings_free(struct settings_source *s)
{
    yaml_tree_free(s->tree);
    for (int i = 0; i < s->n_texts; i++) free(s->texts[i]);
    s->tree = NULL;
    s->n_texts = 0;
}

/* Printing. */

static void print_quoted(const char *text)
{
    putchar('\'');
    for (; *text; text++) {
        if (*text == '\'') putchar('\'');
        putchar(*text);
    }
    putchar('\'');
}

static void print_value(const struct flag *f)
{
    const struct text_list *list = f->out;
    switch (f->kind) {
    case FLAG_SWITCH: printf("%s", *(const bool *)f->out ? "true" : "false"); return;
    case FLAG_INT: printf("%lld", (long long)*(const int64_t *)f->out); return;
    case FLAG_NUMBER: printf("%g", *(const double *)f->out); return;
    case FLAG_CHOICE: printf("%s", f->choices[*(const int *)f->out]); return;
    case FLAG_TEXT: print_quoted(*(const char *const *)f->out); return;
    default: break;
    }
    putchar('[');
    for (int i = 0; i < list->n; i++) {
        if (i) printf(", ");
        print_quoted(list->items[i]);
    }
    putchar(']');
}

static bool is_unset(const struct flag *f)
{
    if (f->kind == FLAG_TEXT) return !*(const char *const *)f->out;
    return (f->kind == FLAG_LIST || f->kind == FLAG_WORDS) && ((const struct text_list *)f->out)->n == 0;
}

static bool is_in(const char *const *names, const char *name)
{
    for (; *names; names++)
        if (strcmp(*names, name) == 0) return true;
    return false;
}

void settings_print(const struct settings_source *s, const char *model, const char *const *secret)
{
    printf("model: ");
    print_quoted(model);
    putchar('\n');
    for (const struct flag *f = s->flags; f->help; f++) {
        char variable[64];
        const char *from = s->from[f - s->flags];
        if (!*f->help && !from) continue;
        if (strcmp(f->name, "--config") == 0 || strcmp(f->name, "--print-config") == 0) continue;
        bool hidden = is_unset(f) || is_in(secret, f->name);
        printf("%s%s: ", hidden ? "# " : "", f->name + 2);
        if (is_unset(f))
            printf("not set");
        else if (hidden)
            printf("not shown");
        else
            print_value(f);
        variable_name(variable, f->name);
        if (from && from == s->path)
            printf("  # %s, line %d\n", from, s->line[f - s->flags]);
        else
            printf("  # %s\n", !from ? "default" : from == COMMAND_LINE ? from : variable);
    }
}
