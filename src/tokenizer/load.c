/* From tokenizer.json and tokenizer_config.json to a struct tokenizer. Everything that would change the ids
 * and that this program does not do is refused by name. What does not is not looked at: "truncation" and
 * "padding" (callers of the reference set them anew at each call), "post_processor" of type ByteLevel,
 * "trim_offsets". */
#include "base/doc.h"
#include "base/file.h"
#include "tokenizer/tokenizer_struct.h"
#include "tokenizer/utf8.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    JSON_BYTES_MAX = 256 << 20, /* the 248,044-entry tokenizer.json has 13 MB */
    BYTE_CHAR_END = 0x144,      /* byte characters are U+0021 to U+0143 */
    SHOWN = 64,
};

struct loader {
    struct tokenizer *t;
    const json_t *root, *model, *vocab;
    size_t pool_capacity;
    int16_t byte_of[BYTE_CHAR_END]; /* byte character to byte; -1: none */
    char byte_char[256][3];         /* and back, as NUL-terminated UTF-8 */
};

/* A value for an error message: its JSON, ASCII only, so that cutting it cannot hurt. */
static const char *shown(char out[SHOWN], const json_t *v)
{
    if (!v) return "nothing";
    char *text = json_dumps(v, JSON_ENCODE_ANY | JSON_ENSURE_ASCII | JSON_COMPACT);
    snprintf(out, SHOWN, "%s", text ? text : "?");
    if (text && strlen(text) >= SHOWN) memcpy(out + SHOWN - 4, "...", 4);
    free(text);
    return out;
}

static bool unsupported(struct err *e, const char *where, const char *key, const json_t *found,
                        const char *expected)
{
    char text[SHOWN];
    return err_set(e, ERR_UNSUPPORTED, "%s%s%s: found %s, expected %s", where, *where ? "." : "", key,
                   shown(text, found), expected);
}

static bool want_string(const json_t *object, const char *where, const char *key, const char *expected,
                        struct err *e)
{
    const json_t *v = json_object_get(object, key);
    if (json_is_string(v) && strcmp(json_string_value(v), expected) == 0) return true;
    char quoted[SHOWN];
    snprintf(quoted, sizeof quoted, "\"%s\"", expected);
    return unsupported(e, where, key, v, quoted);
}

/* Absent means false. */
static bool want_false(const json_t *object, const char *where, const char *key, struct err *e)
{
    const json_t *v = json_object_get(object, key);
    return !v || json_is_false(v) || unsupported(e, where, key, v, "false");
}

static bool want_nothing(const json_t *object, const char *where, const char *key, struct err *e)
{
    const json_t *v = json_object_get(object, key);
    if (!v || json_is_null(v) || (json_is_string(v) && json_string_length(v) == 0)) return true;
    return unsupported(e, where, key, v, "null");
}

static bool want_object(const json_t **out, const json_t *object, const char *where, const char *key,
                        struct err *e)
{
    *out = json_object_get(object, key);
    return json_is_object(*out) || unsupported(e, where, key, *out, "an object");
}

static bool add_token(struct loader *l, const json_t *token, const char *where, int64_t id, struct err *e)
{
    static const char *const flags[] = { "single_word", "lstrip", "rstrip", "normalized" };
    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++)
        if (!want_false(token, where, flags[i], e)) return err_note(e, "not supported");
    const char *content;
    bool is_special = false;
    if (!doc_string(&content, token, where, "content", e)) return false;
    if (!doc_bool_or(&is_special, token, where, "special", e)) return false;
    if (!*content) return err_set(e, ERR_FORMAT, "%s.content: an empty added token", where);
    return added_append(&l->t->added, content, strlen(content), (int32_t)id, is_special, e);
}

static bool read_added(struct loader *l, struct err *e)
{
    const json_t *list = json_object_get(l->root, "added_tokens"), *token;
    if (!list || json_is_null(list)) return true;
    if (!json_is_array(list)) return unsupported(e, "", "added_tokens", list, "an array");
    size_t i;
    json_array_foreach(list, i, token)
    {
        char where[SHOWN];
        int64_t id;
        snprintf(where, sizeof where, "added_tokens[%zu]", i);
        if (!json_is_object(token)) return unsupported(e, "", where, token, "an object");
        if (!doc_int(&id, token, where, "id", 0, BPE_ID_END - 1, e) || !add_token(l, token, where, id, e))
            return false;
    }
    return true;
}

/* A decimal number as JSON writes it; -1 for anything else. */
static int64_t id_of_key(const char *key)
{
    int64_t id = 0;
    if (!*key || (*key == '0' && key[1])) return -1;
    for (; *key; key++) {
        if (*key < '0' || *key > '9' || id >= BPE_ID_END) return -1;
        id = 10 * id + (*key - '0');
    }
    return id < BPE_ID_END ? id : -1;
}

/* tokenizer.json comes first and wins: a token that both name is taken from there. */
static bool read_added_config(struct loader *l, const json_t *config, struct err *e)
{
    if (!json_is_object(config)) return err_set(e, ERR_FORMAT, "expected an object");
    const json_t *map = json_object_get(config, "added_tokens_decoder");
    if (!map || json_is_null(map)) return true;
    if (!json_is_object(map)) return unsupported(e, "", "added_tokens_decoder", map, "an object");
    const char *key;
    json_t *token;
    json_object_foreach((json_t *)map, key, token)
    {
        char where[SHOWN];
        snprintf(where, sizeof where, "added_tokens_decoder.%.30s", key);
        int64_t id = id_of_key(key);
        if (id < 0) return err_set(e, ERR_FORMAT, "%s: expected an id from 0 to %d", where, BPE_ID_END - 1);
        if (!json_is_object(token)) return unsupported(e, "", where, token, "an object");
        if (!add_token(l, token, where, id, e)) return false;
    }
    return true;
}

static void make_byte_chars(struct loader *l)
{
    unsigned shifted = 0x100;
    memset(l->byte_of, 0xff, sizeof l->byte_of);
    for (unsigned b = 0; b < 256; b++) {
        bool is_itself = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
        unsigned c = is_itself ? b : shifted++;
        l->byte_of[c] = (int16_t)b;
        l->byte_char[b][utf8_put(l->byte_char[b], c)] = 0;
    }
}

/* Byte characters to bytes, in place in out, which has room for strlen(text). -1: another character. */
static int64_t unmap(const struct loader *l, char *out, const char *text)
{
    int64_t n = 0;
    for (const unsigned char *s = (const unsigned char *)text; *s;) {
        int length = utf8_length(*s);
        uint32_t c = utf8_get(s, length);
        if (c >= BYTE_CHAR_END || l->byte_of[c] < 0) return -1;
        out[n++] = (char)l->byte_of[c];
        s += length;
    }
    return n;
}

static char *pool_room(struct loader *l, size_t bytes, struct err *e)
{
    struct tokenizer *t = l->t;
    if (!t->bytes || l->pool_capacity - t->n_bytes < bytes) {
        size_t capacity = 2 * l->pool_capacity + bytes + 4096;
        char *pool = capacity <= UINT32_MAX ? realloc(t->bytes, capacity) : NULL;
        if (!pool) {
            err_memory(e, "token bytes", capacity);
            return NULL;
        }
        t->bytes = pool;
        l->pool_capacity = capacity;
    }
    return t->bytes + t->n_bytes;
}

static void place(struct tokenizer *t, int32_t id, size_t bytes)
{
    t->tokens[id] = (struct token){ (uint32_t)t->n_bytes, (uint32_t)bytes };
    t->n_bytes += bytes;
}

static bool count_ids(struct loader *l, struct err *e)
{
    struct tokenizer *t = l->t;
    const char *key;
    json_t *value;
    int64_t n = 0;
    json_object_foreach((json_t *)l->vocab, key, value)
    {
        int64_t id;
        if (!doc_int(&id, l->vocab, "model.vocab", key, 0, BPE_ID_END - 1, e)) return false;
        if (id >= n) n = id + 1;
    }
    for (size_t i = 0; i < t->added.n; i++)
        if (t->added.tokens[i].id >= n) n = t->added.tokens[i].id + 1;
    t->n_tokens = (int32_t)n;
    t->tokens = calloc((size_t)n + 1, sizeof *t->tokens);
    t->is_special = calloc((size_t)n + 1, sizeof *t->is_special);
    return (t->tokens && t->is_special) || err_memory(e, "tokens", (size_t)n * (sizeof *t->tokens + 1));
}

static bool place_added(struct loader *l, struct err *e)
{
    struct tokenizer *t = l->t;
    for (size_t i = 0; i < t->added.n; i++) {
        const struct added_token *a = &t->added.tokens[i];
        const json_t *other = json_object_get(l->vocab, a->text);
        if (other && json_integer_value(other) != a->id)
            return err_set(e, ERR_FORMAT, "added token \"%.40s\" has the id %d, but %d in model.vocab",
                           a->text, (int)a->id, (int)json_integer_value(other));
        char *to = pool_room(l, a->bytes, e);
        if (!to) return false;
        memcpy(to, a->text, a->bytes);
        place(t, a->id, a->bytes);
        t->is_special[a->id] = a->is_special;
    }
    return true;
}

static bool place_vocab(struct loader *l, struct err *e)
{
    struct tokenizer *t = l->t;
    const char *key;
    json_t *value;
    json_object_foreach((json_t *)l->vocab, key, value)
    {
        int32_t id = (int32_t)json_integer_value(value);
        if (t->tokens[id].bytes > 0) {
            /* an added token may be listed in the vocabulary as well */
            const struct added_token *a = added_find(&t->added, key, strlen(key));
            if (a && a->id == id) continue;
            return err_set(e, ERR_FORMAT, "model.vocab: id %d is given twice", (int)id);
        }
        char *to = pool_room(l, strlen(key), e);
        if (!to) return false;
        int64_t bytes = unmap(l, to, key);
        if (bytes < 0)
            return err_set(e, ERR_UNSUPPORTED, "model.vocab: \"%.40s\" is not made of byte characters", key);
        if (bytes == 0) return err_set(e, ERR_FORMAT, "model.vocab: an empty entry");
        place(t, id, (size_t)bytes);
    }
    return true;
}

static bool read_vocab(struct loader *l, struct err *e)
{
    if (!want_object(&l->vocab, l->model, "model", "vocab", e)) return false;
    if (!count_ids(l, e) || !place_added(l, e) || !place_vocab(l, e)) return false;
    for (int b = 0; b < 256; b++) {
        const json_t *id = json_object_get(l->vocab, l->byte_char[b]);
        if (!id)
            return err_set(e, ERR_FORMAT, "model.vocab: no entry for byte %d, \"%s\"", b, l->byte_char[b]);
        l->t->bpe.byte_id[b] = (int32_t)json_integer_value(id);
    }
    return true;
}

struct merge_text {
    char *text; /* left, NUL, right, NUL, left and right joined, NUL */
    size_t capacity;
    const char *left, *right, *joined;
};

static bool merge_room(struct merge_text *m, size_t bytes, struct err *e)
{
    if (bytes <= m->capacity) return true;
    char *text = realloc(m->text, 2 * bytes);
    if (!text) return err_memory(e, "a merge", 2 * bytes);
    m->text = text;
    m->capacity = 2 * bytes;
    return true;
}

static bool merge_join(struct merge_text *m, const char *left, size_t n_left, const char *right,
                       size_t n_right, struct err *e)
{
    if (!merge_room(m, 2 * (n_left + n_right) + 3, e)) return false;
    char *to = m->text;
    m->left = memcpy(to, left, n_left);
    to[n_left] = 0;
    m->right = memcpy(to += n_left + 1, right, n_right);
    to[n_right] = 0;
    m->joined = memcpy(to += n_right + 1, left, n_left);
    memcpy(to + n_left, right, n_right);
    to[n_left + n_right] = 0;
    return true;
}

/* "left right", or [left, right]. */
static bool merge_parts(struct merge_text *m, const json_t *v, const char *where, struct err *e)
{
    static const char expected[] = "\"left right\" or [left, right]";
    const json_t *a = json_array_get(v, 0), *b = json_array_get(v, 1);
    if (json_is_string(v)) {
        const char *text = json_string_value(v), *space = strchr(text, ' ');
        size_t bytes = json_string_length(v);
        if (strlen(text) != bytes || !space || space == text || !space[1] || strchr(space + 1, ' '))
            return unsupported(e, "model", where, v, expected);
        size_t n_left = (size_t)(space - text);
        return merge_join(m, text, n_left, space + 1, bytes - n_left - 1, e);
    }
    if (json_array_size(v) != 2 || !json_is_string(a) || !json_is_string(b))
        return unsupported(e, "model", where, v, expected);
    return merge_join(m, json_string_value(a), json_string_length(a), json_string_value(b),
                      json_string_length(b), e);
}

static bool merge_id(int32_t *id, const struct loader *l, const char *text, const char *where, struct err *e)
{
    const json_t *v = json_object_get(l->vocab, text);
    if (!v) return err_set(e, ERR_FORMAT, "model.%s: \"%.40s\" is not in model.vocab", where, text);
    *id = (int32_t)json_integer_value(v);
    return true;
}

static bool read_merge(struct loader *l, struct merge_text *m, const json_t *v, size_t rank, struct err *e)
{
    char where[SHOWN];
    int32_t left = -1, right = -1, joined = -1;
    snprintf(where, sizeof where, "merges[%zu]", rank);
    if (!merge_parts(m, v, where, e) || !merge_id(&left, l, m->left, where, e) ||
        !merge_id(&right, l, m->right, where, e) || !merge_id(&joined, l, m->joined, where, e))
        return false;
    if (bpe_add(&l->t->bpe, left, right, (uint32_t)rank, joined)) return true;
    return err_set(e, ERR_FORMAT, "model.%s: \"%.40s %.40s\" is given twice", where, m->left, m->right);
}

static bool read_merges(struct loader *l, struct err *e)
{
    const json_t *list = json_object_get(l->model, "merges"), *v;
    if (!json_is_array(list)) return unsupported(e, "model", "merges", list, "an array");
    if (!bpe_init(&l->t->bpe, json_array_size(list), e)) return false;
    struct merge_text m = { 0 };
    bool ok = true;
    for (size_t i = 0; ok && (v = json_array_get(list, i)); i++) ok = read_merge(l, &m, v, i, e);
    free(m.text);
    return ok;
}

static bool read_model(struct loader *l, struct err *e)
{
    if (!want_object(&l->model, l->root, "", "model", e)) return false;
    const json_t *m = l->model;
    return want_string(m, "model", "type", "BPE", e) && want_nothing(m, "model", "dropout", e) &&
           want_nothing(m, "model", "unk_token", e) &&
           want_nothing(m, "model", "continuing_subword_prefix", e) &&
           want_nothing(m, "model", "end_of_word_suffix", e) && want_false(m, "model", "byte_fallback", e) &&
           want_false(m, "model", "ignore_merges", e) && read_vocab(l, e) && read_merges(l, e);
}

static bool read_normalizer(struct loader *l, struct err *e)
{
    const json_t *v = json_object_get(l->root, "normalizer");
    l->t->has_nfc = v && !json_is_null(v);
    return !l->t->has_nfc || want_string(v, "normalizer", "type", "NFC", e);
}

static bool read_pre_tokenizer(struct loader *l, struct err *e)
{
    const json_t *pre, *pattern;
    if (!want_object(&pre, l->root, "", "pre_tokenizer", e)) return false;
    if (!want_string(pre, "pre_tokenizer", "type", "Sequence", e)) return false;
    const json_t *list = json_object_get(pre, "pretokenizers");
    if (json_array_size(list) != 2)
        return unsupported(e, "pre_tokenizer", "pretokenizers", list, "two: Split, ByteLevel");
    static const char first[] = "pre_tokenizer.pretokenizers[0]", second[] = "pre_tokenizer.pretokenizers[1]";
    const json_t *split = json_array_get(list, 0), *level = json_array_get(list, 1);
    const char *regex;
    return want_string(split, first, "type", "Split", e) &&
           want_string(split, first, "behavior", "Isolated", e) && want_false(split, first, "invert", e) &&
           want_object(&pattern, split, first, "pattern", e) &&
           doc_string(&regex, pattern, "pre_tokenizer.pretokenizers[0].pattern", "Regex", e) &&
           want_string(level, second, "type", "ByteLevel", e) &&
           want_false(level, second, "add_prefix_space", e) && want_false(level, second, "use_regex", e) &&
           (split_compile(&l->t->split, regex, e) ||
            err_note(e, "pre_tokenizer.pretokenizers[0].pattern.Regex"));
}

static bool read_rest(struct loader *l, struct err *e)
{
    const json_t *decoder, *post = json_object_get(l->root, "post_processor");
    if (!want_object(&decoder, l->root, "", "decoder", e)) return false;
    if (!want_string(decoder, "decoder", "type", "ByteLevel", e)) return false;
    return !post || json_is_null(post) || want_string(post, "post_processor", "type", "ByteLevel", e);
}

static bool read_added_tokens(struct loader *l, const char *config_json, size_t config_bytes, struct err *e)
{
    if (!read_added(l, e)) return err_note(e, "tokenizer.json");
    if (config_json) {
        json_t *config = NULL;
        bool ok = doc_parse(&config, config_json, config_bytes, e) && read_added_config(l, config, e);
        json_decref(config);
        if (!ok) return err_note(e, "tokenizer_config.json");
    }
    return added_seal(&l->t->added, e);
}

bool tokenizer_create(struct tokenizer **out, const char *json, size_t bytes, const char *config_json,
                      size_t config_bytes, struct err *e)
{
    json_t *root = NULL;
    *out = NULL;
    if (!doc_parse(&root, json, bytes, e)) return err_note(e, "tokenizer.json");
    struct loader l = { .root = root, .t = calloc(1, sizeof *l.t) };
    bool ok = l.t || err_memory(e, "a tokenizer", sizeof *l.t);
    if (ok && !json_is_object(root)) ok = err_set(e, ERR_FORMAT, "tokenizer.json: expected an object");
    if (ok) {
        make_byte_chars(&l);
        ok =
            read_added_tokens(&l, config_json, config_bytes, e) &&
            ((read_normalizer(&l, e) && read_pre_tokenizer(&l, e) && read_rest(&l, e) && read_model(&l, e)) ||
             err_note(e, "tokenizer.json"));
    }
    json_decref(root);
    if (ok)
        *out = l.t;
    else
        tokenizer_free(l.t);
    return ok;
}

static bool load_texts(char **json, size_t *bytes, char **config, size_t *config_bytes, const char *dir,
                       struct err *e)
{
    char *path = file_join(dir, "tokenizer.json"), *config_path = file_join(dir, "tokenizer_config.json");
    bool ok = (path && config_path) || err_memory(e, "a path", strlen(dir));
    ok = ok && file_read(json, bytes, path, JSON_BYTES_MAX, e);
    if (ok && file_exists(config_path)) ok = file_read(config, config_bytes, config_path, JSON_BYTES_MAX, e);
    free(path);
    free(config_path);
    return ok;
}

bool tokenizer_load(struct tokenizer **out, const char *dir, struct err *e)
{
    char *json = NULL, *config = NULL;
    size_t bytes = 0, config_bytes = 0;
    *out = NULL;
    bool ok = load_texts(&json, &bytes, &config, &config_bytes, dir, e) &&
              (tokenizer_create(out, json, bytes, config, config_bytes, e) || err_note(e, "%s", dir));
    free(json);
    free(config);
    return ok;
}

void tokenizer_free(struct tokenizer *t)
{
    if (!t) return;
    split_free(&t->split);
    bpe_deinit(&t->bpe);
    added_deinit(&t->added);
    free(t->tokens);
    free(t->is_special);
    free(t->bytes);
    free(t);
}
