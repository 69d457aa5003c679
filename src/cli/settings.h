/* A flag table's values from more than the command line: a YAML file of --config, then the environment, then
 * the words, the later ones winning whole (a list is not added to). Remembers where each came from. */
#ifndef CLI_SETTINGS_H
#define CLI_SETTINGS_H
#include "cli/flags.h"
#include "quantize/yaml_tree.h"

enum { SETTINGS_FLAGS_MAX = 160 };

struct settings_source {
    const struct command *command;
    const struct flag *flags;
    const char *from[SETTINGS_FLAGS_MAX]; /* "command line", "QUENCH_PORT"; NULL: the default */
    int line[SETTINGS_FLAGS_MAX];         /* of the file, where `from` is its path */
    const char *path;                     /* of the file, or NULL */
    struct yaml_tree *tree;
    char *texts[SETTINGS_FLAGS_MAX]; /* values that had to be written */
    int n_texts;
};

/* `flags` has --config FILE, whose value is `path`. --max-model-len is QUENCH_MAX_MODEL_LEN in the
 * environment and max-model-len, perhaps with '_', in the file; a list's items are there between commas, here
 * a YAML list; a JSON value may be YAML. The first argument is QUENCH_MODEL and `model`. Values live until
 * settings_free, which accepts a zeroed one and must be called also after a failure. */
bool settings_parse(struct settings_source *s, int argc, char **argv, const char **arguments,
                    const char *const *path, bool *help, struct err *e);
void settings_free(struct settings_source *s);

/* As YAML that --config takes, each line with its source. Values of `secret` (NULL-terminated names) are not
 * shown. */
void settings_print(const struct settings_source *s, const char *model, const char *const *secret);
#endif
