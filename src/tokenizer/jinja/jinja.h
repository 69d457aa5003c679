/* A subset of Jinja2 for chat templates, set up as Hugging Face sets it up: trim_blocks, lstrip_blocks,
 * sandboxed (nothing changes but namespaces), tojson as json.dumps(ensure_ascii=False), raise_exception, loop
 * controls, `generation` blocks. What a template may use is listed in docs/decisions/010-chat-template.md;
 * anything else is refused while loading, by line and name. Rendering is a function of its variables alone:
 * no clock, no files. */
#ifndef TOKENIZER_JINJA_JINJA_H
#define TOKENIZER_JINJA_JINJA_H
#include "base/err.h"
#include <jansson.h>
#include <stddef.h>

struct jinja; /* immutable: may be shared by threads */

/* ERR_FORMAT: not a template; ERR_UNSUPPORTED: one that asks for more than the subset; both say "line N:
 * ...". ERR_LIMIT: over 1 MiB, 1000 names or 200 levels of nesting. */
bool jinja_create(struct jinja **out, const char *text, size_t bytes, struct err *e);
void jinja_free(struct jinja *t); /* NULL is fine */

struct jinja_variable {
    const char *name;
    const json_t *value; /* unchanged; NULL: the variable is not defined */
};
struct jinja_limits {
    size_t memory; /* bytes of output and of what it is made of, each; 0: 256 MiB */
    size_t steps;  /* 0: 20 million; a step is one operation, or 64 bytes of a string */
};
/* *text is malloc'd, NUL-terminated, `bytes` long without the NUL, and the caller's; it is UTF-8 when the
 * template is. limits may be NULL. ERR_ARGUMENT: raise_exception, in the template's own words, or "line N: "
 * and what an operation cannot take; ERR_LIMIT; ERR_MEMORY. */
bool jinja_render(char **text, size_t *bytes, const struct jinja *t, const struct jinja_variable *variables,
                  size_t n, const struct jinja_limits *limits, struct err *e);
#endif
