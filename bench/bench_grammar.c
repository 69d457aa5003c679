/* Microseconds for one mask over a vocabulary of the released model's size, in the states answers are mostly
 * in. The vocabulary: the tokens of MODEL_DIR, then byte strings made of them (two joined), distinct, up to
 * 248,320. "first": the state was not met before, the matcher knows nothing; "next": ten tokens later;
 * "again": its mask is kept or its bytes known. usage: bench_grammar MODEL_DIR */
#include "base/clock.h"
#include "grammar/grammar.h"
#include "tokenizer/tokenizer.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { VOCAB = 248320, REPEATS = 21 };

struct vocabulary {
    char **text;
    uint32_t *bytes;
};

static void make_vocabulary(struct vocabulary *v, const struct tokenizer *t)
{
    int64_t known = tokenizer_size(t);
    uint64_t seed = 1;
    v->text = calloc(VOCAB, sizeof *v->text);
    v->bytes = calloc(VOCAB, sizeof *v->bytes);
    if (!v->text || !v->bytes) abort();
    for (int64_t id = 0; id < VOCAB; id++) {
        size_t n[2] = { 0 }, parts = id < known ? 1 : 2;
        const char *part[2] = { 0 };
        for (size_t k = 0; k < parts; k++) {
            seed = seed * 6364136223846793005u + 1442695040888963407u;
            int32_t from = id < known ? (int32_t)id : (int32_t)((seed >> 33) % (uint64_t)known);
            part[k] = tokenizer_is_special(t, from) ? NULL : tokenizer_bytes(t, from, &n[k]);
            if (!part[k]) n[k] = 0;
        }
        v->text[id] = malloc(n[0] + n[1] + 1);
        if (!v->text[id]) abort();
        if (n[0]) memcpy(v->text[id], part[0], n[0]);
        if (n[1]) memcpy(v->text[id] + n[0], part[1], n[1]);
        v->bytes[id] = (uint32_t)(n[0] + n[1]);
    }
}

static const char *bytes_of(void *ctx, int32_t id, size_t *n)
{
    const struct vocabulary *v = ctx;
    *n = v->bytes[id];
    return v->text[id];
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *x)
{
    qsort(x, REPEATS, sizeof *x, compare);
    return x[REPEATS / 2] * 1e6;
}

/* Token of one byte. */
static int32_t byte_id(const struct vocabulary *v, char c)
{
    for (int32_t id = 0; id < VOCAB; id++)
        if (v->bytes[id] == 1 && v->text[id][0] == c) return id;
    abort();
}

static void measure(const char *what, const struct grammar *g, const struct token_trie *t,
                    const struct vocabulary *v, const char *before)
{
    static uint32_t mask[VOCAB / 32 + 1];
    double first[REPEATS], again[REPEATS], next[REPEATS], step[REPEATS];
    int64_t allowed = 0;
    for (int r = 0; r < REPEATS; r++) {
        struct matcher *m;
        if (!matcher_create(&m, g, t, NULL)) abort();
        for (const char *p = before; *p; p++)
            if (!matcher_advance(m, byte_id(v, *p))) abort();
        memset(mask, 255, sizeof mask);
        double at = clock_seconds();
        matcher_mask(m, mask, VOCAB);
        first[r] = clock_seconds() - at;
        allowed = 0;
        for (int64_t i = 0; i < VOCAB / 32; i++) allowed += __builtin_popcount(mask[i]);
        at = clock_seconds();
        for (int k = 0; k < 10; k++) matcher_mask(m, mask, VOCAB);
        again[r] = (clock_seconds() - at) / 10;
        int32_t some = 0;
        while (some < VOCAB && !(mask[some / 32] >> some % 32 & 1)) some++;
        at = clock_seconds();
        for (int k = 0; k < 100; k++)
            if (matcher_advance(m, some)) matcher_back(m, 1);
        step[r] = (clock_seconds() - at) / 100;
        next[r] = 0;
        for (int k = 0; k < 10; k++) {
            if (!matcher_advance(m, byte_id(v, 'e')) && !matcher_advance(m, some)) break;
            memset(mask, 255, sizeof mask);
            at = clock_seconds();
            matcher_mask(m, mask, VOCAB);
            next[r] = clock_seconds() - at;
            some = 0;
            while (some < VOCAB && !(mask[some / 32] >> some % 32 & 1)) some++;
        }
        matcher_free(m);
    }
    printf("%s,%lld,%.1f,%.1f,%.1f,%.2f\n", what, (long long)allowed, median(first), median(next),
           median(again), median(step));
}

static const char SCHEMA[] =
    "{\"type\":\"object\",\"properties\":{\"name\":{\"type\":\"string\"},\"note\":{\"type\":\"string\","
    "\"maxLength\":500},\"age\":{\"type\":\"integer\",\"minimum\":0,\"maximum\":150},\"score\":{\"type\":"
    "\"number\"},"
    "\"tags\":{\"type\":\"array\",\"items\":{\"enum\":[\"red\",\"green\",\"blue\"]}},\"when\":{\"type\":"
    "\"string\","
    "\"format\":\"date-time\"},\"code\":{\"type\":\"string\",\"pattern\":\"^[A-Z]{2,5}-[0-9]+$\"}},"
    "\"required\":[\"name\",\"note\",\"age\",\"score\"]}";
static const char TOOLS[] =
    "[{\"type\":\"function\",\"function\":{\"name\":\"search\",\"parameters\":{\"type\":\"object\","
    "\"properties\":"
    "{\"query\":{\"type\":\"string\"},\"limit\":{\"type\":\"integer\"}},\"required\":[\"query\"]}}}]";

static void run(const struct vocabulary *v, const struct token_trie *t)
{
    struct grammar *g;
    json_t *schema = json_loads(SCHEMA, 0, NULL), *tools = json_loads(TOOLS, 0, NULL);
    static const struct tool_call_options any;
    puts("state,tokens_allowed,us_first,us_next,us_again,us_advance_back");
    double at = clock_seconds();
    if (!grammar_from_schema(&g, schema, NULL)) abort();
    fprintf(stderr, "schema compiled in %.0f us\n", (clock_seconds() - at) * 1e6);
    measure("schema: begin", g, t, v, "");
    measure("schema: key", g, t, v, "{\"");
    measure("schema: string", g, t, v, "{\"name\": \"Ada");
    measure("schema: string of 500 at most", g, t, v, "{\"name\": \"Ada\", \"note\": \"x");
    measure("schema: integer 0 to 150", g, t, v, "{\"name\": \"Ada\", \"note\": \"x\", \"age\": 1");
    measure("schema: number", g, t, v, "{\"name\": \"Ada\", \"note\": \"x\", \"age\": 1, \"score\": 1.");
    measure("schema: between keys", g, t, v,
            "{\"name\": \"Ada\", \"note\": \"x\", \"age\": 1, \"score\": 1.5,");
    measure("schema: enum", g, t, v,
            "{\"name\": \"Ada\", \"note\": \"x\", \"age\": 1, \"score\": 1.5, \"tags\": [\"");
    measure("schema: date-time", g, t, v,
            "{\"name\": \"Ada\", \"note\": \"x\", \"age\": 1, \"score\": 1.5, \"when\": \"20");
    measure("schema: pattern", g, t, v,
            "{\"name\": \"Ada\", \"note\": \"x\", \"age\": 1, \"score\": 1.5, \"code\": \"AB");
    grammar_free(g);
    if (!grammar_from_json_object(&g, NULL)) abort();
    measure("json_object: string", g, t, v, "{\"a\": [{\"b\": \"c");
    measure("json_object: value", g, t, v, "{\"a\": [{\"b\": ");
    grammar_free(g);
    if (!grammar_from_tool_calls(&g, tools, &any, NULL)) abort();
    measure("tool call: string", g, t, v, "<tool_call>\n<function=search>\n<parameter=query>\nhow");
    measure("tool call: tag", g, t, v, "<tool_call>\n<function=");
    grammar_free(g);
    if (!grammar_from_regex(&g, ".*", 2, NULL)) abort();
    measure("regex .*", g, t, v, "a");
    grammar_free(g);
    if (!grammar_from_regex(&g, "[a-z ]*", 7, NULL)) abort();
    measure("regex [a-z ]*", g, t, v, "a");
    grammar_free(g);
    static const char word[] = "[\\w-]{1,64}";
    if (!grammar_from_regex(&g, word, sizeof word - 1, NULL)) abort();
    measure("regex [\\w-]{1,64}", g, t, v, "a");
    grammar_free(g);
    json_decref(schema);
    json_decref(tools);
}

int main(int argc, char **argv)
{
    struct tokenizer *tokenizer;
    struct vocabulary v;
    struct token_trie *t;
    struct err e = { 0 };
    if (argc != 2) {
        fprintf(stderr, "usage: bench_grammar MODEL_DIR\n");
        return 2;
    }
    if (!tokenizer_load(&tokenizer, argv[1], &e)) {
        fprintf(stderr, "bench_grammar: %s\n", e.text);
        return 1;
    }
    make_vocabulary(&v, tokenizer);
    double at = clock_seconds();
    if (!token_trie_create(&t, VOCAB, bytes_of, &v, (const int32_t[]){ VOCAB - 1 }, 1, &e)) {
        fprintf(stderr, "bench_grammar: %s\n", e.text);
        return 1;
    }
    fprintf(stderr, "trie of %d tokens in %.0f ms\n", VOCAB, (clock_seconds() - at) * 1e3);
    run(&v, t);
    token_trie_free(t);
    for (int64_t id = 0; id < VOCAB; id++) free(v.text[id]);
    free(v.text);
    free(v.bytes);
    tokenizer_free(tokenizer);
    return 0;
}
