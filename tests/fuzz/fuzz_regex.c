/* Input: a regular expression; the first byte chooses how it is read: as such, or as a JSON schema's pattern.
 */
#include "grammar_walk.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct grammar *g = NULL;
    struct err e = { 0 };
    if (bytes == 0) return 0;
    if (data[0] & 1) {
        bool ok = grammar_from_regex(&g, (const char *)data + 1, bytes - 1, &e);
        grammar_walk(g, &e, ok);
        return 0;
    }
    json_t *pattern = json_stringn((const char *)data + 1, bytes - 1);
    if (!pattern) return 0; /* not UTF-8 */
    json_t *schema = json_pack("{s:s,s:o}", "type", "string", "pattern", pattern);
    require(schema);
    bool ok = grammar_from_schema(&g, schema, &e);
    json_decref(schema);
    grammar_walk(g, &e, ok);
    return 0;
}
