/* What a random checkpoint consists of: the BF16 tensors of the config, and, for a recipe, what the plan of
 * quantize makes of them. */
#include "quantize/synth.h"
#include "base/file.h"
#include "quantize/plan.h"
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { CONFIG_BYTES_MAX = 16 << 20 };

static json_t *text_part(json_t *root)
{
    json_t *text = json_object_get(root, "text_config");
    return json_is_object(text) ? text : root;
}

/* The first n layers; the text's own list, where there is one, says of which kinds. */
static bool cut_layers(json_t *root, int64_t n, struct err *e)
{
    json_t *text = text_part(root), *types = json_object_get(text, "layer_types");
    int64_t all = json_integer_value(json_object_get(text, "num_hidden_layers"));
    if (n == 0) return true;
    if (n < 0 || n > all)
        return err_set(e, ERR_ARGUMENT, "%" PRId64 " layers were asked for, the config has %" PRId64, n, all);
    while (json_is_array(types) && json_array_size(types) > (size_t)n)
        json_array_remove(types, json_array_size(types) - 1);
    return json_object_set_new(text, "num_hidden_layers", json_integer(n)) == 0 ||
           err_memory(e, "config.json", 0);
}

static bool set_config(struct synth *s, const json_t *config, int64_t layers, struct err *e)
{
    struct checkpoint *c = &s->checkpoint;
    if (!json_is_object(config)) return err_set(e, ERR_FORMAT, "expected an object");
    c->config_json = json_deep_copy(config);
    if (!c->config_json) return err_memory(e, "config.json", 0);
    json_object_del(c->config_json, "quantization_config");
    json_object_del(text_part(c->config_json), "quantization_config");
    return cut_layers(c->config_json, layers, e) && config_parse(&c->config, c->config_json, e);
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct tensor *)a)->name, ((const struct tensor *)b)->name);
}

static bool list_tensors(struct synth *s, struct err *e)
{
    struct checkpoint *c = &s->checkpoint;
    struct tensor_list *l = &s->tensors;
    free(c->tensors);
    free(c->tensor_shard);
    c->tensors = calloc(l->n + 1, sizeof *c->tensors);
    c->tensor_shard = calloc(l->n + 1, sizeof *c->tensor_shard);
    if (!c->tensors || !c->tensor_shard) return err_memory(e, "tensor list", l->n * sizeof *c->tensors);
    qsort(l->items, l->n, sizeof *l->items, by_name);
    s->bytes = 0;
    for (size_t i = 0; i < l->n; i++) {
        c->tensors[i] = &l->items[i];
        s->bytes += l->items[i].bytes;
    }
    c->n_tensors = l->n;
    return true;
}

/* The plan's outputs become the tensors. */
static bool take_outputs(struct synth *s, struct plan *p, struct err *e)
{
    tensor_list_deinit(&s->tensors);
    s->tensors = (struct tensor_list){ p->outputs, p->n_outputs, p->n_outputs };
    p->outputs = NULL;
    p->n_outputs = 0;
    return (json_object_update(s->checkpoint.config_json, p->block) == 0 ||
            err_memory(e, "config.json", 0)) &&
           quantization_parse(&s->checkpoint.quantization, s->checkpoint.config_json, e) &&
           list_tensors(s, e);
}

/* The plan points into its source's bytes but never reads them: addresses without memory will do. */
static bool apply_recipe(struct synth *s, const struct recipe *recipe, struct err *e)
{
    struct plan p;
    uint64_t largest = 0;
    for (size_t i = 0; i < s->tensors.n; i++)
        if (s->tensors.items[i].bytes > largest) largest = s->tensors.items[i].bytes;
    void *space = mmap(NULL, largest, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (space == MAP_FAILED) return err_memory(e, "addresses for a tensor", largest);
    for (size_t i = 0; i < s->tensors.n; i++) s->tensors.items[i].data = space;
    bool ok = plan_create(&p, &s->checkpoint, recipe, e);
    munmap(space, largest);
    if (!ok) return false;
    ok = take_outputs(s, &p, e);
    plan_deinit(&p);
    return ok;
}

bool synth_init(struct synth *s, const json_t *config, const char *name, int64_t layers,
                const struct recipe *recipe, struct err *e)
{
    *s = (struct synth){ 0 };
    s->checkpoint.path = strdup(name);
    bool ok = s->checkpoint.path || err_memory(e, "path", strlen(name));
    ok = ok && (set_config(s, config, layers, e) || err_note(e, "%s", name));
    ok = ok && synth_shapes(&s->tensors, &s->checkpoint.config,
                            text_part(s->checkpoint.config_json) != s->checkpoint.config_json, e);
    ok = ok && list_tensors(s, e) && (!recipe || apply_recipe(s, recipe, e));
    if (!ok) synth_deinit(s);
    return ok;
}

void synth_deinit(struct synth *s)
{
    checkpoint_close(&s->checkpoint);
    tensor_list_deinit(&s->tensors);
    *s = (struct synth){ 0 };
}

static bool load_file(json_t **out, char **folder, const char *config, struct err *e)
{
    bool is_folder = file_is_folder(config);
    char *path = is_folder ? file_join(config, "config.json") : strdup(config);
    const char *slash = strrchr(config, '/');
    *folder = is_folder ? strdup(config)
              : slash   ? strndup(config, (size_t)(slash - config) + 1)
                        : strdup(".");
    bool ok = path && *folder ? doc_load(out, path, CONFIG_BYTES_MAX, e) : err_memory(e, "path", 0);
    free(path);
    if (ok) return true;
    free(*folder);
    *folder = NULL;
    return false;
}

bool synth_load_config(json_t **out, char **folder, const char *config, struct err *e)
{
    const char *known = synth_known_config(config);
    *out = NULL;
    *folder = NULL;
    if (known && !file_exists(config)) return doc_parse(out, known, strlen(known), e);
    return load_file(out, folder, config, e);
}
