/* What expressions of a template compute with, the memory it lives in, and the run that owns both. A run
 * keeps its first failure: functions that fail return an undefined value, and whoever loops looks at
 * `failed`. Values are never changed after they are made, but for namespaces; nothing is freed before the run
 * ends. */
#ifndef TOKENIZER_JINJA_VALUE_H
#define TOKENIZER_JINJA_VALUE_H
#include "base/err.h"
#include "tokenizer/jinja/pystr.h"
#include <jansson.h>
#include <stdint.h>

/* Memory in chunks, freed all at once. */
struct store {
    struct store_chunk *chunks;
    size_t left; /* bytes that may still be taken */
};
void *store_take(struct store *s, size_t count, size_t bytes_each); /* aligned to 16; NULL: no more */
void store_free(struct store *s);

/* Growing text; full once it would pass `limit` or memory ends. */
struct text {
    char *data;
    size_t used, size, limit;
    bool full;
};
void text_put(struct text *t, struct span s);
void text_puts(struct text *t, const char *s);

enum value_kind {
    VALUE_ABSENT, /* no value: an argument that was left out */
    VALUE_UNDEFINED,
    VALUE_NONE,
    VALUE_BOOL,
    VALUE_INT,
    VALUE_REAL,
    VALUE_STRING,
    VALUE_LIST,
    VALUE_TUPLE,
    VALUE_DICT,
    VALUE_NAMESPACE,
    VALUE_LOOP,
    VALUE_MACRO
};

struct value {
    enum value_kind kind;
    enum value_kind owner; /* of an undefined value: what lacks it; VALUE_ABSENT: the context */
    union {
        bool truth;
        int64_t integer;
        double real;
        struct span string; /* of an undefined value: its name */
        struct value_list *list;
        struct value_dict *dict; /* of a namespace too */
        const struct loop *loop;
        const struct node *macro;
    };
};

struct value_list {
    size_t n;
    struct value *items;
};

struct value_entry {
    struct span key;
    struct value value;
};
/* In order of insertion. */
struct value_dict {
    size_t n, capacity;
    struct value_entry *entries;
};

struct run {
    struct err *e;
    bool failed;
    size_t steps; /* left */
    int line;     /* of what is being done */
    int depth;    /* of recursion */
    struct store store;
    struct text out;
    struct scope *scope;
    const struct syntax *syntax;
};

void run_fail(struct run *r, enum err_code code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* Pays for work on so many bytes; false once the run has failed, perhaps by this. */
bool run_step(struct run *r, size_t bytes);
bool run_enter(struct run *r); /* one level of recursion, left with run_leave whatever the answer */
void run_leave(struct run *r);
void *run_take(struct run *r, size_t count, size_t bytes_each); /* NULL: the run has failed */

static inline struct value value_string(struct span s)
{
    return (struct value){ .kind = VALUE_STRING, .string = s };
}
static inline struct value value_integer(int64_t i)
{
    return (struct value){ .kind = VALUE_INT, .integer = i };
}
static inline struct value value_real(double x)
{
    return (struct value){ .kind = VALUE_REAL, .real = x };
}
static inline struct value value_bool(bool b)
{
    return (struct value){ .kind = VALUE_BOOL, .truth = b };
}
static inline bool value_is_list(struct value v)
{
    return v.kind == VALUE_LIST || v.kind == VALUE_TUPLE;
}
static inline bool value_is_number(struct value v)
{
    return v.kind == VALUE_BOOL || v.kind == VALUE_INT || v.kind == VALUE_REAL;
}

struct value value_from_json(struct run *r, const json_t *json); /* strings are borrowed */
struct value value_new_list(struct run *r, enum value_kind kind, size_t n);
struct value value_new_dict(struct run *r, enum value_kind kind);
void value_set(struct run *r, struct value_dict *d, struct span key, struct value v);
const struct value *value_get(const struct value_dict *d, struct span key); /* NULL: not there */
struct value value_copy_text(struct run *r, size_t begin); /* takes what the output has from there on */

const char *value_type(struct value v); /* Python's name of the type */
/* Fails the run as Jinja does when something is asked of an undefined value. */
struct value value_refuse_undefined(struct run *r, struct value v);
bool value_truth(struct value v);
bool value_equal(struct run *r, struct value a, struct value b);
int value_order(struct run *r, struct value a, struct value b,
                const char *operation); /* < 0, 0, > 0; 2: NaN */
bool value_contains(struct run *r, struct value container, struct value v);
int64_t value_length(struct run *r, struct value v);
/* Its items as a list: characters of strings, keys of mappings, nothing of undefined values. */
struct value value_items(struct run *r, struct value v);
struct value value_attribute(struct run *r, struct value v, struct span name);
struct value value_item(struct run *r, struct value v, struct value index);
/* from, to, step: undefined or none where left out. */
struct value value_slice(struct run *r, struct value v, struct value from, struct value to,
                         struct value step);

/* Written to the output: str(v), repr(v), and json.dumps(v, ensure_ascii=False), indent < 0: on one line. */
void value_write(struct run *r, struct value v);
void value_write_repr(struct run *r, struct value v);
void value_write_json(struct run *r, struct value v, int indent);
struct value value_text(struct run *r, struct value v); /* str(v) as a value */
#endif
