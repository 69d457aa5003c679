/* What the APIs need to know of a model, made once; which route does what. */
#include "server/api_routes.h"
#include "base/doc.h"
#include "base/file.h"
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

enum { CONFIG_BYTES_MAX = 64 << 20 };

bool api_serves(const struct api *a, const char *model)
{
    for (int i = 0; i < a->o.n_served_names; i++)
        if (strcmp(a->o.served_names[i], model) == 0) return true;
    return false;
}

/* dir/name as an object; an empty one where there is no such file. */
static bool load(json_t **out, const char *dir, const char *name, struct err *e)
{
    char *path = file_join(dir, name);
    if (!path) return err_memory(e, "a path", strlen(dir));
    bool ok = file_exists(path) ? doc_load(out, path, CONFIG_BYTES_MAX, e) : (*out = json_object()) != NULL;
    if (ok && !json_is_object(*out)) ok = err_set(e, ERR_FORMAT, "%s: expected an object", path);
    free(path);
    return ok;
}

static bool add_stop(struct api *a, const json_t *id, struct err *e)
{
    int64_t v = json_integer_value(id);
    if (!json_is_integer(id) || v < 0 || v >= a->o.config->vocab_size)
        return err_set(e, ERR_FORMAT, "eos_token_id: expected ids of tokens, from 0 to %lld",
                       (long long)a->o.config->vocab_size - 1);
    for (int i = 0; i < a->n_stops; i++)
        if (a->stops[i] == v) return true;
    if (a->n_stops == API_STOPS_MAX)
        return err_set(e, ERR_LIMIT, "eos_token_id: more than %d", API_STOPS_MAX);
    a->stops[a->n_stops++] = (int32_t)v;
    return true;
}

/* One id or a list of them. */
static bool add_stops(struct api *a, const json_t *eos, struct err *e)
{
    if (!eos || json_is_null(eos)) return true;
    if (!json_is_array(eos)) return add_stop(a, eos, e);
    for (size_t i = 0; i < json_array_size(eos); i++)
        if (!add_stop(a, json_array_get(eos, i), e)) return false;
    return true;
}

static bool read_default(float *out, const json_t *g, const char *key, double min, double max, struct err *e)
{
    double v = (double)*out;
    if (!doc_number_or(&v, g, "", key, e)) return false;
    if (!(v >= min && v <= max))
        return err_set(e, ERR_FORMAT, "%s: expected %g to %g, found %g", key, min, max, v);
    *out = (float)v;
    return true;
}

/* Source: vLLM, ModelConfig.get_diff_sampling_param. */
static bool read_defaults(struct api_defaults *d, const json_t *g, struct err *e)
{
    return read_default(&d->temperature, g, "temperature", 0, 100, e) &&
           read_default(&d->top_p, g, "top_p", 0, 1, e) && read_default(&d->min_p, g, "min_p", 0, 1, e) &&
           read_default(&d->repetition_penalty, g, "repetition_penalty", 1e-3, 1e3, e) &&
           doc_int_or(&d->top_k, g, "", "top_k", -1, INT_MAX, e) &&
           doc_int_or(&d->max_tokens, g, "", "max_new_tokens", 1, INT32_MAX, e);
}

static bool read_generation(struct api *a, struct err *e)
{
    json_t *g = NULL;
    a->defaults =
        (struct api_defaults){ .temperature = 1, .top_p = 1, .repetition_penalty = 1, .max_tokens = -1 };
    bool ok = load(&g, a->o.dir, "generation_config.json", e);
    if (ok && !((a->o.neutral_sampling || read_defaults(&a->defaults, g, e)) &&
                add_stops(a, json_object_get(g, "eos_token_id"), e)))
        ok = err_note(e, "%s/generation_config.json", a->o.dir);
    json_decref(g);
    if (ok && a->o.config->eos_token >= 0) {
        json_t *id = json_integer(a->o.config->eos_token);
        ok = id && add_stop(a, id, e);
        json_decref(id);
    }
    return ok && (!a->o.generation || read_defaults(&a->defaults, a->o.generation, e) ||
                  err_note(e, "--override-generation-config"));
}

static void add_never(struct api *a, int64_t id)
{
    if (id >= 0) a->never[a->n_never++] = (int32_t)id;
}

static const char *token_bytes(void *ctx, int32_t id, size_t *n)
{
    const struct tokenizer *t = ctx;
    const char *bytes = tokenizer_bytes(t, id, n);
    if (tokenizer_is_special(t, id)) *n = 0;
    return bytes;
}

/* The token that this text is; -1 where it is several. */
static bool find_text(int32_t *id, const struct tokenizer *t, const char *text, struct err *e)
{
    struct token_list list = { 0 };
    bool ok = tokenizer_encode(t, &list, text, strlen(text), 0, e);
    *id = ok && list.n == 1 ? list.ids[0] : -1;
    free(list.ids);
    return ok;
}

static bool read_tokens(struct api *a, struct err *e)
{
    static const char force[] = "\n</think>\n\n";
    const struct tokenizer *t = a->o.tokenizer;
    a->n_vocab = tokenizer_size(t) < a->o.config->vocab_size ? tokenizer_size(t) : a->o.config->vocab_size;
    a->think = tokenizer_find(t, "<think>");
    a->think_end = tokenizer_find(t, "</think>");
    a->im_start = tokenizer_find(t, "<|im_start|>");
    add_never(a, a->o.config->image_token);
    add_never(a, a->o.config->video_token);
    return find_text(&a->newlines[0], t, "\n", e) && find_text(&a->newlines[1], t, "\n\n", e) &&
           tokenizer_encode(t, &a->force_end, force, strlen(force), 0, e);
}

static bool read_patch_rule(struct api *a, struct err *e)
{
    const struct config *c = a->o.config;
    return !c->has_vision || patch_rule_load(&a->patch_rule, a->o.dir, c->vision.patch,
                                             c->vision.temporal_patch, c->vision.merge, e);
}

bool api_create(struct api **out, const struct api_options *o, struct err *e)
{
    struct api *a = *out = calloc(1, sizeof *a);
    if (!a) return err_memory(e, "an api", sizeof *a);
    a->o = *o;
    a->created = (int64_t)time(NULL);
    if (getrandom(&a->seed, sizeof a->seed, 0) != sizeof a->seed) a->seed = (uint64_t)a->created;
    if (read_tokens(a, e) && read_generation(a, e) && read_patch_rule(a, e) &&
        load(&a->tokenizer_config, o->dir, "tokenizer_config.json", e) &&
        (o->store_bytes == 0 || response_store_create(&a->store, o->store_bytes, o->store_seconds, e)) &&
        token_trie_create(&a->trie, a->n_vocab, token_bytes, (void *)o->tokenizer, a->stops, a->n_stops, e))
        return true;
    api_free(a);
    *out = NULL;
    return false;
}

void api_free(struct api *a)
{
    if (!a) return;
    token_trie_free(a->trie);
    response_store_free(a->store);
    json_decref(a->tokenizer_config);
    free(a->force_end.ids);
    free(a);
}

bool api_route_reads_body(enum api_route route)
{
    return route != API_MODELS && route != API_MODEL && route != API_TOKENIZER_INFO &&
           route != API_RESPONSE && route != API_RESPONSE_DELETE && route != API_RESPONSE_CANCEL &&
           route != API_SERVER_INFO;
}

bool api_route_begin(struct exchange *x, const char *argument)
{
    switch (x->route) {
    case API_CHAT_COMPLETIONS: return api_chat_begin(x);
    case API_COMPLETIONS: return api_completions_begin(x);
    case API_RESPONSES: return api_responses_begin(x);
    case API_RESPONSE: return api_response(x, argument ? argument : "");
    case API_RESPONSE_DELETE: return api_response_delete(x, argument ? argument : "");
    case API_RESPONSE_CANCEL: return api_response_cancel(x, argument ? argument : "");
    case API_MESSAGES: return api_messages_begin(x);
    case API_COUNT_TOKENS: return api_count_tokens(x);
    case API_TOKENIZE: return api_tokenize(x);
    case API_DETOKENIZE: return api_detokenize(x);
    case API_TOKENIZER_INFO: return api_tokenizer_info(x);
    case API_CHAT_RENDER:
    case API_COMPLETIONS_RENDER: return api_render(x);
    case API_SERVER_INFO: return api_server_info(x);
    case API_MODELS: return api_models(x, NULL);
    case API_MODEL: return api_models(x, argument ? argument : "");
    default: return fault_status(&x->fault, 404, NULL, "there is no such route");
    }
}
