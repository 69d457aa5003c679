/* Input: JSON, read as a schema and as the parameters of a function to call. */
#include "grammar_walk.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct grammar *g = NULL;
    struct err e = { 0 };
    static const struct tool_call_options any;
    json_t *schema = json_loadb((const char *)data, bytes, JSON_DECODE_ANY, NULL);
    if (!schema) return 0;
    bool ok = grammar_from_schema(&g, schema, &e);
    grammar_walk(g, &e, ok);
    json_t *tools = json_pack("[{s:s,s:O}]", "name", "f", "parameters", schema);
    require(tools);
    g = NULL;
    e = (struct err){ 0 };
    ok = grammar_from_tool_calls(&g, tools, &any, &e);
    grammar_walk(g, &e, ok);
    json_decref(tools);
    json_decref(schema);
    return 0;
}
