#include "cli/serve_compat.h"
#include <stdio.h>
#include <string.h>

/* allowed: values between '|' that mean what is done anyway; NULL: all do. */
static const struct {
    const char *name, *value, *allowed;
} idle[] = {
    { "--trust-remote-code", NULL, NULL },
    { "--enable-auto-tool-choice", NULL, NULL },
    { "--tool-call-parser", "NAME", "qwen3_coder|qwen3_xml|hermes" },
    { "--reasoning-parser", "NAME", "qwen3" },
    { "--async-scheduling", NULL, NULL },
    { "--enable-chunked-prefill", NULL, NULL },
    { "--enforce-eager", NULL, NULL },
    { "--load-format", "NAME", NULL },
    { "--dtype", "NAME", "auto|bfloat16" },
    { "--quantization", "NAME", NULL },
    { "--tokenizer-mode", "NAME", "auto|hf" },
    { "--mm-encoder-tp-mode", "NAME", NULL },
    { "--mm-processor-cache-type", "NAME", NULL },
    { "--mamba-cache-mode", "NAME", NULL },
    { "--mamba-block-size", "N", NULL },
    { "--mamba-ssm-cache-dtype", "NAME", "auto|float32" },
    { "--moe-backend", "NAME", NULL },
    { "--linear-backend", "NAME", NULL },
    { "--attention-backend", "NAME", NULL },
    { "--gdn-prefill-backend", "NAME", NULL },
    { "--compilation-config", "JSON", NULL },
    { "--optimization-level", "LEVEL", NULL },
    { "--max-cudagraph-capture-size", "N", NULL },
    { "--cudagraph-capture-sizes", "N", NULL },
    { "--block-size", "N", NULL },
    { "--swap-space", "GB", NULL },
    { "--seed", "N", NULL },
    { "--tensor-parallel-size", "N", "1" },
    { "--pipeline-parallel-size", "N", "1" },
    { "--data-parallel-size", "N", "1" },
    { "--enable-expert-parallel", NULL, NULL },
    { "--task", "NAME", "auto|generate" },
    { "--runner", "NAME", "auto|generate" },
    { "--disable-log-requests", NULL, NULL },
    { "--enable-log-requests", NULL, NULL },
    { "--disable-log-stats", NULL, NULL },
    { "--disable-uvicorn-access-log", NULL, NULL },
    { "--uvicorn-log-level", "NAME", NULL },
    { "--enable-request-id-headers", NULL, NULL },
    { "--enable-server-load-tracking", NULL, NULL },
    { "--enable-tokenizer-info-endpoint", NULL, NULL },
    { "--enable-prompt-tokens-details", NULL, NULL },
    { "--allow-credentials", NULL, NULL },
    { "--allowed-methods", "JSON", NULL },
    { "--allowed-headers", "JSON", NULL },
    { "--performance-mode", "NAME", NULL },
    { "--scheduling-policy", "NAME", "fcfs|priority" },
    { "--chat-template-content-format", "NAME", "auto|openai" },
    { "--response-role", "NAME", "assistant" },
    { "--logprobs-mode", "NAME", "raw_logprobs" },
    { "--max-logprobs", "N", "20" },
    { "--api-server-count", "N", NULL },
    { "--disable-frontend-multiprocessing", NULL, NULL },
    { "--max-seq-len-to-capture", "N", NULL },
    { "--skip-mm-profiling", NULL, NULL },
    { "--cpu-offload-gb", "GB", "0" },
};
enum { N_IDLE = sizeof idle / sizeof *idle };
_Static_assert((int)N_IDLE <= (int)COMPAT_FLAGS_MAX, "room for every row");

static const struct {
    const char *name, *server, *ours;
} foreign[] = {
    { "--context-length", "SGLang", "--max-model-len" },
    { "--mem-fraction-static", "SGLang", "--gpu-memory-utilization" },
    { "--max-running-requests", "SGLang", "--max-num-seqs" },
    { "--chunked-prefill-size", "SGLang", "--max-num-batched-tokens" },
    { "--max-queued-requests", "SGLang", "--max-queued" },
    { "--model-path", "SGLang", "the checkpoint as first word: quench serve MODEL" },
    { "--tp-size", "SGLang", "--tensor-parallel-size" },
    { "--speculative-algorithm", "SGLang", "--mtp N" },
    { "--speculative-num-steps", "SGLang", "--mtp N" },
    { "--speculative-eagle-topk", "SGLang", "--mtp N" },
    { "--speculative-num-draft-tokens", "SGLang", "--mtp N" },
    { "--disable-radix-cache", "SGLang", "--no-enable-prefix-caching" },
    { "--enable-metrics", "SGLang", "nothing: /metrics is always there" },
    { "--json-model-override-args", "SGLang", "--hf-overrides" },
    { "--ctx-size", "llama.cpp", "--max-model-len" },
    { "-c", "llama.cpp", "--max-model-len" },
    { "--model", "llama.cpp", "the checkpoint as first word: quench serve MODEL" },
    { "-m", "llama.cpp", "the checkpoint as first word: quench serve MODEL" },
    { "--parallel", "llama.cpp", "--max-num-seqs" },
    { "-np", "llama.cpp", "--max-num-seqs" },
    { "--batch-size", "llama.cpp", "--max-num-batched-tokens" },
    { "--ubatch-size", "llama.cpp", "--max-num-batched-tokens" },
    { "--alias", "llama.cpp", "--served-model-name" },
    { "-a", "llama.cpp", "--served-model-name" },
    { "--flash-attn", "llama.cpp", "nothing: attention is always computed so" },
    { "-fa", "llama.cpp", "nothing: attention is always computed so" },
    { "-ngl", "llama.cpp", "--device cuda" },
    { "--n-gpu-layers", "llama.cpp", "--device cuda" },
    { "--spec-type", "llama.cpp", "--mtp N" },
    { "--spec-draft-n-max", "llama.cpp", "--mtp N" },
    { "--cache-type-k", "llama.cpp", "--kv-cache-dtype" },
    { "--cache-type-v", "llama.cpp", "--kv-cache-dtype" },
    { "--cache-ram", "llama.cpp", "--host-cache" },
    { "--rope-scaling", "llama.cpp and of older vLLMs", "--rope-yarn FACTOR, or --hf-overrides" },
    { "--rope-theta", "older vLLMs", "--hf-overrides" },
    { "--rope-scale", "llama.cpp", "--rope-yarn" },
    { "--rope-freq-base", "llama.cpp", "--hf-overrides" },
    { "--yarn-orig-ctx", "llama.cpp", "--hf-overrides" },
    { "--no-mmap", "llama.cpp", "nothing: weights are bound once and not read again" },
    { "--mlock", "llama.cpp", "nothing: weights are bound once and not read again" },
    { "--jinja", "llama.cpp", "nothing: the checkpoint's template is always used" },
    { "--chat-template-file", "llama.cpp", "--chat-template" },
    { "--ssl-key-file", "llama.cpp", "--ssl-keyfile" },
    { "--ssl-cert-file", "llama.cpp", "--ssl-certfile" },
    { "--h11-max-incomplete-event-size", "vLLM", "--max-header-bytes and --max-body-bytes" },
    { "--kv-cache-memory-bytes", "vLLM", "--memory, of weights and caches together" },
    { "--h11-max-header-count", "vLLM", "--max-headers" },
};

int compat_flags(struct flag *flags, int n, struct compat *c)
{
    for (int i = 0; i < N_IDLE; i++)
        flags[n++] = (struct flag){ .name = idle[i].name,
                                    .kind = idle[i].value ? FLAG_TEXT : FLAG_SWITCH,
                                    .out = idle[i].value ? (void *)&c->texts[i] : (void *)&c->switches[i],
                                    .value = idle[i].value,
                                    .help = "" };
    return n;
}

void compat_rewrite(int argc, char **argv)
{
    static char any[] = "--optimization-level=3"; /* whatever it was, there is nothing to do */
    for (int i = 0; i < argc && strcmp(argv[i], "--") != 0; i++) {
        if (strncmp(argv[i], "-O", 2) != 0) continue;
        bool takes_next = !argv[i][2] && i + 1 < argc;
        argv[i] = any;
        if (takes_next) argv[++i] = any;
    }
}

static bool is_among(const char *value, const char *allowed)
{
    size_t n = strlen(value);
    for (const char *p = allowed; p; p = strchr(p, '|') ? strchr(p, '|') + 1 : NULL)
        if (strncmp(p, value, n) == 0 && (p[n] == '|' || !p[n])) return true;
    return false;
}

bool compat_check(const struct settings_source *s, const struct compat *c, bool quiet, struct err *e)
{
    const char *between = "quench serve: note: no need of ";
    for (int i = 0; i < N_IDLE; i++) {
        const struct flag *f = flags_find(s->flags, idle[i].name);
        if (!s->from[f - s->flags]) continue;
        if (idle[i].allowed && !is_among(c->texts[i], idle[i].allowed))
            return err_set(e, ERR_UNSUPPORTED, "%s %s: not supported; what is done here: %s", idle[i].name,
                           c->texts[i], idle[i].allowed);
        if (!quiet) fprintf(stderr, "%s%s", between, idle[i].name);
        between = ", ";
    }
    if (!quiet && *between == ',') fputc('\n', stderr);
    return true;
}

bool compat_foreign(int argc, char **argv, struct err *e)
{
    for (int i = 0; i < argc && strcmp(argv[i], "--") != 0; i++) {
        size_t n = strcspn(argv[i], "=");
        for (size_t k = 0; argv[i][0] == '-' && k < sizeof foreign / sizeof *foreign; k++)
            if (strlen(foreign[k].name) == n && strncmp(foreign[k].name, argv[i], n) == 0)
                return err_set(e, ERR_ARGUMENT, "%s is a flag of %s; here it is %s", foreign[k].name,
                               foreign[k].server, foreign[k].ours);
    }
    return true;
}
