/* Reads module names. The tables are the model classes of the reference implementation, in the order in which
 * their constructors create the Linears. */
#include "quantize/modules.h"
#include <stdlib.h>
#include <string.h>

const char *const expert_part_name[N_PARTS] = { "gate_proj", "up_proj", "down_proj" };

static const char *const vision_block[] = { "attn.qkv", "attn.proj", "mlp.linear_fc1", "mlp.linear_fc2",
                                            NULL };
static const char *const vision_merger[] = { "linear_fc1", "linear_fc2", NULL };
static const char EXPERTS[] = "mlp.experts";
static const char *const text_layer[] = {
    "linear_attn.out_proj",
    "linear_attn.in_proj_qkv",
    "linear_attn.in_proj_z",
    "linear_attn.in_proj_b",
    "linear_attn.in_proj_a",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate",
    EXPERTS,
    "mlp.shared_expert.gate_proj",
    "mlp.shared_expert.up_proj",
    "mlp.shared_expert.down_proj",
    "mlp.shared_expert_gate",
    NULL,
};

/* What follows `part` in name, where `part` begins the name or stands behind a dot. */
static const char *after(const char *name, const char *part)
{
    for (const char *p = name; (p = strstr(p, part)); p++)
        if (p == name || p[-1] == '.') return p + strlen(part);
    return NULL;
}

/* A number and a dot. */
static bool take_index(const char **p, int64_t *out)
{
    if (**p < '0' || **p > '9') return false;
    int64_t n = 0;
    for (; **p >= '0' && **p <= '9'; ++*p) {
        if (n > INT32_MAX) return false;
        n = 10 * n + (**p - '0');
    }
    *out = n;
    return *(*p)++ == '.';
}

static int find_rank(const char *const *table, const char *name)
{
    for (int i = 0; table[i]; i++)
        if (strcmp(table[i], name) == 0) return i;
    return -1;
}

static bool ends_in(const char *name, const char *end)
{
    size_t n = strlen(name), m = strlen(end);
    return n >= m && strcmp(name + n - m, end) == 0;
}

static bool find_part(enum expert_part *out, const char *name)
{
    for (int i = 0; i < N_PARTS; i++) {
        if (strcmp(expert_part_name[i], name) != 0) continue;
        *out = (enum expert_part)i;
        return true;
    }
    return false;
}

static bool place_in_layer(struct place *out, const char *rest)
{
    const char *expert = after(rest, EXPERTS);
    out->section = PLACE_LAYER;
    if (expert && *expert == '.') {
        expert++;
        out->rank = find_rank(text_layer, EXPERTS);
        return take_index(&expert, &out->expert) && find_part(&out->part, expert);
    }
    out->rank = find_rank(text_layer, rest);
    return out->rank >= 0;
}

static bool place_known(struct place *out, const char *module)
{
    const char *p;
    *out = (struct place){ .layer = -1, .expert = -1 };
    if ((p = after(module, "visual.blocks.")) && take_index(&p, &out->layer)) {
        out->section = PLACE_VISION_BLOCK;
        out->rank = find_rank(vision_block, p);
        return out->rank >= 0;
    }
    if ((p = after(module, "visual.merger."))) {
        out->section = PLACE_VISION_MERGER;
        out->rank = find_rank(vision_merger, p);
        return out->rank >= 0;
    }
    if ((p = after(module, "layers.")) && take_index(&p, &out->layer)) return place_in_layer(out, p);
    p = after(module, "lm_head");
    out->section = PLACE_HEAD;
    return p && !*p;
}

bool module_place(struct place *out, const char *module, bool is_matrix)
{
    if (after(module, "mtp.")) {
        *out = (struct place){ .section = PLACE_DRAFT, .layer = -1, .expert = -1 };
        return is_matrix;
    }
    if (place_known(out, module)) return true;
    *out = (struct place){ .section = PLACE_OTHER, .layer = -1, .expert = -1 };
    return is_matrix && !ends_in(module, "embed_tokens") && !ends_in(module, "pos_embed");
}

enum module_input module_input(const struct place *p)
{
    if (p->section != PLACE_LAYER) return INPUT_NONE;
    if (p->expert >= 0) return p->part == PART_DOWN ? INPUT_EXPERT : INPUT_BLOCK;
    const char *name = text_layer[p->rank];
    if (ends_in(name, "attn.out_proj") || ends_in(name, "attn.o_proj")) return INPUT_MIXER_OUT;
    if (strncmp(name, "mlp.", 4) != 0) return INPUT_MIXER;
    return ends_in(name, "down_proj") ? INPUT_SHARED : INPUT_BLOCK;
}

bool module_is_router(const char *module)
{
    return ends_in(module, ".mlp.gate") || ends_in(module, ".mlp.shared_expert_gate");
}

const char *const *module_fusion(const char *module, size_t *stem_bytes)
{
    static const char *const sets[][4] = {
        { ".self_attn.q_proj", ".self_attn.k_proj", ".self_attn.v_proj", NULL },
        { ".mlp.shared_expert.gate_proj", ".mlp.shared_expert.up_proj", NULL },
        { ".linear_attn.in_proj_qkv", ".linear_attn.in_proj_z", NULL },
        { ".linear_attn.in_proj_b", ".linear_attn.in_proj_a", NULL },
    };
    for (size_t i = 0; i < sizeof sets / sizeof *sets; i++)
        for (const char *const *end = sets[i]; *end; end++) {
            if (!ends_in(module, *end)) continue;
            *stem_bytes = strlen(module) - strlen(*end);
            return sets[i];
        }
    return NULL;
}

bool module_is_fused(const char *tensor, size_t *stem_bytes, bool *is_gate_up)
{
    static const char gate_up[] = ".gate_up_proj", down[] = ".down_proj", stem[] = ".experts";
    *is_gate_up = ends_in(tensor, gate_up);
    if (!*is_gate_up && !ends_in(tensor, down)) return false;
    *stem_bytes = strlen(tensor) - (*is_gate_up ? sizeof gate_up : sizeof down) + 1;
    size_t n = sizeof stem - 1;
    return *stem_bytes >= n && memcmp(tensor + *stem_bytes - n, stem, n) == 0;
}

struct module_entry {
    char *name;
    struct place place;
};

bool module_list_add(struct module_list *l, const char *module, const struct place *place, struct err *e)
{
    if (l->n == l->capacity) {
        size_t capacity = l->capacity ? 2 * l->capacity : 256;
        struct module_entry *items = realloc(l->items, capacity * sizeof *items);
        if (!items) return err_memory(e, "module names", capacity * sizeof *items);
        l->items = items;
        l->capacity = capacity;
    }
    char *name = strdup(module);
    if (!name) return err_memory(e, "module names", strlen(module));
    l->items[l->n++] = (struct module_entry){ name, *place };
    return true;
}

static int by_place(const void *a, const void *b)
{
    const struct module_entry *x = a, *y = b;
    int64_t left[] = { x->place.section, x->place.layer, x->place.rank, x->place.expert, x->place.part };
    int64_t right[] = { y->place.section, y->place.layer, y->place.rank, y->place.expert, y->place.part };
    for (size_t i = 0; i < sizeof left / sizeof *left; i++)
        if (left[i] != right[i]) return left[i] < right[i] ? -1 : 1;
    return strcmp(x->name, y->name);
}

bool module_list_append_to(struct module_list *l, json_t *array, struct err *e)
{
    if (l->n) qsort(l->items, l->n, sizeof *l->items, by_place);
    for (size_t i = 0; i < l->n; i++)
        if (json_array_append_new(array, json_string(l->items[i].name)) != 0)
            return err_memory(e, "ignore list", l->n * sizeof(json_t *));
    return true;
}

void module_list_deinit(struct module_list *l)
{
    for (size_t i = 0; i < l->n; i++) free(l->items[i].name);
    free(l->items);
    *l = (struct module_list){ 0 };
}
