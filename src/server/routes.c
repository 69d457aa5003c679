#include "server/routes.h"
#include <string.h>

#define NOT_THIS_MODEL "this server runs a language model that generates text; it has no "

static const struct route routes[] = {
    { "/v1/chat/completions", "POST", ROUTE_API, API_CHAT_COMPLETIONS, false, NULL },
    { "/v1/completions", "POST", ROUTE_API, API_COMPLETIONS, false, NULL },
    { "/v1/responses", "POST", ROUTE_API, API_RESPONSES, false, NULL },
    { "/v1/responses/", "GET", ROUTE_API, API_RESPONSE, false, NULL },
    { "/v1/responses/", "DELETE", ROUTE_API, API_RESPONSE_DELETE, false, NULL },
    { "/v1/responses/", "POST", ROUTE_API, API_RESPONSE_CANCEL, false, NULL },
    { "/v1/messages", "POST", ROUTE_API, API_MESSAGES, false, NULL },
    { "/v1/messages/count_tokens", "POST", ROUTE_API, API_COUNT_TOKENS, false, NULL },
    { "/v1/chat/completions/render", "POST", ROUTE_API, API_CHAT_RENDER, false, NULL },
    { "/v1/completions/render", "POST", ROUTE_API, API_COMPLETIONS_RENDER, false, NULL },
    { "/v1/models", "GET", ROUTE_API, API_MODELS, false, NULL },
    { "/v1/models/", "GET", ROUTE_API, API_MODEL, false, NULL },
    { "/tokenize", "POST", ROUTE_API, API_TOKENIZE, false, NULL },
    { "/detokenize", "POST", ROUTE_API, API_DETOKENIZE, false, NULL },
    { "/tokenizer_info", "GET", ROUTE_API, API_TOKENIZER_INFO, false, NULL },
    { "/health", "GET", ROUTE_HEALTH, API_MODELS, true, NULL },
    { "/ping", "GET", ROUTE_HEALTH, API_MODELS, true, NULL },
    { "/ping", "POST", ROUTE_HEALTH, API_MODELS, true, NULL },
    { "/ready", "GET", ROUTE_READY, API_MODELS, true, NULL },
    { "/metrics", "GET", ROUTE_METRICS, API_MODELS, false, NULL },
    { "/version", "GET", ROUTE_VERSION, API_MODELS, false, NULL },
    { "/server_info", "GET", ROUTE_API, API_SERVER_INFO, false, NULL },
    { "/load", "GET", ROUTE_LOAD, API_MODELS, false, NULL },
    { "/", "GET", ROUTE_PAGE, API_MODELS, true, NULL },
    { "/v1/embeddings", "POST", ROUTE_ABSENT, API_MODELS, false, NOT_THIS_MODEL "embeddings" },
    { "/v1/rerank", "POST", ROUTE_ABSENT, API_MODELS, false, NOT_THIS_MODEL "reranking" },
    { "/rerank", "POST", ROUTE_ABSENT, API_MODELS, false, NOT_THIS_MODEL "reranking" },
    { "/v1/score", "POST", ROUTE_ABSENT, API_MODELS, false, NOT_THIS_MODEL "scoring of pairs" },
    { "/score", "POST", ROUTE_ABSENT, API_MODELS, false, NOT_THIS_MODEL "scoring of pairs" },
    { "/classify", "POST", ROUTE_ABSENT, API_MODELS, false, NOT_THIS_MODEL "classifier" },
    { "/pooling", "POST", ROUTE_ABSENT, API_MODELS, false, NOT_THIS_MODEL "pooling" },
    { "/v1/audio/transcriptions", "POST", ROUTE_ABSENT, API_MODELS, false, NOT_THIS_MODEL "audio" },
    { "/v1/audio/translations", "POST", ROUTE_ABSENT, API_MODELS, false, NOT_THIS_MODEL "audio" },
    { "/v1/audio/speech", "POST", ROUTE_ABSENT, API_MODELS, false, NOT_THIS_MODEL "audio" },
    { "/v1/images/generations", "POST", ROUTE_ABSENT, API_MODELS, false,
      NOT_THIS_MODEL "images to give, only images to read" },
    { "/v1/load_lora_adapter", "POST", ROUTE_ABSENT, API_MODELS, false, NOT_THIS_MODEL "adapters" },
    { "/v1/unload_lora_adapter", "POST", ROUTE_ABSENT, API_MODELS, false, NOT_THIS_MODEL "adapters" },
};
enum { N_ROUTES = sizeof routes / sizeof *routes };

const struct route *route_at(int i)
{
    return i >= 0 && i < N_ROUTES ? &routes[i] : NULL;
}

/* Where the argument begins (at the path's end where there is none); NULL: another path. */
static const char *match(const struct route *r, const char *path)
{
    size_t n = strlen(r->path);
    if (strncmp(r->path, path, n) != 0) return NULL;
    bool takes_argument = n > 1 && r->path[n - 1] == '/';
    return takes_argument == (path[n] != 0) ? path + n : NULL;
}

const struct route *route_find(const char *method, const char *path, const char **argument, bool *path_exists)
{
    if (strcmp(method, "HEAD") == 0) method = "GET";
    *path_exists = false;
    for (int i = 0; i < N_ROUTES; i++) {
        const char *rest = match(&routes[i], path);
        if (!rest) continue;
        *path_exists = true;
        if (strcmp(routes[i].method, method) != 0) continue;
        *argument = rest;
        return &routes[i];
    }
    return NULL;
}

const char *route_methods(const char *path)
{
    bool get = false, post = false, removes = false;
    for (int i = 0; i < N_ROUTES; i++) {
        if (!match(&routes[i], path)) continue;
        get = get || routes[i].method[0] == 'G';
        post = post || routes[i].method[0] == 'P';
        removes = removes || routes[i].method[0] == 'D';
    }
    if (removes) return "GET, HEAD, POST, DELETE, OPTIONS";
    return get && post ? "GET, HEAD, POST, OPTIONS" : get ? "GET, HEAD, OPTIONS" : "POST, OPTIONS";
}
