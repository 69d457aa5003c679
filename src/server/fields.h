/* Fields of a JSON object that came from outside, read with errors that name them. Absent or null leaves
 * *out as it is and is no error. */
#ifndef SERVER_FIELDS_H
#define SERVER_FIELDS_H
#include "server/fault.h"

struct fields {
    const json_t *object;
    const char *where; /* "" or "stream_options.", say */
    struct fault *fault;
};

const json_t *fields_get(const struct fields *in, const char *key); /* NULL: absent or null */
bool fields_int(const struct fields *in, const char *key, int64_t min, int64_t max, int64_t *out);
bool fields_float(const struct fields *in, const char *key, double min, double max, float *out);
bool fields_bool(const struct fields *in, const char *key, bool *out);
bool fields_text(const struct fields *in, const char *key, const char **out); /* without NUL inside */
bool fields_object(const struct fields *in, const char *key, const json_t **out);
bool fields_array(const struct fields *in, const char *key, const json_t **out);
/* An array of token ids in 0 <= id < n_vocab; malloc'd, not to be NULL on return. */
bool fields_ids(const struct fields *in, const char *key, int64_t n_vocab, int32_t **ids, int *n);
/* The field must not be there, or say nothing (false, null, 0, an empty text or list). why: a sentence. */
bool fields_refuse(const struct fields *in, const char *key, const char *why);

/* "expected WHAT, found an array" of a field or of any part of the request. */
bool fields_wrong(struct fault *f, const char *param, const char *expected, const json_t *found);
/* An integer, also one written as 16.0. */
bool fields_integer(const json_t *v, int64_t *out);
#endif
