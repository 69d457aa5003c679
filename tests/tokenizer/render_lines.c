/* For tools/test_chat_template.py: reads lines of {"template": TEXT, "variables": {...}}, writes a line of
 * {"text": TEXT} or {"error": TEXT} for each. */
#include "base/doc.h"
#include "tokenizer/jinja/jinja.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { VARIABLES_MAX = 32 };

static json_t *rendered(const char *line, size_t bytes)
{
    struct jinja_variable variables[VARIABLES_MAX];
    struct jinja *t = NULL;
    struct err e = { 0 };
    json_t *in = NULL, *out;
    char *text = NULL;
    size_t n = 0, n_text = 0;
    bool ok = doc_parse(&in, line, bytes, &e);
    json_t *given = json_object_get(in, "variables"), *source = json_object_get(in, "template");
    for (void *it = json_object_iter(given); it && n < VARIABLES_MAX; it = json_object_iter_next(given, it))
        variables[n++] = (struct jinja_variable){ json_object_iter_key(it), json_object_iter_value(it) };
    ok = ok && jinja_create(&t, json_string_value(source), json_string_length(source), &e) &&
         jinja_render(&text, &n_text, t, variables, n, NULL, &e);
    out = ok ? json_pack("{s:o}", "text", json_stringn(text, n_text)) : json_pack("{s:s}", "error", e.text);
    free(text);
    jinja_free(t);
    json_decref(in);
    return out;
}

int main(void)
{
    char *line = NULL;
    size_t size = 0;
    for (ssize_t n; (n = getline(&line, &size, stdin)) > 0;) {
        json_t *out = rendered(line, (size_t)n);
        json_dumpf(out, stdout, JSON_COMPACT);
        putchar('\n');
        json_decref(out);
    }
    free(line);
    return 0;
}
