/* Recipe files. Takes YAML in llm-compressor's syntax, gives a table of groups. A key is either understood or
 * refused: one that is skipped would make the checkpoint another than the recipe says. Source:
 * llm-compressor, recipe/ and modifiers/quantization; compressed-tensors, quant_args.py and quant_scheme.py
 * (presets). */
#include "base/file.h"
#include "quantize/recipe.h"
#include "quantize/yaml_tree.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PATH_BYTES = 160, FILE_BYTES_MAX = 1 << 20 };

static bool one_of(const char *text, const char *const *list)
{
    for (; *list; list++)
        if (strcmp(text, *list) == 0) return true;
    return false;
}

static bool is_null(const struct yaml_tree *n)
{
    static const char *const words[] = { "", "~", "null", "Null", "NULL", NULL };
    return !n || (n->kind == YAML_TREE_TEXT && n->is_plain && one_of(n->text, words));
}

static bool must_be(const struct yaml_tree *n, enum yaml_tree_kind kind, const char *where, struct err *e)
{
    static const char *const names[] = { "a text", "a list", "a mapping" };
    return n->kind == kind || err_set(e, ERR_FORMAT, "line %d: %s: expected %s", n->line, where, names[kind]);
}

static bool check_keys(const struct yaml_tree *map, const char *where, const char *const *known,
                       struct err *e)
{
    if (!must_be(map, YAML_TREE_MAP, where, e)) return false;
    for (const struct yaml_tree *n = map->first; n; n = n->next)
        if (!one_of(n->key, known))
            return err_set(e, ERR_FORMAT, "line %d: %s: unknown key '%.100s'", n->line, where, n->key);
    return true;
}

/* Argument objects. */

/* A plain text as YAML 1.1 reads it; only whole numbers, since arguments have no others. */
static json_t *scalar_json(const struct yaml_tree *n)
{
    static const char *const yes[] = { "true", "True", "TRUE", "yes", "on", NULL };
    static const char *const no[] = { "false", "False", "FALSE", "no", "off", NULL };
    const char *digits = n->text + (*n->text == '-');
    if (is_null(n)) return json_null();
    if (!n->is_plain) return json_string(n->text);
    if (one_of(n->text, yes)) return json_true();
    if (one_of(n->text, no)) return json_false();
    if (*digits && strlen(digits) < 10 && strspn(digits, "0123456789") == strlen(digits))
        return json_integer(atol(n->text));
    return json_string(n->text);
}

/* Arguments that have one meaning here: absent, null, or what is always done. */
struct fixed {
    const char *key;
    const char *values[4]; /* NULL-terminated */
    const char *why;
};

static bool check_fixed(const struct yaml_tree *n, const struct fixed *f, const char *where, struct err *e)
{
    if (is_null(n) || (n->kind != YAML_TREE_TEXT && !n->first)) return true;
    if (n->kind == YAML_TREE_TEXT && one_of(n->text, f->values)) return true;
    return err_set(e, ERR_UNSUPPORTED, "line %d: %s.%s: '%.100s' is not done here: %s", n->line, where,
                   f->key, n->kind == YAML_TREE_TEXT ? n->text : "...", f->why);
}

static const struct fixed weight_fixed[] = {
    { "observer",
      { "memoryless_minmax", "minmax", "static_minmax", NULL },
      "scales come from the largest weight (memoryless_minmax)" },
    { "observer_kwargs", { NULL }, "the observer has none" },
    { "actorder", { NULL }, "columns keep their order" },
    { "zp_dtype", { "torch.float8_e4m3fn", NULL }, "there are no zero points" },
    { NULL, { NULL }, NULL },
};
static const struct fixed input_fixed[] = {
    { "observer",
      { "static_minmax", NULL },
      "input scales come from the largest value of all samples (static_minmax)" },
    { "observer_kwargs", { NULL }, "the observer has none" },
    { "actorder", { NULL }, "columns keep their order" },
    { "block_structure", { NULL }, "inputs have no blocks" },
    { "zp_dtype", { "torch.float8_e4m3fn", NULL }, "there are no zero points" },
    { NULL, { NULL }, NULL },
};

/* [128, 128], or the text 128x128. */
static bool add_block(json_t *out, const struct yaml_tree *n, const char *where, struct err *e)
{
    json_t *block = NULL;
    int rows, cols, end = 0;
    if (n->kind == YAML_TREE_LIST && (block = json_array()))
        for (const struct yaml_tree *c = n->first; c; c = c->next)
            json_array_append_new(block, c->kind == YAML_TREE_TEXT ? scalar_json(c) : json_null());
    else if (n->kind == YAML_TREE_TEXT && strlen(n->text) < 20 &&
             sscanf(n->text, "%dx%d%n", &rows, &cols, &end) == 2 && !n->text[end])
        block = json_pack("[i, i]", rows, cols);
    else
        return err_set(e, ERR_FORMAT, "line %d: %s.block_structure: expected [128, 128]", n->line, where);
    return json_object_set_new(out, n->key, block) == 0 || err_memory(e, "recipe", 0);
}

/* Adds one argument to what quantization_config's own reader will judge. */
static bool add_argument(json_t *out, const struct yaml_tree *n, const struct fixed *fixed, const char *where,
                         struct err *e)
{
    static const char *const read[] = { "num_bits",  "type",    "strategy",    "group_size",
                                        "symmetric", "dynamic", "scale_dtype", NULL };
    for (const struct fixed *f = fixed; f->key; f++)
        if (strcmp(n->key, f->key) == 0) return check_fixed(n, f, where, e);
    if (strcmp(n->key, "block_structure") == 0) return is_null(n) || add_block(out, n, where, e);
    if (!one_of(n->key, read))
        return err_set(e, ERR_FORMAT, "line %d: %s: unknown key '%.100s'", n->line, where, n->key);
    char path[PATH_BYTES + 32];
    snprintf(path, sizeof path, "%s.%s", where, n->key);
    if (!must_be(n, YAML_TREE_TEXT, path, e)) return false;
    json_t *value = strcmp(n->key, "scale_dtype") == 0 && strcmp(n->text, "float8_e4m3fn") == 0
                        ? json_string("torch.float8_e4m3fn")
                        : scalar_json(n);
    return json_object_set_new(out, n->key, value) == 0 || err_memory(e, "recipe", 0);
}

static bool add_arguments(json_t *group, const struct yaml_tree *n, const struct fixed *fixed,
                          const char *where, struct err *e)
{
    if (is_null(n)) return true;
    char path[PATH_BYTES];
    snprintf(path, sizeof path, "%s.%s", where, n->key);
    if (!must_be(n, YAML_TREE_MAP, path, e)) return false;
    json_t *object = json_object();
    if (json_object_set_new(group, n->key, object) != 0) return err_memory(e, "recipe", 0);
    for (const struct yaml_tree *a = n->first; a; a = a->next)
        if (!add_argument(object, a, fixed, path, e)) return false;
    return true;
}

/* Variants that quantization_config may hold and files written here do not. */
static bool check_written(enum scheme scheme, const json_t *group, const char *where, struct err *e)
{
    if (scheme == SCHEME_NVFP4 || scheme == SCHEME_NVFP4A16) return true;
    const json_t *weights = json_object_get(group, "weights"), *size = json_object_get(weights, "group_size");
    const char *strategy = json_string_value(json_object_get(weights, "strategy"));
    bool channel = strategy ? strcmp(strategy, "channel") == 0 : json_integer_value(size) == -1;
    if (scheme == SCHEME_FP8 && channel)
        return err_set(
            e, ERR_UNSUPPORTED,
            "%s.weights: one scale a row with one for all inputs is not done here; strategy 'tensor' "
            "is, or 'token' for the inputs",
            where);
    if (scheme != SCHEME_FP8 && scheme != SCHEME_FP8_BLOCK && !channel)
        return err_set(
            e, ERR_UNSUPPORTED,
            "%s.weights: one scale for the whole matrix with these inputs is not done here; strategy "
            "'channel' is",
            where);
    if (json_string_value(json_object_get(weights, "scale_dtype")))
        return err_set(e, ERR_UNSUPPORTED,
                       "%s.weights.scale_dtype: scales of FP8 weights are stored in the weights' own dtype",
                       where);
    return true;
}

static bool read_arguments(enum scheme *out, const struct yaml_tree *n, const char *where, struct err *e)
{
    static const char *const known[] = { "targets", "weights", "input_activations", "output_activations",
                                         "format",  NULL };
    const struct yaml_tree *format = yaml_tree_get(n, "format"),
                           *outputs = yaml_tree_get(n, "output_activations");
    if (!check_keys(n, where, known, e)) return false;
    if (is_null(yaml_tree_get(n, "weights")))
        return err_set(e, ERR_FORMAT, "line %d: %s: 'weights' is missing", n->line, where);
    if (!is_null(outputs))
        return err_set(e, ERR_UNSUPPORTED, "line %d: %s.output_activations is not supported", outputs->line,
                       where);
    char path[PATH_BYTES + 32];
    snprintf(path, sizeof path, "line %d: %s", n->line, where);
    json_t *group = json_object();
    bool ok = (group || err_memory(e, "recipe", 0)) &&
              add_arguments(group, yaml_tree_get(n, "weights"), weight_fixed, where, e) &&
              add_arguments(group, yaml_tree_get(n, "input_activations"), input_fixed, where, e);
    if (ok && !is_null(format))
        ok = must_be(format, YAML_TREE_TEXT, "format", e) &&
             (json_object_set_new(group, "format", json_string(format->text)) == 0 ||
              err_memory(e, "recipe", 0));
    ok = ok && quantization_group_scheme(out, NULL, group, path, e) && check_written(*out, group, path, e);
    json_decref(group);
    return ok;
}

static bool read_preset(enum scheme *out, const char *name, int line, struct err *e)
{
    return quantization_preset(out, name, e) || err_note(e, "line %d", line);
}

/* Groups. */

/* One text or a list of them; borrowed from the tree. */
static bool read_texts(struct recipe_file *f, const char *const **out, size_t *n,
                       const struct yaml_tree *list, const char *where, struct err *e)
{
    *out = f->texts + f->n_texts;
    *n = 0;
    if (list->kind == YAML_TREE_MAP)
        return err_set(e, ERR_FORMAT, "line %d: %s: expected names or patterns", list->line, where);
    for (const struct yaml_tree *t = list->kind == YAML_TREE_LIST ? list->first : list; t; t = t->next) {
        if (t->kind != YAML_TREE_TEXT || is_null(t) || !*t->text)
            return err_set(e, ERR_FORMAT, "line %d: %s: expected a name or a pattern", t->line, where);
        f->texts[f->n_texts++] = t->text;
        ++*n;
        if (list->kind != YAML_TREE_LIST) break;
    }
    return true;
}

static bool read_targets(struct recipe_file *f, struct recipe_group *g, const struct yaml_tree *list,
                         int line, const char *where, struct err *e)
{
    if (!is_null(list) && !read_texts(f, &g->targets, &g->n_targets, list, where, e)) return false;
    return g->n_targets > 0 || err_set(e, ERR_FORMAT, "line %d: %s: no targets", line, where);
}

static struct recipe_group *new_group(struct recipe_file *f, const char *name)
{
    size_t i = f->recipe.n_groups++;
    snprintf(f->names[i], sizeof f->names[i], "group_%zu", i);
    f->groups[i] = (struct recipe_group){ .name = name ? name : f->names[i] };
    return &f->groups[i];
}

/* A group is a mapping of targets and arguments, or a list of targets under the name of a preset. */
static bool read_group(struct recipe_file *f, const struct yaml_tree *n, struct err *e)
{
    char where[PATH_BYTES];
    struct recipe_group *g = new_group(f, n->key);
    snprintf(where, sizeof where, "config_groups.%.100s", n->key);
    if (n->kind == YAML_TREE_LIST)
        return read_preset(&g->scheme, n->key, n->line, e) && read_targets(f, g, n, n->line, where, e);
    if (!read_arguments(&g->scheme, n, where, e)) return false;
    snprintf(where, sizeof where, "config_groups.%.100s.targets", n->key);
    return read_targets(f, g, yaml_tree_get(n, "targets"), n->line, where, e);
}

static bool read_groups(struct recipe_file *f, const struct yaml_tree *map, struct err *e)
{
    if (!must_be(map, YAML_TREE_MAP, "config_groups", e)) return false;
    for (const struct yaml_tree *n = map->first; n; n = n->next)
        if (!read_group(f, n, e)) return false;
    return f->recipe.n_groups > 0 || err_set(e, ERR_FORMAT, "line %d: config_groups: empty", map->line);
}

/* scheme: PRESET with targets beside it (all Linear modules when there are none), or {PRESET: targets}. */
static bool read_scheme(struct recipe_file *f, const struct yaml_tree *scheme,
                        const struct yaml_tree *targets, struct err *e)
{
    static const char linear[] = "Linear";
    if (scheme->kind == YAML_TREE_TEXT) {
        struct recipe_group *g = new_group(f, NULL);
        if (!read_preset(&g->scheme, scheme->text, scheme->line, e)) return false;
        if (targets) return read_targets(f, g, targets, targets->line, "targets", e);
        g->targets = f->texts + f->n_texts;
        g->n_targets = 1;
        f->texts[f->n_texts++] = linear;
        return true;
    }
    if (!must_be(scheme, YAML_TREE_MAP, "scheme", e)) return false;
    if (targets)
        return err_set(e, ERR_FORMAT, "line %d: targets: they stand under 'scheme' already", targets->line);
    for (const struct yaml_tree *n = scheme->first; n; n = n->next) {
        struct recipe_group *g = new_group(f, NULL);
        if (!read_preset(&g->scheme, n->key, n->line, e) || !read_targets(f, g, n, n->line, "scheme", e))
            return false;
    }
    return f->recipe.n_groups > 0 || err_set(e, ERR_FORMAT, "line %d: scheme: empty", scheme->line);
}

/* Room for every text and every group the tree could hold. */
static bool make_room(struct recipe_file *f, const struct yaml_tree *n, size_t *total)
{
    for (const struct yaml_tree *c = n->first; c; c = c->next)
        if (!make_room(f, c, total)) return false;
    ++*total;
    if (n != f->root) return true;
    f->texts = malloc((*total + 1) * sizeof *f->texts);
    f->groups = malloc((*total + 1) * sizeof *f->groups);
    f->names = malloc((*total + 1) * sizeof *f->names);
    return f->texts && f->groups && f->names;
}

static bool check_modifier(const struct yaml_tree *n, struct err *e)
{
    static const char *const known[] = {
        "config_groups", "scheme", "targets", "ignore", "kv_cache_scheme", "bypass_divisibility_checks", NULL
    };
    static const char *const no[] = { "false", "False", NULL };
    if (!check_keys(n, n->key, known, e)) return false;
    const struct yaml_tree *cache = yaml_tree_get(n, "kv_cache_scheme"),
                           *groups = yaml_tree_get(n, "config_groups"),
                           *bypass = yaml_tree_get(n, "bypass_divisibility_checks");
    if (!is_null(cache))
        return err_set(e, ERR_UNSUPPORTED, "line %d: kv_cache_scheme: scales of a cache are not written here",
                       cache->line);
    if (!is_null(bypass) && (bypass->kind != YAML_TREE_TEXT || !one_of(bypass->text, no)))
        return err_set(e, ERR_UNSUPPORTED,
                       "line %d: bypass_divisibility_checks: columns must fill whole groups", bypass->line);
    if (is_null(groups) == is_null(yaml_tree_get(n, "scheme")))
        return err_set(e, ERR_FORMAT, "line %d: %s: either 'config_groups' or 'scheme' is needed", n->line,
                       n->key);
    if (!is_null(groups) && !is_null(yaml_tree_get(n, "targets")))
        return err_set(e, ERR_FORMAT, "line %d: targets: with 'config_groups' they stand in the groups",
                       yaml_tree_get(n, "targets")->line);
    return true;
}

static bool read_modifier(struct recipe_file *f, const struct yaml_tree *n, struct err *e)
{
    struct recipe *r = &f->recipe;
    if (!check_modifier(n, e)) return false;
    const struct yaml_tree *groups = yaml_tree_get(n, "config_groups"),
                           *targets = yaml_tree_get(n, "targets"), *ignore = yaml_tree_get(n, "ignore");
    return (is_null(groups) ? read_scheme(f, yaml_tree_get(n, "scheme"), is_null(targets) ? NULL : targets, e)
                            : read_groups(f, groups, e)) &&
           (is_null(ignore) || read_texts(f, &r->ignore, &r->n_ignore, ignore, "ignore", e));
}

/* Stages and modifiers. */

static bool ends_in(const char *text, const char *end)
{
    size_t n = strlen(text), m = strlen(end);
    return n >= m && strcmp(text + n - m, end) == 0;
}

static bool find_in_modifiers(const struct yaml_tree **found, const struct yaml_tree *modifiers,
                              struct err *e)
{
    static const char name[] = "QuantizationModifier";
    if (!must_be(modifiers, YAML_TREE_MAP, modifiers->key, e)) return false;
    for (const struct yaml_tree *m = modifiers->first; m; m = m->next) {
        if (strcmp(m->key, name) != 0)
            return err_set(e, ERR_UNSUPPORTED, "line %d: modifier '%.100s' is not done here, only %s is",
                           m->line, m->key, name);
        if (*found)
            return err_set(e, ERR_UNSUPPORTED, "line %d: a second %s; one is read, with several groups",
                           m->line, name);
        *found = m;
    }
    return true;
}

static bool find_modifier(const struct yaml_tree **found, const struct yaml_tree *root, struct err *e)
{
    *found = NULL;
    if (!must_be(root, YAML_TREE_MAP, "recipe", e)) return false;
    for (const struct yaml_tree *stage = root->first; stage; stage = stage->next) {
        if (!ends_in(stage->key, "stage"))
            return err_set(e, ERR_FORMAT, "line %d: unknown key '%.100s': here stand stages (default_stage)",
                           stage->line, stage->key);
        if (!must_be(stage, YAML_TREE_MAP, stage->key, e)) return false;
        for (const struct yaml_tree *m = stage->first; m; m = m->next) {
            if (!ends_in(m->key, "modifiers"))
                return err_set(e, ERR_FORMAT,
                               "line %d: %.100s: unknown key '%.100s': here stand modifiers "
                               "(default_modifiers)",
                               m->line, stage->key, m->key);
            if (!find_in_modifiers(found, m, e)) return false;
        }
    }
    return *found || err_set(e, ERR_FORMAT, "line %d: no QuantizationModifier", root->line);
}

bool recipe_parse(struct recipe_file *out, const char *name, const char *text, size_t bytes, struct err *e)
{
    const struct yaml_tree *modifier;
    size_t total = 0;
    *out = (struct recipe_file){ .name = strdup(name) };
    bool ok = (out->name || err_memory(e, "recipe", strlen(name))) &&
              yaml_tree_read(&out->root, text, bytes, e) && find_modifier(&modifier, out->root, e) &&
              (make_room(out, out->root, &total) || err_memory(e, "recipe", total)) &&
              read_modifier(out, modifier, e);
    out->recipe.name = out->name;
    out->recipe.groups = out->groups;
    if (ok) return true;
    recipe_file_deinit(out);
    return err_note(e, "%s", name);
}

bool recipe_load(struct recipe_file *out, const char *path, struct err *e)
{
    char *text;
    size_t bytes;
    *out = (struct recipe_file){ 0 };
    if (!file_read(&text, &bytes, path, FILE_BYTES_MAX, e)) return false;
    bool ok = recipe_parse(out, path, text, bytes, e);
    free(text);
    return ok;
}

void recipe_file_deinit(struct recipe_file *f)
{
    yaml_tree_free(f->root);
    free(f->groups);
    free(f->names);
    free(f->texts);
    free(f->name);
    *f = (struct recipe_file){ 0 };
}
