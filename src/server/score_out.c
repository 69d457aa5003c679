#include "server/score_out.h"
#include "tokenizer/utf8.h"
#include <stdio.h>
#include <string.h>

static void bytes_name(struct json_out *o, const char *bytes, size_t n)
{
    struct json_out name = { 0 };
    char hex[8];
    json_out_raw(&name, "bytes:", 6);
    for (size_t i = 0; i < n; i++) {
        snprintf(hex, sizeof hex, "\\x%02x", (unsigned char)bytes[i]);
        json_out_raw(&name, hex, 4);
    }
    json_out_string(o, name.data, name.n);
    o->failed |= name.failed;
    json_out_deinit(&name);
}

void score_out_token(struct json_out *o, const struct api *a, int32_t id, bool as_ids)
{
    size_t n;
    const char *bytes = tokenizer_bytes(a->o.tokenizer, id, &n);
    if (as_ids) {
        char name[32];
        snprintf(name, sizeof name, "token_id:%d", id);
        json_out_text(o, name);
    } else if (utf8_valid_prefix(bytes, n) == n && !memchr(bytes, 0, n)) {
        json_out_string(o, bytes, n);
    } else {
        bytes_name(o, bytes, n);
    }
}

static void chat_entry(struct json_out *o, const struct api *a, int32_t id, float logprob, bool as_ids)
{
    size_t n;
    const char *bytes = tokenizer_bytes(a->o.tokenizer, id, &n);
    json_out_key(o, "token");
    score_out_token(o, a, id, as_ids);
    json_out_key(o, "logprob");
    json_out_float(o, logprob);
    json_out_key_open(o, "bytes", '[');
    for (size_t i = 0; i < n; i++) json_out_int(o, (unsigned char)bytes[i]);
    json_out_close(o, ']');
}

void score_out_chat(struct json_out *o, const struct api *a, const struct score_list *l, size_t from,
                    bool as_ids)
{
    json_out_open(o, '[');
    for (size_t i = from; i < l->n; i++) {
        const struct score *s = &l->items[i];
        json_out_open(o, '{');
        chat_entry(o, a, s->id, s->logprob, as_ids);
        json_out_key_open(o, "top_logprobs", '[');
        for (size_t k = 0; k < s->n_top; k++) {
            json_out_open(o, '{');
            chat_entry(o, a, l->top[s->top + k].id, l->top[s->top + k].logprob, as_ids);
            json_out_close(o, '}');
        }
        json_out_close(o, ']');
        json_out_close(o, '}');
    }
    json_out_close(o, ']');
}

/* The best tokens of a place, then the token itself where it is not among them; NULL ends. */
static const struct token_score *place(const struct score_list *l, const struct score *s, size_t best,
                                       size_t k, struct token_score *own)
{
    size_t n = s->n_top < best ? s->n_top : best;
    if (k < n) return &l->top[s->top + k];
    if (k > n) return NULL;
    for (size_t i = 0; i < n; i++)
        if (l->top[s->top + i].id == s->id) return NULL;
    *own = (struct token_score){ s->id, s->logprob };
    return own;
}

static void map_of(struct json_out *o, const struct api *a, const struct score_list *l, const struct score *s,
                   int best, bool as_ids)
{
    struct token_score own;
    const struct token_score *t;
    if (!s->has_score) {
        json_out_null(o);
        return;
    }
    json_out_open(o, '{');
    for (size_t k = 0; (t = place(l, s, (size_t)best, k, &own)); k++) {
        score_out_token(o, a, t->id, as_ids);
        json_out_raw(o, ":", 1);
        o->needs_comma = false;
        json_out_float(o, t->logprob);
    }
    json_out_close(o, '}');
}

static int64_t characters(const struct api *a, int32_t id)
{
    size_t n;
    const char *bytes = tokenizer_bytes(a->o.tokenizer, id, &n);
    int64_t count = 0;
    for (size_t i = 0; i < n; i++) count += ((unsigned char)bytes[i] & 0xc0) != 0x80;
    return count;
}

enum column { TOKENS, LOGPROBS, MAPS, OFFSETS };

static void column(struct json_out *o, const struct api *a, const struct score_range *r, enum column what,
                   bool as_ids, int64_t *offset)
{
    if (!r->list) return;
    for (size_t i = r->from; i < r->list->n; i++) {
        const struct score *s = &r->list->items[i];
        switch (what) {
        case TOKENS: score_out_token(o, a, s->id, as_ids); break;
        case LOGPROBS:
            if (s->has_score)
                json_out_float(o, s->logprob);
            else
                json_out_null(o);
            break;
        case MAPS: map_of(o, a, r->list, s, r->best, as_ids); break;
        case OFFSETS:
            json_out_int(o, *offset);
            *offset += characters(a, s->id);
            break;
        }
    }
}

void score_out_completions(struct json_out *o, const struct api *a, const struct score_range ranges[2],
                           bool as_ids, int64_t *offset)
{
    static const char *const names[] = { "tokens", "token_logprobs", "top_logprobs", "text_offset" };
    json_out_open(o, '{');
    for (int what = TOKENS; what <= OFFSETS; what++) {
        json_out_key_open(o, names[what], '[');
        for (int i = 0; i < 2; i++) column(o, a, &ranges[i], (enum column)what, as_ids, offset);
        json_out_close(o, ']');
    }
    json_out_close(o, '}');
}

static void prompt_entry(struct json_out *o, const struct api *a, const struct token_score *t, int64_t rank)
{
    char id[16];
    snprintf(id, sizeof id, "%d", t->id);
    json_out_key_open(o, id, '{');
    json_out_key(o, "logprob");
    json_out_float(o, t->logprob);
    json_out_key_int(o, "rank", rank);
    json_out_key(o, "decoded_token");
    score_out_token(o, a, t->id, false);
    json_out_close(o, '}');
}

void score_out_prompt(struct json_out *o, const struct api *a, const struct score_list *l, int best)
{
    json_out_open(o, '[');
    for (size_t i = 0; i < l->n; i++) {
        const struct score *s = &l->items[i];
        struct token_score own;
        const struct token_score *t;
        if (!s->has_score) {
            json_out_null(o);
            continue;
        }
        json_out_open(o, '{');
        for (size_t k = 0; (t = place(l, s, (size_t)best, k, &own)); k++)
            prompt_entry(o, a, t, t->id == s->id ? s->rank : (int64_t)k + 1);
        json_out_close(o, '}');
    }
    json_out_close(o, ']');
}
