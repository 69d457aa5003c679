/* quench merge-mtp MODEL --from SRC */
#include "cli/commands.h"
#include "cli/common.h"
#include "quantize/merge_mtp.h"
#include <jansson.h>
#include <stdio.h>

static const struct command command = {
    "merge-mtp",
    "MODEL --from SRC",
    "Repairs a checkpoint that lost its MTP head: copies all mtp tensors of SRC into it, byte for byte, and "
    "makes\n"
    "config.json leave them unquantized. Changes MODEL in place; if it fails or is interrupted, MODEL is as "
    "it "
    "was.",
    1,
};

struct settings {
    const char *model, *source;
    bool quiet, json;
};

static void print_text(const struct settings *s, const struct merge_mtp_result *r)
{
    char bytes[32];
    printf("%s: %lld tensors of the MTP head, %s, from %s, in %s\n", s->model, (long long)r->tensors,
           common_bytes(bytes, sizeof bytes, r->bytes), s->source, r->file);
    if (r->layers_added) puts("config.json: mtp_num_hidden_layers added");
    if (r->ignore_added) puts("config.json: \"re:.*mtp.*\" added to quantization_config.ignore");
}

static void print_json(const struct settings *s, const struct merge_mtp_result *r)
{
    json_t *o = json_pack("{s:o, s:o, s:I, s:I, s:s, s:b, s:b}", "model", common_json_path(s->model),
                          "source", common_json_path(s->source), "tensors", (json_int_t)r->tensors, "bytes",
                          (json_int_t)r->bytes, "file", r->file, "ignore_added", r->ignore_added,
                          "layers_added", r->layers_added);
    json_dumpf(o, stdout, JSON_COMPACT);
    putchar('\n');
    json_decref(o);
}

static bool run(const struct settings *s, struct err *e)
{
    struct merge_mtp_result r;
    struct report report = common_report(&(struct common){ .quiet = s->quiet });
    struct merge_mtp_options o = { .model = s->model, .source = s->source, .report = &report };
    if (!s->source) return err_set(e, ERR_ARGUMENT, "--from SRC is needed");
    if (!merge_mtp(&o, &r, e)) return false;
    if (s->json)
        print_json(s, &r);
    else
        print_text(s, &r);
    return true;
}

int cli_merge_mtp(int argc, char **argv)
{
    struct settings s = { 0 };
    const struct flag flags[] = {
        { "--from", 0, FLAG_TEXT, &s.source, "SRC", "the checkpoint that still has the head", NULL },
        { "--quiet", 0, FLAG_SWITCH, &s.quiet, NULL, "no progress, no notes", NULL },
        { "--json", 0, FLAG_SWITCH, &s.json, NULL, "print the result as one JSON object", NULL },
        FLAGS_END,
    };
    int status;
    struct err e = { 0 };
    if (!common_parse(&command, flags, argc, argv, &s.model, &status)) return status;
    return run(&s, &e) ? 0 : common_fail(&command, &e);
}
