/* quench generate MODEL -p TEXT */
#include "cli/commands.h"
#include "cli/common.h"
#include "cli/plan.h"
#include "base/file.h"
#include "engine/generate.h"
#include "engine/prompt.h"
#include "tokenizer/chat.h"
#include "tokenizer/utf8.h"
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct command command = {
    "generate",
    "MODEL -p TEXT",
    "Continues a prompt. The prompt is raw text: control tokens such as <|im_start|> in it are recognised.\n"
    "With --image the text is a question about images instead: both are put into the model's chat format, "
    "the\n"
    "images first, for an answer without thinking.\n"
    "Without --temperature the most likely token is taken each time.",
    1,
};

struct settings {
    struct common common;
    const char *model, *prompt, *prompt_file;
    int64_t max_tokens, seed, top_k;
    double temperature, top_p, min_p;
    struct text_list stops, images;
    int drafts;
    bool ignore_eos, keep_special;
};

struct collected {
    bool print;
    char *text;
    size_t n;
    FILE *stream;
};

static void take_text(void *ctx, const char *bytes, size_t n)
{
    struct collected *c = ctx;
    if (c->stream) {
        fwrite(bytes, 1, n, c->stream);
        return;
    }
    fwrite(bytes, 1, n, stdout);
    fflush(stdout);
}

static bool check(const struct settings *s, const struct sampling *sampling, struct err *e)
{
    if (!s->prompt == !s->prompt_file)
        return err_set(e, ERR_ARGUMENT, "one of -p TEXT and --prompt-file FILE is needed");
    if (s->max_tokens < 1 || s->max_tokens > 1 << 24)
        return err_set(e, ERR_ARGUMENT, "--max-tokens: expected 1 to 16777216, found %lld",
                       (long long)s->max_tokens);
    for (int i = 0; i < s->stops.n; i++) {
        const char *stop = s->stops.items[i];
        size_t valid = utf8_valid_prefix(stop, strlen(stop));
        if (!*stop) return err_set(e, ERR_ARGUMENT, "--stop: an empty string would stop at once");
        if (stop[valid]) return err_set(e, ERR_ARGUMENT, "--stop: not UTF-8 at byte %zu", valid);
    }
    if (s->top_k != (int)s->top_k)
        return err_set(e, ERR_ARGUMENT, "--top-k: expected 0 to 2147483647, found %lld", (long long)s->top_k);
    return sampling_check(sampling, e);
}

/* A user's turn, images before the text, and the opening of an answer. */
static bool encode_question(struct token_list *list, const struct opened *o, int n_images, const char *text,
                            size_t bytes, struct err *e)
{
    static const struct chat_options options = { .add_generation_prompt = true,
                                                 .thinking = CHAT_THINKING_OFF };
    json_t *string = json_stringn(text, bytes), *parts = json_array();
    char *rendered = NULL;
    size_t n = 0;
    if (!string) {
        json_decref(parts);
        return err_set(e, ERR_FORMAT, "not UTF-8");
    }
    for (int i = 0; i < n_images; i++) json_array_append_new(parts, json_pack("{s:s}", "type", "image"));
    json_array_append_new(parts, json_pack("{s:s, s:o}", "type", "text", "text", string));
    json_t *messages = json_pack("[{s:s, s:o}]", "role", "user", "content", parts);
    struct chat_template *template = NULL;
    bool ok = chat_template_load(&template, o->checkpoint.path, e) &&
              chat_render(&rendered, &n, template, messages, NULL, &options, e) &&
              tokenizer_encode(o->tokenizer, list, rendered, n, 0, e);
    json_decref(messages);
    chat_template_free(template);
    free(rendered);
    return ok;
}

static bool encode_prompt(struct token_list *list, const struct opened *o, const struct settings *s,
                          struct err *e)
{
    struct file_map map = { 0 };
    if (s->prompt_file && !file_map_open(&map, s->prompt_file, e)) return false;
    const char *text = s->prompt ? s->prompt : (const char *)map.data;
    size_t bytes = s->prompt ? strlen(s->prompt) : (size_t)map.bytes;
    bool ok = (s->images.n ? encode_question(list, o, s->images.n, text, bytes, e)
                           : tokenizer_encode(o->tokenizer, list, text, bytes, 0, e)) ||
              err_note(e, "%s", s->prompt ? "--prompt" : s->prompt_file);
    file_map_close(&map);
    if (!ok) return false;
    if (list->n == 0) return err_set(e, ERR_ARGUMENT, "the prompt is empty");
    for (size_t i = 0; i < list->n; i++)
        if (list->ids[i] >= o->checkpoint.config.vocab_size)
            return err_set(e, ERR_FORMAT, "the tokenizer gives token %d, the model has %lld", list->ids[i],
                           (long long)o->checkpoint.config.vocab_size);
    return true;
}

/* The prompt's tokens, with pictures where their places are. */
static bool lay_prompt(struct prompt *out, struct opened *o, const struct token_list *tokens,
                       struct picture *pictures, const struct settings *s, struct err *e)
{
    struct picture_reader *reader = NULL;
    bool ok = s->images.n == 0 || picture_reader_create(&reader, &o->model, e);
    for (int i = 0; ok && i < s->images.n; i++)
        ok = picture_read(reader, &pictures[i], s->images.items[i], NULL, e);
    picture_reader_free(reader);
    /* typed into a prompt without --image, the token stays an ordinary one */
    struct place_tokens places = { s->images.n ? o->checkpoint.config.image_token : -1, -1 };
    if (!ok || !prompt_create(out, tokens->ids, (int64_t)tokens->n, places, pictures, s->images.n, 0, e))
        return false;
    int64_t most = o->checkpoint.config.max_position_embeddings;
    return out->n < most ||
           err_set(e, ERR_LIMIT, "the prompt has %lld tokens, the model allows %lld with the answer",
                   (long long)out->n, (long long)most);
}

static const char *finish_name(enum finish f)
{
    return f == FINISH_STOP ? "stop" : "length";
}

static void add_drafts(json_t *o, const struct speculation *s)
{
    json_t *places = json_array();
    for (int i = 0; i < s->most && s->tried[i]; i++)
        json_array_append_new(places, json_real((double)s->right[i] / (double)s->tried[i]));
    json_object_update_new(o, json_pack("{s:I, s:I, s:f, s:o}", "drafted", (json_int_t)s->drafted, "accepted",
                                        (json_int_t)s->accepted, "mean_accepted_length",
                                        speculation_mean_length(s), "acceptance", places));
}

static void print_json(const struct settings *s, const struct generated *g, const struct speculation *drafts,
                       const char *text, size_t n, size_t n_prompt)
{
    json_t *ids = json_array();
    for (size_t i = 0; i < g->tokens.n; i++) json_array_append_new(ids, json_integer(g->tokens.ids[i]));
    json_t *o = json_pack("{s:o, s:o, s:o, s:s, s:I, s:f, s:f}", "model", common_json_path(s->model), "text",
                          json_stringn(text, n), "token_ids", ids, "finish_reason", finish_name(g->finish),
                          "prompt_tokens", (json_int_t)n_prompt, "prefill_seconds", g->prefill_seconds,
                          "decode_seconds", g->decode_seconds);
    if (drafts->most) add_drafts(o, drafts);
    json_dumpf(o, stdout, JSON_COMPACT);
    putchar('\n');
    json_decref(o);
}

static void print_drafts(const struct speculation *s)
{
    fprintf(stderr, "quench: %lld drafted, %lld accepted (", (long long)s->drafted, (long long)s->accepted);
    for (int i = 0; i < s->most && s->tried[i]; i++)
        fprintf(stderr, "%s%.0f %%", i ? ", " : "by place ", 100 * (double)s->right[i] / (double)s->tried[i]);
    fprintf(stderr, "); mean accepted length %.2f\n", speculation_mean_length(s));
}

static void print_speed(const struct generated *g, const struct speculation *s, size_t n_prompt)
{
    fprintf(stderr, "\nquench: %zu prompt tokens, %.0f tokens/s; %zu generated, %.1f tokens/s; finish: %s\n",
            n_prompt, (double)n_prompt / g->prefill_seconds, g->tokens.n,
            g->tokens.n ? (double)g->tokens.n / g->decode_seconds : 0, finish_name(g->finish));
    if (s->most) print_drafts(s);
}

static struct engine_options engine_for(const struct settings *s, const struct backend *b,
                                        const struct config *c, int64_t n_prompt)
{
    int64_t most = c->max_position_embeddings - n_prompt;
    return (struct engine_options){ .context = n_prompt + (s->max_tokens < most ? s->max_tokens : most),
                                    .kv = common_kv_dtype(&s->common, b),
                                    .drafts = s->drafts };
}

/* Pictures, whose rows are not known yet, count for little beside weights. */
static bool fits(const struct settings *s, const struct opened *o, const struct backend *b,
                 const struct token_list *tokens, struct err *e)
{
    struct engine_options eo = engine_for(s, b, &o->checkpoint.config, (int64_t)tokens->n);
    return plan_device(&o->checkpoint, b, &eo, NULL, s->common.quiet, e);
}

static bool answer(const struct settings *s, struct opened *o, const struct prompt *prompt,
                   const struct sampling *sampling, const struct report *report, struct err *e)
{
    int32_t eos[16];
    int n_eos = 0;
    if (!s->ignore_eos && !checkpoint_eos_tokens(&o->checkpoint, eos, 16, &n_eos, e)) return false;
    const struct config *c = &o->checkpoint.config;
    int32_t pictures[] = { (int32_t)c->image_token, (int32_t)c->video_token };
    int64_t most = c->max_position_embeddings, n = prompt->n;
    int64_t max_tokens = s->max_tokens < most - n ? s->max_tokens : most - n;
    struct collected text = { 0 };
    struct speculation speculation;
    speculation_init(&speculation, s->drafts);
    struct generation g = { .sampling = *sampling,
                            .max_tokens = max_tokens,
                            .stops = s->stops.items,
                            .n_stops = s->stops.n,
                            .stop_tokens = eos,
                            .n_stop_tokens = n_eos,
                            .never = pictures,
                            .n_never = 2,
                            .keep_special = s->keep_special,
                            .ctx = &text,
                            .text = take_text,
                            .speculation = &speculation,
                            .report = report };
    struct engine_options eo = engine_for(s, o->model.backend, c, n);
    struct engine *engine;
    struct generated out = { 0 };
    if (!engine_create(&engine, &o->model, &eo, e)) return false;
    if (s->common.json) text.stream = open_memstream(&text.text, &text.n);
    bool ok = (!s->common.json || text.stream || err_errno(e, "text")) &&
              generate_rows(&out, engine, o->tokenizer, prompt->rows, n, &g, e);
    if (text.stream) fclose(text.stream);
    if (ok && s->common.json)
        print_json(s, &out, &speculation, text.text, text.n, (size_t)n);
    else if (ok)
        putchar('\n');
    if (ok && !s->common.json && !s->common.quiet) print_speed(&out, &speculation, (size_t)n);
    free(text.text);
    free(out.tokens.ids);
    engine_free(engine);
    return ok;
}

static bool run(struct settings *s, struct err *e)
{
    struct report report = common_report(&s->common);
    struct sampling sampling = { (float)s->temperature, (int)s->top_k, (float)s->top_p, (float)s->min_p,
                                 (uint64_t)s->seed };
    struct backend b = { 0 };
    struct opened o = { 0 };
    struct token_list tokens = { 0 };
    struct picture pictures[TEXT_LIST_MAX] = { 0 };
    struct prompt prompt = { 0 };
    bool ok = check(s, &sampling, e) && common_drafts(&s->drafts, &s->common, s->model, e) &&
              common_start(&b, &o, &s->common, s->model, e) && encode_prompt(&tokens, &o, s, e) &&
              fits(s, &o, &b, &tokens, e) && common_bind(&o, &b, &report, e) &&
              common_bind_mtp(&o, s->drafts, e) && lay_prompt(&prompt, &o, &tokens, pictures, s, e) &&
              answer(s, &o, &prompt, &sampling, &report, e);
    prompt_free(&prompt);
    for (int i = 0; i < s->images.n; i++) picture_free(&pictures[i]);
    free(tokens.ids);
    common_close(&o);
    backend_destroy(&b);
    return ok;
}

int cli_generate(int argc, char **argv)
{
    struct settings s = { .common.inputs = 1, .max_tokens = 256 };
    const struct flag flags[] = {
        { "--prompt", 'p', FLAG_TEXT, &s.prompt, "TEXT", "the prompt", NULL },
        { "--prompt-file", 0, FLAG_TEXT, &s.prompt_file, "FILE", "the prompt, from a UTF-8 file", NULL },
        { "--image", 0, FLAG_LIST, &s.images, "FILE",
          "PNG, JPEG, WebP or GIF the prompt is about, or a data: URL (may be repeated)", NULL },
        { "--max-tokens", 'n', FLAG_INT, &s.max_tokens, "N", "most tokens to generate (default 256)", NULL },
        { "--temperature", 0, FLAG_NUMBER, &s.temperature, "T", "0: greedy (default)", NULL },
        { "--top-k", 0, FLAG_INT, &s.top_k, "K", "sample from the K most likely", NULL },
        { "--top-p", 0, FLAG_NUMBER, &s.top_p, "P", "sample from the most likely whose probabilities reach P",
          NULL },
        { "--min-p", 0, FLAG_NUMBER, &s.min_p, "P", "drop tokens under P times the likeliest", NULL },
        { "--seed", 0, FLAG_INT, &s.seed, "N", "of the sampler (default 0): same seed, same text", NULL },
        { "--stop", 0, FLAG_LIST, &s.stops, "TEXT", "stop before this text (may be repeated)", NULL },
        { "--ignore-eos", 0, FLAG_SWITCH, &s.ignore_eos, NULL, "go on past end-of-text tokens", NULL },
        { "--keep-special", 0, FLAG_SWITCH, &s.keep_special, NULL, "print special tokens as their text",
          NULL },
        COMMON_SPECULATIVE_FLAG(s.common),
        COMMON_OVERRIDES_FLAGS(s.common),
        COMMON_KV_FLAG(s.common),
        COMMON_ACTIVATIONS_FLAGS(s.common),
        COMMON_FLAGS(s.common),
        FLAGS_END,
    };
    int status;
    struct err e = { 0 };
    if (!common_parse(&command, flags, argc, argv, &s.model, &status)) return status;
    return run(&s, &e) ? 0 : common_fail(&command, &e);
}
