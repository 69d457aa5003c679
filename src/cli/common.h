/* What the subcommands share: flags that every one has, progress and messages on a terminal, opening a model.
 */
#ifndef CLI_COMMON_H
#define CLI_COMMON_H
#include "cli/flags.h"
#include "base/report.h"
#include "engine/engine.h"
#include "tokenizer/tokenizer.h"
#include <jansson.h>

struct common {
    int device; /* index into common_devices */
    int mask;   /* index into common_masks */
    int kv;     /* index into common_kv */
    int fp4;    /* index into common_activations */
    int inputs; /* index into common_inputs */
    int64_t threads;
    const char *speculative; /* NULL: none */
    const char *overrides;   /* NULL: none */
    double rope_yarn;        /* 0: none */
    bool quiet, json;
};
extern const char *const common_devices[],
    *const common_masks[], *const common_kv[], *const common_activations[], *const common_inputs[];
/* Rows of a flag table. */
#define COMMON_DEVICE_FLAGS(c)                                                                               \
    { "--device",          0,                                                                                \
      FLAG_CHOICE,         &(c).device,                                                                      \
      "auto|cpu|cuda|ref", "where to compute (auto: a GPU where there is one)",                              \
      common_devices },                                                                                      \
        { "--cpu-mask",                                                                                      \
          0,                                                                                                 \
          FLAG_CHOICE,                                                                                       \
          &(c).mask,                                                                                         \
          "best|generic|avx2|avx512|avx512bf16|amx",                                                         \
          "use at most these instructions",                                                                  \
          common_masks },                                                                                    \
        { "--threads",  0,   FLAG_INT,                                                                       \
          &(c).threads, "N", "threads (default: this process's share of the machine)",                       \
          NULL },                                                                                            \
    {                                                                                                        \
        "--quiet", 0, FLAG_SWITCH, &(c).quiet, NULL, "no progress, no notes", NULL                           \
    }
#define COMMON_FLAGS(c)                                                                                      \
    COMMON_DEVICE_FLAGS(c),                                                                                  \
    {                                                                                                        \
        "--json", 0, FLAG_SWITCH, &(c).json, NULL, "print the result as one JSON object", NULL               \
    }
#define COMMON_KV_FLAG(c)                                                                                    \
    {                                                                                                        \
        "--kv-cache-dtype", 0, FLAG_CHOICE, &(c).kv, "auto|f32|bf16|fp8|int8_per_token_head",                \
            "how keys and values are kept (auto: f32, on a GPU bf16; int8 for short: not on a GPU)",         \
            common_kv                                                                                        \
    }
#define COMMON_ACTIVATIONS_FLAGS(c)                                                                          \
    { "--nvfp4-activations",                                                                                 \
      0,                                                                                                     \
      FLAG_CHOICE,                                                                                           \
      &(c).fp4,                                                                                              \
      "bf16|fp4",                                                                                            \
      "inputs of NVFP4 weights: as they are (bf16, default) or as FP4 tensor cores take them (fp4)",         \
      common_activations },                                                                                  \
    {                                                                                                        \
        "--cpu-activations", 0, FLAG_CHOICE, &(c).inputs, "int8|f32",                                        \
            "inputs of products: f32, or int8 for NVFP4 weights and BF16 for BF16 ones (default but for "    \
            "perplexity)",                                                                                   \
            common_inputs                                                                                    \
    }
#define COMMON_OVERRIDES_FLAGS(c)                                                                            \
    { "--hf-overrides",                                                                                      \
      0,                                                                                                     \
      FLAG_TEXT,                                                                                             \
      &(c).overrides,                                                                                        \
      "JSON",                                                                                                \
      "fields of config.json, merged into it: '{\"text_config\": {\"rope_parameters\": {...}}}'",            \
      NULL },                                                                                                \
    {                                                                                                        \
        "--rope-yarn", 0, FLAG_NUMBER, &(c).rope_yarn, "FACTOR",                                             \
            "YaRN: so many times the positions the model was trained on, 4 for a million; changes short "    \
            "texts too (default 0: off)",                                                                    \
            NULL                                                                                             \
    }
#define FLAGS_END                                                                                            \
    {                                                                                                        \
        NULL, 0, FLAG_SWITCH, NULL, NULL, NULL, NULL                                                         \
    }

#define COMMON_SPECULATIVE_FLAG(c)                                                                           \
    {                                                                                                        \
        "--speculative-config", 0, FLAG_TEXT, &(c).speculative, "JSON",                                      \
            "draft with the MTP head: '{\"method\":\"mtp\",\"num_speculative_tokens\":2}', at most so many " \
            "a step (1 to 8), fewer where that is faster; the text is the same",                             \
            NULL                                                                                             \
    }

/* auto: as activations are held, on a GPU BF16 where inputs of products are rounded, else f32. */
enum kv_dtype common_kv_dtype(const struct common *c, const struct backend *b);
/* ERR_ARGUMENT where the backend knows no such cache; common_backend asks. */
bool common_check_kv(const struct common *c, const struct backend *b, struct err *e);
const char *common_kv_name(enum kv_dtype d); /* "f32" */

/* Progress on a terminal, warnings on stderr; a zeroed struct when quiet. */
struct report common_report(const struct common *c);
/* Parses and answers --help. Returns true to go on; else *status is the exit status. */
bool common_parse(const struct command *command, const struct flag *flags, int argc, char **argv,
                  const char **arguments, int *status);
int common_fail(const struct command *command, const struct err *e); /* prints; returns the exit status */

/* With --hf-overrides and --rope-yarn; c: NULL, without. */
bool common_checkpoint(struct checkpoint *k, const struct common *c, const char *path, struct err *e);

/* A checkpoint opened, its weights bound, its tokenizer loaded. */
struct opened {
    struct checkpoint checkpoint;
    struct model model;
    struct tokenizer *tokenizer;
};
/* --speculative-config as vLLM has it; *drafts: 0 without. Other methods and fields are refused, and another
 * model than this path. */
bool common_drafts(int *drafts, const struct common *c, const char *model, struct err *e);
bool common_backend(struct backend *b, const struct common *c, struct err *e);
/* Files, then weights; common_open does both. c: as for common_checkpoint. On failure nothing stays open. */
bool common_open_files(struct opened *o, const struct common *c, const char *path, struct err *e);
bool common_bind(struct opened *o, struct backend *b, const struct report *report, struct err *e);
bool common_open(struct opened *o, const struct common *c, const char *path, struct backend *b,
                 const struct report *report, struct err *e);
/* common_backend and common_open_files at the same time: a GPU takes as long to wake as files to be read. On
 * failure nothing stays open. */
bool common_start(struct backend *b, struct opened *o, const struct common *c, const char *path,
                  struct err *e);
/* The MTP head of an opened model, where drafts are wanted. */
bool common_bind_mtp(struct opened *o, int drafts, struct err *e);
void common_close(struct opened *o); /* accepts a zeroed one */

/* A JSON string of a path: names of files may hold any bytes, what is not UTF-8 becomes U+FFFD. */
json_t *common_json_path(const char *path);
char *common_bytes(char *out, size_t size, uint64_t bytes); /* "1.25 GB" */
#endif
