/* quench bench serve --base-url URL ...: load on an OpenAI server, with the flags and keys of `vllm bench
 * serve` */
#include "cli/bench_serve.h"
#include "base/clock.h"
#include "base/doc.h"
#include "base/file.h"
#include "cli/common.h"
#include "eval/load.h"
#include "eval/load_data.h"
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

static const char PURPOSE[] =
    "Puts load on a server with OpenAI's API and times its streams: this one's, vLLM's, any other. Flags, "
    "table and JSON\n"
    "keys are those of `vllm bench serve`. The API key is read from OPENAI_API_KEY. Tokens are counted by "
    "the "
    "server (its\n"
    "usage); an event of a stream may hold several.";
static const struct command command = { "bench serve", "[flags]", PURPOSE, 0 };

static const char *const backends[] = { "openai", "openai-chat", "vllm", NULL };
enum { BACKEND_CHAT = 1 };

struct settings {
    const char *base_url, *host, *endpoint, *model, *served_name, *tokenizer;
    const char *dataset, *path, *extra_body, *label, *result_dir, *result_file;
    const char *metrics, *percentiles;
    struct text_list goodput, metadata, headers;
    int backend;
    int64_t port, n, max_concurrency, seed, input, output, prefix, any_input, any_output, warmups;
    int64_t sharegpt_output, custom_output, logprobs;
    double rate, burstiness, range_ratio, ready_seconds;
    double temperature, top_p, top_k, min_p; /* NAN: the server's */
    bool save, detailed, ignore_eos, insecure, no_progress, trust, quiet, json;
};

static bool check(const struct settings *s, struct err *e)
{
    const struct {
        const char *flag;
        int64_t value, min, max;
    } whole[] = {
        { "--num-prompts", s->n, 1, 1 << 22 },
        { "--port", s->port, 1, 65535 },
        { "--max-concurrency", s->max_concurrency, 0, 1 << 20 },
        { "--random-input-len", s->input, 1, 1 << 24 },
        { "--random-output-len", s->output, 1, 1 << 24 },
        { "--random-prefix-len", s->prefix, 0, 1 << 24 },
        { "--sharegpt-output-len", s->sharegpt_output, 0, 1 << 24 },
        { "--custom-output-len", s->custom_output, 0, 1 << 24 },
        { "--num-warmups", s->warmups, 0, 1 << 20 },
    };
    for (size_t i = 0; i < sizeof whole / sizeof *whole; i++)
        if (whole[i].value < whole[i].min || whole[i].value > whole[i].max)
            return err_set(e, ERR_ARGUMENT, "%s: expected %lld to %lld, found %lld", whole[i].flag,
                           (long long)whole[i].min, (long long)whole[i].max, (long long)whole[i].value);
    if (!(s->rate > 0)) return err_set(e, ERR_ARGUMENT, "--request-rate: expected more than 0, or inf");
    if (!(s->burstiness > 0)) return err_set(e, ERR_ARGUMENT, "--burstiness: expected more than 0, or inf");
    if (!(s->range_ratio >= 0 && s->range_ratio <= 1))
        return err_set(e, ERR_ARGUMENT, "--random-range-ratio: expected 0 to 1");
    for (int i = 0; i < s->metadata.n; i++)
        if (!strchr(s->metadata.items[i], '='))
            return err_set(e, ERR_ARGUMENT, "--metadata: expected KEY=VALUE, found '%s'",
                           s->metadata.items[i]);
    for (const char *p = s->metrics; *p; p += strcspn(p, ","), p += *p == ',')
        if (!serve_knows_metric(p, strcspn(p, ",")))
            return err_set(e, ERR_ARGUMENT,
                           "--percentile-metrics: expected ttft, tpot, itl, e2el or client_queue_time with "
                           "commas between, found '%s'",
                           s->metrics);
    return true;
}

static bool parse_goals(struct load_goals *g, const struct text_list *l, struct err *e)
{
    *g = (struct load_goals){ INFINITY, INFINITY, INFINITY, l->n > 0 };
    for (int i = 0; i < l->n; i++) {
        const char *text = l->items[i], *colon = strchr(text, ':');
        char *end = NULL;
        double ms = colon ? strtod(colon + 1, &end) : -1;
        size_t n = colon ? (size_t)(colon - text) : 0;
        double *to = n == 4 && memcmp(text, "ttft", n) == 0   ? &g->ttft
                     : n == 4 && memcmp(text, "tpot", n) == 0 ? &g->tpot
                     : n == 4 && memcmp(text, "e2el", n) == 0 ? &g->e2el
                                                              : NULL;
        if (!to || end == colon + 1 || *end || !(ms >= 0))
            return err_set(e, ERR_ARGUMENT, "--goodput: expected ttft:MS, tpot:MS or e2el:MS, found '%s'",
                           text);
        *to = ms / 1e3;
    }
    return true;
}

static bool parse_percentiles(struct load_metrics_options *o, const char *text, struct err *e)
{
    const char *p = text;
    while (*p) {
        char *end;
        double x = strtod(p, &end);
        if (end == p || (*end && *end != ',') || !(x >= 0 && x <= 100) ||
            o->n_percentiles == LOAD_PERCENTILES_MAX)
            return err_set(e, ERR_ARGUMENT,
                           "--metric-percentiles: expected at most %d numbers from 0 to 100 with commas "
                           "between, found '%s'",
                           LOAD_PERCENTILES_MAX, text);
        o->percentiles[o->n_percentiles++] = x;
        p = *end ? end + 1 : end;
    }
    return true;
}

/* What goes into every request besides. */
static bool make_extra(json_t **out, const struct settings *s, struct err *e)
{
    const struct {
        const char *key;
        double value;
    } numbers[] = { { "temperature", s->temperature }, { "top_p", s->top_p }, { "min_p", s->min_p } };
    json_t *extra = json_object(), *given = NULL;
    for (int i = 0; i < 3; i++)
        if (!isnan(numbers[i].value)) json_object_set_new(extra, numbers[i].key, json_real(numbers[i].value));
    if (!isnan(s->top_k)) json_object_set_new(extra, "top_k", json_integer((json_int_t)s->top_k));
    if (s->ignore_eos) json_object_set_new(extra, "ignore_eos", json_true());
    if (s->logprobs >= 0 && s->backend == BACKEND_CHAT) {
        json_object_set_new(extra, "logprobs", json_true());
        json_object_set_new(extra, "top_logprobs", json_integer(s->logprobs));
    } else if (s->logprobs >= 0)
        json_object_set_new(extra, "logprobs", json_integer(s->logprobs));
    bool ok = !s->extra_body || (doc_parse(&given, s->extra_body, strlen(s->extra_body), e) &&
                                 (json_is_object(given) || err_set(e, ERR_ARGUMENT, "expected an object")));
    if (!ok) err_note(e, "--extra-body");
    if (given && ok) json_object_update(extra, given);
    json_decref(given);
    if (ok)
        *out = extra;
    else
        json_decref(extra);
    return ok;
}

/* Everything between the words and the result. */
struct run {
    const struct settings *s;
    struct report report;
    struct load_http *http;
    char *model; /* as the server calls it */
    struct tokenizer *tokenizer;
    json_t *extra;
    struct load_data data;
    struct load_request *requests; /* [data.n] */
    struct load_answer *answers;   /* [n] */
    int64_t n;
};

static bool wait_for(bool (*f)(struct run *r, struct err *e), struct run *r, struct err *e)
{
    double until = clock_seconds() + r->s->ready_seconds;
    while (!f(r, e)) {
        if (e->code == ERR_ARGUMENT || clock_seconds() >= until) return false;
        nanosleep(&(struct timespec){ .tv_sec = 1 }, NULL);
    }
    return true;
}

static bool connect_once(struct run *r, struct err *e)
{
    const struct settings *s = r->s;
    char url[1200];
    const char *key = getenv("OPENAI_API_KEY");
    snprintf(url, sizeof url, strchr(s->host, ':') ? "http://[%s]:%d" : "http://%s:%d", s->host,
             (int)s->port);
    struct load_http_options o = { .url = s->base_url ? s->base_url : url,
                                   .key = key && *key ? key : NULL,
                                   .headers = s->headers.items,
                                   .n_headers = s->headers.n,
                                   .insecure = s->insecure };
    return load_http_create(&r->http, &o, e);
}

static bool find_model(struct run *r, struct err *e)
{
    const char *given = r->s->served_name ? r->s->served_name : r->s->model;
    if (given) {
        r->model = strdup(given);
        return r->model || err_memory(e, "model", 0);
    }
    int status;
    char *body;
    json_t *v = NULL;
    if (!load_http_get(r->http, "/v1/models", &status, &body, e)) return false;
    bool ok = status == 200 ? doc_parse(&v, body, strlen(body), e)
                            : err_set(e, ERR_IO, "HTTP status %d: %.300s", status, body);
    const char *id = json_string_value(json_object_get(json_array_get(json_object_get(v, "data"), 0), "id"));
    ok = ok && (id || err_set(e, ERR_FORMAT, "it names no model"));
    if (ok) {
        r->model = strdup(id);
        report_warn(&r->report, "model: %s, the first of the server's", id);
    }
    json_decref(v);
    free(body);
    return ok || err_note(e, "/v1/models (or give --model)");
}

/* --dataset-name random, sharegpt, custom with --dataset-path, or the path of a file of lines itself. */
static bool load_prompts(struct run *r, struct err *e)
{
    const struct settings *s = r->s;
    bool random = strcmp(s->dataset, "random") == 0, sharegpt = strcmp(s->dataset, "sharegpt") == 0;
    const char *tokenizer = s->tokenizer ? s->tokenizer : s->model,
               *path = random || sharegpt || strcmp(s->dataset, "custom") == 0 ? s->path : s->dataset;
    if (random == (path != NULL))
        return err_set(e, ERR_ARGUMENT,
                       random ? "--dataset-path: random prompts come from no file"
                              : "--dataset-path: expected the file of --dataset-name");
    if (sharegpt && tokenizer && file_is_folder(tokenizer) && !tokenizer_load(&r->tokenizer, tokenizer, e))
        return false;
    int64_t output = random ? s->output : sharegpt ? s->sharegpt_output : s->custom_output;
    struct load_data_options o = { .kind = random     ? LOAD_RANDOM
                                           : sharegpt ? LOAD_SHAREGPT
                                                      : LOAD_LINES,
                                   .path = path,
                                   .tokenizer = r->tokenizer,
                                   .n = s->n + 1, /* one for the first try */
                                   .input_tokens = s->any_input ? s->any_input : s->input,
                                   .prefix_tokens = s->prefix,
                                   .output_tokens = s->any_output ? s->any_output : output,
                                   .range_ratio = s->range_ratio,
                                   .seed = (uint64_t)s->seed };
    if (!load_data_create(&r->data, &o, e)) return false;
    r->n = r->data.n < s->n ? r->data.n : s->n;
    if (r->n < s->n)
        report_warn(&r->report, "%s has %lld usable prompts, fewer than --num-prompts", path,
                    (long long)r->n);
    return true;
}

static bool make_requests(struct run *r, struct err *e)
{
    bool chat = r->s->backend == BACKEND_CHAT;
    r->requests = calloc((size_t)r->data.n, sizeof *r->requests);
    r->answers = calloc((size_t)r->n, sizeof *r->answers);
    if (!r->requests || !r->answers) return err_memory(e, "requests", 0);
    for (int64_t i = 0; i < r->data.n; i++) {
        const struct load_prompt *p = &r->data.items[i];
        if (!chat && p->messages) return err_set(e, ERR_ARGUMENT, "\"messages\" need --backend openai-chat");
        r->requests[i] =
            (struct load_request){ load_data_body(p, r->model, chat, r->extra), p->prompt_tokens };
        if (!r->requests[i].body) return err_memory(e, "request", 0);
    }
    return true;
}

static struct load_options load_options_of(const struct run *r)
{
    const struct settings *s = r->s;
    const char *endpoint = s->backend == BACKEND_CHAT ? "/v1/chat/completions" : "/v1/completions";
    return (struct load_options){ .http = r->http,
                                  .endpoint = s->endpoint ? s->endpoint : endpoint,
                                  .rate = INFINITY,
                                  .burstiness = 1,
                                  .max_concurrency = s->max_concurrency };
}

/* The last prompt, which the run itself does not use where there is one to spare, `n` times. */
static bool try_out(struct run *r, int64_t n, struct err *e)
{
    struct load_options o = load_options_of(r);
    struct load_request *same = calloc((size_t)n, sizeof *same);
    struct load_answer *answers = calloc((size_t)n, sizeof *answers);
    double seconds;
    bool ok = (same && answers) || err_memory(e, "requests", 0);
    for (int64_t i = 0; ok && i < n; i++) same[i] = r->requests[r->data.n - 1];
    ok = ok && load_run(answers, &seconds, same, n, &o, e);
    for (int64_t i = 0; ok && i < n; i++)
        ok = answers[i].ok || err_set(e, ERR_IO, "%s: %s", o.endpoint, answers[i].error);
    for (int64_t i = 0; answers && i < n; i++) load_answer_deinit(&answers[i]);
    free(answers);
    free(same);
    return ok;
}

static bool try_once(struct run *r, struct err *e)
{
    return try_out(r, 1, e) || err_note(e, "the first request");
}

static struct serve_counters counters_now(const struct run *r)
{
    struct serve_counters c = { 0 };
    struct err ignored = { 0 };
    int status;
    char *body;
    if (load_http_get(r->http, "/metrics", &status, &body, &ignored) && status == 200)
        c = serve_counters_read(body);
    free(body);
    return c;
}

static struct serve_counters during(const struct serve_counters *before, const struct serve_counters *after)
{
    struct serve_counters c = { .known = before->known && after->known,
                                .drafts = after->drafts - before->drafts,
                                .draft_tokens = after->draft_tokens - before->draft_tokens,
                                .accepted = after->accepted - before->accepted };
    for (int i = 0; i < SERVE_PLACES_MAX; i++)
        c.accepted_at[i] = after->accepted_at[i] - before->accepted_at[i];
    return c;
}

static bool prepare(struct run *r, struct err *e)
{
    return wait_for(connect_once, r, e) && make_extra(&r->extra, r->s, e) && load_prompts(r, e) &&
           wait_for(find_model, r, e) && make_requests(r, e) && wait_for(try_once, r, e) &&
           (r->s->warmups == 0 || try_out(r, r->s->warmups, e));
}

static bool measure(struct serve_result *out, struct run *r, struct err *e)
{
    struct load_options o = load_options_of(r);
    o.rate = r->s->rate;
    o.burstiness = r->s->burstiness;
    o.seed = (uint64_t)r->s->seed;
    o.report = r->s->no_progress ? NULL : &r->report;
    struct serve_counters before = counters_now(r);
    if (!load_run(r->answers, &out->options.duration, r->requests, r->n, &o, e)) return false;
    struct serve_counters after = counters_now(r);
    out->drafting = during(&before, &after);
    out->answers = r->answers;
    out->n = r->n;
    out->model = r->model;
    return load_metrics(&out->sums, r->answers, r->n, &out->options, e);
}

static void show_failures(const struct run *r)
{
    int shown = 0;
    for (int64_t i = 0; i < r->n && shown < 10; i++)
        if (!r->answers[i].ok && ++shown)
            report_warn(&r->report, "request %lld: %s", (long long)i + 1, r->answers[i].error);
}

static bool save(const struct serve_result *out, const struct settings *s, struct err *e)
{
    char name[512], limit[40] = "";
    const char *slash = strrchr(out->model, '/');
    if (s->max_concurrency) snprintf(limit, sizeof limit, "-concurrency%lld", (long long)s->max_concurrency);
    snprintf(name, sizeof name, "%s-%gqps%s-%s-%s.json", s->label ? s->label : out->backend, s->rate, limit,
             slash ? slash + 1 : out->model, out->date);
    if (s->result_dir && mkdir(s->result_dir, 0777) != 0 && errno != EEXIST)
        return err_errno(e, s->result_dir);
    const char *file = s->result_file ? s->result_file : name;
    char *path = s->result_dir ? file_join(s->result_dir, file) : strdup(file);
    json_t *o = serve_json(out);
    char *text = doc_dump(o, false);
    bool ok = (path && text) ? file_write(path, text, strlen(text), e) : err_memory(e, "result", 0);
    if (ok && !s->quiet) fprintf(stderr, "quench bench serve: saved %s\n", path);
    json_decref(o);
    free(text);
    free(path);
    return ok;
}

static void clean(struct run *r)
{
    for (int64_t i = 0; r->requests && i < r->data.n; i++) free(r->requests[i].body);
    for (int64_t i = 0; r->answers && i < r->n; i++) load_answer_deinit(&r->answers[i]);
    free(r->requests);
    free(r->answers);
    load_data_free(&r->data);
    json_decref(r->extra);
    tokenizer_free(r->tokenizer);
    load_http_free(r->http);
    free(r->model);
}

static bool run(const struct settings *s, struct err *e)
{
    struct run r = { .s = s, .report = common_report(&(struct common){ .quiet = s->quiet }) };
    struct serve_result out = { .backend = backends[s->backend],
                                .label = s->label,
                                .tokenizer = s->tokenizer,
                                .metadata = &s->metadata,
                                .metrics = s->metrics,
                                .rate = s->rate,
                                .burstiness = s->burstiness,
                                .max_concurrency = s->max_concurrency,
                                .detailed = s->detailed };
    time_t now = time(NULL);
    strftime(out.date, sizeof out.date, "%Y%m%d-%H%M%S", localtime(&now));
    bool ok = check(s, e) && parse_goals(&out.options.goals, &s->goodput, e) &&
              parse_percentiles(&out.options, s->percentiles, e) && prepare(&r, e) && measure(&out, &r, e);
    if (ok) {
        show_failures(&r);
        if (s->json) {
            json_t *o = serve_json(&out);
            json_dumpf(o, stdout, JSON_COMPACT);
            putchar('\n');
            json_decref(o);
        } else
            serve_print(&out);
        ok = (!s->save || save(&out, s, e)) &&
             (out.sums.completed > 0 || err_set(e, ERR_IO, "no request was answered"));
    }
    clean(&r);
    return ok;
}

int bench_serve(int argc, char **argv)
{
    struct settings s = { .host = "127.0.0.1",
                          .port = 8000,
                          .dataset = "random",
                          .n = 1000,
                          .input = 1024,
                          .output = 128,
                          .rate = INFINITY,
                          .burstiness = 1,
                          .metrics = "ttft,tpot,itl,e2el",
                          .percentiles = "99",
                          .temperature = NAN,
                          .top_p = NAN,
                          .top_k = NAN,
                          .min_p = NAN,
                          .logprobs = -1 };
    const struct flag flags[] = {
        { "--base-url", 0, FLAG_TEXT, &s.base_url, "URL", "http[s]://HOST[:PORT][/PREFIX] of the server",
          NULL },
        { "--host", 0, FLAG_TEXT, &s.host, "HOST", "without --base-url (default 127.0.0.1)", NULL },
        { "--port", 0, FLAG_INT, &s.port, "N", "without --base-url (default 8000)", NULL },
        { "--backend", 0, FLAG_CHOICE, &s.backend, "openai|openai-chat|vllm",
          "completions (default, vllm too) or chat", backends },
        { "--endpoint", 0, FLAG_TEXT, &s.endpoint, "PATH",
          "(default /v1/completions or /v1/chat/completions)", NULL },
        { "--model", 0, FLAG_TEXT, &s.model, "NAME", "(default: the first the server names)", NULL },
        { "--served-model-name", 0, FLAG_TEXT, &s.served_name, "NAME",
          "as the server calls it, where --model is a folder", NULL },
        { "--tokenizer", 0, FLAG_TEXT, &s.tokenizer, "DIR",
          "counts ShareGPT's lengths (default: --model where it is a folder)", NULL },
        { "--dataset-name", 0, FLAG_TEXT, &s.dataset, "random|sharegpt|custom|FILE",
          "random words (default), conversations, or JSON lines with \"prompt\" or \"messages\"", NULL },
        { "--dataset-path", 0, FLAG_TEXT, &s.path, "FILE", "of sharegpt and custom", NULL },
        { "--num-prompts", 0, FLAG_INT, &s.n, "N", "requests (default 1000)", NULL },
        { "--request-rate", 0, FLAG_NUMBER, &s.rate, "R", "arrivals a second (default inf: all at once)",
          NULL },
        { "--burstiness", 0, FLAG_NUMBER, &s.burstiness, "B",
          "1: Poisson (default); less: bursts; more: evenly; inf: equal gaps", NULL },
        { "--max-concurrency", 0, FLAG_INT, &s.max_concurrency, "N",
          "requests at a time; the others wait here", NULL },
        { "--random-input-len", 0, FLAG_INT, &s.input, "N", "words of a prompt (default 1024)", NULL },
        { "--random-output-len", 0, FLAG_INT, &s.output, "N", "tokens of an answer (default 128)", NULL },
        { "--random-range-ratio", 0, FLAG_NUMBER, &s.range_ratio, "X",
          "lengths vary by this share (default 0)", NULL },
        { "--random-prefix-len", 0, FLAG_INT, &s.prefix, "N", "words that all prompts begin with (default 0)",
          NULL },
        { "--sharegpt-output-len", 0, FLAG_INT, &s.sharegpt_output, "N",
          "tokens of an answer (default: as long as the conversation's)", NULL },
        { "--custom-output-len", 0, FLAG_INT, &s.custom_output, "N",
          "tokens of an answer (default: the line's \"output_tokens\", else 256)", NULL },
        { "--input-len", 0, FLAG_INT, &s.any_input, "N", "whatever the data", NULL },
        { "--output-len", 0, FLAG_INT, &s.any_output, "N", "whatever the data", NULL },
        { "--seed", 0, FLAG_INT, &s.seed, "N", "of prompts and arrivals (default 0)", NULL },
        { "--ignore-eos", 0, FLAG_SWITCH, &s.ignore_eos, NULL,
          "answers run to their length (always with random)", NULL },
        { "--logprobs", 0, FLAG_INT, &s.logprobs, "N", "ask for them", NULL },
        { "--temperature", 0, FLAG_NUMBER, &s.temperature, "T", "(default: the server's)", NULL },
        { "--top-p", 0, FLAG_NUMBER, &s.top_p, "P", "(default: the server's)", NULL },
        { "--top-k", 0, FLAG_NUMBER, &s.top_k, "K", "(default: the server's)", NULL },
        { "--min-p", 0, FLAG_NUMBER, &s.min_p, "P", "(default: the server's)", NULL },
        { "--extra-body", 0, FLAG_TEXT, &s.extra_body, "JSON", "fields of every request", NULL },
        { "--header", 0, FLAG_WORDS, &s.headers, "KEY=VALUE ...", "headers of every request", NULL },
        { "--insecure", 0, FLAG_SWITCH, &s.insecure, NULL, "any certificate will do", NULL },
        { "--num-warmups", 0, FLAG_INT, &s.warmups, "N",
          "requests before (default 0, and one that must succeed)", NULL },
        { "--ready-check-timeout-sec", 0, FLAG_NUMBER, &s.ready_seconds, "S",
          "wait so long for the server (default 0)", NULL },
        { "--goodput", 0, FLAG_WORDS, &s.goodput, "NAME:MS ...",
          "goals for ttft, tpot, e2el of a good request", NULL },
        { "--percentile-metrics", 0, FLAG_TEXT, &s.metrics, "NAMES",
          "shown of ttft,tpot,itl,e2el,client_queue_time (default: the first four)", NULL },
        { "--metric-percentiles", 0, FLAG_TEXT, &s.percentiles, "P,...", "(default 99)", NULL },
        { "--save-result", 0, FLAG_SWITCH, &s.save, NULL, "write the JSON to a file", NULL },
        { "--save-detailed", 0, FLAG_SWITCH, &s.detailed, NULL, "with every request in it", NULL },
        { "--result-dir", 0, FLAG_TEXT, &s.result_dir, "DIR", "(default: here)", NULL },
        { "--result-filename", 0, FLAG_TEXT, &s.result_file, "NAME",
          "(default: of label, rate, model and date)", NULL },
        { "--label", 0, FLAG_TEXT, &s.label, "TEXT", "in the JSON and the file's name", NULL },
        { "--metadata", 0, FLAG_WORDS, &s.metadata, "KEY=VALUE ...", "in the JSON", NULL },
        { "--disable-tqdm", 0, FLAG_SWITCH, &s.no_progress, NULL, "no progress", NULL },
        { "--trust-remote-code", 0, FLAG_SWITCH, &s.trust, NULL, "accepted; no code is ever loaded", NULL },
        { "--quiet", 0, FLAG_SWITCH, &s.quiet, NULL, "no progress, no notes", NULL },
        { "--json", 0, FLAG_SWITCH, &s.json, NULL, "print the result as one JSON object", NULL },
        FLAGS_END,
    };
    int status;
    struct err e = { 0 };
    const char *none = NULL;
    if (!common_parse(&command, flags, argc, argv, &none, &status)) return status;
    if (strcmp(s.dataset, "random") == 0) s.ignore_eos = true;
    return run(&s, &e) ? 0 : common_fail(&command, &e);
}
