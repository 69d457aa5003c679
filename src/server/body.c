#include "server/body.h"
#include "base/doc.h"
#include <string.h>

/* A number costs 40 bytes of memory and may be written with two, an empty array 136, an empty object 232
 * (jansson 2.14, glibc). Weighed so, no body becomes more than some 60 MB; four prompts of 262,144 token ids
 * pass. */
size_t body_values(const char *text, size_t n)
{
    size_t count = 0;
    bool in_string = false;
    for (size_t i = 0; i < n; i++) {
        char c = text[i];
        if (c == '\\' && in_string)
            i++;
        else if (c == '"')
            in_string = !in_string;
        else if (!in_string)
            count += c == ',' ? 1 : c == '[' ? 2 : c == '{' ? 4 : 0;
    }
    return count;
}

static const char *const common_names[] = { "model",
                                            "stream",
                                            "temperature",
                                            "top_p",
                                            "metadata",
                                            "service_tier",
                                            "store",
                                            "user",
                                            "safety_identifier",
                                            "prompt_cache_key",
                                            "request_id",
                                            "session_id",
                                            NULL };
static const char *const sampling_names[] = { "top_k",
                                              "min_p",
                                              "presence_penalty",
                                              "frequency_penalty",
                                              "repetition_penalty",
                                              "seed",
                                              "n",
                                              "best_of",
                                              "max_tokens",
                                              "max_completion_tokens",
                                              "min_tokens",
                                              "stop",
                                              "stop_token_ids",
                                              "include_stop_str_in_output",
                                              "ignore_eos",
                                              "logit_bias",
                                              "allowed_token_ids",
                                              "bad_words",
                                              "logprobs",
                                              "top_logprobs",
                                              "prompt_logprobs",
                                              "logprob_token_ids",
                                              "repetition_detection",
                                              "return_token_ids",
                                              "return_tokens_as_token_ids",
                                              "stream_options",
                                              "stream_interval",
                                              "skip_special_tokens",
                                              "spaces_between_special_tokens",
                                              "truncate_prompt_tokens",
                                              "truncation_side",
                                              "cache_salt",
                                              "priority",
                                              "add_special_tokens",
                                              "response_format",
                                              "structured_outputs",
                                              "guided_json",
                                              "guided_regex",
                                              "guided_choice",
                                              "guided_grammar",
                                              NULL };
static const char *const chat_names[] = { "messages",
                                          "tools",
                                          "tool_choice",
                                          "parallel_tool_calls",
                                          "reasoning_effort",
                                          "thinking_token_budget",
                                          "include_reasoning",
                                          "chat_template_kwargs",
                                          "documents",
                                          "media_io_kwargs",
                                          "add_generation_prompt",
                                          "continue_final_message",
                                          "prompt_cache_retention",
                                          "verbosity",
                                          "modalities",
                                          NULL };
static const char *const completion_names[] = { "prompt", "echo", NULL };
static const char *const responses_names[] = { "input",
                                               "instructions",
                                               "tools",
                                               "tool_choice",
                                               "parallel_tool_calls",
                                               "max_output_tokens",
                                               "reasoning",
                                               "text",
                                               "include",
                                               "truncation",
                                               "top_logprobs",
                                               "background",
                                               "previous_response_id",
                                               "conversation",
                                               "prompt",
                                               "max_tool_calls",
                                               "stream_options",
                                               "prompt_cache_retention",
                                               "top_k",
                                               "min_p",
                                               "seed",
                                               "cache_salt",
                                               "priority",
                                               NULL };
static const char *const messages_names[] = {
    "messages", "system",        "max_tokens", "stop_sequences",     "top_k",       "tools", "tool_choice",
    "thinking", "output_config", "container",  "context_management", "mcp_servers", "betas", NULL
};
static const char *const token_names[] = { "prompt",
                                           "messages",
                                           "tokens",
                                           "tools",
                                           "tool_choice",
                                           "add_special_tokens",
                                           "return_token_strs",
                                           "add_generation_prompt",
                                           "continue_final_message",
                                           "chat_template_kwargs",
                                           "documents",
                                           "media_io_kwargs",
                                           "system",
                                           "thinking",
                                           NULL };

static bool is_named(const char *const *names, const char *key)
{
    while (*names && strcmp(*names, key) != 0) names++;
    return *names;
}

static bool is_known(enum api_route route, const char *key)
{
    if (is_named(common_names, key)) return true;
    switch (route) {
    case API_CHAT_COMPLETIONS:
    case API_CHAT_RENDER: return is_named(sampling_names, key) || is_named(chat_names, key);
    case API_COMPLETIONS:
    case API_COMPLETIONS_RENDER: return is_named(sampling_names, key) || is_named(completion_names, key);
    case API_RESPONSES: return is_named(responses_names, key);
    case API_MESSAGES:
    case API_COUNT_TOKENS: return is_named(messages_names, key);
    default: return is_named(token_names, key);
    }
}

static bool check_names(const json_t *body, enum api_route route, struct fault *f)
{
    const char *key;
    const json_t *value;
    json_object_foreach((json_t *)body, key, value) if (!is_known(route, key)) return fault_set(
        f, key, "%.60s: no such field; this server was started with --strict-params", key);
    return true;
}

static bool check_model(const struct api *a, const json_t *body, struct fault *f)
{
    const json_t *model = json_object_get(body, "model");
    if (!model || json_is_null(model)) return true;
    if (!json_is_string(model)) return fault_set(f, "model", "model: expected a string");
    if (api_serves(a, json_string_value(model))) return true;
    fault_status(f, 404, "model_not_found", "the model '%.200s' does not exist; served is '%s'",
                 json_string_value(model), a->o.served_names[0]);
    param_set(&f->param, "model");
    return false;
}

bool body_parse(json_t **out, enum api_route route, const struct api *a, const char *body, size_t bytes,
                struct fault *f)
{
    struct err e = { 0 };
    if (bytes == 0) return fault_set(f, NULL, "the body is empty: expected a JSON object");
    if (body_values(body, bytes) > BODY_VALUES_MAX)
        return fault_status(f, 413, NULL, "the body has more than %d values", BODY_VALUES_MAX);
    if (!doc_parse(out, body, bytes, &e)) return fault_set(f, NULL, "the body is not JSON: %s", e.text);
    if (!json_is_object(*out)) return fault_set(f, NULL, "the body is not a JSON object");
    return check_model(a, *out, f) && (!a->o.strict_params || check_names(*out, route, f));
}
