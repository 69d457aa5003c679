/* A card's text in, the fields that a card made from it may want out. */
#include "quantize/front_matter.h"
#include "base/file.h"
#include "quantize/yaml_tree.h"
#include <stdlib.h>
#include <string.h>

enum { CARD_BYTES_MAX = 16 << 20 };

/* Bytes of the line at s, its end included; *is_fence: it is "---". */
static size_t line_at(const char *s, size_t n, bool *is_fence)
{
    const char *end = memchr(s, '\n', n);
    size_t length = end ? (size_t)(end - s) + 1 : n, used = end ? length - 1 : n;
    while (used > 3 && strchr(" \t\r", s[used - 1])) used--;
    *is_fence = used == 3 && memcmp(s, "---", 3) == 0;
    return length;
}

/* False: no front matter. */
static bool find(const char **begin, size_t *n, const char *text, size_t bytes)
{
    bool fence;
    if (bytes >= 3 && memcmp(text, "\xef\xbb\xbf", 3) == 0) {
        text += 3;
        bytes -= 3;
    }
    size_t at = line_at(text, bytes, &fence);
    if (!fence) return false;
    *begin = text + at;
    while (at < bytes) {
        size_t line = line_at(text + at, bytes - at, &fence);
        *n = (size_t)(text + at - *begin);
        if (fence) return true;
        at += line;
    }
    return false;
}

/* NULL: neither a text nor a list of texts. */
static json_t *value_of(const struct yaml_tree *n)
{
    bool nothing =
        n->is_plain && (!n->text || !*n->text || !strcmp(n->text, "null") || !strcmp(n->text, "~"));
    if (n->kind == YAML_TREE_TEXT) return nothing ? NULL : json_string(n->text);
    if (n->kind != YAML_TREE_LIST) return NULL;
    json_t *list = json_array();
    for (const struct yaml_tree *c = n->first; c; c = c->next)
        if (c->kind == YAML_TREE_TEXT) json_array_append_new(list, json_string(c->text));
    if (json_array_size(list) > 0) return list;
    json_decref(list);
    return NULL;
}

bool front_matter_parse(json_t **out, const char *text, size_t bytes, struct err *e)
{
    const char *begin;
    size_t n;
    struct yaml_tree *root;
    *out = json_object();
    if (!*out) return err_memory(e, "front matter", 0);
    if (!find(&begin, &n, text, bytes)) return true;
    if (!yaml_tree_read(&root, begin, n, e)) {
        json_decref(*out);
        *out = NULL;
        return err_note(e, "front matter");
    }
    if (root && root->kind == YAML_TREE_MAP)
        for (const struct yaml_tree *c = root->first; c; c = c->next) {
            json_t *value = value_of(c);
            if (value) json_object_set_new(*out, c->key, value);
        }
    yaml_tree_free(root);
    return true;
}

bool front_matter_load(json_t **out, const char *folder, const struct report *report, struct err *e)
{
    struct err why = { 0 };
    char *path = file_join(folder, "README.md"), *text = NULL;
    size_t bytes = 0;
    *out = NULL;
    if (!path) return err_memory(e, "path", strlen(folder));
    if (file_exists(path) &&
        !(file_read(&text, &bytes, path, CARD_BYTES_MAX, &why) && front_matter_parse(out, text, bytes, &why)))
        report_warn(report, "%s: nothing is taken from it: %s", path, why.text);
    if (!*out) *out = json_object();
    free(text);
    free(path);
    return *out || err_memory(e, "front matter", 0);
}
