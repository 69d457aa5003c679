/* quench chat MODEL */
#include "cli/commands.h"
#include "cli/common.h"
#include "cli/line.h"
#include "cli/plan.h"
#include "engine/session.h"
#include "engine/picture.h"
#include "tokenizer/chat.h"
#include "tokenizer/reply.h"
#include "tokenizer/utf8.h"
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct command command = {
    "chat",
    "MODEL",
    "A conversation. Lines are messages; those that begin with / are commands, /help lists them. Ctrl-C "
    "stops an\n"
    "answer, Ctrl-D ends. Without a terminal every line of standard input is a message.",
    1,
};

static const char help[] = "/image PATH    a picture for the next message (PNG, JPEG, WebP, GIF, data: URL)\n"
                           "/system TEXT   the system message from now on; without TEXT none\n"
                           "/think on|off  whether the model thinks before it answers\n"
                           "/stats         tokens, reuse, drafts and speed of the last answer\n"
                           "/reset         forget the conversation, keep the system message\n"
                           "/help          this list\n"
                           "Ctrl-C         stop the answer\n"
                           "Ctrl-D         leave\n";

static const char *const thinkings[] = { "template", "off", "on", NULL };

struct settings {
    struct common common;
    const char *model, *system;
    int64_t context, max_tokens, seed, top_k;
    double temperature, top_p, min_p;
    int thinking;
    bool preserve_thinking;
    int drafts;
};

/* What one answer consists of, as it arrives. */
struct answer {
    char *reasoning, *content;
    size_t n_reasoning, n_content;
    FILE *reasoning_to, *content_to;
    enum reply_kind shown; /* what was printed last; REPLY_MARK: nothing */
};

struct chat {
    const struct settings *s;
    struct opened *o;
    struct chat_template *template;
    struct session *session;
    struct session_options options;
    struct line *line;
    json_t *messages;              /* without the system message */
    struct picture_reader *reader; /* made at the first picture */
    struct picture *pictures;      /* of all messages, in order; the last n_waiting are for the next one */
    int n_pictures, n_waiting;
    char *system; /* NULL: none */
    enum chat_thinking thinking;
    bool is_coloured;
    struct answer answer;
    struct reply *reply;
    struct session_result last;
};

/* Set by Ctrl-C while an answer is under way; a signal handler has no other place. */
static volatile sig_atomic_t interrupted;

static void interrupt(int number)
{
    (void)number;
    interrupted = 1;
}

/* Without a terminal Ctrl-C ends the program, as it does any other in a pipe. */
static void catch_interrupts(const struct chat *c, bool on)
{
    if (!line_is_interactive(c->line)) return;
    struct sigaction a = { .sa_handler = on ? interrupt : SIG_IGN, .sa_flags = SA_RESTART };
    interrupted = 0;
    sigaction(SIGINT, &a, NULL);
}

static bool was_interrupted(void *ctx)
{
    (void)ctx;
    return interrupted;
}

/* Reasoning is dimmed, or without colours told apart by an empty line. */
static void show(struct chat *c, enum reply_kind kind, const char *text, size_t n)
{
    struct answer *a = &c->answer;
    if (c->s->common.json) return;
    if (a->shown != kind) {
        if (c->is_coloured) fputs(kind == REPLY_REASONING ? "\033[2m" : "\033[0m", stdout);
        if (a->shown != REPLY_MARK) fputs("\n\n", stdout);
        a->shown = kind;
    }
    fwrite(text, 1, n, stdout);
    fflush(stdout);
}

/* A tool call, which nobody asked for here, is shown and kept as it was written. */
static void take_event(void *ctx, const struct reply_event *event)
{
    struct chat *c = ctx;
    if (event->kind == REPLY_MARK) return;
    bool is_reasoning = event->kind == REPLY_REASONING;
    fwrite(event->text, 1, event->bytes, is_reasoning ? c->answer.reasoning_to : c->answer.content_to);
    show(c, is_reasoning ? REPLY_REASONING : REPLY_CONTENT, event->text, event->bytes);
}

static void take_text(void *ctx, const char *bytes, size_t n)
{
    struct chat *c = ctx;
    struct err e = { 0 };
    if (!reply_feed(c->reply, bytes, n, &e))
        interrupted = 1; /* out of memory: end the answer with what there is */
}

static void begin_answer(struct answer *a)
{
    *a = (struct answer){ .shown = REPLY_MARK };
    a->reasoning_to = open_memstream(&a->reasoning, &a->n_reasoning);
    a->content_to = open_memstream(&a->content, &a->n_content);
}

static void end_answer(struct answer *a)
{
    if (a->reasoning_to) fclose(a->reasoning_to);
    if (a->content_to) fclose(a->content_to);
    a->reasoning_to = a->content_to = NULL;
}

static void free_answer(struct answer *a)
{
    end_answer(a);
    free(a->reasoning);
    free(a->content);
    *a = (struct answer){ 0 };
}

static bool render(char **text, size_t *bytes, const struct chat *c, struct err *e)
{
    struct chat_options o = { .add_generation_prompt = true,
                              .thinking = c->thinking,
                              .preserve_thinking = c->s->preserve_thinking };
    json_t *all = json_array();
    if (c->system) json_array_append_new(all, json_pack("{s:s,s:s}", "role", "system", "content", c->system));
    json_array_extend(all, c->messages);
    bool ok = chat_render(text, bytes, c->template, all, NULL, &o, e);
    json_decref(all);
    return ok;
}

static bool check_ids(const struct token_list *prompt, const struct config *config, struct err *e)
{
    for (size_t i = 0; i < prompt->n; i++)
        if (prompt->ids[i] >= config->vocab_size)
            return err_set(e, ERR_FORMAT, "the tokenizer gives token %d, the model has %lld", prompt->ids[i],
                           (long long)config->vocab_size);
    return true;
}

static bool generate_answer(struct chat *c, const char *text, size_t bytes, struct err *e)
{
    static const char think[] = "<think>\n";
    size_t n = strlen(think);
    struct reply_options ro = { .in_reasoning = bytes >= n && memcmp(text + bytes - n, think, n) == 0,
                                .event = take_event,
                                .ctx = c };
    struct token_list tokens = { 0 };
    struct prompt prompt = { 0 };
    /* Typed into a message, the token stays an ordinary one where no pictures are. */
    struct place_tokens places = { c->n_pictures ? c->o->checkpoint.config.image_token : -1, -1 };
    begin_answer(&c->answer);
    bool ok = (c->answer.reasoning_to && c->answer.content_to) || err_errno(e, "an answer");
    ok = ok && tokenizer_encode(c->o->tokenizer, &tokens, text, bytes, 0, e) &&
         check_ids(&tokens, &c->o->checkpoint.config, e) &&
         prompt_create(&prompt, tokens.ids, (int64_t)tokens.n, places, c->pictures, c->n_pictures, 0, e) &&
         reply_create(&c->reply, &ro, e);
    catch_interrupts(c, true);
    ok = ok && session_answer(c->session, &c->last, &prompt, &c->options, e) && reply_finish(c->reply, e);
    catch_interrupts(c, false);
    reply_free(c->reply);
    c->reply = NULL;
    end_answer(&c->answer);
    prompt_free(&prompt);
    free(tokens.ids);
    return ok;
}

static const char *finish_name(enum session_finish f)
{
    return f == SESSION_STOP ? "stop" : f == SESSION_LENGTH ? "length" : "cancelled";
}

/* Tokens a step of decoding. */
static double mean_length(const struct session_result *r)
{
    return r->rounds ? 1 + (double)r->accepted / (double)r->rounds : 0;
}

static void print_json(const struct chat *c)
{
    const struct answer *a = &c->answer;
    json_t *o = json_pack(
        "{s:o, s:o, s:s, s:I, s:I, s:I, s:f, s:f}", "reasoning", json_stringn(a->reasoning, a->n_reasoning),
        "content", json_stringn(a->content, a->n_content), "finish_reason", finish_name(c->last.finish),
        "prompt_tokens", (json_int_t)c->last.prompt_tokens, "reused_tokens",
        (json_int_t)c->last.reused_tokens, "tokens", (json_int_t)c->last.tokens, "prefill_seconds",
        c->last.prefill_seconds, "decode_seconds", c->last.decode_seconds);
    if (c->s->drafts)
        json_object_update_new(o, json_pack("{s:I, s:I, s:f}", "drafted", (json_int_t)c->last.drafted,
                                            "accepted", (json_int_t)c->last.accepted, "mean_accepted_length",
                                            mean_length(&c->last)));
    json_dumpf(o, stdout, JSON_COMPACT);
    putchar('\n');
    fflush(stdout);
    json_decref(o);
}

/* Ends the answer's last line, and says why it ended where that is not plain. */
static void print_end(const struct chat *c)
{
    if (c->is_coloured) fputs("\033[0m", stdout);
    putchar('\n');
    fflush(stdout);
    if (c->last.finish == SESSION_CANCELLED) fputs("quench: stopped\n", stderr);
    if (c->last.finish == SESSION_LENGTH)
        fprintf(stderr, "quench: cut after %lld tokens%s; --max-tokens and --context allow more\n",
                (long long)c->last.tokens, c->answer.n_content ? "" : ", all of them thinking");
}

static void keep_answer(struct chat *c)
{
    const struct answer *a = &c->answer;
    json_t *m =
        json_pack("{s:s, s:o}", "role", "assistant", "content", json_stringn(a->content, a->n_content));
    if (a->n_reasoning)
        json_object_set_new(m, "reasoning_content", json_stringn(a->reasoning, a->n_reasoning));
    json_array_append_new(c->messages, m);
}

/* A user's message: its pictures, then its text. */
static json_t *user_message(const struct chat *c, const char *text)
{
    if (c->n_waiting == 0) return json_pack("{s:s, s:s}", "role", "user", "content", text);
    json_t *parts = json_array();
    for (int i = 0; i < c->n_waiting; i++) json_array_append_new(parts, json_pack("{s:s}", "type", "image"));
    json_array_append_new(parts, json_pack("{s:s, s:s}", "type", "text", "text", text));
    return json_pack("{s:s, s:o}", "role", "user", "content", parts);
}

/* One turn. A turn that fails is taken back, its pictures wait for the next. */
static bool say(struct chat *c, const char *message, struct err *e)
{
    char *text = NULL;
    size_t bytes, valid = utf8_valid_prefix(message, strlen(message));
    if (message[valid]) return err_set(e, ERR_FORMAT, "the message is not UTF-8 at byte %zu", valid);
    json_array_append_new(c->messages, user_message(c, message));
    bool ok = render(&text, &bytes, c, e) && generate_answer(c, text, bytes, e);
    free(text);
    if (ok) {
        keep_answer(c);
        c->n_waiting = 0;
        if (c->s->common.json)
            print_json(c);
        else
            print_end(c);
    } else {
        json_array_remove(c->messages, json_array_size(c->messages) - 1);
    }
    free_answer(&c->answer);
    return ok;
}

static void print_drafts(const struct chat *c)
{
    const struct session_result *r = &c->last;
    const struct speculation *s = session_speculation(c->session);
    printf("drafts       %lld, %lld accepted, %.2f tokens a step", (long long)r->drafted,
           (long long)r->accepted, mean_length(r));
    for (int i = 0; i < s->most && s->tried[i]; i++)
        printf("%s%.0f %%", i ? ", " : "; of all answers by place ",
               100 * (double)s->right[i] / (double)s->tried[i]);
    putchar('\n');
}

static void print_stats(const struct chat *c)
{
    const struct session_result *r = &c->last;
    int64_t computed = r->prompt_tokens - r->reused_tokens;
    printf("messages     %zu\n", json_array_size(c->messages));
    if (r->prompt_tokens == 0) return;
    printf("prompt       %lld tokens, %lld reused, %lld computed, %.0f tokens/s\n",
           (long long)r->prompt_tokens, (long long)r->reused_tokens, (long long)computed,
           (double)computed / r->prefill_seconds);
    printf("answer       %lld tokens, %.1f tokens/s, finish: %s\n", (long long)r->tokens,
           r->tokens ? (double)r->tokens / r->decode_seconds : 0, finish_name(r->finish));
    if (c->s->drafts) print_drafts(c);
    printf("context      %lld of %lld tokens\n", (long long)(r->prompt_tokens + r->tokens),
           (long long)c->s->context);
}

static bool add_picture(struct chat *c, const char *path, struct err *e)
{
    if (!*path) return err_set(e, ERR_ARGUMENT, "/image: the path of a picture is missing");
    if (!c->reader && !picture_reader_create(&c->reader, &c->o->model, e)) return false;
    struct picture *grown = realloc(c->pictures, (size_t)(c->n_pictures + 1) * sizeof *grown);
    if (!grown) return err_memory(e, "pictures", sizeof *grown);
    c->pictures = grown;
    grown[c->n_pictures] = (struct picture){ 0 };
    if (!picture_read(c->reader, &grown[c->n_pictures], path, NULL, e)) return false;
    c->n_pictures++;
    c->n_waiting++;
    return true;
}

static void forget(struct chat *c)
{
    session_reset(c->session);
    json_array_clear(c->messages);
    for (int i = 0; i < c->n_pictures; i++) picture_free(&c->pictures[i]);
    c->n_pictures = c->n_waiting = 0;
    c->last = (struct session_result){ 0 };
}

static bool set_system(struct chat *c, const char *text, struct err *e)
{
    size_t valid = utf8_valid_prefix(text, strlen(text));
    if (text[valid]) return err_set(e, ERR_FORMAT, "the system message is not UTF-8 at byte %zu", valid);
    char *copy = *text ? strdup(text) : NULL;
    if (*text && !copy) return err_memory(e, "the system message", strlen(text));
    free(c->system);
    c->system = copy;
    return true;
}

static bool set_thinking(struct chat *c, const char *text, struct err *e)
{
    bool on = strcmp(text, "on") == 0;
    if (!on && strcmp(text, "off") != 0)
        return err_set(e, ERR_ARGUMENT, "/think: expected on or off, found '%s'", text);
    c->thinking = on ? CHAT_THINKING_ON : CHAT_THINKING_OFF;
    return true;
}

static bool run_command(struct chat *c, const char *line, struct err *e)
{
    size_t n = strcspn(line, " \t");
    const char *rest = line + n + strspn(line + n, " \t");
    bool takes_text = false, ok = true;
    if (n == 7 && strncmp(line, "/system", n) == 0) {
        takes_text = true;
        ok = set_system(c, rest, e);
    } else if (n == 6 && strncmp(line, "/think", n) == 0) {
        takes_text = true;
        ok = set_thinking(c, rest, e);
    } else if (n == 6 && strncmp(line, "/stats", n) == 0) {
        print_stats(c);
    } else if (n == 6 && strncmp(line, "/reset", n) == 0) {
        forget(c);
    } else if (n == 6 && strncmp(line, "/image", n) == 0) {
        takes_text = true;
        ok = add_picture(c, rest, e);
    } else if (n == 5 && strncmp(line, "/help", n) == 0) {
        fputs(help, stdout);
    } else {
        return err_set(e, ERR_ARGUMENT, "unknown command '%.*s'; /help lists them", (int)n, line);
    }
    fflush(stdout);
    return ok && (takes_text || !*rest || err_set(e, ERR_ARGUMENT, "'%.*s' takes nothing", (int)n, line));
}

/* Errors of a turn end a conversation only where nobody is there to see them. */
static bool converse(struct chat *c, struct err *e)
{
    const char *line;
    catch_interrupts(c, false);
    while ((line = line_next(c->line))) {
        struct err mine = { 0 };
        if (!*line) continue;
        if (*line == '/' ? run_command(c, line, &mine) : say(c, line, &mine)) continue;
        if (!line_is_interactive(c->line)) return err_set(e, mine.code, "%s", mine.text);
        fprintf(stderr, "quench: %s\n", mine.text);
    }
    if (line_is_interactive(c->line)) putchar('\n');
    return true;
}

static bool check(const struct settings *s, const struct sampling *sampling, struct err *e)
{
    if (s->max_tokens < 1 || s->max_tokens > 1 << 24)
        return err_set(e, ERR_ARGUMENT, "--max-tokens: expected 1 to 16777216, found %lld",
                       (long long)s->max_tokens);
    if (s->context < 2 || s->context > 1 << 24)
        return err_set(e, ERR_ARGUMENT, "--context: expected 2 to 16777216, found %lld",
                       (long long)s->context);
    if (s->top_k != (int)s->top_k)
        return err_set(e, ERR_ARGUMENT, "--top-k: expected 0 to 2147483647, found %lld", (long long)s->top_k);
    return sampling_check(sampling, e);
}

static bool may_colour(void)
{
    const char *none = getenv("NO_COLOR"), *terminal = getenv("TERM");
    return isatty(STDOUT_FILENO) && !(none && *none) && terminal && strcmp(terminal, "dumb") != 0;
}

static struct engine_options engine_for(const struct settings *s, const struct backend *b)
{
    return (struct engine_options){ .context = s->context,
                                    .kv = common_kv_dtype(&s->common, b),
                                    .drafts = s->drafts };
}

static bool open_chat(struct chat *c, struct engine **engine, const struct settings *s, struct err *e)
{
    struct engine_options eo = engine_for(s, c->o->model.backend);
    c->thinking = (enum chat_thinking)s->thinking;
    c->messages = json_array();
    c->is_coloured = !s->common.json && may_colour();
    return set_system(c, s->system ? s->system : "", e) && chat_template_load(&c->template, s->model, e) &&
           engine_create(engine, &c->o->model, &eo, e) &&
           session_create(&c->session, *engine, c->o->tokenizer, e) && line_open(&c->line, "> ", e);
}

static void close_chat(struct chat *c, struct engine *engine)
{
    for (int i = 0; i < c->n_pictures; i++) picture_free(&c->pictures[i]);
    free(c->pictures);
    picture_reader_free(c->reader);
    line_close(c->line);
    session_free(c->session);
    engine_free(engine);
    chat_template_free(c->template);
    json_decref(c->messages);
    free(c->system);
}

static bool run(struct settings *s, struct err *e)
{
    struct report report = common_report(&s->common);
    struct sampling sampling = { (float)s->temperature, (int)s->top_k, (float)s->top_p, (float)s->min_p,
                                 (uint64_t)s->seed };
    struct backend b = { 0 };
    struct opened o = { 0 };
    struct engine *engine = NULL;
    struct chat c = { .s = s, .o = &o };
    int32_t eos[16], pictures[2];
    int n_eos = 0;
    bool ok = check(s, &sampling, e) && common_drafts(&s->drafts, &s->common, s->model, e) &&
              common_start(&b, &o, &s->common, s->model, e);
    struct engine_options eo = { 0 };
    if (ok) eo = engine_for(s, &b);
    ok = ok && plan_device(&o.checkpoint, &b, &eo, NULL, s->common.quiet, e) &&
         common_bind(&o, &b, &report, e) && common_bind_mtp(&o, s->drafts, e) &&
         checkpoint_eos_tokens(&o.checkpoint, eos, 16, &n_eos, e);
    const struct config *config = &o.checkpoint.config;
    pictures[0] = (int32_t)config->image_token;
    pictures[1] = (int32_t)config->video_token;
    if (ok && s->context > config->max_position_embeddings) s->context = config->max_position_embeddings;
    c.options = (struct session_options){ .sampling = sampling,
                                          .max_tokens = s->max_tokens,
                                          .stop_tokens = eos,
                                          .n_stop_tokens = n_eos,
                                          .never = pictures,
                                          .n_never = 2,
                                          .ctx = &c,
                                          .text = take_text,
                                          .cancelled = was_interrupted,
                                          .report = &report };
    ok = ok && open_chat(&c, &engine, s, e) && converse(&c, e);
    close_chat(&c, engine);
    common_close(&o);
    backend_destroy(&b);
    return ok;
}

int cli_chat(int argc, char **argv)
{
    struct settings s = { .common.inputs = 1, .context = 8192, .max_tokens = 4096 };
    const struct flag flags[] = {
        { "--system", 0, FLAG_TEXT, &s.system, "TEXT", "the system message", NULL },
        { "--think", 0, FLAG_CHOICE, &s.thinking, "template|off|on",
          "whether the model thinks first (default: as the template does)", thinkings },
        { "--preserve-thinking", 0, FLAG_SWITCH, &s.preserve_thinking, NULL,
          "keep the reasoning of earlier turns in the prompt; then nothing is computed twice", NULL },
        { "--context", 0, FLAG_INT, &s.context, "N", "most tokens of the conversation (default 8192)", NULL },
        { "--max-tokens", 'n', FLAG_INT, &s.max_tokens, "N", "most tokens of an answer (default 4096)",
          NULL },
        { "--temperature", 0, FLAG_NUMBER, &s.temperature, "T", "0: greedy (default)", NULL },
        { "--top-k", 0, FLAG_INT, &s.top_k, "K", "sample from the K most likely", NULL },
        { "--top-p", 0, FLAG_NUMBER, &s.top_p, "P", "sample from the most likely whose probabilities reach P",
          NULL },
        { "--min-p", 0, FLAG_NUMBER, &s.min_p, "P", "drop tokens under P times the likeliest", NULL },
        { "--seed", 0, FLAG_INT, &s.seed, "N", "of the sampler (default 0): same seed, same text", NULL },
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
