/* Free text with parts that follow a schema: vLLM's structural tags, of which a part begins where one of the
 * triggers is written.
 *   {"triggers": ["<function="], "structures": [{"begin": "<function=f>", "schema": {...}, "end":
 * "</function>"}]} */
#include "grammar/grammar.h"
#include "grammar/schema.h"
#include "grammar/text.h"
#include <stdio.h>
#include <string.h>

enum { TRIGGERS_MAX = 16, STRUCTURES_MAX = 256, END_BYTES_MAX = 1024 };

static bool starts_with_trigger(const char *begin, const char *const *triggers, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (strncmp(begin, triggers[i], strlen(triggers[i])) == 0) return true;
    return false;
}

static size_t read_triggers(const char **out, struct rules *r, const json_t *tag)
{
    const json_t *list = json_object_get(tag, "triggers");
    size_t n = json_array_size(list);
    if (n == 0 || n > TRIGGERS_MAX)
        rules_fail(r, ERR_ARGUMENT, "triggers: expected an array of 1 to %d strings", TRIGGERS_MAX);
    for (size_t i = 0; i < n && !r->failed; i++) {
        out[i] = json_string_value(json_array_get(list, i));
        if (!out[i] || !*out[i] || strlen(out[i]) != json_string_length(json_array_get(list, i)))
            rules_fail(r, ERR_ARGUMENT, "triggers[%zu]: expected a string of ASCII characters", i);
    }
    return n;
}

static int32_t structure(struct schema *s, const json_t *given, size_t i, const char *const *triggers,
                         size_t n)
{
    struct rules *r = s->r;
    const char *begin = json_string_value(json_object_get(given, "begin"));
    const json_t *end = json_object_get(given, "end"), *schema = json_object_get(given, "schema");
    char path[60];
    if (!begin || !starts_with_trigger(begin, triggers, n))
        rules_fail(r, ERR_ARGUMENT,
                   "structures[%zu].begin: expected a string that begins with one of the triggers", i);
    if (!json_is_string(end) || json_string_length(end) > END_BYTES_MAX)
        rules_fail(r, ERR_ARGUMENT, "structures[%zu].end: expected a string of at most %d bytes", i,
                   END_BYTES_MAX);
    if (!json_is_object(schema) && !json_is_boolean(schema))
        rules_fail(r, ERR_ARGUMENT, "structures[%zu].schema: expected a JSON schema", i);
    if (r->failed) return 0;
    snprintf(path, sizeof path, "structures[%zu].schema", i);
    schema_set_root(s, schema, path);
    int32_t value = expr_call(r, rules_add(r, path, schema_expr(s, schema, "%s", "")));
    schema_finish(s);
    return SEQ(r, expr_text(r, begin), value, expr_bytes(r, json_string_value(end), json_string_length(end)));
}

bool grammar_from_structural_tag(struct grammar **out, const json_t *tag, struct err *e)
{
    struct rules r;
    struct schema s;
    struct expr_list parts = { 0 };
    const char *triggers[TRIGGERS_MAX] = { NULL };
    const json_t *list = json_object_get(tag, "structures");
    *out = NULL;
    rules_init(&r, e);
    schema_init(&s, &r);
    if (json_object_get(tag, "format"))
        rules_fail(&r, ERR_ARGUMENT,
                   "format: only structural tags with triggers and structures are supported");
    if (json_array_size(list) == 0 || json_array_size(list) > STRUCTURES_MAX)
        rules_fail(&r, ERR_ARGUMENT, "structures: expected an array of 1 to %d objects", STRUCTURES_MAX);
    size_t n = r.failed ? 0 : read_triggers(triggers, &r, tag);
    int32_t text = r.failed ? 0 : text_without(&r, triggers, n);
    for (size_t i = 0; i < json_array_size(list) && !r.failed; i++)
        expr_list_add(&r, &parts, structure(&s, json_array_get(list, i), i, triggers, n));
    int32_t any = expr_list_alt(&r, &parts);
    int32_t all = SEQ(&r, text, expr_repeat(&r, SEQ(&r, any, text), 0, -1));
    bool ok = rules_compile(out, &r, rules_add(&r, "structural tag", all));
    schema_deinit(&s);
    rules_deinit(&r);
    return ok;
}
