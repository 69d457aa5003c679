/* What stands where in a JSON text. */
#ifndef TESTS_SERVER_JSON_AT_H
#define TESTS_SERVER_JSON_AT_H
#include "base/doc.h"
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static inline json_t *fixture_parse(const char *text)
{
    struct err e = { 0 };
    json_t *root;
    if (!doc_parse(&root, text, strlen(text), &e)) fail_msg("%s in %s", e.text, text);
    return root;
}

/* "choices.0.message.content"; NULL: not there. */
static inline json_t *at(json_t *root, const char *path)
{
    char copy[200], *rest;
    snprintf(copy, sizeof copy, "%s", path);
    for (char *name = strtok_r(copy, ".", &rest); name && root; name = strtok_r(NULL, ".", &rest))
        root = json_is_array(root) ? json_array_get(root, (size_t)atoi(name)) : json_object_get(root, name);
    return root;
}
static inline const char *text_at(json_t *root, const char *path)
{
    const char *text = json_string_value(at(root, path));
    return text ? text : "(none)";
}

#endif
