/* YAML text as a tree of texts that remember their lines. (libyaml exports names such as yaml_free, hence the
 * longer prefix.) */
#ifndef QUANTIZE_YAML_TREE_H
#define QUANTIZE_YAML_TREE_H
#include "base/err.h"
#include <stdbool.h>
#include <stddef.h>

enum yaml_tree_kind { YAML_TREE_TEXT, YAML_TREE_LIST, YAML_TREE_MAP };

struct yaml_tree {
    enum yaml_tree_kind kind;
    int line;                       /* from 1; the key's, where there is one */
    char *key;                      /* in a map; no two are equal */
    char *text;                     /* of YAML_TREE_TEXT, valid UTF-8 without NUL */
    bool is_plain;                  /* not quoted: "null", "true" and numbers mean what they say */
    struct yaml_tree *first, *next; /* of a list or map; beside this one */
};

/* One document of at most 1 MiB. Anchors, aliases, tags, keys that are not text, duplicate keys, depth above
 * 16 and more than 16384 values are errors, all with a line. *root is the caller's. */
bool yaml_tree_read(struct yaml_tree **root, const char *text, size_t bytes, struct err *e);
void yaml_tree_free(struct yaml_tree *root); /* NULL is fine */
/* The value of a key, or NULL; map may be anything. */
const struct yaml_tree *yaml_tree_get(const struct yaml_tree *map, const char *key);
#endif
