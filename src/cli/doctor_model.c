#include "base/clock.h"
#include "cli/doctor.h"
#include "cli/plan.h"
#include "eval/load_http.h"
#include "tokenizer/chat.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/vfs.h>
#include <unistd.h>

enum {
    NETWORK_NFS = 0x6969,
    NETWORK_FUSE = 0x65735546,
    NETWORK_SMB2 = (int)0xFE534D42,
    NETWORK_9P = 0x01021997
};
static const double UTILIZATION = 0.92; /* quench serve's */

static void say_checkpoint(struct doctor *d, const struct checkpoint *c)
{
    char bytes[32];
    uint64_t sum = 0;
    for (size_t i = 0; i < c->n_tensors; i++) sum += c->tensors[i]->bytes;
    doctor_say(d, DOCTOR_OK, "checkpoint", NULL, "%zu tensors, %s in %d file%s%s%s", c->n_tensors,
               common_bytes(bytes, sizeof bytes, sum), c->n_shards, c->n_shards == 1 ? "" : "s",
               c->config.has_vision ? ", vision tower" : ", no vision tower",
               c->config.mtp_layers ? ", MTP head" : ", no MTP head");
    bool promised = c->config.mtp_layers > 0, has = false;
    for (size_t i = 0; i < c->n_tensors; i++) has = has || strncmp(c->tensors[i]->name, "mtp.", 4) == 0;
    if (promised && !has)
        doctor_say(d, DOCTOR_WARN, "MTP head", "quench merge-mtp MODEL --from SOURCE brings it back",
                   "config.json promises one, the tensors are missing: no drafts");
}

static bool render_once(const struct chat_template *t, char **text, struct err *e)
{
    size_t bytes;
    json_t *messages = json_pack("[{s:s, s:s}, {s:s, s:s}]", "role", "system", "content", "Be brief.", "role",
                                 "user", "content", "Hello.");
    struct chat_options o = { .add_generation_prompt = true };
    bool ok = messages ? chat_render(text, &bytes, t, messages, NULL, &o, e) : err_memory(e, "messages", 0);
    json_decref(messages);
    return ok;
}

/* Tokens of a rendered conversation, in the model's vocabulary. */
static bool check_text(struct doctor *d, const struct checkpoint *c, struct err *e)
{
    struct tokenizer *tokenizer = NULL;
    struct chat_template *template = NULL;
    struct token_list l = { 0 };
    char *text = NULL;
    int32_t stops[16];
    int n_stops = 0;
    bool ok = tokenizer_load(&tokenizer, d->model, e) && chat_template_load(&template, d->model, e) &&
              render_once(template, &text, e) && tokenizer_encode(tokenizer, &l, text, strlen(text), 0, e) &&
              checkpoint_eos_tokens(c, stops, 16, &n_stops, e);
    for (size_t i = 0; ok && i < l.n; i++)
        ok = l.ids[i] < c->config.vocab_size ||
             err_set(e, ERR_FORMAT, "the tokenizer gives token %d, the model has %lld", l.ids[i],
                     (long long)c->config.vocab_size);
    if (ok)
        doctor_say(d, n_stops ? DOCTOR_OK : DOCTOR_WARN, "chat",
                   n_stops ? NULL : "put eos_token_id into generation_config.json: answers will not end",
                   "a conversation renders to %zu tokens by %s; %d stop token%s", l.n,
                   chat_template_is_built_in(template) ? "the built-in template"
                                                       : "the checkpoint's template",
                   n_stops, n_stops == 1 ? "" : "s");
    free(text);
    free(l.ids);
    chat_template_free(template);
    tokenizer_free(tokenizer);
    return ok;
}

static void say_fit(struct doctor *d, const struct checkpoint *c)
{
    struct plan one, all;
    char weights[32], budget[32];
    struct err e = { 0 };
    struct plan_options o = { .checkpoint = c,
                              .backend = &d->backend,
                              .kv = common_kv_dtype(d->common, &d->backend),
                              .sequences = 1,
                              .utilization = UTILIZATION };
    if (!plan_make(&one, &o, &e)) {
        doctor_say(d, DOCTOR_FAIL, "fits",
                   "a machine with more memory, or a quantized checkpoint (quench quantize)", "%s", e.text);
        return;
    }
    o.sequences = 0;
    o.context = one.context < 32768 ? one.context : 32768;
    bool many = plan_make(&all, &o, &e);
    bool whole = one.context == c->config.max_position_embeddings;
    const char *less =
        d->backend.kv_int8
            ? "--kv-cache-dtype int8 takes a quarter of f32; or serve a shorter --max-model-len"
            : "--kv-cache-dtype fp8 takes half of bf16; or serve a shorter --max-model-len";
    doctor_say(d, whole ? DOCTOR_OK : DOCTOR_WARN, "fits", whole ? NULL : less,
               "weights %s of %s; one sequence of %lld tokens%s, or %lld of %lld",
               common_bytes(weights, sizeof weights, one.weights),
               common_bytes(budget, sizeof budget, one.budget), (long long)one.context,
               whole ? ", all the model allows" : "", many ? (long long)all.sequences : 0,
               (long long)o.context);
}

/* Bytes of the shard that are in the page cache. */
static uint64_t cached_bytes(const struct safetensors *s)
{
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE), n = (s->map.bytes + page - 1) / page, cached = 0;
    unsigned char *there = malloc(n ? n : 1);
    if (there && s->map.data && mincore((void *)(uintptr_t)s->map.data, s->map.bytes, there) == 0)
        for (uint64_t i = 0; i < n; i++) cached += (there[i] & 1) * page;
    free(there);
    return cached;
}

static void say_storage(struct doctor *d, const struct checkpoint *c)
{
    struct statfs f;
    uint64_t cached = 0, all = 0;
    char a[32], b[32];
    for (int i = 0; i < c->n_shards; i++) {
        cached += cached_bytes(&c->shards[i]);
        all += c->shards[i].map.bytes;
    }
    int kind = statfs(d->model, &f) == 0 ? (int)f.f_type : 0;
    bool far = kind == NETWORK_NFS || kind == NETWORK_FUSE || kind == NETWORK_SMB2 || kind == NETWORK_9P;
    doctor_say(d, far ? DOCTOR_WARN : DOCTOR_OK, "page cache",
               far ? "copy the checkpoint to a local disk" : NULL, "%s of %s are in memory already%s",
               common_bytes(a, sizeof a, cached < all ? cached : all), common_bytes(b, sizeof b, all),
               far ? "; the folder is on a network's file system" : "");
}

void doctor_model(struct doctor *d)
{
    struct checkpoint c = { 0 };
    struct err e = { 0 };
    if (!checkpoint_open(&c, d->model, &e)) {
        doctor_say(d, DOCTOR_FAIL, "checkpoint", "quench verify MODEL says more; download the folder again",
                   "%s", e.text);
        return;
    }
    say_checkpoint(d, &c);
    if (!check_text(d, &c, &e))
        doctor_say(d, DOCTOR_FAIL, "chat", "take tokenizer and template files from the model's source", "%s",
                   e.text);
    if (d->backend.ops) say_fit(d, &c);
    say_storage(d, &c);
    checkpoint_close(&c);
}

/* The answer's status; 0: none, and why. */
static int ask(struct load_http *h, const char *path, json_t **out, struct err *e)
{
    int status = 0;
    char *body;
    *out = NULL;
    if (!load_http_get(h, path, &status, &body, e)) return 0;
    *out = json_loads(body, 0, NULL);
    free(body);
    return status;
}

static void say_failure(struct doctor *d, const char *check, const char *path, int status,
                        const struct err *e)
{
    if (status)
        doctor_say(d, DOCTOR_FAIL, check, NULL, "%s: HTTP status %d", path, status);
    else
        doctor_say(d, DOCTOR_FAIL, check, NULL, "%s", e->text);
}

static void say_models(struct doctor *d, struct load_http *h)
{
    json_t *o;
    struct err e = { 0 };
    int status = ask(h, "/v1/models", &o, &e);
    const json_t *first = json_array_get(json_object_get(o, "data"), 0);
    const char *id = json_string_value(json_object_get(first, "id"));
    json_int_t most = json_integer_value(json_object_get(first, "max_model_len"));
    if (status == 200 && id && most)
        doctor_say(d, DOCTOR_OK, "models", NULL, "%s, up to %lld tokens", id, (long long)most);
    else if (status == 200 && id)
        doctor_say(d, DOCTOR_OK, "models", NULL, "%s", id);
    else if (status == 401)
        doctor_say(d, getenv("OPENAI_API_KEY") ? DOCTOR_FAIL : DOCTOR_WARN, "models",
                   "put a key of the server's into OPENAI_API_KEY", "the server asks for a key%s",
                   getenv("OPENAI_API_KEY") ? ", and not for this one" : "");
    else
        say_failure(d, "models", "/v1/models", status, &e);
    json_decref(o);
}

void doctor_server(struct doctor *d)
{
    struct load_http *h;
    struct err e = { 0 };
    json_t *o;
    const char *key = getenv("OPENAI_API_KEY");
    struct load_http_options options = { .url = d->url, .key = key && *key ? key : NULL };
    if (!load_http_create(&h, &options, &e)) {
        doctor_say(d, DOCTOR_FAIL, "server", "is it running, and does it listen at that address?", "%s",
                   e.text);
        return;
    }
    double begin = clock_seconds();
    int status = ask(h, "/health", &o, &e);
    double seconds = clock_seconds() - begin;
    json_decref(o);
    if (status == 200)
        doctor_say(d, DOCTOR_OK, "server", NULL, "alive, answers in %.1f ms", 1e3 * seconds);
    else
        say_failure(d, "server", "/health", status, &e);
    status = ask(h, "/ready", &o, &e);
    json_decref(o);
    if (status == 200 || status == 503)
        doctor_say(d, status == 200 ? DOCTOR_OK : DOCTOR_WARN, "ready",
                   status == 200 ? NULL : "it loads, drains or stands still; its log says which", "%s",
                   status == 200 ? "takes requests" : "takes no requests now");
    if (status != 503) say_models(d, h);
    load_http_free(h);
}
