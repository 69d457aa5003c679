/* Input: a recipe file. It is refused with a message, or it gives groups that can be written down, read again
 * and written the same. */
#include "quantize/recipe.h"
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static void require(bool claim)
{
    if (!claim) abort();
}

static void check_recipe(const struct recipe *r)
{
    require(r->n_groups > 0);
    for (size_t i = 0; i < r->n_groups; i++) {
        require(r->groups[i].name && r->groups[i].scheme != SCHEME_NONE && r->groups[i].n_targets > 0);
        for (size_t k = 0; k < r->groups[i].n_targets; k++) require(*r->groups[i].targets[k]);
    }
    for (size_t k = 0; k < r->n_ignore; k++) require(*r->ignore[k]);
}

/* The patterns of the recipe may not compile; matching those that do must end. */
static void look_up(const struct recipe *r)
{
    struct err e = { 0 };
    struct quantization *q;
    json_t *config, *ignore = json_array();
    require(recipe_config(&config, r, ignore, &e));
    if (quantization_parse(&q, config, &e)) {
        quantization_scheme(q, "model.language_model.layers.0.mlp.experts.7.gate_proj", "Linear");
        quantization_free(q);
    } else {
        require(e.code != ERR_NONE && e.text[0]);
    }
    json_decref(config);
    json_decref(ignore);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct recipe_file f, again;
    struct err e = { 0 };
    char *text, *twice;
    size_t n, m;
    if (!recipe_parse(&f, "r", (const char *)data, bytes, &e)) {
        require(e.code != ERR_NONE && e.text[0] && !f.groups);
        return 0;
    }
    check_recipe(&f.recipe);
    look_up(&f.recipe);
    require(recipe_yaml(&text, &n, &f.recipe, &e));
    require(recipe_parse(&again, "r", text, n, &e));
    require(recipe_yaml(&twice, &m, &again.recipe, &e) && n == m && memcmp(text, twice, n) == 0);
    free(text);
    free(twice);
    recipe_file_deinit(&again);
    recipe_file_deinit(&f);
    return 0;
}
