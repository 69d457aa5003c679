/* What the tests of this folder share: cmocka, a folder of their own under /tmp, assertions on errors. */
#ifndef TESTS_CHECKPOINT_TEMP_H
#define TESTS_CHECKPOINT_TEMP_H
#include "base/doc.h"
#include "base/err.h"
#include "base/file.h"
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

struct temp {
    char path[64];
};

static inline struct temp temp_make(void)
{
    struct temp t = { "/tmp/quench-test-XXXXXX" };
    assert_non_null(mkdtemp(t.path));
    return t;
}

static inline void temp_remove(const struct temp *t)
{
    assert_true(file_remove_tree(t->path, NULL));
}

/* Path of a file inside; each call reuses one of four buffers. */
static inline const char *temp_path(const struct temp *t, const char *name)
{
    static char paths[4][256];
    static int next;
    char *out = paths[next++ % 4];
    snprintf(out, sizeof paths[0], "%s/%s", t->path, name);
    return out;
}

static inline void temp_write(const struct temp *t, const char *name, const void *data, size_t bytes)
{
    struct err e = { 0 };
    if (!file_write(temp_path(t, name), data, bytes, &e)) fail_msg("%s", e.text);
}

static inline void temp_text(const struct temp *t, const char *name, const char *text)
{
    temp_write(t, name, text, strlen(text));
}

/* The message, behind any folder that is in front of it, begins with `want`. */
static inline void assert_message(const struct err *e, const char *folder, const char *want)
{
    const char *text = e->text;
    size_t n = strlen(folder);
    if (n && strncmp(text, folder, n) == 0) text += n;
    if (strncmp(text, want, strlen(want)) != 0) fail_msg("expected '%s', found '%s'", want, e->text);
    assert_int_not_equal(e->code, ERR_NONE);
}

static inline json_t *must_load(const char *path)
{
    struct err e = { 0 };
    json_t *v;
    if (!doc_load(&v, path, 1 << 24, &e)) fail_msg("%s", e.text);
    return v;
}

static inline json_t *must_parse(const char *text)
{
    struct err e = { 0 };
    json_t *v;
    if (!doc_parse(&v, text, strlen(text), &e)) fail_msg("%s: %s", text, e.text);
    return v;
}

/* Sets the value at a dotted path to the JSON `text`; NULL deletes it. */
static inline void json_change(json_t *root, const char *path, const char *text)
{
    char copy[256], *rest = copy;
    snprintf(copy, sizeof copy, "%s", path);
    for (char *dot; (dot = strchr(rest, '.')); rest = dot + 1) {
        *dot = 0;
        root = json_object_get(root, rest);
        assert_non_null(root);
    }
    if (text)
        json_object_set_new(root, rest, must_parse(text));
    else
        json_object_del(root, rest);
}
#endif
