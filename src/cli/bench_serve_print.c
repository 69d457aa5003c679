#include "cli/bench_serve.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { WIDTH = 50 };

static const struct {
    const char *name, *label, *header;
    size_t offset;
} figures[] = {
    { "ttft", "TTFT", "Time to First Token", offsetof(struct load_metrics, ttft) },
    { "tpot", "TPOT", "Time per Output Token (excl. 1st token)", offsetof(struct load_metrics, tpot) },
    { "itl", "ITL", "Inter-token Latency", offsetof(struct load_metrics, itl) },
    { "e2el", "E2EL", "End-to-end Latency", offsetof(struct load_metrics, e2el) },
    { "client_queue_time", "Client Queue Time", "Client-side Queueing",
      offsetof(struct load_metrics, queued) },
};
enum { N_FIGURES = sizeof figures / sizeof *figures };

static const struct load_summary *summary_of(const struct load_metrics *m, int i)
{
    return (const struct load_summary *)((const char *)m + figures[i].offset);
}

bool serve_knows_metric(const char *name, size_t n)
{
    for (int i = 0; i < N_FIGURES; i++)
        if (strlen(figures[i].name) == n && memcmp(figures[i].name, name, n) == 0) return true;
    return false;
}

static bool is_shown(const struct serve_result *r, int i)
{
    size_t n = strlen(figures[i].name);
    for (const char *p = r->metrics; *p; p += strcspn(p, ","), p += *p == ',')
        if (strcspn(p, ",") == n && memcmp(p, figures[i].name, n) == 0) return true;
    return false;
}

static void rule(const char *text, char c)
{
    int n = (int)strlen(text), left = (WIDTH - n) / 2;
    for (int i = 0; i < left; i++) putchar(c);
    fputs(text, stdout);
    for (int i = left + n; i < WIDTH; i++) putchar(c);
    putchar('\n');
}

static void line(const char *label, double value)
{
    printf("%-40s %-10.2f\n", label, value);
}

static void whole(const char *label, int64_t value)
{
    printf("%-40s %-10lld\n", label, (long long)value);
}

static const char *percentile_name(char *out, size_t size, double p)
{
    snprintf(out, size, "%g", p);
    return out;
}

static void print_figure(const struct serve_result *r, int i)
{
    const struct load_summary *s = summary_of(&r->sums, i);
    char label[64], p[32];
    rule(figures[i].header, '-');
    snprintf(label, sizeof label, "Mean %s (ms):", figures[i].label);
    line(label, 1e3 * s->mean);
    snprintf(label, sizeof label, "Median %s (ms):", figures[i].label);
    line(label, 1e3 * s->median);
    for (int k = 0; k < r->options.n_percentiles; k++) {
        snprintf(label, sizeof label, "P%s %s (ms):", percentile_name(p, sizeof p, r->options.percentiles[k]),
                 figures[i].label);
        line(label, 1e3 * s->percentiles[k]);
    }
}

static bool has_drafts(const struct serve_result *r)
{
    return r->drafting.known && r->drafting.draft_tokens > 0;
}

static int places_of(const struct serve_counters *c)
{
    int n = SERVE_PLACES_MAX;
    while (n > 0 && c->accepted_at[n - 1] == 0) n--;
    return n;
}

static void print_drafting(const struct serve_counters *c)
{
    rule("Speculative Decoding", '-');
    line("Acceptance rate (%):", 100 * c->accepted / c->draft_tokens);
    line("Acceptance length:", c->drafts > 0 ? 1 + c->accepted / c->drafts : 0);
    whole("Drafts:", (int64_t)c->drafts);
    whole("Draft tokens:", (int64_t)c->draft_tokens);
    whole("Accepted tokens:", (int64_t)c->accepted);
    if (places_of(c)) puts("Per-position acceptance (%):");
    for (int i = 0; i < places_of(c) && c->drafts > 0; i++) {
        char label[32];
        snprintf(label, sizeof label, "  Position %d:", i);
        line(label, 100 * c->accepted_at[i] / c->drafts);
    }
}

void serve_print(const struct serve_result *r)
{
    const struct load_metrics *m = &r->sums;
    double s = r->options.duration;
    rule(" Serving Benchmark Result ", '=');
    whole("Successful requests:", m->completed);
    whole("Failed requests:", m->failed);
    if (r->max_concurrency) whole("Maximum request concurrency:", r->max_concurrency);
    if (!isinf(r->rate)) line("Request rate configured (RPS):", r->rate);
    line("Benchmark duration (s):", s);
    whole("Total input tokens:", m->input_tokens);
    whole("Total generated tokens:", m->output_tokens);
    line("Request throughput (req/s):", (double)m->completed / s);
    if (r->options.goals.any) line("Request goodput (req/s):", (double)m->good / s);
    line("Output token throughput (tok/s):", (double)m->output_tokens / s);
    line("Peak output token throughput (tok/s):", m->peak_tokens);
    line("Peak concurrent requests:", (double)m->peak_requests);
    line("Total token throughput (tok/s):", (double)(m->input_tokens + m->output_tokens) / s);
    for (int i = 0; i < N_FIGURES; i++)
        if (is_shown(r, i)) print_figure(r, i);
    if (has_drafts(r)) print_drafting(&r->drafting);
    rule("", '=');
}

static void set(json_t *o, const char *key, json_t *value)
{
    json_object_set_new(o, key, value);
}

static json_t *text_or_null(const char *text)
{
    return text ? json_string(text) : json_null();
}

static json_t *count_or_null(int64_t n)
{
    return n < 0 ? json_null() : json_integer(n);
}

static void add_setting(json_t *o, const struct serve_result *r)
{
    set(o, "date", json_string(r->date));
    set(o, "endpoint_type", json_string(r->backend));
    set(o, "backend", json_string(r->backend));
    set(o, "label", text_or_null(r->label));
    set(o, "model_id", json_string(r->model));
    set(o, "tokenizer_id", text_or_null(r->tokenizer));
    set(o, "num_prompts", json_integer(r->n));
    for (int i = 0; i < r->metadata->n; i++) {
        char key[256];
        size_t n = strcspn(r->metadata->items[i], "=");
        snprintf(key, sizeof key, "%.*s", (int)n, r->metadata->items[i]);
        set(o, key, json_string(r->metadata->items[i] + n + 1));
    }
    set(o, "request_rate", isinf(r->rate) ? json_string("inf") : json_real(r->rate));
    set(o, "burstiness", isinf(r->burstiness) ? json_string("inf") : json_real(r->burstiness));
    set(o, "max_concurrency", r->max_concurrency ? json_integer(r->max_concurrency) : json_null());
}

static void add_sums(json_t *o, const struct serve_result *r)
{
    const struct load_metrics *m = &r->sums;
    double s = r->options.duration;
    set(o, "duration", json_real(s));
    set(o, "completed", json_integer(m->completed));
    set(o, "failed", json_integer(m->failed));
    set(o, "total_input_tokens", json_integer(m->input_tokens));
    set(o, "total_output_tokens", json_integer(m->output_tokens));
    set(o, "request_throughput", json_real((double)m->completed / s));
    set(o, "request_goodput", r->options.goals.any ? json_real((double)m->good / s) : json_null());
    set(o, "output_throughput", json_real((double)m->output_tokens / s));
    set(o, "total_token_throughput", json_real((double)(m->input_tokens + m->output_tokens) / s));
    set(o, "max_output_tokens_per_s", json_real(m->peak_tokens));
    set(o, "max_concurrent_requests", json_integer(m->peak_requests));
}

static json_t *array_of_itl(const struct load_answer *a)
{
    json_t *all = json_array();
    for (int64_t i = 0; i < a->n_itl; i++) json_array_append_new(all, json_real(a->itl[i]));
    return all;
}

static void add_requests(json_t *o, const struct serve_result *r)
{
    static const char *const keys[] = { "input_lens",  "output_lens", "ttfts",           "itls",  "latencies",
                                        "start_times", "queue_times", "generated_texts", "errors" };
    enum { N_KEYS = sizeof keys / sizeof *keys };
    json_t *arrays[N_KEYS];
    for (int k = 0; k < N_KEYS; k++) set(o, keys[k], arrays[k] = json_array());
    for (int64_t i = 0; i < r->n; i++) {
        const struct load_answer *a = &r->answers[i];
        json_t *values[N_KEYS] = { count_or_null(a->prompt_tokens),
                                   json_integer(a->ok ? a->output_tokens : 0),
                                   json_real(a->ttft),
                                   array_of_itl(a),
                                   json_real(a->latency),
                                   json_real(a->start),
                                   json_real(a->queued),
                                   json_stringn(a->text ? a->text : "", a->text_bytes),
                                   json_string(a->error ? a->error : "") };
        for (int k = 0; k < N_KEYS; k++) json_array_append_new(arrays[k], values[k]);
    }
}

static void add_drafting(json_t *o, const struct serve_counters *c)
{
    json_t *places = json_array();
    for (int i = 0; i < places_of(c) && c->drafts > 0; i++)
        json_array_append_new(places, json_real(c->accepted_at[i] / c->drafts));
    set(o, "spec_decode_acceptance_rate", json_real(100 * c->accepted / c->draft_tokens));
    set(o, "spec_decode_acceptance_length", json_real(c->drafts > 0 ? 1 + c->accepted / c->drafts : 0));
    set(o, "spec_decode_num_drafts", json_integer((json_int_t)c->drafts));
    set(o, "spec_decode_draft_tokens", json_integer((json_int_t)c->draft_tokens));
    set(o, "spec_decode_accepted_tokens", json_integer((json_int_t)c->accepted));
    set(o, "spec_decode_per_position_acceptance_rates", places);
}

static void add_figure(json_t *o, const struct serve_result *r, int i)
{
    const struct load_summary *s = summary_of(&r->sums, i);
    char key[96], p[32];
    const struct {
        const char *name;
        double value;
    } three[] = { { "mean", s->mean }, { "median", s->median }, { "std", s->deviation } };
    for (int k = 0; k < 3; k++) {
        snprintf(key, sizeof key, "%s_%s_ms", three[k].name, figures[i].name);
        set(o, key, json_real(1e3 * three[k].value));
    }
    for (int k = 0; k < r->options.n_percentiles; k++) {
        snprintf(key, sizeof key, "p%s_%s_ms", percentile_name(p, sizeof p, r->options.percentiles[k]),
                 figures[i].name);
        set(o, key, json_real(1e3 * s->percentiles[k]));
    }
}

json_t *serve_json(const struct serve_result *r)
{
    json_t *o = json_object();
    add_setting(o, r);
    add_sums(o, r);
    if (r->detailed) add_requests(o, r);
    if (has_drafts(r)) add_drafting(o, &r->drafting);
    for (int i = 0; i < N_FIGURES; i++)
        if (is_shown(r, i)) add_figure(o, r, i);
    return o;
}

static bool begins(const char *text, const char *with)
{
    return strncmp(text, with, strlen(with)) == 0;
}

static void read_counter(struct serve_counters *c, const char *text, size_t n)
{
    static const char PREFIX[] = "vllm:spec_decode_num_";
    char line_text[512];
    snprintf(line_text, sizeof line_text, "%.*s", (int)n, text);
    const char *value = strrchr(line_text, ' '), *name = line_text + strlen(PREFIX);
    if (!begins(line_text, PREFIX) || !value) return;
    size_t word = strcspn(name, "{ ");
    if (word >= 8 && memcmp(name + word - 8, "_created", 8) == 0) return;
    double x = strtod(value, NULL);
    const char *place = strstr(name, "position=\"");
    if (begins(name, "accepted_tokens_per_pos")) {
        long i = place ? strtol(place + 10, NULL, 10) : -1;
        if (i >= 0 && i < SERVE_PLACES_MAX) c->accepted_at[i] += x;
    } else if (begins(name, "accepted_tokens"))
        c->accepted += x;
    else if (begins(name, "draft_tokens"))
        c->draft_tokens += x;
    else if (begins(name, "drafts"))
        c->drafts += x;
    c->known = true;
}

struct serve_counters serve_counters_read(const char *text)
{
    struct serve_counters c = { 0 };
    while (*text) {
        size_t n = strcspn(text, "\n");
        read_counter(&c, text, n);
        text += n + (text[n] == '\n');
    }
    return c;
}
