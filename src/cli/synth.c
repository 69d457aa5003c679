/* quench synth CONFIG DST [--layers N] [--format bf16|card|fast|nvfp4|nvfp4a16] */
#include "cli/commands.h"
#include "cli/common.h"
#include "quantize/synth.h"
#include <jansson.h>
#include <stdio.h>

static const struct command command = {
    "synth",
    "CONFIG DST",
    "Writes a checkpoint of random values in the shape that CONFIG (a config.json, its folder, or 35b-a3b) "
    "describes:\n"
    "the language model, and MTP head and vision tower where the config has them, in valid values of the "
    "size "
    "that\n"
    "trained ones have. DST must not exist; it appears only when complete. A tokenizer beside CONFIG is "
    "copied.",
    2,
};

static const char *const formats[] = { "bf16", "card", "fast", "nvfp4", "nvfp4a16", NULL };

struct settings {
    struct common common;
    const char *paths[2];
    int format;
    int64_t layers, seed, shard_bytes;
};

static void print_result(const struct settings *s, const struct synth_result *r)
{
    char bytes[32];
    if (!s->common.json) {
        printf("%s -> %s, %s\n  %lld tensors, %s in %lld file%s, %.1f s; %s\n", s->paths[0], s->paths[1],
               formats[s->format], (long long)r->tensors, common_bytes(bytes, sizeof bytes, r->bytes),
               (long long)r->shards, r->shards == 1 ? "" : "s", r->seconds,
               r->has_tokenizer ? "tokenizer copied" : "no tokenizer");
        return;
    }
    json_t *o = json_pack("{s:o, s:o, s:s, s:I, s:I, s:I, s:b, s:f}", "config", common_json_path(s->paths[0]),
                          "destination", common_json_path(s->paths[1]), "format", formats[s->format],
                          "tensors", (json_int_t)r->tensors, "bytes", (json_int_t)r->bytes, "shards",
                          (json_int_t)r->shards, "has_tokenizer", r->has_tokenizer, "seconds", r->seconds);
    json_dumpf(o, stdout, JSON_COMPACT);
    putchar('\n');
    json_decref(o);
}

static bool run(const struct settings *s, struct err *e)
{
    struct report report = common_report(&s->common);
    struct synth_result r;
    if (s->shard_bytes < 1)
        return err_set(e, ERR_ARGUMENT, "--max-shard-size: expected a number of bytes above 0, found %lld",
                       (long long)s->shard_bytes);
    if (s->common.threads < 0 || s->common.threads > 1024)
        return err_set(e, ERR_ARGUMENT, "--threads: expected 1 to 1024, found %lld",
                       (long long)s->common.threads);
    struct synth_options o = { .config = s->paths[0],
                               .destination = s->paths[1],
                               .layers = s->layers,
                               .recipe = recipe_builtin(formats[s->format]),
                               .seed = (uint64_t)s->seed,
                               .max_shard_bytes = (uint64_t)s->shard_bytes,
                               .threads = (int)s->common.threads,
                               .report = &report };
    if (!synth_write(&o, &r, e)) return false;
    print_result(s, &r);
    return true;
}

int cli_synth(int argc, char **argv)
{
    struct settings s = { .shard_bytes = 5000000000 };
    const struct flag flags[] = {
        { "--layers", 0, FLAG_INT, &s.layers, "N", "layers of the language model (default: the config's)",
          NULL },
        { "--format", 0, FLAG_CHOICE, &s.format, "bf16|card|fast|nvfp4|nvfp4a16",
          "BF16 (default), or as quantize writes with that recipe", formats },
        { "--seed", 0, FLAG_INT, &s.seed, "N", "the same seed gives the same bytes (default 0)", NULL },
        { "--max-shard-size", 0, FLAG_INT, &s.shard_bytes, "BYTES", "of a file (default 5000000000)", NULL },
        { "--threads", 0, FLAG_INT, &s.common.threads, "N",
          "threads (default: this process's share of the machine)", NULL },
        { "--quiet", 0, FLAG_SWITCH, &s.common.quiet, NULL, "no progress, no notes", NULL },
        { "--json", 0, FLAG_SWITCH, &s.common.json, NULL, "print the result as one JSON object", NULL },
        FLAGS_END,
    };
    int status;
    struct err e = { 0 };
    if (!common_parse(&command, flags, argc, argv, s.paths, &status)) return status;
    return run(&s, &e) ? 0 : common_fail(&command, &e);
}
