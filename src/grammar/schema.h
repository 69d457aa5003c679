/* JSON schema to rules, in parts. Schemas wait in a list until their turn, so nothing here recurses as deep
 * as a schema is; equal schemas share a rule. What would be ignored is refused by path and keyword instead,
 * and what cannot be said exactly is said more narrowly, never more widely. docs/structured.md has the table.
 */
#ifndef GRAMMAR_SCHEMA_H
#define GRAMMAR_SCHEMA_H
#include "grammar/chars.h"
#include "grammar/json.h"
#include "grammar/rules.h"

struct pending_schema {
    json_t *schema; /* owned */
    const json_t *root;
    char *path;
    int32_t rule;
};

struct schema {
    struct rules *r;
    struct json j;
    const json_t *root; /* what "#" means */
    const char *path;   /* of the schema at work, for messages */
    json_t *known;      /* a schema's text: its rule */
    struct pending_schema *pending;
    int64_t n_pending, n_done, room, steps;
};

/* A root is set before schema_expr, and another one after schema_finish. */
void schema_init(struct schema *s, struct rules *r);
void schema_deinit(struct schema *s);
void schema_set_root(struct schema *s, const json_t *root, const char *path);
/* A value of this schema, below s->path by `step` ("/items" say, or ""). */
int32_t schema_expr(struct schema *s, const json_t *schema, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
void schema_finish(struct schema *s); /* writes the rules of all that schema_expr promised */

/* "schema, PATH: 'KEYWORD' WHY". Returns 0. */
int32_t schema_refuse(struct schema *s, const char *keyword, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* A keyword that is an integer >= 0; `otherwise` when absent. */
int64_t schema_count(struct schema *s, const json_t *schema, const char *keyword, int64_t otherwise);

/* One of the values of a schema with enum or const, strings in this form, and as JSON in quotes. */
int32_t schema_values(struct schema *s, const json_t *schema, enum chars_form form);
unsigned schema_check_keywords(struct schema *s,
                               const json_t *flat); /* types they are about; unknown: refused */

/* schema_merge.c. The same schema without $ref and allOf, a new object or boolean; NULL: refused. */
json_t *schema_flatten(struct schema *s, const json_t *schema);
json_t *schema_merge(struct schema *s, const json_t *a, const json_t *b);
const json_t *schema_resolve(struct schema *s, const char *ref);
/* Shows that no value is written for one of two flat schemas that the other holds for valid. */
bool schema_is_apart(struct schema *s, const json_t *a, const json_t *b, int depth);
/* Bits of TYPE_*: those the schema names; TYPE_ALL when it names none. */
enum {
    TYPE_NULL = 1,
    TYPE_BOOLEAN = 2,
    TYPE_INTEGER = 4,
    TYPE_NUMBER = 8, /* with TYPE_INTEGER always */
    TYPE_STRING = 16,
    TYPE_ARRAY = 32,
    TYPE_OBJECT = 64,
    TYPE_ALL = 127
};
unsigned schema_types(struct schema *s, const json_t *schema);
unsigned schema_type_of(const json_t *value);
bool schema_is_equal(const json_t *a, const json_t *b); /* as JSON schema: 1 is 1.0 */
bool schema_is_annotation(const char *keyword);

/* schema_number.c */
int32_t schema_number(struct schema *s, const json_t *schema, bool is_integer);
/* schema_string.c: the value between the quotes, if it has such. */
int32_t schema_string(struct schema *s, const json_t *schema, enum chars_form form);
/* A string in quotes that is none of these names. */
int32_t schema_other_key(struct schema *s, const char *const *names, size_t n);
#endif
