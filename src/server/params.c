#include "server/params.h"
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    STOPS_MAX = 64,
    STOP_BYTES_MAX = 4096,
    BAD_WORDS_MAX = 1024,
    SALT_BYTES_MAX = 1024,
    N_DEFAULT_MAX = 16,
    COMPLETION_TOKENS = 16,
    REPEATS_SIZE_MAX = 1024
};

/* Fields that ask for what is not done here, in any route. */
static bool refuse(const struct fields *in)
{
    static const char *const refused[][2] = {
        { "use_beam_search", "tokens are sampled one after the other" },
        { "prompt_embeds", "prompts are text or token ids" },
        { "kv_transfer_params", "caches stay in this server" },
        { "vllm_xargs", "there are no extensions to pass arguments to" },
        { "chat_template", "the template is the server's; start it with --chat-template" },
        { "functions", "use tools" },
        { "function_call", "use tool_choice" },
        { "audio", "the model has no audio" },
        { "suffix", "the model continues a text, it does not fill gaps" },
        { "mm_processor_kwargs", "pictures are prepared as the checkpoint says" },
        { "length_penalty", "it belongs to beam search" },
    };
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++)
        if (strcmp(refused[i][0], "length_penalty") != 0 ||
            json_number_value(fields_get(in, refused[i][0])) != 1)
            if (!fields_refuse(in, refused[i][0], refused[i][1])) return false;
    return true;
}

static bool read_sampling(struct params *p, const struct api *a, const struct fields *in)
{
    const struct api_defaults *d = &a->defaults;
    struct sampling *s = &p->sampling;
    int64_t top_k = d->top_k, seed = 0;
    *s = (struct sampling){ .temperature = d->temperature, .top_p = d->top_p, .min_p = d->min_p };
    p->repetition_penalty = d->repetition_penalty;
    if (!fields_float(in, "temperature", 0, 100, &s->temperature) ||
        !fields_float(in, "top_p", 0, 1, &s->top_p) || !fields_float(in, "min_p", 0, 1, &s->min_p) ||
        !fields_int(in, "top_k", -1, INT_MAX, &top_k) ||
        !fields_float(in, "presence_penalty", -2, 2, &p->presence_penalty) ||
        !fields_float(in, "frequency_penalty", -2, 2, &p->frequency_penalty) ||
        !fields_float(in, "repetition_penalty", 1e-3, 1e3, &p->repetition_penalty) ||
        !fields_int(in, "seed", INT64_MIN, INT64_MAX, &seed))
        return false;
    s->top_k = top_k > 0 ? (int)top_k : 0;
    /* 0 means off to the sampler; to OpenAI's clients, the most likely token only. */
    if (fields_get(in, "top_p") && s->top_p == 0) s->top_k = 1;
    s->seed = (uint64_t)seed;
    if (!fields_get(in, "seed")) {
        uint64_t count = atomic_fetch_add(&((struct api *)a)->n_requests, 1);
        s->seed = (uint64_t)(sample_uniform(a->seed, count) * 0x1p53);
    }
    return true;
}

static bool read_lengths(struct params *p, const struct api *a, const struct fields *in, bool is_chat)
{
    p->max_tokens = a->defaults.max_tokens >= 0 ? a->defaults.max_tokens : is_chat ? -1 : COMPLETION_TOKENS;
    if (!fields_int(in, "max_tokens", is_chat ? 1 : 0, INT32_MAX, &p->max_tokens) ||
        !fields_int(in, "max_completion_tokens", 1, INT32_MAX, &p->max_tokens) ||
        !fields_int(in, "min_tokens", 0, INT32_MAX, &p->min_tokens))
        return false;
    if (p->max_tokens >= 0 && p->min_tokens > p->max_tokens)
        return fault_set(in->fault, "min_tokens",
                         "min_tokens: expected 0 to max_tokens (%" PRId64 "), found %" PRId64, p->max_tokens,
                         p->min_tokens);
    return true;
}

static bool read_counts(struct params *p, const struct api *a, const struct fields *in)
{
    int64_t n = 1, best_of = 0, max = a->o.max_n ? a->o.max_n : N_DEFAULT_MAX;
    if (!fields_int(in, "n", 1, max, &n) || !fields_int(in, "best_of", 0, INT_MAX, &best_of)) return false;
    if (best_of > n)
        return fault_set(in->fault, "best_of",
                         "best_of is not supported: ask for n answers and choose among them");
    p->n = (int)n;
    return true;
}

static bool add_stop(struct params *p, const json_t *v, const char *param, struct fault *f)
{
    if (!json_is_string(v)) return fields_wrong(f, param, "a string", v);
    size_t bytes = json_string_length(v);
    if (bytes == 0 || bytes > STOP_BYTES_MAX)
        return fault_set(f, param, "%s: expected 1 to %d bytes, found %zu", param, STOP_BYTES_MAX, bytes);
    p->stops[p->n_stops++] = (struct stop_string){ json_string_value(v), bytes };
    return true;
}

static bool read_stops(struct params *p, const struct fields *in)
{
    const json_t *stop = fields_get(in, "stop");
    if (json_is_string(stop) && json_string_length(stop) == 0) return true; /* as vLLM */
    size_t n = json_is_string(stop) ? 1 : json_array_size(stop);
    if (stop && !json_is_string(stop) && !json_is_array(stop))
        return fields_wrong(in->fault, "stop", "a string or an array of strings", stop);
    if (n > STOPS_MAX)
        return fault_set(in->fault, "stop", "stop: expected at most %d strings, found %zu", STOPS_MAX, n);
    p->stops = calloc(n + 1, sizeof *p->stops);
    if (!p->stops) return fault_memory(in->fault);
    if (json_is_string(stop)) return add_stop(p, stop, "stop", in->fault);
    for (size_t i = 0; i < n; i++) {
        char param[32];
        snprintf(param, sizeof param, "stop[%zu]", i);
        if (!add_stop(p, json_array_get(stop, i), param, in->fault)) return false;
    }
    return true;
}

static bool read_stop_tokens(struct params *p, const struct api *a, const struct fields *in)
{
    int32_t *asked = NULL;
    int n = 0;
    bool ignore_eos = false;
    bool ok = fields_bool(in, "include_stop_str_in_output", &p->include_stop) &&
              fields_bool(in, "ignore_eos", &ignore_eos) &&
              fields_ids(in, "stop_token_ids", a->n_vocab, &asked, &n);
    int own = ignore_eos ? 0 : a->n_stops;
    if (ok) p->stop_tokens = calloc((size_t)(n + own) + 1, sizeof *p->stop_tokens);
    if (ok && !p->stop_tokens) ok = fault_memory(in->fault);
    for (int i = 0; ok && i < n + own; i++) p->stop_tokens[i] = i < own ? a->stops[i] : asked[i - own];
    if (ok) p->n_stop_tokens = n + own;
    free(asked);
    return ok;
}

static bool read_id(const char *text, int64_t n_vocab, int64_t *id)
{
    char *end;
    if (*text < '0' || *text > '9') return false;
    *id = strtoll(text, &end, 10);
    return *end == 0 && *id < n_vocab;
}

static bool read_bias(struct params *p, const struct api *a, const struct fields *in)
{
    const json_t *map = NULL, *value;
    const char *key;
    if (!fields_object(in, "logit_bias", &map) || !map) return !in->fault->status;
    if (json_object_size(map) > (size_t)a->n_vocab)
        return fault_set(in->fault, "logit_bias", "logit_bias: more entries than tokens");
    p->bias = calloc(json_object_size(map) + 1, sizeof *p->bias);
    if (!p->bias) return fault_memory(in->fault);
    json_object_foreach((json_t *)map, key, value)
    {
        int64_t id;
        float bias = 0;
        const struct fields entry = { map, "logit_bias.", in->fault };
        if (!read_id(key, a->n_vocab, &id))
            return fault_set(in->fault, "logit_bias",
                             "logit_bias: expected token ids below %" PRId64 " as keys, found \"%.40s\"",
                             a->n_vocab, key);
        if (!fields_float(&entry, key, -100, 100, &bias)) return false;
        p->bias[p->n_bias++] = (struct logit_bias){ (int32_t)id, bias };
    }
    return true;
}

static bool read_allowed(struct params *p, const struct api *a, const struct fields *in)
{
    if (!fields_ids(in, "allowed_token_ids", a->n_vocab, &p->allowed, &p->n_allowed)) return false;
    return p->n_allowed > 0 || !p->allowed ||
           fault_set(in->fault, "allowed_token_ids", "allowed_token_ids: no token would be allowed");
}

static bool add_bad_word(struct params *p, const struct api *a, const char *text, size_t n, struct fault *f)
{
    struct token_list list = { 0 };
    struct err e = { 0 };
    if (!tokenizer_encode(a->o.tokenizer, &list, text, n, 0, &e)) {
        free(list.ids);
        return fault_from_err(f, "bad_words", &e);
    }
    if (list.n == 0 || list.n > INT_MAX) {
        free(list.ids);
        return true;
    }
    p->bad_words[p->n_bad_words++] = (struct token_run){ list.ids, (int)list.n };
    return true;
}

/* A word at the beginning of a text and inside of one: with a space before it, where that is another token.
 * Source: vLLM, SamplingParams.update_from_tokenizer. */
static bool add_bad_words(struct params *p, const struct api *a, const json_t *word, struct fault *f)
{
    const char *text = json_string_value(word);
    size_t n = json_string_length(word), blanks = 0;
    while (blanks < n && strchr(" \t\r\n", text[blanks]) && text[blanks]) blanks++;
    char *spaced = malloc(n - blanks + 2);
    if (!spaced) return fault_memory(f);
    spaced[0] = ' ';
    memcpy(spaced + 1, text + blanks, n - blanks);
    bool ok = add_bad_word(p, a, spaced + 1, n - blanks, f);
    const struct token_run *plain = p->n_bad_words ? &p->bad_words[p->n_bad_words - 1] : NULL;
    if (ok && plain && add_bad_word(p, a, spaced, n - blanks + 1, f)) {
        struct token_run *last = &p->bad_words[p->n_bad_words - 1];
        if (last != plain && (last->n != plain->n || last->ids[0] == plain->ids[0])) {
            free((void *)last->ids);
            p->n_bad_words--;
        }
    }
    free(spaced);
    return ok && !f->status;
}

static bool read_bad_words(struct params *p, const struct api *a, const struct fields *in)
{
    const json_t *list = NULL;
    if (!fields_array(in, "bad_words", &list) || !list) return !in->fault->status;
    size_t n = json_array_size(list);
    if (n > BAD_WORDS_MAX)
        return fault_set(in->fault, "bad_words", "bad_words: expected at most %d words, found %zu",
                         BAD_WORDS_MAX, n);
    p->bad_words = calloc(2 * n + 1, sizeof *p->bad_words);
    if (!p->bad_words) return fault_memory(in->fault);
    for (size_t i = 0; i < n; i++) {
        char param[32];
        const json_t *word = json_array_get(list, i);
        snprintf(param, sizeof param, "bad_words[%zu]", i);
        if (!json_is_string(word)) return fields_wrong(in->fault, param, "a string", word);
        if (json_string_length(word) > STOP_BYTES_MAX)
            return fault_set(in->fault, param, "%s: expected at most %d bytes", param, STOP_BYTES_MAX);
        if (!add_bad_words(p, a, word, in->fault)) return false;
    }
    return true;
}

static bool read_count_of_best(const struct fields *in, const char *key, int *out)
{
    int64_t n = -1;
    if (!fields_int(in, key, 0, TOP_LOGPROBS_MAX, &n)) return false;
    if (n >= 0) *out = (int)n;
    return true;
}

static bool read_chat_logprobs(struct params *p, const struct fields *in)
{
    bool wanted = false;
    int best = 0;
    if (!fields_bool(in, "logprobs", &wanted) || !read_count_of_best(in, "top_logprobs", &best)) return false;
    if (best > 0 && !wanted)
        return fault_set(in->fault, "top_logprobs", "top_logprobs needs \"logprobs\": true");
    if (wanted) p->logprobs = best;
    return true;
}

static bool read_score_ids(struct params *p, const struct api *a, const struct fields *in)
{
    if (!fields_ids(in, "logprob_token_ids", a->n_vocab, &p->score_ids, &p->n_score_ids)) return false;
    if (p->n_score_ids == 0) return true;
    if (p->n_score_ids > TOP_LOGPROBS_MAX)
        return fault_set(in->fault, "logprob_token_ids",
                         "logprob_token_ids: expected at most %d ids, found %d", TOP_LOGPROBS_MAX,
                         p->n_score_ids);
    if (p->echo)
        return fault_set(in->fault, "logprob_token_ids",
                         "logprob_token_ids: not with echo; prompts are scored by prompt_logprobs");
    p->logprobs = p->n_score_ids;
    return true;
}

static bool read_repeats(struct params *p, const struct fields *in)
{
    const json_t *object = NULL;
    int64_t most = 0, least = 0, count = 0;
    if (!fields_object(in, "repetition_detection", &object) || !object) return !in->fault->status;
    const struct fields inside = { object, "repetition_detection.", in->fault };
    if (!fields_int(&inside, "max_pattern_size", 0, REPEATS_SIZE_MAX, &most) ||
        !fields_int(&inside, "min_pattern_size", 0, most, &least) ||
        !fields_int(&inside, "min_count", most ? 2 : 0, INT32_MAX, &count))
        return false;
    if (most && !fields_get(&inside, "min_count"))
        return fields_wrong(in->fault, "repetition_detection.min_count", "an integer of 2 or more", NULL);
    p->repeats = (struct repeats_rule){ least ? (int)least : 1, (int)most, count };
    return true;
}

static bool read_logprobs(struct params *p, const struct api *a, const struct fields *in, bool is_chat)
{
    p->logprobs = p->prompt_logprobs = -1;
    bool ok = is_chat ? read_chat_logprobs(p, in)
                      : read_count_of_best(in, "logprobs", &p->logprobs) && fields_bool(in, "echo", &p->echo);
    if (!ok || !read_score_ids(p, a, in) || !read_count_of_best(in, "prompt_logprobs", &p->prompt_logprobs))
        return false;
    if (p->prompt_logprobs >= 0 && p->stream)
        return fault_set(in->fault, "prompt_logprobs", "prompt_logprobs comes only without \"stream\": true");
    return fields_bool(in, "return_token_ids", &p->return_token_ids) &&
           fields_bool(in, "return_tokens_as_token_ids", &p->tokens_as_ids);
}

static bool read_stream(struct params *p, const struct api *a, const struct fields *in)
{
    const json_t *options = NULL;
    p->stream_interval = a->o.stream_interval;
    if (!fields_bool(in, "stream", &p->stream) || !fields_object(in, "stream_options", &options) ||
        !fields_int(in, "stream_interval", 1, INT32_MAX, &p->stream_interval))
        return false;
    if (!options) return true;
    if (!p->stream) return fault_set(in->fault, "stream_options", "stream_options needs \"stream\": true");
    const struct fields inside = { options, "stream_options.", in->fault };
    return fields_bool(&inside, "include_usage", &p->include_usage) &&
           fields_bool(&inside, "continuous_usage_stats", &p->continuous_usage);
}

static bool read_prompt_handling(struct params *p, const struct api *a, const struct fields *in)
{
    const char *side = "left";
    bool skip = true;
    p->truncate = -1;
    if (!fields_bool(in, "skip_special_tokens", &skip) ||
        !fields_int(in, "truncate_prompt_tokens", -1, INT32_MAX, &p->truncate) ||
        !fields_text(in, "truncation_side", &side) || !fields_text(in, "cache_salt", &p->cache_salt) ||
        !fields_int(in, "priority", INT32_MIN, INT32_MAX, &p->priority))
        return false;
    p->keep_special = !skip;
    if (p->truncate < 0 && fields_get(in, "truncate_prompt_tokens")) p->truncate = a->o.max_model_len;
    p->truncate_right = strcmp(side, "right") == 0;
    if (!p->truncate_right && strcmp(side, "left") != 0)
        return fault_set(in->fault, "truncation_side", "truncation_side: expected \"left\" or \"right\"");
    if (p->cache_salt && (!*p->cache_salt || strlen(p->cache_salt) > SALT_BYTES_MAX))
        return fault_set(in->fault, "cache_salt", "cache_salt: expected 1 to %d bytes, found %zu",
                         SALT_BYTES_MAX, strlen(p->cache_salt));
    return true;
}

static bool read_kwargs(struct params *p, const json_t *kwargs, struct fault *f)
{
    static const char where[] = "chat_template_kwargs.";
    const struct fields in = { kwargs, where, f };
    const char *key;
    const json_t *value;
    bool thinking = false;
    json_object_foreach(
        (json_t *)kwargs, key,
        value) if (strcmp(key, "enable_thinking") && strcmp(key, "preserve_thinking") &&
                   strcmp(key, "add_vision_id")) return fault_set(f, "chat_template_kwargs",
                                                                  "chat_template_kwargs.%.60s: expected "
                                                                  "enable_thinking, preserve_thinking or "
                                                                  "add_vision_id",
                                                                  key);
    if (!fields_bool(&in, "enable_thinking", &thinking) ||
        !fields_bool(&in, "preserve_thinking", &p->preserve_thinking) ||
        !fields_bool(&in, "add_vision_id", &p->add_vision_id))
        return false;
    if (fields_get(&in, "enable_thinking")) p->thinking = thinking ? CHAT_THINKING_ON : CHAT_THINKING_OFF;
    return true;
}

/* Efforts are budgets of thinking tokens; docs/api.md has the table. */
static bool read_effort(struct params *p, const struct fields *in)
{
    static const struct {
        const char *name;
        int64_t budget;
    } efforts[] = { { "none", 0 },  { "minimal", 512 }, { "low", 2048 }, { "medium", 8192 },
                    { "high", -1 }, { "xhigh", -1 },    { "max", -1 } };
    const char *effort = NULL;
    if (!fields_text(in, "reasoning_effort", &effort) || !effort) return !in->fault->status;
    for (size_t i = 0; i < sizeof efforts / sizeof *efforts; i++) {
        if (strcmp(effort, efforts[i].name) != 0) continue;
        p->thinking = i == 0 ? CHAT_THINKING_OFF : CHAT_THINKING_ON;
        p->thinking_budget = efforts[i].budget;
        return true;
    }
    return fault_set(
        in->fault, "reasoning_effort",
        "reasoning_effort: expected none, minimal, low, medium, high, xhigh or max, found \"%.40s\"", effort);
}

/* What a template for retrieval shows: texts under their names. */
static bool read_documents(struct params *p, const struct api *a, const struct fields *in)
{
    if (!chat_template_takes_documents(a->o.chat_template))
        return fields_refuse(in, "documents", "the model's template takes none; put them into a message");
    if (!fields_array(in, "documents", &p->documents)) return false;
    for (size_t i = 0; i < json_array_size(p->documents); i++) {
        const json_t *d = json_array_get(p->documents, i);
        struct param at;
        param_set(&at, "documents[%zu]", i);
        if (!json_is_object(d)) return fields_wrong(in->fault, at.text, "an object of texts", d);
    }
    return true;
}

bool params_read_template(struct params *p, const struct api *a, const json_t *body, struct fault *f)
{
    const struct fields in = { body, "", f };
    const json_t *kwargs = NULL;
    bool reasoning = true, parallel = true;
    p->thinking_budget = -1;
    p->add_generation_prompt = true;
    if (a->o.chat_kwargs && !read_kwargs(p, a->o.chat_kwargs, f)) return false;
    if (!read_effort(p, &in) || !fields_object(&in, "chat_template_kwargs", &kwargs) ||
        (kwargs && !read_kwargs(p, kwargs, f)) ||
        !fields_int(&in, "thinking_token_budget", 0, INT32_MAX, &p->thinking_budget) ||
        !fields_bool(&in, "include_reasoning", &reasoning) ||
        !fields_bool(&in, "parallel_tool_calls", &parallel) ||
        !fields_bool(&in, "continue_final_message", &p->continue_final_message))
        return false;
    p->no_reasoning = !reasoning;
    p->one_call = !parallel;
    p->add_generation_prompt = !p->continue_final_message;
    if (!fields_bool(&in, "add_generation_prompt", &p->add_generation_prompt)) return false;
    if (p->add_generation_prompt && p->continue_final_message)
        return fault_set(f, "continue_final_message",
                         "continue_final_message goes with \"add_generation_prompt\": false only");
    return fields_refuse(&in, "chat_template",
                         "the template is the server's; start it with --chat-template") &&
           read_documents(p, a, &in);
}

bool params_read(struct params *p, const struct api *a, const json_t *body, bool is_chat, struct fault *f)
{
    const struct fields in = { body, "", f };
    *p = (struct params){ 0 };
    if (!is_chat && !fields_refuse(&in, "media_io_kwargs", "prompts of this route have no videos"))
        return false;
    return refuse(&in) && read_sampling(p, a, &in) && read_lengths(p, a, &in, is_chat) &&
           read_counts(p, a, &in) && read_stops(p, &in) && read_stop_tokens(p, a, &in) &&
           read_bias(p, a, &in) && read_allowed(p, a, &in) && read_bad_words(p, a, &in) &&
           read_stream(p, a, &in) && read_logprobs(p, a, &in, is_chat) && read_repeats(p, &in) &&
           read_prompt_handling(p, a, &in) && (!is_chat || params_read_template(p, a, body, f));
}

void params_deinit(struct params *p)
{
    for (int i = 0; i < p->n_bad_words; i++) free((void *)p->bad_words[i].ids);
    free(p->bad_words);
    free(p->stops);
    free(p->stop_tokens);
    free(p->bias);
    free(p->allowed);
    free(p->score_ids);
}
