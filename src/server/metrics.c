/* Names, labels and buckets are those of vLLM's metrics page, so that its dashboards, routers and autoscalers
 * read this server. What vLLM has no name for is under quench:. */
#include "server/metrics.h"
#include "model/model.h"
#include <dirent.h>
#include <inttypes.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const double FIRST_TOKEN[] = { 0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
                                      1,     2.5,   5,    7.5,  10,   20,   40,   80,  160,  640, 2560 };
static const double TOKEN[] = { 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5,
                                0.75, 1,     2.5,  5,     7.5, 10,   20,  40,  80 };
static const double REQUEST[] = { 0.3, 0.5, 0.8, 1,  1.5, 2,   2.5, 5,   10,   15,  20,
                                  30,  40,  50,  60, 120, 240, 480, 960, 1920, 7680 };
static const double TOKENS[] = { 1,    2,    5,    10,    20,    50,    100,    200,    500,
                                 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000, 500000 };
static const double STEP[] = { 1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384 };
static const double CHOICES[] = { 1, 2, 5, 10, 20 };

#define BOUNDS(b) .bounds = (b), .n_bounds = (int)(sizeof(b) / sizeof *(b))

void metrics_init(struct metrics *m)
{
    *m = (struct metrics){ .first_token = { BOUNDS(FIRST_TOKEN) },
                           .inter_token = { BOUNDS(TOKEN) },
                           .per_token = { BOUNDS(TOKEN) },
                           .latency = { BOUNDS(REQUEST) },
                           .queued = { BOUNDS(REQUEST) },
                           .inference = { BOUNDS(REQUEST) },
                           .prefill = { BOUNDS(REQUEST) },
                           .decode = { BOUNDS(REQUEST) },
                           .prompt_tokens = { BOUNDS(TOKENS) },
                           .generation_tokens = { BOUNDS(TOKENS) },
                           .params_n = { BOUNDS(CHOICES) },
                           .params_max_tokens = { BOUNDS(TOKENS) },
                           .step_rows = { BOUNDS(STEP) } };
}

void histogram_observe(struct histogram *h, double value, uint64_t times)
{
    int i = 0;
    while (i < h->n_bounds && value > h->bounds[i]) i++;
    h->counts[i] += times;
    h->sum += value * (double)times;
}

void metrics_take_steps(struct metrics *m, const struct scheduler_stats *s)
{
    uint64_t steps = (uint64_t)s->steps - m->steps_seen, rows = (uint64_t)s->step_rows - m->rows_seen;
    if (steps == 0) return;
    histogram_observe(&m->step_rows, (double)rows / (double)steps, steps);
    m->steps_seen = (uint64_t)s->steps;
    m->rows_seen = (uint64_t)s->step_rows;
}

static enum metrics_finish finish_of(const char *finish)
{
    if (!finish || !*finish || strcmp(finish, "abort") == 0) return METRICS_ABORT;
    if (strcmp(finish, "length") == 0) return METRICS_LENGTH;
    if (strcmp(finish, "repetition") == 0) return METRICS_REPETITION;
    return strcmp(finish, "error") == 0 ? METRICS_ERROR : METRICS_STOP;
}

void metrics_take_request(struct metrics *m, const struct exchange_account *a, double seconds)
{
    enum metrics_finish finish = finish_of(a->finish);
    const struct request_usage *u = &a->usage;
    m->finished[finish]++;
    histogram_observe(&m->latency, seconds, 1);
    histogram_observe(&m->queued, u->queued_seconds, 1);
    histogram_observe(&m->prefill, u->prefill_seconds, 1);
    histogram_observe(&m->decode, u->decode_seconds, 1);
    histogram_observe(&m->inference, u->prefill_seconds + u->decode_seconds, 1);
    histogram_observe(&m->prompt_tokens, (double)u->prompt_tokens, 1);
    histogram_observe(&m->generation_tokens, (double)u->answer_tokens, 1);
    histogram_observe(&m->params_n, (double)a->n_choices, 1);
    if (a->max_tokens >= 0) histogram_observe(&m->params_max_tokens, (double)a->max_tokens, 1);
    if (a->per_token > 0) histogram_observe(&m->per_token, a->per_token, 1);
}

/* A label's value, escaped as the text format asks. */
static void put_quoted(FILE *f, const char *text)
{
    for (; *text; text++) {
        if (*text == '\n')
            fputs("\\n", f);
        else {
            if (*text == '"' || *text == '\\') fputc('\\', f);
            fputc(*text, f);
        }
    }
}

struct writer {
    FILE *f;
    const char *model;
};

static void put_head(const struct writer *w, const char *name, const char *type, const char *help)
{
    fprintf(w->f, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

/* label: further labels, "position=\"0\"", or NULL. */
static void put_value(const struct writer *w, const char *name, const char *label, double value)
{
    fprintf(w->f, "%s{engine=\"0\",model_name=\"", name);
    put_quoted(w->f, w->model);
    fprintf(w->f, "\"%s%s} %.15g\n", label ? "," : "", label ? label : "", value);
}

static void put(const struct writer *w, const char *name, const char *type, double value, const char *help)
{
    put_head(w, name, type, help);
    put_value(w, name, NULL, value);
}

static void put_histogram(const struct writer *w, const char *name, const struct histogram *h,
                          const char *help)
{
    char series[96], label[48];
    uint64_t total = 0;
    put_head(w, name, "histogram", help);
    snprintf(series, sizeof series, "%s_bucket", name);
    for (int i = 0; i <= h->n_bounds; i++) {
        total += h->counts[i];
        if (i < h->n_bounds)
            snprintf(label, sizeof label, "le=\"%g\"", h->bounds[i]);
        else
            snprintf(label, sizeof label, "le=\"+Inf\"");
        put_value(w, series, label, (double)total);
    }
    snprintf(series, sizeof series, "%s_count", name);
    put_value(w, series, NULL, (double)total);
    snprintf(series, sizeof series, "%s_sum", name);
    put_value(w, series, NULL, h->sum);
}

static double share(int64_t used, int64_t of)
{
    return of > 0 ? (double)used / (double)of : 0;
}

static void put_cache(const struct writer *w, const struct scheduler_stats *s)
{
    double pages = share(s->pages_used, s->pages);
    put(w, "vllm:kv_cache_usage_perc", "gauge", pages, "KV pages in use, 1 is all of them");
    put(w, "vllm:gpu_cache_usage_perc", "gauge", pages, "The same under its older name");
    put(w, "quench:state_pool_usage_perc", "gauge", share(s->states_used, s->states),
        "DeltaNet states in use, 1 is all of them");
    put(w, "quench:kv_pages_used", "gauge", (double)s->pages_used,
        "KV pages in use, by requests or the prefix cache");
    put(w, "quench:states_used", "gauge", (double)s->states_used, "DeltaNet states in use");
    double asked = (double)s->prefix_queries, found = (double)s->prefix_hits;
    put(w, "vllm:prefix_cache_queries_total", "counter", asked,
        "Prompt tokens looked up in the prefix cache");
    put(w, "vllm:prefix_cache_hits_total", "counter", found, "Prompt tokens found in the prefix cache");
    put(w, "quench:prefix_cache_disk_hits_total", "counter", (double)s->disk_hits,
        "Of these, tokens whose state was read from a file");
    put(w, "vllm:gpu_prefix_cache_queries_total", "counter", asked, "The same under its older name");
    put(w, "vllm:gpu_prefix_cache_hits_total", "counter", found, "The same under its older name");
    put(w, "vllm:mm_cache_queries_total", "counter", (double)s->encoder_queries,
        "Images looked up in the encoder cache");
    put(w, "vllm:mm_cache_hits_total", "counter", (double)s->encoder_hits,
        "Images found in the encoder cache");
    put(w, "quench:mm_cache_bytes", "gauge", (double)s->encoder_bytes, "Size of the encoder cache now");
    char label[96];
    put_head(w, "vllm:cache_config_info", "gauge", "Tokens a page and pages in all");
    snprintf(label, sizeof label, "block_size=\"%d\",num_gpu_blocks=\"%" PRId64 "\"", KV_PAGE, s->pages);
    put_value(w, "vllm:cache_config_info", label, 1);
}

static void put_drafts(const struct writer *w, const struct scheduler_stats *s)
{
    put(w, "vllm:spec_decode_num_drafts_total", "counter", (double)s->drafts, "Rounds with drafts");
    put(w, "vllm:spec_decode_num_draft_tokens_total", "counter", (double)s->drafted, "Tokens drafted");
    put(w, "vllm:spec_decode_num_accepted_tokens_total", "counter", (double)s->accepted,
        "Drafts that were right");
    put_head(w, "vllm:spec_decode_num_accepted_tokens_per_pos_total", "counter",
             "Drafts that were right, by place");
    for (int i = 0; i < DRAFTS_MAX; i++) {
        char label[24];
        snprintf(label, sizeof label, "position=\"%d\"", i);
        put_value(w, "vllm:spec_decode_num_accepted_tokens_per_pos_total", label, (double)s->accepted_at[i]);
    }
}

static void put_scheduler(const struct writer *w, const struct scheduler_stats *s)
{
    put(w, "vllm:num_requests_running", "gauge", (double)s->running, "Requests that steps are made for");
    put(w, "vllm:num_requests_waiting", "gauge", (double)s->waiting,
        "Requests that wait for their first step");
    put(w, "quench:waiting_tokens", "gauge", (double)s->waiting_tokens,
        "Prompt tokens of requests that wait");
    put(w, "vllm:num_preemptions_total", "counter", (double)s->preemptions, "Requests put aside for others");
    put(w, "quench:steps_total", "counter", (double)s->steps, "Steps of the engine");
    put_cache(w, s);
    put_drafts(w, s);
}

static void put_requests(const struct writer *w, const struct metrics *m)
{
    static const char *const reasons[] = { "stop", "length", "abort", "error", "repetition" };
    put(w, "vllm:prompt_tokens_total", "counter", (double)m->prompt_tokens_total, "Prompt tokens processed");
    put(w, "vllm:generation_tokens_total", "counter", (double)m->generation_tokens_total, "Tokens generated");
    put_head(w, "vllm:request_success_total", "counter", "Requests ended, by reason");
    for (int i = 0; i < METRICS_FINISHES; i++) {
        char label[40];
        snprintf(label, sizeof label, "finished_reason=\"%s\"", reasons[i]);
        put_value(w, "vllm:request_success_total", label, (double)m->finished[i]);
    }
    put_histogram(w, "vllm:time_to_first_token_seconds", &m->first_token,
                  "From the request to its first token");
    put_histogram(w, "vllm:inter_token_latency_seconds", &m->inter_token, "Between two tokens of a request");
    put_histogram(w, "vllm:request_time_per_output_token_seconds", &m->per_token,
                  "Mean of a request's tokens but the first");
    put_histogram(w, "vllm:time_per_output_token_seconds", &m->inter_token,
                  "Inter-token latency under its older name");
    put_histogram(w, "vllm:e2e_request_latency_seconds", &m->latency, "From the request to its end");
    put_histogram(w, "vllm:request_queue_time_seconds", &m->queued, "In the queue");
    put_histogram(w, "vllm:request_inference_time_seconds", &m->inference, "Prompt and answer");
    put_histogram(w, "vllm:request_prefill_time_seconds", &m->prefill, "Prompt");
    put_histogram(w, "vllm:request_decode_time_seconds", &m->decode, "Answer");
    put_histogram(w, "vllm:request_prompt_tokens", &m->prompt_tokens, "Tokens of a prompt");
    put_histogram(w, "vllm:request_generation_tokens", &m->generation_tokens, "Tokens of an answer");
    put_histogram(w, "vllm:request_params_n", &m->params_n, "Answers asked for");
    put_histogram(w, "vllm:request_params_max_tokens", &m->params_max_tokens, "Most tokens asked for");
    put_histogram(w, "vllm:iteration_tokens_total", &m->step_rows, "Tokens of a step");
}

static void put_routes(const struct writer *w, const struct metrics_now *now)
{
    put_head(w, "http_requests_total", "counter", "Answers by route and status");
    for (int i = 0; i < now->n_routes; i++)
        for (int c = 1; c < 6; c++) {
            const struct metrics_route *r = &now->routes[i];
            if (r->by_class[c])
                fprintf(w->f,
                        "http_requests_total{handler=\"%s\",method=\"%s\",status=\"%dxx\"} %" PRIu64 "\n",
                        r->path, r->method, c, r->by_class[c]);
        }
}

static void put_server(const struct writer *w, const struct metrics *m, const struct metrics_now *now)
{
    put(w, "quench:connections", "gauge", (double)now->connections, "Connections open");
    put(w, "quench:exchanges", "gauge", (double)now->exchanges, "Requests being answered");
    put(w, "quench:body_bytes", "gauge", (double)now->body_bytes, "Memory held for bodies that arrive");
    put(w, "quench:draining", "gauge", now->draining, "1 after SIGTERM");
    put(w, "quench:paused", "gauge", now->paused, "1 while the operator lets no new requests in");
    put(w, "quench:connections_total", "counter", (double)m->accepted_connections, "Connections accepted");
    put(w, "quench:connections_refused_total", "counter", (double)m->refused_connections,
        "Connections over the limit");
    put(w, "quench:disconnects_total", "counter", (double)m->disconnects,
        "Answers stopped because the client left");
    put(w, "quench:slow_readers_total", "counter", (double)m->slow_readers,
        "Answers stopped because the client reads too slowly");
    put(w, "quench:timeouts_total", "counter", (double)m->timeouts, "Requests that took too long to arrive");
    put(w, "quench:expired_total", "counter", (double)m->expired,
        "Answers stopped because they took longer than --request-timeout");
    put(w, "quench:unauthorized_total", "counter", (double)m->unauthorized, "Requests without a valid key");
    put(w, "quench:rejected_total", "counter", (double)m->rejected, "Requests answered 429 or 503");
}

/* Figures of /proc/self under the names every Prometheus client exports; Linux only. */
static void put_process(const struct writer *w)
{
    struct timespec cpu;
    long long pages = 0;
    int fds = 0;
    FILE *f = fopen("/proc/self/statm", "re");
    if (f && fscanf(f, "%*d %lld", &pages) == 1)
        put(w, "process_resident_memory_bytes", "gauge", (double)pages * (double)sysconf(_SC_PAGESIZE),
            "Resident memory");
    if (f) fclose(f);
    if (clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &cpu) == 0)
        put(w, "process_cpu_seconds_total", "counter", (double)cpu.tv_sec + 1e-9 * (double)cpu.tv_nsec,
            "Processor time");
    DIR *d = opendir("/proc/self/fd");
    if (!d) return;
    while (readdir(d)) fds++;
    closedir(d);
    put(w, "process_open_fds", "gauge", fds - 3, "Descriptors open"); /* less ., .. and the folder's own */
}

void metrics_write(const struct metrics *m, const struct metrics_now *now, FILE *f)
{
    struct writer w = { f, now->model_name };
    if (now->stats) put_scheduler(&w, now->stats);
    put_requests(&w, m);
    put_routes(&w, now);
    put_server(&w, m, now);
    put_process(&w);
}
