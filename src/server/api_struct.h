/* What an api consists of; for the files of this folder that begin with api_ or deal with exchanges. */
#ifndef SERVER_API_STRUCT_H
#define SERVER_API_STRUCT_H
#include "image/patches.h"
#include "server/api.h"
#include "server/json_out.h"
#include "server/response_store.h"
#include <stdatomic.h>

/* What a request that does not say gets. From generation_config.json by vLLM's rule, overridden by options.
 */
struct api_defaults {
    float temperature, top_p, min_p, repetition_penalty;
    int64_t top_k;
    int64_t max_tokens; /* max_new_tokens; < 0: none */
};

enum { API_STOPS_MAX = 16 };

struct api {
    struct api_options o;
    struct api_defaults defaults;
    json_t *tokenizer_config; /* an object, perhaps empty */
    int32_t stops[API_STOPS_MAX];
    int n_stops;
    int32_t never[4]; /* placeholders */
    int n_never;
    int32_t think, think_end, im_start; /* tokens; -1: none */
    int32_t newlines[2];                /* tokens of one and of two newlines; -1: none */
    struct token_list force_end;        /* closes the reasoning */
    int64_t n_vocab;                    /* ids below have a meaning */
    struct token_trie *trie;
    struct patch_rule patch_rule; /* of a model that sees */
    struct response_store *store; /* NULL: none is kept */
    uint64_t seed;                /* of seeds for requests that name none */
    atomic_uint_fast64_t n_requests;
    atomic_int n_fetching; /* requests whose images are being fetched */
    int64_t created;       /* seconds since 1970 */
};

/* Whether a model of that name is served; NULL: nobody asked. */
bool api_serves(const struct api *a, const char *model);
#endif
