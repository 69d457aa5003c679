/* JSON text, written in order into one growing buffer: what a stream's chunks are made of. Commas come by
 * themselves. Out of memory is remembered in `failed`, after which nothing is added. */
#ifndef SERVER_JSON_OUT_H
#define SERVER_JSON_OUT_H
#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Zero-initialise. */
struct json_out {
    char *data; /* owned; not NUL-terminated */
    size_t n, capacity;
    bool failed, needs_comma;
};
void json_out_deinit(struct json_out *o);
void json_out_clear(struct json_out *o); /* keeps the memory */

void json_out_raw(struct json_out *o, const char *bytes, size_t n); /* as they are; no comma */
void json_out_open(struct json_out *o, char bracket);               /* { or [ */
void json_out_close(struct json_out *o, char bracket);
void json_out_key(struct json_out *o, const char *key); /* plain ASCII, or escaped already */
/* text: UTF-8, NUL allowed. */
void json_out_string(struct json_out *o, const char *text, size_t n);
/* The same in parts of whole characters. */
void json_out_string_begin(struct json_out *o);
void json_out_string_part(struct json_out *o, const char *text, size_t n);
void json_out_string_end(struct json_out *o);
/* A member's name that may need escapes. */
void json_out_name(struct json_out *o, const char *name);
void json_out_text(struct json_out *o, const char *text); /* NUL-terminated; NULL writes null */
void json_out_int(struct json_out *o, int64_t v);
void json_out_bool(struct json_out *o, bool v);
void json_out_null(struct json_out *o);
/* The fewest digits that give the same f32 back, so equal numbers are equal texts. What is not finite becomes
 * -9999.0, as in vLLM: JSON has no infinities. */
void json_out_float(struct json_out *o, float v);
/* Compact, numbers in the fewest digits that give them back; NULL writes null. As deep as the value is. */
void json_out_value(struct json_out *o, const json_t *v);

void json_out_key_text(struct json_out *o, const char *key, const char *text);
void json_out_key_string(struct json_out *o, const char *key, const char *text, size_t n);
void json_out_key_int(struct json_out *o, const char *key, int64_t v);
void json_out_key_bool(struct json_out *o, const char *key, bool v);
void json_out_key_null(struct json_out *o, const char *key);
void json_out_key_value(struct json_out *o, const char *key, const json_t *v);
/* ids[from] .. ids[n - 1] */
void json_out_key_ids(struct json_out *o, const char *key, const int32_t *ids, size_t from, size_t n);
void json_out_key_open(struct json_out *o, const char *key, char bracket);
#endif
