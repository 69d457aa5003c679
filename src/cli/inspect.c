/* quench inspect MODEL: what the checkpoint holds, in groups, its configuration in words, what it needs in
 * memory. */
#include "cli/commands.h"
#include "cli/common.h"
#include <jansson.h>
#include <stdio.h>
#include <string.h>

static const struct command command = {
    "inspect",
    "MODEL",
    "A table of the checkpoint's tensors by group and dtype, its configuration in words, and the memory it "
    "would need.",
    1,
};

enum { GROUPS = 12 };
/* First match decides; every tensor matches the last. */
static const struct {
    const char *name, *part;
} kinds[GROUPS] = {
    { "MTP head", "mtp." },
    { "vision tower", "visual." },
    { "token embedding", "embed_tokens" },
    { "lm_head", "lm_head" },
    { "routed experts", ".mlp.experts." },
    { "shared expert", ".mlp.shared_expert." },
    { "shared expert gate", ".mlp.shared_expert_gate" },
    { "router", ".mlp.gate." },
    { "DeltaNet", ".linear_attn." },
    { "attention", ".self_attn." },
    { "norms", "norm" },
    { "other", "" },
};

struct tally {
    uint64_t tensors, parameters, bytes;
};

struct census {
    struct tally of[GROUPS][DTYPE_COUNT], total;
};

static int kind_of(const char *name)
{
    int k = 0;
    while (!(k == 0 ? strncmp(name, kinds[0].part, strlen(kinds[0].part)) == 0
                    : strstr(name, kinds[k].part) != NULL))
        k++;
    return k;
}

static bool is_scale(const char *name)
{
    const char *dot = strrchr(name, '.');
    return dot && (strstr(dot, "_scale") != NULL);
}

/* Two weights a byte of NVFP4 codes; scales are not parameters. */
static uint64_t parameters_of(const struct tensor *t)
{
    if (is_scale(t->name)) return 0;
    const char *dot = strrchr(t->name, '.');
    uint64_t n = (uint64_t)tensor_elements(t);
    return t->dtype == DTYPE_U8 && dot && strncmp(dot, ".weight", 7) == 0 ? 2 * n : n;
}

static void take_census(struct census *s, const struct checkpoint *c)
{
    for (size_t i = 0; i < c->n_tensors; i++) {
        const struct tensor *t = c->tensors[i];
        struct tally *both[] = { &s->of[kind_of(t->name)][t->dtype], &s->total };
        for (int k = 0; k < 2; k++) {
            both[k]->tensors++;
            both[k]->parameters += parameters_of(t);
            both[k]->bytes += t->bytes;
        }
    }
}

struct needs {
    uint64_t text, vision, mtp, kv_token[KV_DTYPES],
        state; /* weights by part; KV bytes a token by dtype; state a sequence */
};

static struct needs needs_of(const struct census *s, const struct config *c)
{
    struct needs n = { 0 };
    for (int d = 0; d < DTYPE_COUNT; d++) {
        n.mtp += s->of[0][d].bytes;
        n.vision += s->of[1][d].bytes;
    }
    n.text = s->total.bytes - n.mtp - n.vision;
    uint64_t linear = 0, values = (uint64_t)c->linear_value_heads * (uint64_t)c->linear_value_dim;
    for (int i = 0; i < c->n_layers; i++) linear += c->layer_kinds[i] == LAYER_LINEAR_ATTENTION;
    for (int i = 0; i < KV_DTYPES; i++)
        n.kv_token[i] = 2 * ((uint64_t)c->n_layers - linear) *
                        (uint64_t)kv_line_bytes((enum kv_dtype)i, c->n_kv_heads, c->head_dim);
    uint64_t channels = 2 * (uint64_t)c->linear_key_heads * (uint64_t)c->linear_key_dim + values;
    uint64_t keep = c->conv_kernel > 0 ? (uint64_t)c->conv_kernel - 1 : 0;
    n.state = linear * 4 * (values * (uint64_t)c->linear_key_dim + keep * channels);
    return n;
}

static const char *quantized_by(const struct quantization *q)
{
    static const char *const words[] = { "quantized (compressed-tensors)", "quantized (ModelOpt)",
                                         "quantized (FP8 in blocks)" };
    return q ? words[quantization_origin(q)] : "not quantized";
}

static void print_config(const struct checkpoint *k)
{
    const struct config *c = &k->config;
    int full = 0;
    for (int i = 0; i < c->n_layers; i++) full += c->layer_kinds[i] == LAYER_FULL_ATTENTION;
    printf("%s, %s\n", k->path, c->architecture[0] ? c->architecture : c->model_type);
    printf("  %d layers of width %lld: %d Gated DeltaNet, %d gated attention; %lld tokens%s\n", c->n_layers,
           (long long)c->hidden_size, c->n_layers - full, full, (long long)c->vocab_size,
           c->tie_word_embeddings ? ", lm_head tied to the embedding" : "");
    printf("  attention: %d query heads, %d key/value heads of %d, %d dimensions rotate, theta %g, up to "
           "%lld positions\n",
           c->n_heads, c->n_kv_heads, c->head_dim, c->rotary_dim, c->rope_theta,
           (long long)c->max_position_embeddings);
    if (c->yarn.factor > 0)
        printf("  YaRN: %g times the %lld positions it was trained on\n", c->yarn.factor,
               (long long)c->yarn.original);
    if (full < c->n_layers)
        printf("  DeltaNet: %d key heads of %d, %d value heads of %d, convolution over %d\n",
               c->linear_key_heads, c->linear_key_dim, c->linear_value_heads, c->linear_value_dim,
               c->conv_kernel);
    printf("  experts: %d of width %lld, %d a token, and a shared one of width %lld\n", c->n_experts,
           (long long)c->moe_intermediate, c->experts_per_token, (long long)c->shared_intermediate);
    if (c->has_vision)
        printf("  vision tower: %d blocks of width %lld, patches of %d; %s\n", c->vision.depth,
               (long long)c->vision.hidden, c->vision.patch,
               c->mtp_layers ? "MTP head: 1 layer" : "no MTP head");
    else
        printf("  no vision tower; %s\n", c->mtp_layers ? "MTP head: 1 layer" : "no MTP head");
    printf("  %zu tensors in %d file%s, %s\n\n", k->n_tensors, k->n_shards, k->n_shards == 1 ? "" : "s",
           quantized_by(k->quantization));
}

static void print_table(const struct census *s)
{
    char bytes[32];
    printf("%-20s %-8s %10s %16s %12s\n", "group", "dtype", "tensors", "parameters", "bytes");
    for (int g = 0; g < GROUPS; g++)
        for (int d = 0; d < DTYPE_COUNT; d++) {
            const struct tally *t = &s->of[g][d];
            if (t->tensors)
                printf("%-20s %-8s %10llu %16llu %12s\n", kinds[g].name, dtype_name((enum dtype)d),
                       (unsigned long long)t->tensors, (unsigned long long)t->parameters,
                       common_bytes(bytes, sizeof bytes, t->bytes));
        }
    printf("%-20s %-8s %10llu %16llu %12s\n\n", "total", "", (unsigned long long)s->total.tensors,
           (unsigned long long)s->total.parameters, common_bytes(bytes, sizeof bytes, s->total.bytes));
}

static void print_needs(const struct needs *n)
{
    char a[32], b[32], c[32], d[32];
    printf("memory: language model %s, vision tower %s, MTP head %s\n", common_bytes(a, sizeof a, n->text),
           common_bytes(b, sizeof b, n->vision), common_bytes(c, sizeof c, n->mtp));
    printf("        per token of context %s in bf16 (f32 %s, fp8 %s, int8 %s)\n",
           common_bytes(a, sizeof a, n->kv_token[KV_BF16]), common_bytes(b, sizeof b, n->kv_token[KV_F32]),
           common_bytes(c, sizeof c, n->kv_token[KV_FP8]), common_bytes(d, sizeof d, n->kv_token[KV_INT8]));
    printf("        per sequence %s of recurrent state\n", common_bytes(a, sizeof a, n->state));
}

static void print_json(const struct checkpoint *k, const struct census *s, const struct needs *n)
{
    json_t *groups = json_array();
    for (int g = 0; g < GROUPS; g++)
        for (int d = 0; d < DTYPE_COUNT; d++) {
            const struct tally *t = &s->of[g][d];
            if (t->tensors)
                json_array_append_new(groups,
                                      json_pack("{s:s, s:s, s:I, s:I, s:I}", "group", kinds[g].name, "dtype",
                                                dtype_name((enum dtype)d), "tensors", (json_int_t)t->tensors,
                                                "parameters", (json_int_t)t->parameters, "bytes",
                                                (json_int_t)t->bytes));
        }
    json_t *o = json_pack("{s:o, s:s, s:b, s:I, s:I, s:I, s:o, s:I, s:I, s:I, s:I, s:I}", "model",
                          common_json_path(k->path), "model_type", k->config.model_type, "quantized",
                          k->quantization != NULL, "tensors", (json_int_t)s->total.tensors, "parameters",
                          (json_int_t)s->total.parameters, "bytes", (json_int_t)s->total.bytes, "groups",
                          groups, "language_model_bytes", (json_int_t)n->text, "vision_bytes",
                          (json_int_t)n->vision, "mtp_bytes", (json_int_t)n->mtp, "kv_bytes_per_token_bf16",
                          (json_int_t)n->kv_token[KV_BF16], "state_bytes_per_sequence", (json_int_t)n->state);
    json_dumpf(o, stdout, JSON_COMPACT);
    putchar('\n');
    json_decref(o);
}

int cli_inspect(int argc, char **argv)
{
    struct common common = { 0 };
    const char *path;
    const struct flag flags[] = {
        { "--json", 0, FLAG_SWITCH, &common.json, NULL, "print the result as one JSON object", NULL },
        FLAGS_END,
    };
    int status;
    struct err e = { 0 };
    struct checkpoint c = { 0 };
    if (!common_parse(&command, flags, argc, argv, &path, &status)) return status;
    if (!checkpoint_open(&c, path, &e)) return common_fail(&command, &e);
    struct census s = { 0 };
    take_census(&s, &c);
    struct needs n = needs_of(&s, &c.config);
    if (common.json) {
        print_json(&c, &s, &n);
    } else {
        print_config(&c);
        print_table(&s);
        print_needs(&n);
    }
    checkpoint_close(&c);
    return 0;
}
