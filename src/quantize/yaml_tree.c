/* libyaml's events as a tree. Takes bytes from outside: whatever could make the tree larger than the text
 * that describes it (aliases) or run the stack down (nesting) is refused. */
#include "quantize/yaml_tree.h"
#include <stdlib.h>
#include <string.h>
#include <yaml.h>

enum { BYTES_MAX = 1 << 20, DEPTH_MAX = 16, NODES_MAX = 16384 };

struct reader {
    yaml_parser_t parser;
    int n_nodes;
};

static int line_of(const yaml_mark_t *mark)
{
    return (int)mark->line + 1;
}

/* The caller deletes the event also after a failure. */
static bool next_event(struct reader *r, yaml_event_t *event, struct err *e)
{
    memset(event, 0, sizeof *event);
    if (yaml_parser_parse(&r->parser, event)) return true;
    if (r->parser.error == YAML_MEMORY_ERROR) return err_memory(e, "YAML", 0);
    return err_set(e, ERR_FORMAT, "line %d: not YAML: %s", line_of(&r->parser.problem_mark),
                   r->parser.problem ? r->parser.problem : "?");
}

static bool check_properties(const yaml_event_t *event, struct err *e)
{
    bool anchor = event->type == YAML_ALIAS_EVENT, tag = false;
    if (event->type == YAML_SCALAR_EVENT) {
        anchor = event->data.scalar.anchor;
        tag = event->data.scalar.tag;
    } else if (event->type == YAML_SEQUENCE_START_EVENT) {
        anchor = event->data.sequence_start.anchor;
        tag = event->data.sequence_start.tag;
    } else if (event->type == YAML_MAPPING_START_EVENT) {
        anchor = event->data.mapping_start.anchor;
        tag = event->data.mapping_start.tag;
    }
    if (!anchor && !tag) return true;
    return err_set(e, ERR_UNSUPPORTED, "line %d: %s are not read", line_of(&event->start_mark),
                   anchor ? "anchors and aliases" : "tags");
}

static bool take_text(char **out, const yaml_event_t *event, struct err *e)
{
    const char *text = (const char *)event->data.scalar.value;
    if (strlen(text) != event->data.scalar.length)
        return err_set(e, ERR_FORMAT, "line %d: a text contains NUL", line_of(&event->start_mark));
    *out = strdup(text);
    return *out || err_memory(e, "YAML", event->data.scalar.length);
}

static bool read_children(struct reader *r, struct yaml_tree *parent, int depth, struct err *e);

/* The value that begins with this event; it is linked to its parent by the caller, also after a failure. */
static bool read_value(struct reader *r, struct yaml_tree *n, const yaml_event_t *event, int depth,
                       struct err *e)
{
    if (!check_properties(event, e)) return false;
    if (event->type == YAML_SCALAR_EVENT) {
        n->kind = YAML_TREE_TEXT;
        n->is_plain = event->data.scalar.style == YAML_PLAIN_SCALAR_STYLE;
        return take_text(&n->text, event, e);
    }
    n->kind = event->type == YAML_MAPPING_START_EVENT ? YAML_TREE_MAP : YAML_TREE_LIST;
    if (depth == DEPTH_MAX)
        return err_set(e, ERR_LIMIT, "line %d: nested deeper than %d", line_of(&event->start_mark),
                       DEPTH_MAX);
    return read_children(r, n, depth + 1, e);
}

static struct yaml_tree *new_node(struct reader *r, const yaml_event_t *event, struct err *e)
{
    if (r->n_nodes++ == NODES_MAX) {
        err_set(e, ERR_LIMIT, "line %d: more than %d values", line_of(&event->start_mark), NODES_MAX);
        return NULL;
    }
    struct yaml_tree *n = calloc(1, sizeof *n);
    if (n)
        n->line = line_of(&event->start_mark);
    else
        err_memory(e, "YAML", sizeof *n);
    return n;
}

/* The key and the first event of its value. */
static bool read_key(struct reader *r, struct yaml_tree *n, const struct yaml_tree *parent,
                     yaml_event_t *event, struct err *e)
{
    if (!check_properties(event, e)) return false;
    if (event->type != YAML_SCALAR_EVENT)
        return err_set(e, ERR_FORMAT, "line %d: a key is not text", n->line);
    if (!take_text(&n->key, event, e)) return false;
    for (const struct yaml_tree *other = parent->first; other; other = other->next)
        if (other != n && strcmp(other->key, n->key) == 0)
            return err_set(e, ERR_FORMAT, "line %d: key '%.100s' stands on line %d already", n->line, n->key,
                           other->line);
    yaml_event_delete(event);
    return next_event(r, event, e);
}

static bool read_children(struct reader *r, struct yaml_tree *parent, int depth, struct err *e)
{
    struct yaml_tree **end = &parent->first;
    for (;;) {
        yaml_event_t event;
        struct yaml_tree *n = NULL;
        bool ok = next_event(r, &event, e);
        bool last = ok && (event.type == YAML_SEQUENCE_END_EVENT || event.type == YAML_MAPPING_END_EVENT);
        if (ok && !last) n = new_node(r, &event, e);
        ok = last || n;
        if (n) {
            *end = n;
            end = &n->next;
            ok = (parent->kind != YAML_TREE_MAP || read_key(r, n, parent, &event, e)) &&
                 read_value(r, n, &event, depth, e);
        }
        yaml_event_delete(&event);
        if (!ok || last) return ok;
    }
}

/* Skips an event that must come here. */
static bool expect(struct reader *r, yaml_event_type_t type, const char *instead, struct err *e)
{
    yaml_event_t event;
    bool ok = next_event(r, &event, e);
    if (ok && event.type != type)
        ok = err_set(e, ERR_FORMAT, "line %d: %s", line_of(&event.start_mark), instead);
    yaml_event_delete(&event);
    return ok;
}

static bool read_document(struct reader *r, struct yaml_tree **root, struct err *e)
{
    yaml_event_t event;
    if (!expect(r, YAML_STREAM_START_EVENT, "no YAML", e) ||
        !expect(r, YAML_DOCUMENT_START_EVENT, "nothing in it", e))
        return false;
    bool ok =
        next_event(r, &event, e) && (*root = new_node(r, &event, e)) && read_value(r, *root, &event, 0, e);
    yaml_event_delete(&event);
    return ok && expect(r, YAML_DOCUMENT_END_EVENT, "more than one document", e) &&
           expect(r, YAML_STREAM_END_EVENT, "more than one document", e);
}

bool yaml_tree_read(struct yaml_tree **root, const char *text, size_t bytes, struct err *e)
{
    struct reader r = { 0 };
    *root = NULL;
    if (bytes > BYTES_MAX) return err_set(e, ERR_LIMIT, "%zu bytes, at most %d are read", bytes, BYTES_MAX);
    if (!yaml_parser_initialize(&r.parser)) return err_memory(e, "YAML", 0);
    yaml_parser_set_encoding(&r.parser, YAML_UTF8_ENCODING);
    yaml_parser_set_input_string(&r.parser, (const unsigned char *)text, bytes);
    bool ok = read_document(&r, root, e);
    yaml_parser_delete(&r.parser);
    if (ok) return true;
    yaml_tree_free(*root);
    *root = NULL;
    return false;
}

void yaml_tree_free(struct yaml_tree *root)
{
    while (root) {
        struct yaml_tree *next = root->next;
        yaml_tree_free(root->first); /* no deeper than DEPTH_MAX */
        free(root->key);
        free(root->text);
        free(root);
        root = next;
    }
}

const struct yaml_tree *yaml_tree_get(const struct yaml_tree *map, const char *key)
{
    if (!map || map->kind != YAML_TREE_MAP) return NULL;
    for (const struct yaml_tree *n = map->first; n; n = n->next)
        if (strcmp(n->key, key) == 0) return n;
    return NULL;
}
