/* A document as libyaml events, in memory. */
#include "quantize/yaml.h"
#include <ctype.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <yaml.h>

/* What the tool that reads recipes also breaks its lines at. */
enum { LINE_WIDTH = 88 };

/* Emits an event that was initialised (or not: `made` 0). The emitter owns it afterwards, also on failure. */
static bool emit(yaml_emitter_t *y, yaml_event_t *event, int made)
{
    return made && yaml_emitter_emit(y, event);
}

/* A word that YAML 1.1 and 1.2 both read as a string. */
static bool is_word(const char *s)
{
    static const char *const taken[] = { "true", "false", "yes", "no", "on", "off", "null", "y", "n" };
    if (!isalpha((unsigned char)*s)) return false;
    for (const char *p = s; *p; p++)
        if (!isalnum((unsigned char)*p) && !strchr("_.-", *p)) return false;
    for (size_t i = 0; i < sizeof taken / sizeof *taken; i++)
        if (strcasecmp(s, taken[i]) == 0) return false;
    return true;
}

static bool put_scalar(yaml_emitter_t *y, const char *text, yaml_scalar_style_t style)
{
    yaml_event_t event;
    bool plain = style == YAML_PLAIN_SCALAR_STYLE;
    return emit(y, &event,
                yaml_scalar_event_initialize(&event, NULL, NULL, (const yaml_char_t *)text, (int)strlen(text),
                                             plain, !plain, style));
}

static bool put_string(yaml_emitter_t *y, const char *text)
{
    return put_scalar(y, text, is_word(text) ? YAML_PLAIN_SCALAR_STYLE : YAML_SINGLE_QUOTED_SCALAR_STYLE);
}

static bool put(yaml_emitter_t *y, const json_t *v);

static bool put_map(yaml_emitter_t *y, const json_t *v)
{
    yaml_event_t event;
    const char *key;
    json_t *value;
    bool ok =
        emit(y, &event, yaml_mapping_start_event_initialize(&event, NULL, NULL, 1, YAML_BLOCK_MAPPING_STYLE));
    json_object_foreach((json_t *)(uintptr_t)v, key, value)
    {
        ok = ok && put_string(y, key) && put(y, value);
    }
    return ok && emit(y, &event, yaml_mapping_end_event_initialize(&event));
}

static bool put_list(yaml_emitter_t *y, const json_t *v)
{
    yaml_event_t event;
    bool ok = emit(y, &event,
                   yaml_sequence_start_event_initialize(&event, NULL, NULL, 1, YAML_BLOCK_SEQUENCE_STYLE));
    for (size_t i = 0; i < json_array_size(v); i++) ok = ok && put(y, json_array_get(v, i));
    return ok && emit(y, &event, yaml_sequence_end_event_initialize(&event));
}

static bool put(yaml_emitter_t *y, const json_t *v)
{
    char number[40];
    switch (json_typeof(v)) {
    case JSON_OBJECT: return put_map(y, v);
    case JSON_ARRAY: return put_list(y, v);
    case JSON_STRING: return put_string(y, json_string_value(v));
    case JSON_INTEGER: snprintf(number, sizeof number, "%" JSON_INTEGER_FORMAT, json_integer_value(v)); break;
    case JSON_REAL: snprintf(number, sizeof number, "%.17g", json_real_value(v)); break;
    case JSON_TRUE: snprintf(number, sizeof number, "true"); break;
    case JSON_FALSE: snprintf(number, sizeof number, "false"); break;
    default: snprintf(number, sizeof number, "null"); break;
    }
    return put_scalar(y, number, YAML_PLAIN_SCALAR_STYLE);
}

static bool put_document(yaml_emitter_t *y, const json_t *root)
{
    yaml_event_t event;
    return emit(y, &event, yaml_stream_start_event_initialize(&event, YAML_UTF8_ENCODING)) &&
           emit(y, &event, yaml_document_start_event_initialize(&event, NULL, NULL, NULL, 1)) &&
           put(y, root) && emit(y, &event, yaml_document_end_event_initialize(&event, 1)) &&
           emit(y, &event, yaml_stream_end_event_initialize(&event));
}

bool yaml_write(char **text, size_t *bytes, const json_t *root, struct err *e)
{
    yaml_emitter_t y;
    *text = NULL;
    FILE *f = open_memstream(text, bytes);
    if (!f) return err_memory(e, "YAML", 0);
    bool ok = yaml_emitter_initialize(&y);
    if (ok) {
        yaml_emitter_set_output_file(&y, f);
        yaml_emitter_set_unicode(&y, 1);
        yaml_emitter_set_width(&y, LINE_WIDTH);
        ok = put_document(&y, root) && yaml_emitter_flush(&y);
        yaml_emitter_delete(&y);
    }
    ok = fclose(f) == 0 && ok;
    if (ok) return true;
    free(*text);
    *text = NULL;
    return err_memory(e, "YAML", 0);
}
