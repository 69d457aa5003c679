/* quench serve MODEL */
#include "base/clock.h"
#include "base/file.h"
#include "cli/commands.h"
#include "cli/common.h"
#include "cli/plan.h"
#include "cli/serve_compat.h"
#include "image/isolated.h"
#include "quantize/source.h"
#include "quantize/verify.h"
#include "server/crash.h"
#include "server/page.h"
#include "server/server.h"
#include <ctype.h>
#include <math.h>
#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct command command = {
    "serve",
    "MODEL",
    "Answers the OpenAI and Anthropic APIs over HTTP. Flags are vLLM's; each may also stand in the "
    "environment\n"
    "(--max-model-len as QUENCH_MAX_MODEL_LEN) or in the YAML file of --config (max-model-len: 32768).\n"
    "SIGTERM: no new requests, those that run are finished. SIGHUP: keys, certificates and log are read "
    "again.",
    -1,
};

/* vLLM's names of KV dtypes, and what they are here. */
static const char *const kv_names[] = { "auto",     "f32", "float32",  "bf16",
                                        "bfloat16", "fp8", "fp8_e4m3", "int8_per_token_head",
                                        "int8",     NULL };
static const int kv_of[] = { 0, 1, 1, 2, 2, 3, 3, 4, 4 };

static const char *const generation_sources[] = { "auto", "vllm", NULL };

struct settings {
    struct common common;
    const char *model;
    bool print_config;
    const char *config;
    /* where */
    const char *host, *uds, *root_path, *admin, *admin_key;
    int64_t port;
    bool open_bind;
    /* who */
    const char *certificate, *certificate_key, *key_password, *client_ca, *key_file;
    int64_t client_certificates;
    struct text_list keys, origins, media_hosts;
    bool public_metrics;
    /* the model */
    struct text_list names;
    const char *context_text, *step_text, *memory_text, *host_cache_text, *disk_cache_text;
    int64_t sequences, mtp, queued, stream_interval;
    double utilization, decode_ms, encoder_cache_gb;
    int kv;
    bool prefix_caching, language_only, strict;
    const char *local_media;
    bool deterministic, verify;
    int generation_source;
    const char *template_file, *template_kwargs, *generation, *media;
    /* limits */
    const char *header_text, *body_text, *store_text;
    int64_t headers, connections, key_requests, key_tokens, queued_tokens;
    double header_seconds, body_seconds, idle_seconds, send_seconds, comment_seconds, stall_seconds,
        shutdown_seconds, store_seconds, request_seconds;
    const char *log, *crash_log;
    /* read from the above */
    uint64_t context, step_tokens, memory, host_cache, disk_bytes, header_bytes, body_bytes, store_bytes;
    char *disk_folder;
    int drafts, max_images, max_videos; /* as api_options has them */
    json_t *kwargs, *override;
};

/* "32768", "32k" (thousands), "32K" (1024s), "20G"; vLLM's reading of sizes. */
static bool read_size(uint64_t *out, const char *flag, const char *text, struct err *e)
{
    static const struct {
        char unit;
        double factor;
    } units[] = { { 0, 1 },      { 'k', 1e3 },     { 'm', 1e6 },       { 'g', 1e9 },
                  { 'K', 1024 }, { 'M', 1048576 }, { 'G', 1073741824 } };
    char *end;
    if (!text) return true;
    double x = strtod(text, &end), factor = 0;
    for (size_t i = 0; i < sizeof units / sizeof *units; i++)
        if (*end == units[i].unit) factor = units[i].factor;
    if (isdigit((unsigned char)*text) && factor > 0 && (!*end || !end[1]) && x * factor <= 1e15) {
        *out = (uint64_t)(x * factor);
        return true;
    }
    return err_set(e, ERR_ARGUMENT, "%s: expected a size such as 4096, 32k or 20G, found '%s'", flag, text);
}

/* FOLDER, or FOLDER:SIZE. */
static bool read_disk_cache(struct settings *s, struct err *e)
{
    const char *text = s->disk_cache_text, *colon = text ? strrchr(text, ':') : NULL;
    s->disk_bytes = (uint64_t)16 << 30;
    if (!text) return true;
    if (colon == text || !*text)
        return err_set(e, ERR_ARGUMENT, "--disk-cache: expected FOLDER or FOLDER:SIZE");
    if (colon && !read_size(&s->disk_bytes, "--disk-cache", colon + 1, e)) return false;
    s->disk_folder = colon ? strndup(text, (size_t)(colon - text)) : strdup(text);
    return s->disk_folder || err_memory(e, "--disk-cache", strlen(text));
}

static bool read_json(json_t **out, const char *flag, const char *text, struct err *e)
{
    json_error_t fault;
    if (!text) return true;
    *out = json_loads(text, JSON_REJECT_DUPLICATES, &fault);
    if (!*out) return err_set(e, ERR_ARGUMENT, "%s: not JSON: %s", flag, fault.text);
    return json_is_object(*out) || err_set(e, ERR_ARGUMENT, "%s: expected an object", flag);
}

/* A count of `o`; what is not there counts as it did. */
static bool read_count(long long *out, const json_t *o, const char *key)
{
    const json_t *v = json_object_get(o, key);
    if (v) *out = json_is_integer(v) ? json_integer_value(v) : -1;
    return *out >= 0 && *out <= 1000;
}

/* {"image": 4, "video": 1}, or image=4 as vLLM once had it. */
static bool read_media(struct settings *s, struct err *e)
{
    json_t *o = NULL;
    long long images = -1, videos;
    if (!s->media) return true;
    bool ok =
        sscanf(s->media, "image=%lld", &images) == 1 || read_json(&o, "--limit-mm-per-prompt", s->media, e);
    if (json_object_get(o, "video")) images = 16;
    bool counts = ok && read_count(&images, o, "image");
    videos = images ? 4 : 0;
    if (ok && !(counts && read_count(&videos, o, "video")))
        ok = err_set(e, ERR_ARGUMENT, "--limit-mm-per-prompt: expected '{\"image\": N, \"video\": N}'");
    json_decref(o);
    if (!ok) return false;
    s->max_images = images ? (int)images : -1;
    s->max_videos = videos ? (int)videos : -1;
    s->language_only = s->language_only || images + videos == 0;
    return true;
}

static bool check_ranges(const struct settings *s, struct err *e)
{
    const struct {
        const char *flag;
        double value, least, most;
    } ranges[] = {
        { "--port", (double)s->port, 0, 65535 },
        { "--max-num-seqs", (double)s->sequences, 0, 4096 },
        { "--mtp", (double)s->mtp, 0, DRAFTS_MAX },
        { "--max-queued", (double)s->queued, 0, 1 << 20 },
        { "--stream-interval", (double)s->stream_interval, 0, INT32_MAX },
        { "--gpu-memory-utilization", s->utilization, 0, 1 },
        { "--decode-target-ms", s->decode_ms, 0, 1e5 },
        { "--mm-processor-cache-gb", s->encoder_cache_gb, 0, 1e5 },
        { "--max-headers", (double)s->headers, 1, HTTP_HEADERS_MAX },
        { "--max-connections", (double)s->connections, 1, 1 << 20 },
        { "--max-header-bytes", (double)s->header_bytes, 256, 16 << 20 },
        { "--max-body-bytes", (double)s->body_bytes, 1, 4e9 },
        { "--header-timeout", s->header_seconds, 0.001, 1e6 },
        { "--body-timeout", s->body_seconds, 0.001, 1e6 },
        { "--idle-timeout", s->idle_seconds, 0.001, 1e6 },
        { "--send-timeout", s->send_seconds, 0.001, 1e6 },
        { "--comment-interval", s->comment_seconds, 0.001, 1e6 },
        { "--stall-timeout", s->stall_seconds, 0.001, 1e6 },
        { "--shutdown-timeout", s->shutdown_seconds, 0, 1e6 },
        { "--request-timeout", s->request_seconds, 0, 1e6 },
        { "--max-requests-per-key", (double)s->key_requests, 0, 1 << 20 },
        { "--max-queued-tokens-per-key", (double)s->key_tokens, 0, 1e12 },
        { "--max-queued-tokens", (double)s->queued_tokens, 0, 1e12 },
        { "--response-store", (double)s->store_bytes, 0, 1e12 },
        { "--response-store-age", s->store_seconds, 1, 1e9 },
        { "--ssl-cert-reqs", (double)s->client_certificates, 0, 2 },
    };
    for (size_t i = 0; i < sizeof ranges / sizeof *ranges; i++)
        if (!(ranges[i].value >= ranges[i].least && ranges[i].value <= ranges[i].most))
            return err_set(e, ERR_ARGUMENT, "%s: expected %g to %g, found %g", ranges[i].flag,
                           ranges[i].least, ranges[i].most, ranges[i].value);
    return true;
}

static bool read_drafts(struct settings *s, struct err *e)
{
    if (s->mtp && s->common.speculative)
        return err_set(e, ERR_ARGUMENT, "--mtp and --speculative-config: one of them is enough");
    if (!s->mtp) return common_drafts(&s->drafts, &s->common, s->model, e);
    s->drafts = (int)s->mtp;
    return true;
}

static bool check_tls(const struct settings *s, struct err *e)
{
    if (s->client_certificates == 1)
        return err_set(e, ERR_UNSUPPORTED,
                       "--ssl-cert-reqs: 1 (optional) is not supported; 0 or 2 (required)");
    return s->client_certificates != 2 || s->client_ca ||
           err_set(e, ERR_ARGUMENT, "--ssl-cert-reqs 2 needs --ssl-ca-certs");
}

/* vLLM's lists of origins are JSON; words are fine too. */
static bool read_origins(struct settings *s, json_t **keep, struct err *e)
{
    if (s->origins.n != 1 || s->origins.items[0][0] != '[') return true;
    json_t *list = *keep = json_loads(s->origins.items[0], 0, NULL);
    size_t n = json_array_size(list);
    bool ok = list && n <= TEXT_LIST_MAX;
    for (size_t i = 0; ok && i < n; i++) ok = json_is_string(json_array_get(list, i));
    if (!ok) return err_set(e, ERR_ARGUMENT, "--allowed-origins: expected up to %d origins", TEXT_LIST_MAX);
    s->origins.n = (int)n;
    for (size_t i = 0; i < n; i++) s->origins.items[i] = json_string_value(json_array_get(list, i));
    return true;
}

static bool check(struct settings *s, json_t **origins, struct err *e)
{
    bool fits =
        s->context_text && (strcmp(s->context_text, "auto") == 0 || strcmp(s->context_text, "-1") == 0);
    s->common.kv = kv_of[s->kv];
    return (fits || read_size(&s->context, "--max-model-len", s->context_text, e)) &&
           read_size(&s->step_tokens, "--max-num-batched-tokens", s->step_text, e) &&
           read_size(&s->memory, "--memory", s->memory_text, e) &&
           read_size(&s->host_cache, "--host-cache", s->host_cache_text, e) && read_disk_cache(s, e) &&
           read_size(&s->header_bytes, "--max-header-bytes", s->header_text, e) &&
           read_size(&s->body_bytes, "--max-body-bytes", s->body_text, e) &&
           read_size(&s->store_bytes, "--response-store", s->store_text, e) && check_ranges(s, e) &&
           check_tls(s, e) && read_drafts(s, e) && read_media(s, e) && read_origins(s, origins, e) &&
           read_json(&s->kwargs, "--default-chat-template-kwargs", s->template_kwargs, e) &&
           read_json(&s->override, "--override-generation-config", s->generation, e);
}

/* What a server says while it runs. */

static void note(void *ctx, const char *text)
{
    (void)ctx;
    fprintf(stderr, "quench serve: %s\n", text);
}

static void quit(void *ctx)
{
    (void)ctx;
    _exit(0); /* nothing was asked yet, and loading cannot be interrupted otherwise */
}

/* Progress of loading, on the terminal and for /ready. */
struct watcher {
    struct report terminal;
    struct server *server;
};

static void watch_progress(void *ctx, const char *what, uint64_t done, uint64_t total)
{
    const struct watcher *w = ctx;
    server_loading(w->server, what, done, total);
    report_progress(&w->terminal, what, done, total);
}

static void watch_warn(void *ctx, const char *text)
{
    const struct watcher *w = ctx;
    if (w->terminal.warn) w->terminal.warn(w->terminal.ctx, text);
}

static bool start_server(struct server **out, const struct settings *s, struct err *e)
{
    static char policy[PAGE_POLICY_MAX]; /* borrowed by the server */
    struct server_options o = { .host = s->host,
                                .port = (int)s->port,
                                .uds = s->uds,
                                .open_bind = s->open_bind,
                                .root_path = s->root_path,
                                .tls = { s->certificate, s->certificate_key, s->key_password, s->client_ca },
                                .keys = s->keys.items,
                                .n_keys = s->keys.n,
                                .key_file = s->key_file,
                                .public_metrics = s->public_metrics,
                                .admin = s->admin,
                                .admin_key = s->admin_key,
                                .origins = s->origins.items,
                                .n_origins = s->origins.n,
                                .max_header_bytes = s->header_bytes,
                                .max_headers = (int)s->headers,
                                .max_body_bytes = s->body_bytes,
                                .max_connections = (int)s->connections,
                                .header_seconds = s->header_seconds,
                                .body_seconds = s->body_seconds,
                                .idle_seconds = s->idle_seconds,
                                .send_seconds = s->send_seconds,
                                .comment_seconds = s->comment_seconds,
                                .stall_seconds = s->stall_seconds,
                                .shutdown_seconds = s->shutdown_seconds > 0 ? s->shutdown_seconds : -1,
                                .request_seconds = s->request_seconds,
                                .max_key_requests = s->key_requests,
                                .max_key_tokens = s->key_tokens,
                                .max_queued_tokens = s->queued_tokens,
                                .request_log = s->log,
                                .model_name = s->names.items[0],
                                .version = cli_version,
                                .page = page_policy(policy) ? page_html : NULL,
                                .page_bytes = page_html_bytes,
                                .page_policy = policy,
                                .note = note,
                                .quit = quit };
    return server_start(out, &o, e);
}

/* What a start takes its time for. */
enum stage { STAGE_FILES, STAGE_WEIGHTS, STAGE_MEMORY, STAGE_REST };
enum { STAGES = STAGE_REST + 1 };

/* All that answers requests, in the order it is made. */
struct service {
    struct backend backend;
    struct opened opened;
    struct engine *engine;
    struct scheduler *scheduler;
    struct chat_template *template;
    struct api *api;
    struct local_media local_media;
    struct image_limits images;
    struct token_list turn_end;
    uint32_t *known; /* bits: tokens that have a text */
    double seconds[STAGES];
};

static bool sees(const struct service *v, const struct settings *s)
{
    return v->opened.checkpoint.config.has_vision && !s->language_only;
}

static uint64_t encoder_cache(const struct service *v, const struct settings *s)
{
    return sees(v, s) ? (uint64_t)(s->encoder_cache_gb * (1 << 30)) : 0;
}

static bool make_plan(struct plan *p, const struct settings *s, const struct service *v, struct err *e)
{
    struct plan_options o = { .checkpoint = &v->opened.checkpoint,
                              .backend = &v->backend,
                              .kv = common_kv_dtype(&s->common, &v->backend),
                              .drafts = s->drafts,
                              .prefix_cache = s->prefix_caching,
                              .encoder_cache = encoder_cache(v, s),
                              .context = (int64_t)s->context,
                              .sequences = s->sequences,
                              .step_rows = (int64_t)s->step_tokens,
                              .budget = s->memory,
                              .utilization = s->utilization };
    if (!plan_make(p, &o, e)) return false;
    if (!s->common.quiet) plan_print(p, &o);
    return true;
}

static bool make_engine(struct service *v, const struct settings *s, const struct plan *p, struct err *e)
{
    struct engine_options o = { .context = p->context,
                                .sequences = (int)p->sequences,
                                .step_rows = (int64_t)s->step_tokens,
                                .kv = common_kv_dtype(&s->common, &v->backend),
                                .pages = p->pages,
                                .snapshots = (int)p->snapshots,
                                .drafts = s->drafts };
    return engine_create(&v->engine, &v->opened.model, &o, e);
}

/* All that the bits of what is kept in files depend on besides the prompt: the program, the weights, who
 * computes with them and how. */
static bool identify(uint8_t out[32], const struct service *v, const struct settings *s, struct err *e)
{
    char text[512];
    struct file_map program;
    const char *name = v->backend.name; /* less the number of threads */
    if (!file_map_open(&program, "/proc/self/exe", e)) return false;
    int n = snprintf(text, sizeof text, "|%016llx|%.*s|%d %d %d|%d",
                     (unsigned long long)source_digest(&v->opened.checkpoint), (int)strcspn(name, ","), name,
                     (int)common_kv_dtype(&s->common, &v->backend), s->common.fp4, s->common.inputs,
                     s->drafts > 0);
    EVP_MD_CTX *sha = EVP_MD_CTX_new();
    bool ok = sha && EVP_DigestInit_ex(sha, EVP_sha256(), NULL) == 1 &&
              EVP_DigestUpdate(sha, program.data, program.bytes) == 1 &&
              EVP_DigestUpdate(sha, text, (size_t)n) == 1 && EVP_DigestFinal_ex(sha, out, NULL) == 1;
    EVP_MD_CTX_free(sha);
    file_map_close(&program);
    return ok || err_set(e, ERR_MEMORY, "no memory for SHA-256");
}

static bool make_scheduler(struct service *v, const struct settings *s, struct server *server, struct err *e)
{
    static const char end[] = "<|im_end|>\n";
    if (!tokenizer_encode(v->opened.tokenizer, &v->turn_end, end, sizeof end - 1, 0, e) ||
        !sampled_tokens(&v->known, v->opened.tokenizer, v->opened.checkpoint.config.vocab_size, NULL, 0, e))
        return false;
    struct scheduler_options o = { .engine = v->engine,
                                   .model = &v->opened.model,
                                   .known = v->known,
                                   .max_queued = s->queued,
                                   .step_tokens = (int64_t)s->step_tokens,
                                   .decode_seconds = s->decode_ms / 1000,
                                   .images = &v->images,
                                   .no_pictures = s->language_only,
                                   .no_prefix_cache = !s->prefix_caching,
                                   .host_cache_bytes = s->host_cache,
                                   .encoder_cache_bytes = encoder_cache(v, s),
                                   .disk_folder = s->disk_folder,
                                   .disk_bytes = s->disk_bytes,
                                   .turn_end = v->turn_end.ids,
                                   .n_turn_end = (int)v->turn_end.n,
                                   .ctx = server,
                                   .wake = server_wake,
                                   .warn = note };
    if (s->disk_folder && !identify(o.disk_identity, v, s, e)) return false;
    return scheduler_create(&v->scheduler, &o, e);
}

static bool make_api(struct service *v, const struct settings *s, struct err *e)
{
    bool ok = s->template_file ? chat_template_load_file(&v->template, s->model, s->template_file, e)
                               : chat_template_load(&v->template, s->model, e);
    struct api_options o = { .scheduler = v->scheduler,
                             .tokenizer = v->opened.tokenizer,
                             .chat_template = v->template,
                             .config = &v->opened.checkpoint.config,
                             .dir = s->model,
                             .served_names = s->names.items,
                             .n_served_names = s->names.n,
                             .max_model_len = engine_context(v->engine),
                             .max_images = s->max_images,
                             .max_videos = s->max_videos,
                             .stream_interval = s->stream_interval,
                             .media_hosts = s->media_hosts.items,
                             .n_media_hosts = s->media_hosts.n,
                             .images = &v->images,
                             .local_media = s->local_media ? &v->local_media : NULL,
                             .strict_params = s->strict,
                             .chat_kwargs = s->kwargs,
                             .generation = s->override,
                             .neutral_sampling = s->generation_source == 1,
                             .store_bytes = s->store_bytes,
                             .store_seconds = s->store_seconds };
    return ok && api_create(&v->api, &o, e);
}

/* docs/numerics.md, Order of additions, has where this is not so. */
static bool check_deterministic(const struct service *v, const struct settings *s, struct err *e)
{
    if (!s->deterministic) return true;
    const char *name = v->backend.name;
    if (v->backend.few_differ && s->sequences > ROWS_EXACT)
        return err_set(
            e, ERR_UNSUPPORTED,
            "--deterministic: on a GPU the last bits of an answer depend on whether more than %d are "
            "generated; --max-num-seqs %d is the most",
            ROWS_EXACT, ROWS_EXACT);
    return !strstr(name, "amx") ||
           err_set(e, ERR_UNSUPPORTED,
                   "--deterministic: AMX adds in its own order; --cpu-mask avx512bf16 leaves it out");
}

static bool check_model(struct service *v, const struct settings *s, const struct report *report,
                        struct err *e)
{
    struct verify_result r = { 0 };
    struct verify_options o = {
        .path = s->model, .threads = (int)s->common.threads, .backend = &v->backend, .report = report
    };
    if (!s->verify) return true;
    bool ok = verify_run(&r, &o, e);
    long long n = ok ? (long long)verify_faults(&r) : 0;
    verify_deinit(&r);
    return ok && (n == 0 || err_set(e, ERR_FORMAT,
                                    "--verify: the checkpoint has faults (%lld); quench verify %s says which",
                                    n, s->model));
}

/* Images are decoded where they can do no harm, if this machine lets a process have no rights. */
static void isolate_images(struct service *v, const struct settings *s)
{
    static const char self[] = "/proc/self/exe";
    struct err e = { 0 };
    if (!sees(v, s)) return;
    if (isolated_works(self, &e))
        v->images.program = self;
    else
        fprintf(stderr,
                "quench serve: warning: images are decoded in this process, not one without rights: %s\n",
                e.text);
}

static bool ends(struct service *v, enum stage stage, double *begin)
{
    double now = clock_seconds();
    v->seconds[stage] = now - *begin;
    *begin = now;
    return true;
}

static bool load(struct service *v, const struct settings *s, struct server *server, struct err *e)
{
    struct watcher w = { common_report(&s->common), server };
    struct report report = { &w, watch_progress, watch_warn };
    struct plan plan;
    double begin = clock_seconds();
    bool ok = common_start(&v->backend, &v->opened, &s->common, s->model, e) &&
              check_deterministic(v, s, e) && check_model(v, s, &report, e) && make_plan(&plan, s, v, e) &&
              ends(v, STAGE_FILES, &begin) && common_bind(&v->opened, &v->backend, &report, e) &&
              common_bind_mtp(&v->opened, s->drafts, e) && ends(v, STAGE_WEIGHTS, &begin) &&
              make_engine(v, s, &plan, e) && ends(v, STAGE_MEMORY, &begin);
    v->opened.model.report = NULL; /* lives as long as this function; pictures of requests report nothing */
    if (ok) isolate_images(v, s);
    return ok && make_scheduler(v, s, server, e) && make_api(v, s, e) && ends(v, STAGE_REST, &begin);
}

static void unload(struct service *v)
{
    api_free(v->api);
    scheduler_free(v->scheduler);
    chat_template_free(v->template);
    engine_free(v->engine);
    free(v->turn_end.ids);
    free(v->known);
    common_close(&v->opened);
    backend_destroy(&v->backend);
    local_media_close(&v->local_media);
}

static bool run(struct settings *s, struct err *e)
{
    struct server *server;
    struct service v = { 0 };
    double begin = clock_seconds();
    if (s->local_media && !local_media_open(&v.local_media, s->local_media, e))
        return err_note(e, "--allowed-local-media-path");
    if (!crash_arm(s->crash_log, cli_version, e)) return false;
    if (!start_server(&server, s, e)) {
        crash_disarm();
        return false;
    }
    for (int i = 0; i < s->media_hosts.n; i++)
        if (strcmp(s->media_hosts.items[i], "*") == 0)
            fprintf(stderr,
                    "quench serve: warning: --allowed-media-domains '*': whoever may ask makes this machine "
                    "fetch from any public address\n");
    fprintf(stderr, "quench serve: listening at %s, loading %s\n", server_address(server), s->model);
    if (s->admin) fprintf(stderr, "quench serve: administration at %s\n", server_admin_address(server));
    bool ok = load(&v, s, server, e);
    if (ok) {
        server_attach(server, v.api, v.scheduler);
        fprintf(
            stderr,
            "quench serve: ready after %.1f s (device and files %.1f, weights %.1f, memory %.1f, rest %.1f): "
            "%s, %lld tokens\n",
            clock_seconds() - begin, v.seconds[STAGE_FILES], v.seconds[STAGE_WEIGHTS],
            v.seconds[STAGE_MEMORY], v.seconds[STAGE_REST], v.backend.name,
            (long long)engine_context(v.engine));
        if (s->store_bytes)
            fprintf(stderr, "quench serve: keeps responses of /v1/responses: at most %.1f MB, for %.0f s\n",
                    (double)s->store_bytes / 1e6, s->store_seconds);
        ok = server_wait(server) || err_set(e, ERR_BUSY, "stopped before every request was answered");
    } else
        server_stop(server);
    server_wait(server);
    unload(&v);
    server_free(server);
    crash_disarm();
    return ok;
}

enum { FLAGS_MAX = SETTINGS_FLAGS_MAX };

/* The table, with rows of other servers behind those shown. */
static void make_flags(struct flag *out, struct settings *s, struct compat *compat)
{
    const struct flag flags[] = {
        { "--host", 0, FLAG_TEXT, &s->host, "ADDRESS", "to listen at (default 127.0.0.1: this machine only)",
          NULL },
        { "--port", 0, FLAG_INT, &s->port, "N", "default 8000; 0: one that is free, which is printed", NULL },
        { "--uds", 0, FLAG_TEXT, &s->uds, "PATH", "listen at a Unix socket instead", NULL },
        { "--allow-open-bind", 0, FLAG_SWITCH, &s->open_bind, NULL, "other machines may ask without a key",
          NULL },
        { "--root-path", 0, FLAG_TEXT, &s->root_path, "PATH", "what a proxy puts in front of paths", NULL },
        { "--api-key", 0, FLAG_WORDS, &s->keys, "KEY...", "requests need one of these keys", NULL },
        { "--api-key-file", 0, FLAG_TEXT, &s->key_file, "FILE", "the same, one a line; SIGHUP reads it again",
          NULL },
        { "--public-metrics", 0, FLAG_SWITCH, &s->public_metrics, NULL, "/metrics needs no key", NULL },
        { "--admin-listen", 0, FLAG_TEXT, &s->admin, "PORT|PATH",
          "pause, cancel, reset, reload: a port of 127.0.0.1 or a Unix socket (default none)", NULL },
        { "--admin-key", 0, FLAG_TEXT, &s->admin_key, "KEY", "which that needs; none of the API's", NULL },
        { "--allowed-origins", 0, FLAG_WORDS, &s->origins, "ORIGIN...",
          "web pages that may ask (default none; * all)", NULL },
        { "--ssl-certfile", 0, FLAG_TEXT, &s->certificate, "FILE", "TLS: certificate chain, PEM", NULL },
        { "--ssl-keyfile", 0, FLAG_TEXT, &s->certificate_key, "FILE", "TLS: its key", NULL },
        { "--ssl-keyfile-password", 0, FLAG_TEXT, &s->key_password, "TEXT", "TLS: the key's password", NULL },
        { "--ssl-ca-certs", 0, FLAG_TEXT, &s->client_ca, "FILE",
          "clients need a certificate of these authorities", NULL },
        { "--ssl-cert-reqs", 0, FLAG_INT, &s->client_certificates, "N", "2 insists on --ssl-ca-certs", NULL },
        { "--served-model-name", 0, FLAG_WORDS, &s->names, "NAME...",
          "names that requests may give; the first is in answers (default MODEL)", NULL },
        { "--max-model-len", 0, FLAG_TEXT, &s->context_text, "N|auto",
          "tokens of prompt and answer (default auto: what fits, up to the model's)", NULL },
        { "--max-num-seqs", 0, FLAG_INT, &s->sequences, "N",
          "requests at a time (default: what fits, up to 32)", NULL },
        { "--max-num-batched-tokens", 0, FLAG_TEXT, &s->step_text, "N",
          "most tokens of a step, prompts' pieces included", NULL },
        { "--max-queued", 0, FLAG_INT, &s->queued, "N", "requests that may wait (default 1024); then 503",
          NULL },
        { "--max-queued-tokens", 0, FLAG_INT, &s->queued_tokens, "N",
          "tokens of their prompts (default 0: any); then 503", NULL },
        { "--max-requests-per-key", 0, FLAG_INT, &s->key_requests, "N",
          "of an API key at a time (default 0: any); then 429", NULL },
        { "--max-queued-tokens-per-key", 0, FLAG_INT, &s->key_tokens, "N",
          "of an API key's prompts that wait (default 0: any); then 429", NULL },
        { "--decode-target-ms", 0, FLAG_NUMBER, &s->decode_ms, "MS",
          "between two tokens of a stream while prompts are read (default 100)", NULL },
        { "--stream-interval", 0, FLAG_INT, &s->stream_interval, "N",
          "tokens of a stream's event (default 0: what comes in 0.6 ms for each stream there is, 40 ms at "
          "most)",
          NULL },
        { "--kv-cache-dtype", 0, FLAG_CHOICE, &s->kv, "auto|bf16|fp8|f32|int8_per_token_head",
          "how keys and values are kept (auto: f32, on a GPU bf16; int8 for short: not on a GPU)", kv_names },
        { "--gpu-memory-utilization", 0, FLAG_NUMBER, &s->utilization, "SHARE",
          "of the device's memory (default 0.92; on a CPU 0.5 of what is available)", NULL },
        { "--memory", 0, FLAG_TEXT, &s->memory_text, "BYTES", "the same as an amount: 20G", NULL },
        { "--host-cache", 0, FLAG_TEXT, &s->host_cache_text, "BYTES", "prefixes kept in host memory besides",
          NULL },
        { "--disk-cache", 0, FLAG_TEXT, &s->disk_cache_text, "FOLDER[:SIZE]",
          "prefixes kept in files, found again after a restart (default size 16G)", NULL },
        { "--enable-prefix-caching", 0, FLAG_SWITCH, &s->prefix_caching, NULL,
          "prompts go on where known ones part (default; --no-... off)", NULL },
        COMMON_OVERRIDES_FLAGS(s->common),
        COMMON_SPECULATIVE_FLAG(s->common),
        { "--mtp", 0, FLAG_INT, &s->mtp, "N", "short for --speculative-config with method mtp", NULL },
        { "--chat-template", 0, FLAG_TEXT, &s->template_file, "FILE", "in place of the checkpoint's", NULL },
        { "--default-chat-template-kwargs", 0, FLAG_TEXT, &s->template_kwargs, "JSON",
          "such as '{\"enable_thinking\": false}'", NULL },
        { "--generation-config", 0, FLAG_CHOICE, &s->generation_source, "auto|vllm",
          "sampling defaults: generation_config.json's, or neutral ones", generation_sources },
        { "--override-generation-config", 0, FLAG_TEXT, &s->generation, "JSON",
          "sampling where a request says nothing", NULL },
        { "--limit-mm-per-prompt", 0, FLAG_TEXT, &s->media, "JSON",
          "of a request: '{\"image\": 16, \"video\": 4}'", NULL },
        { "--allowed-media-domains", 0, FLAG_WORDS, &s->media_hosts, "HOST...",
          "images by URL are fetched from these (default none; HOST:PORT where it is another than the "
          "scheme's)",
          NULL },
        { "--allowed-local-media-path", 0, FLAG_TEXT, &s->local_media, "FOLDER",
          "images by file:// URL are read from below this folder (default none)", NULL },
        { "--mm-processor-cache-gb", 0, FLAG_NUMBER, &s->encoder_cache_gb, "GB",
          "of host memory for what the vision tower made of images, GiB (default 0.25; 0: nothing is kept)",
          NULL },
        { "--language-model-only", 0, FLAG_SWITCH, &s->language_only, NULL, "no images", NULL },
        { "--verify", 0, FLAG_SWITCH, &s->verify, NULL, "check the checkpoint first, as quench verify does",
          NULL },
        { "--deterministic", 0, FLAG_SWITCH, &s->deterministic, NULL,
          "start only where answers do not depend on what else runs", NULL },
        { "--strict-params", 0, FLAG_SWITCH, &s->strict, NULL, "unknown fields of requests are refused",
          NULL },
        { "--response-store", 0, FLAG_TEXT, &s->store_text, "BYTES",
          "of /v1/responses kept in memory for previous_response_id (default none)", NULL },
        { "--response-store-age", 0, FLAG_NUMBER, &s->store_seconds, "S", "and for how long (default 3600)",
          NULL },
        { "--max-header-bytes", 0, FLAG_TEXT, &s->header_text, "BYTES", "of a request (default 64K)", NULL },
        { "--max-headers", 0, FLAG_INT, &s->headers, "N", "default 100", NULL },
        { "--max-body-bytes", 0, FLAG_TEXT, &s->body_text, "BYTES", "default 64M", NULL },
        { "--max-connections", 0, FLAG_INT, &s->connections, "N", "default 4096", NULL },
        { "--header-timeout", 0, FLAG_NUMBER, &s->header_seconds, "S",
          "until a request's headers are there (default 10)", NULL },
        { "--body-timeout", 0, FLAG_NUMBER, &s->body_seconds, "S",
          "until its body is, and one more each 16 KiB (default 30)", NULL },
        { "--idle-timeout", 0, FLAG_NUMBER, &s->idle_seconds, "S",
          "between two requests of a connection (default 60)", NULL },
        { "--send-timeout", 0, FLAG_NUMBER, &s->send_seconds, "S",
          "a client may stop reading for (default 30)", NULL },
        { "--comment-interval", 0, FLAG_NUMBER, &s->comment_seconds, "S",
          "of silence, then a stream gets a comment line (default 10)", NULL },
        { "--stall-timeout", 0, FLAG_NUMBER, &s->stall_seconds, "S",
          "without a step while requests wait, then /ready fails (default 60)", NULL },
        { "--shutdown-timeout", 0, FLAG_NUMBER, &s->shutdown_seconds, "S",
          "after SIGTERM, for requests that run (default 30)", NULL },
        { "--request-timeout", 0, FLAG_NUMBER, &s->request_seconds, "S",
          "from a request to its answer's end (default 0: any); then 504", NULL },
        { "--request-log", 0, FLAG_TEXT, &s->log, "FILE",
          "a line of JSON a request, without its text (-: standard output)", NULL },
        { "--crash-log", 0, FLAG_TEXT, &s->crash_log, "FILE",
          "what the last requests were, if a fault ends the server (default standard error)", NULL },
        { "--config", 0, FLAG_TEXT, &s->config, "FILE", "YAML with flags", NULL },
        { "--print-config", 0, FLAG_SWITCH, &s->print_config, NULL,
          "print every value and where it came from", NULL },
        COMMON_ACTIVATIONS_FLAGS(s->common),
        COMMON_DEVICE_FLAGS(s->common),
    };
    enum { SHOWN = sizeof flags / sizeof *flags };
    _Static_assert(SHOWN + COMPAT_FLAGS_MAX < FLAGS_MAX, "room for every flag and the end");
    memcpy(out, flags, sizeof flags);
    out[compat_flags(out, SHOWN, compat)] = (struct flag)FLAGS_END;
}

static int serve(struct settings *s, struct settings_source *source, const struct compat *compat, int argc,
                 char **argv)
{
    static const char *const secret[] = { "--api-key", "--admin-key", "--ssl-keyfile-password", NULL };
    struct err e = { 0 };
    bool help = false;
    json_t *origins = NULL;
    compat_rewrite(argc, argv);
    bool ok = compat_foreign(argc, argv, &e) &&
              settings_parse(source, argc, argv, &s->model, (const char *const *)&s->config, &help, &e);
    if (ok && help) {
        flags_help(&command, source->flags);
        return 0;
    }
    ok = ok && (s->model || err_set(&e, ERR_ARGUMENT, "expected: quench serve MODEL"));
    if (ok && s->print_config) {
        settings_print(source, s->model, secret);
        return 0;
    }
    if (ok && s->names.n == 0) s->names.items[s->names.n++] = s->model;
    ok = ok && compat_check(source, compat, s->common.quiet, &e) && check(s, &origins, &e) && run(s, &e);
    json_decref(origins);
    json_decref(s->kwargs);
    json_decref(s->override);
    free(s->disk_folder);
    return ok ? 0 : common_fail(&command, &e);
}

int cli_serve(int argc, char **argv)
{
    struct settings s = { .common.inputs = 1,
                          .port = 8000,
                          .decode_ms = 100,
                          .encoder_cache_gb = 0.25,
                          .prefix_caching = true,
                          .headers = 100,
                          .header_bytes = 64 << 10,
                          .body_bytes = 64 << 20,
                          .connections = 4096,
                          .header_seconds = 10,
                          .body_seconds = 30,
                          .idle_seconds = 60,
                          .send_seconds = 30,
                          .comment_seconds = 10,
                          .stall_seconds = 60,
                          .shutdown_seconds = 30,
                          .store_seconds = 3600 };
    struct flag flags[FLAGS_MAX];
    struct compat compat = { 0 };
    make_flags(flags, &s, &compat);
    struct settings_source source = { .command = &command, .flags = flags };
    int status = serve(&s, &source, &compat, argc, argv);
    settings_free(&source);
    return status;
}
