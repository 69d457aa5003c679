/* Finds a checkpoint's chat template and gives it the variables that Hugging Face gives it. */
#include "tokenizer/chat.h"
#include "base/doc.h"
#include "base/file.h"
#include "tokenizer/jinja/jinja.h"
#include <stdlib.h>
#include <string.h>

enum { TEMPLATE_BYTES_MAX = 1 << 20, CONFIG_BYTES_MAX = 64 << 20 };

struct chat_template {
    struct jinja *jinja;
    json_t *config; /* tokenizer_config.json; NULL: there is none */
    char *file;     /* of chat_template.jinja; NULL: there is none */
    const char *text;
    size_t bytes;
    bool is_built_in;
};

/* The text of models/demo/chat_template.jinja, from the assembler: one file for the product and the demo
 * model. */
__asm__(".section .rodata\n"
        ".global chat_built_in, chat_built_in_end\n"
        "chat_built_in: .incbin \"models/demo/chat_template.jinja\"\n"
        "chat_built_in_end: .byte 0\n"
        ".previous\n");
extern const char chat_built_in[], chat_built_in_end[];

static const char *const special_tokens[] = { "bos_token", "eos_token", "unk_token", "sep_token",
                                              "pad_token", "cls_token", "mask_token" };
enum { N_SPECIAL = sizeof special_tokens / sizeof *special_tokens };

static bool load_config(struct chat_template *t, const char *path, struct err *e)
{
    if (!file_exists(path)) return true;
    if (!doc_load(&t->config, path, CONFIG_BYTES_MAX, e)) return false;
    return json_is_object(t->config) || err_set(e, ERR_FORMAT, "expected an object");
}

/* The template inside of tokenizer_config.json; *text NULL when there is none. */
static bool config_template(const char **text, const json_t *config, struct err *e)
{
    const json_t *found = json_object_get(config, "chat_template"), *item;
    *text = json_string_value(found);
    if (*text || !found || json_is_null(found)) return true;
    for (size_t i = 0; i < json_array_size(found) && !*text; i++) {
        item = json_array_get(found, i);
        const char *name = json_string_value(json_object_get(item, "name"));
        if (name && strcmp(name, "default") == 0)
            *text = json_string_value(json_object_get(item, "template"));
    }
    return *text ||
           err_set(e, ERR_UNSUPPORTED, "chat_template: neither a text nor a list with one named \"default\"");
}

static bool create_from_config(struct chat_template *t, struct err *e)
{
    const char *text;
    if (!config_template(&text, t->config, e)) return false;
    t->is_built_in = !text;
    t->text = text ? text : chat_built_in;
    t->bytes = text ? strlen(text) : (size_t)(chat_built_in_end - chat_built_in);
    return jinja_create(&t->jinja, t->text, t->bytes, e) || (text && err_note(e, "chat_template"));
}

static bool create_from_file(struct chat_template *t, const char *path, struct err *e)
{
    if (!file_read(&t->file, &t->bytes, path, TEMPLATE_BYTES_MAX, e)) return false;
    t->text = t->file;
    return jinja_create(&t->jinja, t->text, t->bytes, e) || err_note(e, "%s", path);
}

/* path: NULL for the checkpoint's own. */
static bool load(struct chat_template **out, const char *dir, const char *path, struct err *e)
{
    struct chat_template *t = calloc(1, sizeof *t);
    char *file = path ? strdup(path) : file_join(dir, "chat_template.jinja");
    char *config = file_join(dir, "tokenizer_config.json");
    bool ok = (t && file && config) || err_memory(e, "a chat template", sizeof *t);
    ok = ok && (load_config(t, config, e) || err_note(e, "%s", config));
    if (ok && (path || file_exists(file)))
        ok = create_from_file(t, file, e);
    else if (ok)
        ok = create_from_config(t, e) || err_note(e, "%s", config);
    free(file);
    free(config);
    if (!ok) chat_template_free(t);
    *out = ok ? t : NULL;
    return ok;
}

bool chat_template_load(struct chat_template **out, const char *dir, struct err *e)
{
    return load(out, dir, NULL, e);
}

bool chat_template_load_file(struct chat_template **out, const char *dir, const char *path, struct err *e)
{
    return load(out, dir, path, e);
}

void chat_template_free(struct chat_template *t)
{
    if (!t) return;
    jinja_free(t->jinja);
    json_decref(t->config);
    free(t->file);
    free(t);
}

bool chat_template_is_built_in(const struct chat_template *t)
{
    return t->is_built_in;
}

bool chat_template_takes_documents(const struct chat_template *t)
{
    return memmem(t->text, t->bytes, "documents", 9);
}

const char *chat_template_text(const struct chat_template *t, size_t *bytes)
{
    *bytes = t->bytes;
    return t->text;
}

/* A special token is its text, or an object with its text in "content". */
static const json_t *special_token(const json_t *config, const char *name)
{
    const json_t *token = json_object_get(config, name);
    if (json_is_object(token)) token = json_object_get(token, "content");
    return json_is_string(token) ? token : NULL;
}

static const json_t *boolean(bool b)
{
    return b ? json_true() : json_false();
}

bool chat_render(char **text, size_t *bytes, const struct chat_template *t, const json_t *messages,
                 const json_t *tools, const struct chat_options *o, struct err *e)
{
    struct jinja_variable variables[N_SPECIAL + 7] = {
        { "messages", messages },
        { "tools", tools ? tools : json_null() },
        { "documents", o->documents ? o->documents : json_null() },
        { "add_generation_prompt", boolean(o->add_generation_prompt) },
        { "enable_thinking", o->thinking ? boolean(o->thinking == CHAT_THINKING_ON) : NULL },
        { "preserve_thinking", o->preserve_thinking ? json_true() : NULL },
        { "add_vision_id", o->add_vision_id ? json_true() : NULL },
    };
    for (size_t i = 0; i < N_SPECIAL; i++)
        variables[7 + i] =
            (struct jinja_variable){ special_tokens[i], special_token(t->config, special_tokens[i]) };
    return jinja_render(text, bytes, t->jinja, variables, N_SPECIAL + 7, NULL, e);
}
