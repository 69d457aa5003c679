/* Texts and conversations to tokens and back, without any being generated: tokenize, detokenize,
 * tokenizer_info, render. Source: vLLM's routes of these names. */
#include "server/api_routes.h"
#include "server/score_out.h"
#include <stdlib.h>
#include <string.h>

static bool one_prompt(struct exchange *x)
{
    x->prompts = calloc(1, sizeof *x->prompts);
    x->n_prompts = x->prompts ? 1 : 0;
    return x->prompts || fault_memory(&x->fault);
}

static bool read_prompt(struct exchange *x)
{
    const json_t *text = json_object_get(x->body, "prompt");
    if (!one_prompt(x)) return false;
    if (json_object_get(x->body, "messages"))
        return params_read_template(&x->params, x->api, x->body, &x->fault) &&
               conversation_prompt(x->prompts, x->api, x->body, &x->params, &x->fault);
    if (!json_is_string(text))
        return fields_wrong(&x->fault, "prompt", "a string, or messages instead", text);
    return prompt_from_text(x->prompts, x->api, json_string_value(text), json_string_length(text), "prompt",
                            &x->fault);
}

/* Names of tokens as the vocabulary has them would be in byte characters; these are the texts. */
static void write_strings(struct exchange *x)
{
    json_out_key_open(&x->out, "token_strs", '[');
    for (int64_t i = 0; i < x->prompts->n; i++) score_out_token(&x->out, x->api, x->prompts->ids[i], false);
    json_out_close(&x->out, ']');
}

bool api_tokenize(struct exchange *x)
{
    const struct fields in = { x->body, "", &x->fault };
    bool with_strings = false;
    if (!fields_bool(&in, "return_token_strs", &with_strings) || !read_prompt(x)) return false;
    json_out_open(&x->out, '{');
    json_out_key_int(&x->out, "count", x->prompts->n);
    json_out_key_int(&x->out, "max_model_len", x->api->o.max_model_len);
    json_out_key_ids(&x->out, "tokens", x->prompts->ids, 0, (size_t)x->prompts->n);
    if (with_strings)
        write_strings(x);
    else
        json_out_key_null(&x->out, "token_strs");
    json_out_close(&x->out, '}');
    return exchange_answered(x);
}

bool api_detokenize(struct exchange *x)
{
    const struct fields in = { x->body, "", &x->fault };
    struct err e = { 0 };
    char *text;
    size_t bytes;
    int n = 0;
    if (!one_prompt(x) || !fields_ids(&in, "tokens", x->api->n_vocab, &x->prompts->ids, &n)) return false;
    if (!x->prompts->ids) return fields_wrong(&x->fault, "tokens", "an array of token ids", NULL);
    if (!tokenizer_decode(x->api->o.tokenizer, x->prompts->ids, (size_t)n, false, &text, &bytes, &e))
        return fault_from_err(&x->fault, "tokens", &e);
    json_out_open(&x->out, '{');
    json_out_key_string(&x->out, "prompt", text, bytes);
    json_out_close(&x->out, '}');
    free(text);
    return exchange_answered(x);
}

/* Special tokens are texts here, whatever the file has. */
bool api_tokenizer_info(struct exchange *x)
{
    const struct api *a = x->api;
    const char *key;
    const json_t *value;
    size_t bytes;
    const char *template = chat_template_text(a->o.chat_template, &bytes);
    json_out_open(&x->out, '{');
    json_object_foreach(a->tokenizer_config, key, value)
    {
        const json_t *content = json_object_get(value, "content");
        size_t n = strlen(key);
        if (strcmp(key, "chat_template") == 0) continue;
        bool is_token = n > 6 && strcmp(key + n - 6, "_token") == 0 && json_is_string(content);
        json_out_string(&x->out, key, n);
        json_out_raw(&x->out, ":", 1);
        x->out.needs_comma = false;
        json_out_value(&x->out, is_token ? content : value);
    }
    json_out_key_string(&x->out, "chat_template", template, bytes);
    json_out_key_int(&x->out, "max_model_len", a->o.max_model_len);
    json_out_close(&x->out, '}');
    return exchange_answered(x);
}

static void write_rendered(struct exchange *x, const struct prompt_text *p)
{
    json_out_open(&x->out, '{');
    if (p->text) json_out_key_string(&x->out, "prompt", p->text, p->bytes);
    json_out_key_ids(&x->out, "token_ids", p->ids, 0, (size_t)p->n);
    json_out_key_int(&x->out, "count", p->n);
    json_out_key_int(&x->out, "images", p->n_pictures - p->n_videos);
    json_out_key_int(&x->out, "videos", p->n_videos);
    json_out_key_int(&x->out, "max_model_len", x->api->o.max_model_len);
    json_out_close(&x->out, '}');
}

bool api_render(struct exchange *x)
{
    bool is_chat = x->route == API_CHAT_RENDER;
    if (is_chat ? !(one_prompt(x) && params_read(&x->params, x->api, x->body, true, &x->fault) &&
                    conversation_prompt(x->prompts, x->api, x->body, &x->params, &x->fault))
                : !api_completions_prompts(x))
        return false;
    x->params.stream = false;
    if (!is_chat) json_out_open(&x->out, '[');
    for (int i = 0; i < x->n_prompts; i++) write_rendered(x, &x->prompts[i]);
    if (!is_chat) json_out_close(&x->out, ']');
    return exchange_answered(x);
}
