/* The program from outside: started on folders made here, by exit status, what it prints, and the exact
 * message. $BUILD/quench (build/quench) is the program, models/demo the model that most folders are variants
 * of. */
#include "checkpoint/temp.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { TEXT_MAX = 1 << 16, ARGUMENTS_MAX = 24 };

static const char demo[] = "models/demo";
static const char shard_1[] = "model-00001-of-00002.safetensors";
static const char shard_2[] = "model-00002-of-00002.safetensors";
static const char calibration[] = "data/calibration.jsonl";
static const char question[] = "<|im_start|>user\nWhat is the capital of "
                               "Finland?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n";

/* The folder all of this happens in, and what the last run printed. */
static struct fixture {
    struct temp temp;
    char program[PATH_MAX];
    char out[TEXT_MAX], err[TEXT_MAX];
} f;

/* How the program is started; zero: plainly. */
struct start {
    const char *stdout_path; /* instead of collecting what it prints */
    rlim_t file_bytes;       /* the disk is full after so many of a file */
    bool closed;             /* no standard streams at all */
};

/* Path of something in the folder; each call reuses one of 32 buffers. */
static const char *in(const char *name)
{
    static char paths[32][256];
    static unsigned next;
    char *out = paths[next++ % 32];
    snprintf(out, sizeof paths[0], "%s/%s", f.temp.path, name);
    return out;
}

static void read_back(char *text, const char *name)
{
    char *all;
    size_t n;
    struct err e = { 0 };
    if (!file_read(&all, &n, in(name), TEXT_MAX - 1, &e)) fail_msg("%s", e.text);
    memcpy(text, all, n + 1);
    free(all);
}

static void redirect(int fd, const char *path)
{
    int opened = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    if (opened < 0 || dup2(opened, fd) != fd) _exit(99);
    close(opened);
}

static void child(const struct start *s, const char *const *argv)
{
    redirect(STDOUT_FILENO, s->stdout_path ? s->stdout_path : in("out"));
    redirect(STDERR_FILENO, in("err"));
    if (s->file_bytes) {
        setrlimit(RLIMIT_FSIZE, &(struct rlimit){ s->file_bytes, s->file_bytes });
        signal(SIGXFSZ, SIG_IGN); /* the write fails instead, as on a full disk */
    }
    for (int fd = 0; s->closed && fd < 3; fd++) close(fd);
    execv(argv[0], (char *const *)(uintptr_t)argv);
    _exit(98);
}

static int run_as(const struct start *s, const char *const *words)
{
    const char *argv[ARGUMENTS_MAX] = { f.program };
    int n = 1, status;
    while (*words) argv[n++] = *words++;
    assert_true(n < ARGUMENTS_MAX);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) child(s, argv);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    if (!WIFEXITED(status)) fail_msg("quench %s: ended by signal %d", argv[1], WTERMSIG(status));
    f.out[0] = 0;
    if (!s->stdout_path) read_back(f.out, "out");
    read_back(f.err, "err");
    return WEXITSTATUS(status);
}

#define WORDS(...) ((const char *const[]){ __VA_ARGS__, NULL })

static void expect_status(int got, int want)
{
    if (got != want) fail_msg("expected exit status %d, found %d; stderr: %s", want, got, f.err);
}

static void succeed(const char *const *words)
{
    expect_status(run_as(&(struct start){ 0 }, words), 0);
}

/* Must end with this status, this on stderr, and nothing on stdout. In `message`, @ is the fixture's folder.
 */
static void refuse(const char *const *words, int status, const char *message)
{
    char want[2000];
    size_t n = 0;
    for (const char *p = message; *p; p++)
        n += (size_t)snprintf(want + n, sizeof want - n, *p == '@' ? "%s" : "%.1s",
                              *p == '@' ? f.temp.path : p);
    expect_status(run_as(&(struct start){ 0 }, words), status);
    assert_string_equal(f.err, want);
    assert_string_equal(f.out, "");
}

/* Variants of the demo model. */

/* A folder with links to the model's files. */
static const char *variant(const char *name)
{
    const char *folder = in(name);
    char from[PATH_MAX], to[PATH_MAX], real[PATH_MAX];
    DIR *dir = opendir(demo);
    assert_non_null(dir);
    assert_true(file_remove_tree(folder, NULL));
    assert_int_equal(mkdir(folder, 0777), 0);
    for (struct dirent *d; (d = readdir(dir));) {
        if (d->d_name[0] == '.') continue;
        snprintf(from, sizeof from, "%s/%s", demo, d->d_name);
        snprintf(to, sizeof to, "%s/%s", folder, d->d_name);
        assert_non_null(realpath(from, real));
        assert_int_equal(symlink(real, to), 0);
    }
    closedir(dir);
    return folder;
}

/* Puts a file in the place of a link. */
static void replace(const char *folder, const char *name, const void *data, size_t n)
{
    struct err e = { 0 };
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    unlink(path);
    if (!file_write(path, data, n, &e)) fail_msg("%s", e.text);
}

static char *load(const char *name, size_t *n)
{
    struct err e = { 0 };
    char path[PATH_MAX], *data;
    snprintf(path, sizeof path, "%s/%s", demo, name);
    if (!file_read(&data, n, path, 1 << 30, &e)) fail_msg("%s", e.text);
    return data;
}

/* Sets the value at a dotted path of a JSON file; NULL deletes it. */
static void change_json(const char *folder, const char *name, const char *path, const char *value)
{
    char from[PATH_MAX];
    snprintf(from, sizeof from, "%s/%s", folder, name);
    json_t *root = must_load(from);
    json_change(root, path, value);
    char *text = json_dumps(root, JSON_INDENT(1));
    replace(folder, name, text, strlen(text));
    free(text);
    json_decref(root);
}

/* Replaces text of a shard's header by text of the same length, after the first place where `near` stands. */
static void change_header(const char *folder, const char *shard, const char *near, const char *old,
                          const char *new)
{
    size_t n;
    char *data = load(shard, &n);
    assert_int_equal(strlen(old), strlen(new));
    char *at = memmem(data, n, near, strlen(near));
    assert_non_null(at);
    at = memmem(at, 300, old, strlen(old));
    assert_non_null(at);
    memcpy(at, new, strlen(new));
    replace(folder, shard, data, n);
    free(data);
}

static void text_file(const char *name, const void *data, size_t n)
{
    temp_write(&f.temp, name, data, n);
}

static int setup(void **state)
{
    (void)state;
    const char *build = getenv("BUILD");
    f.temp = temp_make();
    snprintf(f.program, sizeof f.program, "%s/quench", build ? build : "build");
    static const char text[] =
        "The river rose that night, and in the morning the road to the mill was gone.\n"
        "Nobody in the village had seen the water so high since the year of the "
        "great flood.\n";
    text_file("text", text, sizeof text - 1);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    temp_remove(&f.temp);
    return 0;
}

/* Misuse. */

static void commands_are_named(void **state)
{
    (void)state;
    static const char *const none[] = { NULL };
    expect_status(run_as(&(struct start){ 0 }, none), 2);
    assert_non_null(strstr(f.err, "usage: quench COMMAND"));
    assert_string_equal(f.out, "");
    expect_status(run_as(&(struct start){ 0 }, WORDS("quantise")), 2);
    assert_memory_equal(f.err, "quench: unknown command 'quantise'\n", 35);
    assert_non_null(strstr(f.err, "usage: quench COMMAND"));
    static const char *const asked[] = { "--help", "-h", "help" };
    for (int i = 0; i < 3; i++) {
        succeed(WORDS(asked[i]));
        assert_non_null(strstr(f.out, "usage: quench COMMAND"));
        assert_string_equal(f.err, "");
    }
    succeed(WORDS("--version"));
    assert_memory_equal(f.out, "quench ", 7);
}

static void every_command_has_help(void **state)
{
    (void)state;
    static const struct {
        const char *name, *flags[4];
    } commands[] = {
        { "quantize",
          { "--recipe NAME", "--calibration FILE", "--num-calibration-samples N",
            "--max-shard-size BYTES" } },
        { "perplexity", { "--text FILE", "--against OTHER", "--ctx N", "--max-chunks N" } },
        { "generate", { "-p, --prompt TEXT", "--temperature T", "--stop TEXT", "--seed N" } },
        { "inspect", { "--json" } },
    };
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
        char first[64];
        succeed(WORDS(commands[i].name, "--help"));
        snprintf(first, sizeof first, "quench %s ", commands[i].name);
        assert_memory_equal(f.out, first, strlen(first));
        for (int k = 0; k < 4 && commands[i].flags[k]; k++)
            assert_non_null(strstr(f.out, commands[i].flags[k]));
        assert_string_equal(f.err, "");
        succeed(WORDS(commands[i].name, "a", "-h"));
    }
}

static void flags_are_checked(void **state)
{
    (void)state;
    const char *text = in("text");
    refuse(WORDS("perplexity", demo, "--texts", text), 2,
           "quench perplexity: unknown flag '--texts'\ntry: quench perplexity --help\n");
    refuse(WORDS("perplexity", demo, "--texts=x"), 2,
           "quench perplexity: unknown flag '--texts'\ntry: quench perplexity --help\n");
    refuse(WORDS("perplexity", demo), 2, "quench perplexity: --text FILE is needed\n");
    refuse(WORDS("perplexity", demo, "--text"), 2,
           "quench perplexity: --text needs a value: FILE\ntry: quench perplexity --help\n");
    refuse(
        WORDS("perplexity"), 2,
        "quench perplexity: expected: quench perplexity MODEL --text FILE\ntry: quench perplexity --help\n");
    refuse(WORDS("perplexity", demo, "again", "--text", text), 2,
           "quench perplexity: 'again': one argument too many\ntry: quench perplexity --help\n");
    refuse(WORDS("perplexity", demo, "--text", text, "--ctx", "1"), 2,
           "quench perplexity: --ctx: expected 2 to 1048576, found 1\n");
    refuse(
        WORDS("perplexity", demo, "--text", text, "--ctx", "many"), 2,
        "quench perplexity: --ctx: expected a whole number, found 'many'\ntry: quench perplexity --help\n");
    refuse(WORDS("perplexity", demo, "--text", text, "--quiet=1"), 2,
           "quench perplexity: --quiet takes no value\ntry: quench perplexity --help\n");
    refuse(WORDS("perplexity", demo, "--text", text, "--kv-cache-dtype", "int4"), 2,
           "quench perplexity: --kv-cache-dtype: expected one of auto, f32, bf16, fp8, int8_per_token_head, "
           "int8, found 'int4'\n"
           "try: quench perplexity --help\n");
    refuse(WORDS("perplexity", demo, "--text", text, "--threads", "-1"), 2,
           "quench perplexity: --threads: expected 1 to 1024, found -1\n");
    refuse(WORDS("generate", demo), 2, "quench generate: one of -p TEXT and --prompt-file FILE is needed\n");
    refuse(WORDS("generate", demo, "-p", "x", "--temperature", "-1"), 2,
           "quench generate: --temperature: expected 0 to 100, found -1\n");
    refuse(WORDS("generate", demo, "-p", "x", "--stop", ""), 2,
           "quench generate: --stop: an empty string would stop at once\n");
    refuse(WORDS("generate", demo, "-p", "x", "-n", "0"), 2,
           "quench generate: --max-tokens: expected 1 to 16777216, found 0\n");
    refuse(WORDS("generate", demo, "-p", "x", "--top-k", "4294967297"), 2,
           "quench generate: --top-k: expected 0 to 2147483647, found 4294967297\n");
    refuse(WORDS("generate", demo, "-p", "x", "--stop", "\xa9"), 2,
           "quench generate: --stop: not UTF-8 at byte 0\n");
    refuse(WORDS("quantize", demo, in("dst")), 2,
           "quench quantize: --calibration FILE.jsonl is needed: recipe card measures activations\n");
    refuse(WORDS("quantize", demo, in("dst"), "--recipe", "fast"), 2,
           "quench quantize: --calibration FILE.jsonl is needed: recipe fast measures activations\n");
    refuse(
        WORDS("quantize", demo, in("dst"), "--recipe", "cards"), 2,
        "quench quantize: --recipe: expected card, nvfp4, fast, nvfp4a16 or the path of a .yaml file, found "
        "'cards'\n");
    refuse(WORDS("quantize", demo, in("dst"), "--recipe", in("none.yaml")), 1,
           "quench quantize: --recipe: @/none.yaml: No such file or directory\n");
}

/* Checkpoints that are not right. */

static void folders_that_are_no_models(void **state)
{
    (void)state;
    static const char *const commands[][4] = { { "inspect" },
                                               { "perplexity", "--text", "@" },
                                               { "generate", "-p", "x" } };
    const char *missing = in("nowhere"), *text = in("text");
    char message[200];
    for (int i = 0; i < 3; i++) {
        const char *const *c = commands[i];
        const char *words[6] = { c[0], missing, c[1], c[1] && c[2][0] == '@' ? text : c[2], NULL };
        snprintf(message, sizeof message, "quench %s: @/nowhere: no such folder\n", c[0]);
        refuse(words, 1, message);
        words[1] = text;
        snprintf(message, sizeof message, "quench %s: @/text: not a folder\n", c[0]);
        refuse(words, 1, message);
        words[1] = f.temp.path;
        snprintf(message, sizeof message, "quench %s: @: no config.json: not a checkpoint folder\n", c[0]);
        refuse(words, 1, message);
    }
}

static void shards_that_are_not_whole(void **state)
{
    (void)state;
    size_t n;
    char *data = load(shard_2, &n), path[PATH_MAX];
    const char *folder = variant("cut");
    replace(folder, shard_2, data, n - 1000);
    refuse(WORDS("generate", folder, "-p", "x"), 1,
           "quench generate: @/cut/model-00002-of-00002.safetensors: tensor "
           "'mtp.pre_fc_norm_embedding.weight': bytes [2993152, 2993664) of 2993176\n");
    free(data);
    snprintf(path, sizeof path, "%s/%s", folder, shard_2);
    unlink(path);
    refuse(WORDS("generate", folder, "-p", "x"), 1,
           "quench generate: @/cut: shard model-00002-of-00002.safetensors is missing; "
           "model.safetensors.index.json places tensor 'mtp.fc.weight' in it\n");
}

static void tensors_of_the_wrong_kind(void **state)
{
    (void)state;
    const char *folder = variant("shape");
    change_header(folder, shard_1, "\"lm_head.weight\"", "[2048,256]", "[256,2048]");
    refuse(WORDS("generate", folder, "-p", "x"), 1,
           "quench generate: @/shape: tensor 'lm_head.weight': expected shape [2048, 256] from config.json, "
           "found [256, 2048]\n");
    folder = variant("dtype");
    change_header(folder, shard_1, "\"lm_head.weight\"", "\"BF16\"", "\"I16\" ");
    refuse(
        WORDS("perplexity", folder, "--text", in("text")), 1,
        "quench perplexity: @/dtype: tensor 'lm_head.weight': expected dtype BF16, F16 or F32, found I16\n");
    folder = variant("size");
    change_header(folder, shard_1, "\"lm_head.weight\"", "\"BF16\"", "\"F32\" ");
    refuse(
        WORDS("inspect", folder), 1,
        "quench inspect: @/size/model-00001-of-00002.safetensors: tensor 'lm_head.weight': F32 [2048, 256] "
        "needs 2097152 bytes, its span has 1048576\n");
}

/* Matrices of experts are made many at a time: the one that is wrong is named. */
static void experts_that_are_no_numbers(void **state)
{
    (void)state;
    static const char wanted[] = "layers.1.mlp.experts.13.up_proj.weight_scale\"",
                      place[] = "\"data_offsets\":[";
    size_t n;
    char *data;
    struct err e = { 0 };
    uint64_t header;
    succeed(WORDS("synth", demo, in("nan"), "--format", "card", "--layers", "2", "--quiet"));
    if (!file_read(&data, &n, in("nan/model-00001-of-00001.safetensors"), 1 << 30, &e))
        fail_msg("%s", e.text);
    memcpy(&header, data, 8);
    char *entry = memmem(data + 8, header, wanted, sizeof wanted - 1);
    assert_non_null(entry);
    const char *offsets = strstr(entry, place);
    assert_non_null(offsets);
    data[8 + header + strtoull(offsets + sizeof place - 1, NULL, 10) + 1] = 0x7f;
    replace(in("nan"), "model-00001-of-00001.safetensors", data, n);
    refuse(WORDS("generate", in("nan"), "-p", "x"), 1,
           "quench generate: @/nan: 'model.language_model.layers.1.mlp.experts.13.up_proj.weight_packed': "
           "NaN at "
           "row 0, column 16\n");
    free(data);
}

/* quantization_config of one group of the demo's modules. */
static void set_scheme(const char *folder, const char *weights, const char *more)
{
    char text[1000];
    snprintf(text, sizeof text,
             "{\"quant_method\": \"compressed-tensors\", \"config_groups\": {\"group_0\": {\"targets\": "
             "[\"Linear\"], \"weights\": %s}}%s}",
             weights, more);
    change_json(folder, "config.json", "quantization_config", text);
}

static void schemes_not_computed_here(void **state)
{
    (void)state;
    const char *folder = variant("scheme");
    set_scheme(folder, "{\"num_bits\": 4, \"type\": \"int\", \"strategy\": \"group\", \"group_size\": 128}",
               "");
    refuse(WORDS("inspect", folder), 1,
           "quench inspect: @/scheme/config.json: quantization_config.config_groups.group_0.weights: 4-bit "
           "int, strategy 'group', group_size 128, dynamic false is not supported\n");
    set_scheme(folder, "{\"num_bits\": 8, \"type\": \"float\", \"strategy\": \"channel\"}",
               ", \"transform_config\": {\"config_groups\": {\"u\": {}}}");
    refuse(
        WORDS("generate", folder, "-p", "x"), 1,
        "quench generate: @/scheme/config.json: quantization_config.transform_config: only an empty one is "
        "supported\n");
    /* what the config promises must be in the files */
    set_scheme(folder, "{\"num_bits\": 8, \"type\": \"float\", \"strategy\": \"channel\"}", "");
    refuse(WORDS("generate", folder, "-p", "x"), 1,
           "quench generate: @/scheme: 'model.language_model.layers.0.linear_attn.in_proj_qkv': "
           "quantization_config says FP8A16, the file holds BF16\n");
}

static void tokenizers_of_another_kind(void **state)
{
    (void)state;
    const char *folder = variant("unigram");
    change_json(folder, "tokenizer.json", "model.type", "\"Unigram\"");
    refuse(WORDS("generate", folder, "-p", "x"), 1,
           "quench generate: @/unigram: tokenizer.json: model.type: found \"Unigram\", expected \"BPE\"\n");
}

/* Texts and prompts that are not right. */

static void texts_that_cannot_be_scored(void **state)
{
    (void)state;
    static const char broken[] = "first line\r\nsecond \xff line\n";
    const char *path = in("broken");
    text_file("broken", "", 0);
    refuse(WORDS("perplexity", demo, "--text", path), 1, "quench perplexity: @/broken: the text is empty\n");
    text_file("broken", "a", 1);
    refuse(WORDS("perplexity", demo, "--text", path), 2,
           "quench perplexity: the text has 1 tokens, at least 2 are needed\n");
    text_file("broken", broken, sizeof broken - 1);
    refuse(WORDS("perplexity", demo, "--text", path), 1,
           "quench perplexity: @/broken: the text is not UTF-8 at byte 19\n");
    refuse(WORDS("perplexity", demo, "--text", f.temp.path), 1, "quench perplexity: @: not a regular file\n");
    unlink(path);
    refuse(WORDS("perplexity", demo, "--text", path), 1,
           "quench perplexity: @/broken: No such file or directory\n");
    refuse(WORDS("generate", demo, "-p", "caf\xe9"), 1,
           "quench generate: --prompt: the text is not UTF-8 at byte 3\n");
    refuse(WORDS("generate", demo, "-p", ""), 2, "quench generate: the prompt is empty\n");
}

static void contexts_too_short(void **state)
{
    (void)state;
    const char *folder = variant("short");
    change_json(folder, "config.json", "text_config.max_position_embeddings", "8");
    refuse(WORDS("generate", folder, "-p", "a b c d e f g h i j"), 1,
           "quench generate: the prompt has 10 tokens, the model allows 8 with the answer\n");
    refuse(WORDS("perplexity", folder, "--text", in("text")), 1,
           "quench perplexity: @/short: a context of 512 tokens was asked for, the model allows 8\n");
    succeed(WORDS("generate", folder, "-p", "a b", "--quiet", "--json", "--ignore-eos"));
    json_t *o = must_parse(f.out); /* it ends where the model's positions do */
    assert_int_equal(json_array_size(json_object_get(o, "token_ids")) +
                         (size_t)json_integer_value(json_object_get(o, "prompt_tokens")),
                     8);
    assert_string_equal(json_string_value(json_object_get(o, "finish_reason")), "length");
    json_decref(o);
}

static void numbers_no_kernel_has_room_for(void **state)
{
    (void)state;
    const char *folder = variant("kernel");
    change_json(folder, "config.json", "text_config.linear_conv_kernel_dim", "100");
    refuse(WORDS("generate", folder, "-p", "x"), 1,
           "quench generate: @/kernel: linear_conv_kernel_dim is 100, at most 64 is supported\n");
}

/* Output that goes nowhere. */

static void a_full_or_closed_stdout_is_a_failure(void **state)
{
    (void)state;
    const char *text = in("text");
    const char *const *const all[] = { WORDS("inspect", demo), WORDS("inspect", demo, "--json"),
                                       WORDS("generate", demo, "-p", "The river", "-n", "4", "--quiet"),
                                       WORDS("perplexity", demo, "--text", text, "--quiet") };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        expect_status(run_as(&(struct start){ .stdout_path = "/dev/full" }, all[i]), 1);
        assert_string_equal(f.err, "quench: standard output: No space left on device\n");
        expect_status(run_as(&(struct start){ .closed = true }, all[i]), 1);
    }
}

/* Results. */

static json_t *result(const char *const *words)
{
    succeed(words);
    assert_string_equal(f.err, "");
    assert_int_equal(strcspn(f.out, "\n") + 1, strlen(f.out)); /* one line */
    return must_parse(f.out);
}

static double number(const json_t *o, const char *key)
{
    const json_t *v = json_object_get(o, key);
    if (!json_is_number(v)) fail_msg("%s: no number", key);
    return json_number_value(v);
}

static const char *string(const json_t *o, const char *key)
{
    const json_t *v = json_object_get(o, key);
    if (!json_is_string(v)) fail_msg("%s: no string", key);
    return json_string_value(v);
}

static void perplexity_as_json(void **state)
{
    (void)state;
    const char *text = in("text");
    json_t *o = result(WORDS("perplexity", demo, "--text", text, "--ctx", "16", "--json", "--quiet"));
    int64_t tokens = (int64_t)number(o, "tokens"), tail = tokens % 16;
    assert_true(tokens > 32);
    assert_int_equal(number(o, "chunks"), tokens / 16 + (tail >= 2));
    assert_int_equal(number(o, "scored_tokens"), tokens / 16 * 15 + (tail >= 2 ? tail - 1 : 0));
    const double plain = number(o, "perplexity");
    assert_true(plain > 1 && plain < 2048);
    assert_string_equal(string(o, "kv_cache_dtype"), "f32");
    assert_string_equal(string(o, "rule"), "card");
    assert_string_equal(string(o, "model"), demo);
    assert_null(json_object_get(o, "delta"));
    json_decref(o);

    o = result(WORDS("perplexity", demo, "--text", text, "--ctx", "16", "--max-chunks", "2", "--against",
                     demo, "--kv-cache-dtype", "fp8", "--json", "--quiet"));
    assert_int_equal(number(o, "chunks"), 2);
    assert_int_equal(number(o, "scored_tokens"), 30);
    assert_true(number(o, "delta") == 0 && number(o, "ratio") == 1 && number(o, "same_top") == 1);
    assert_true(number(o, "ratio_low") <= 1 && number(o, "ratio_high") >= 1);
    assert_true(number(o, "kld") <= 1e-7 && number(o, "kld") >= -1e-7);
    assert_true(number(o, "against_perplexity") == number(o, "perplexity"));
    assert_string_equal(string(o, "kv_cache_dtype"), "fp8");
    json_decref(o);

    static const char *const spelled[] = { "int8_per_token_head", "int8" };
    double of[2];
    for (int i = 0; i < 2; i++) {
        o = result(WORDS("perplexity", demo, "--text", text, "--ctx", "16", "--kv-cache-dtype", spelled[i],
                         "--json", "--quiet"));
        assert_string_equal(string(o, "kv_cache_dtype"), "int8_per_token_head");
        of[i] = number(o, "perplexity");
        json_decref(o);
    }
    assert_true(of[0] == of[1] && of[0] != plain);
}

/* A text with the line ends of another system is the same text. */
static void line_ends_do_not_matter(void **state)
{
    (void)state;
    static const char *const ends[] = { "\n", "\r\n", "\r" };
    double perplexity[3];
    char lines[200];
    const char *text = in("lines");
    for (int i = 0; i < 3; i++) {
        int n = snprintf(lines, sizeof lines, "One line%s%sand another, which goes on%s", ends[i], ends[i],
                         ends[i]);
        text_file("lines", lines, (size_t)n);
        json_t *o = result(WORDS("perplexity", demo, "--text", text, "--json", "--quiet"));
        perplexity[i] = number(o, "perplexity");
        json_decref(o);
    }
    assert_true(perplexity[0] == perplexity[1] && perplexity[0] == perplexity[2]);
}

static void generate_as_json(void **state)
{
    (void)state;
    json_t *o = result(WORDS("generate", demo, "-p", question, "-n", "40", "--json", "--quiet"));
    assert_non_null(strstr(string(o, "text"), "Helsinki"));
    assert_string_equal(string(o, "finish_reason"), "stop");
    const json_t *ids = json_object_get(o, "token_ids");
    assert_true(json_array_size(ids) > 0 && json_array_size(ids) < 40);
    for (size_t i = 0; i < json_array_size(ids); i++) assert_true(json_is_integer(json_array_get(ids, i)));
    json_decref(o);
    o = result(WORDS("generate", demo, "-p", question, "-n", "2", "--json", "--quiet"));
    assert_int_equal(json_array_size(json_object_get(o, "token_ids")), 2);
    assert_string_equal(string(o, "finish_reason"), "length");
    json_decref(o);
}

static void generate_about_images(void **state)
{
    (void)state;
    static const char picture[] = "tests/golden/demo/golden_image.png", what[] = "What color is the shape?";
    succeed(WORDS("generate", demo, "--image", picture, "-p", what, "-n", "20", "--quiet"));
    assert_string_equal(f.out, "Red.\n");
    json_t *o =
        result(WORDS("generate", demo, "--image", picture, "-p", what, "-n", "20", "--json", "--quiet"));
    double one = number(o, "prompt_tokens");
    json_decref(o);
    o = result(WORDS("generate", demo, "--image", picture, "--image", "tests/golden/images/rgb.png", "-p",
                     what, "-n", "20", "--json", "--quiet"));
    /* 23 x 14 pixels grow to 96 x 64: 2 x 3 rows, and a token before and after them */
    assert_true(number(o, "prompt_tokens") == one + 6 + 2);
    json_decref(o);
    refuse(WORDS("generate", demo, "--image", in("none.png"), "-p", what), 1,
           "quench generate: @/none.png: No such file or directory\n");
    refuse(WORDS("generate", demo, "--image", "README.md", "-p", what), 1,
           "quench generate: README.md: not an image of a known format: PNG, JPEG, WebP and GIF are read\n");
    refuse(WORDS("generate", demo, "--image", picture, "-p", "<|image_pad|>"), 2,
           "quench generate: the prompt has places for 2 images, 1 given\n");
    refuse(WORDS("generate", demo, "--image", picture, "-p", "\xa9"), 1,
           "quench generate: --prompt: not UTF-8\n");
}

#define DRAFTS(fields) "--speculative-config", "{\"method\":\"mtp\"" fields "}"

static void drafts_as_json(void **state)
{
    (void)state;
    json_t *o = result(WORDS("generate", demo, "-p", "The river", "-n", "60", "--ignore-eos", "--json",
                             "--quiet", DRAFTS(",\"num_speculative_tokens\":3,\"model\":\"models/demo/\"")));
    assert_int_equal(json_array_size(json_object_get(o, "token_ids")), 60);
    assert_true(number(o, "accepted") <= number(o, "drafted"));
    assert_true(number(o, "mean_accepted_length") >= 1);
    assert_true(json_array_size(json_object_get(o, "acceptance")) <= 3);
    json_decref(o);
    static const char lines[] = "{\"prompt\": \"The river rose\"}\n{\"prompt\": \"A\"}\n";
    text_file("prompts", lines, sizeof lines - 1);
    o = result(WORDS("bench", demo, "--prompts", in("prompts"), "-n", "20", "--json", "--quiet",
                     DRAFTS(",\"num_speculative_tokens\":2")));
    assert_int_equal(number(o, "prompts"), 2);
    assert_int_equal(number(o, "num_speculative_tokens"), 2);
    assert_int_equal(json_array_size(json_object_get(o, "acceptance")), 2);
    assert_true(number(o, "plain_ts") > 0 && number(o, "speculative_ts") > 0 && number(o, "tokens") <= 40);
    assert_true(json_is_true(json_object_get(o, "same_text")));
    json_decref(o);
}

static void drafts_are_checked(void **state)
{
    (void)state;
    static const char *const refused[][2] = {
        { "{", "not JSON: string or '}' expected near end of file" },
        { "3", "not JSON: '[' or '{' expected near '3'" },
        { "[]", "expected an object" },
        { "{}", "field 'method' is missing" },
        { "{\"method\":\"eagle\"}", "field 'method': the only method is \"mtp\"" },
        { "{\"method\":\"mtp\",\"num_speculative_tokens\":9}",
          "field 'num_speculative_tokens': expected 1 to 8" },
        { "{\"method\":\"mtp\",\"model\":\"x\"}",
          "field 'model': the MTP head is part of MODEL; leave the field out, or give MODEL again" },
        { "{\"method\":\"mtp\",\"quantization\":\"x\"}",
          "field 'quantization': not known here; fields are method, num_speculative_tokens and model" },
    };
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        char message[200];
        snprintf(message, sizeof message, "quench generate: --speculative-config: %s\n", refused[i][1]);
        refuse(WORDS("generate", demo, "-p", "x", "--speculative-config", refused[i][0]), 2, message);
    }
    refuse(
        WORDS("bench", demo, DRAFTS("")), 2,
        "quench bench: --speculative-config: --prompts FILE.jsonl is needed too, acceptance means nothing on "
        "random tokens\n");
    refuse(WORDS("bench", demo, "--prompts", "x"), 2,
           "quench bench: --prompts: --speculative-config is needed too, for what is compared\n");
    text_file("prompts", "{\"text\": 1}\n", 12);
    refuse(WORDS("bench", demo, "--prompts", in("prompts"), DRAFTS("")), 1,
           "quench bench: @/prompts: line 1: expected an object with a string \"prompt\"\n");
}

/* Names that are not UTF-8 cannot stand in JSON as they are; the result must come out all the same. */
static const char story[] = "The capital of Finland is Helsinki. The sea rises and falls twice a day, and "
                            "the boats wait for it in every "
                            "harbour from here to the north, where the tides are lower and the winters are "
                            "longer than anywhere else.";

/* A value of what a command prints as JSON, as text. */
static char *value_of(const char *key, const char *const *words)
{
    succeed(words);
    json_t *o = must_parse(f.out);
    char *text = json_dumps(json_object_get(o, key), JSON_ENCODE_ANY);
    assert_non_null(text);
    json_decref(o);
    return text;
}

static void overrides_are_an_edited_file(void **state)
{
    (void)state;
    static const char recipe[] =
        "{\"text_config\":{\"rope_parameters\":{\"mrope_interleaved\":true,\"mrope_section\":[11,11,10],"
        "\"rope_type\":\"yarn\",\"rope_theta\":10000000,\"partial_rotary_factor\":0.25,\"factor\":4.0,"
        "\"original_max_position_embeddings\":262144}}}";
    const char *folder = variant("yarn"), *text = in("yarn-text");
    replace(f.temp.path, "yarn-text", story, strlen(story));
    change_json(folder, "config.json", "text_config.rope_parameters.rope_type", "\"yarn\"");
    change_json(folder, "config.json", "text_config.rope_parameters.factor", "4.0");
    const struct {
        const char *model, *flag, *value;
    } ways[] = { { demo, "--rope-yarn", "0" },
                 { folder, "--rope-yarn", "0" },
                 { demo, "--rope-yarn", "4" },
                 { demo, "--hf-overrides", recipe } };
    char *ids[4], *perplexity[4];
    for (int i = 0; i < 4; i++) {
        ids[i] =
            value_of("token_ids", WORDS("generate", ways[i].model, "-p", story, "-n", "24", "--ignore-eos",
                                        "--quiet", "--json", ways[i].flag, ways[i].value));
        perplexity[i] = value_of("perplexity", WORDS("perplexity", ways[i].model, "--text", text, "--quiet",
                                                     "--json", ways[i].flag, ways[i].value));
        assert_int_equal(strcmp(ids[i], ids[0]) != 0, i > 0);
        assert_int_equal(strcmp(perplexity[i], perplexity[0]) != 0, i > 0);
        if (i > 1) assert_string_equal(ids[i], ids[1]);
        if (i > 1) assert_string_equal(perplexity[i], perplexity[1]);
    }
    for (int i = 0; i < 4; i++) free(ids[i]), free(perplexity[i]);
}

static void overrides_are_checked(void **state)
{
    (void)state;
    static const char *const commands[][4] = { { "generate", "-p", "x" },
                                               { "chat", "--max-tokens", "1" },
                                               { "perplexity", "--text", "data/calibration.jsonl" },
                                               { "eval", "--tasks", "@/tasks" },
                                               { "bench", "-r", "1" } };
    char message[300], path[300];
    replace(f.temp.path, "tasks", "{\"prompt\":\"a\",\"answer\":\"b\"}\n", 28);
    snprintf(path, sizeof path, "%s", in("tasks"));
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
        const char *const *c = commands[i], *value = *c[2] == '@' ? path : c[2];
        snprintf(
            message, sizeof message,
            "quench %s: overrides of config.json: text_config.hidden_size: fixed by the weights, which were "
            "made for 256; it cannot be overridden\n",
            c[0]);
        refuse(WORDS(c[0], demo, c[1], value, "--hf-overrides", "{\"text_config\":{\"hidden_size\":512}}"), 2,
               message);
        snprintf(message, sizeof message, "quench %s: --rope-yarn: expected 1 or more, found 0.5\n", c[0]);
        refuse(WORDS(c[0], demo, c[1], value, "--rope-yarn", "0.5"), 2, message);
    }
    refuse(WORDS("generate", demo, "-p", "x", "--hf-overrides", "[]"), 2,
           "quench generate: --hf-overrides: expected an object\n");
    refuse(
        WORDS("generate", demo, "-p", "x", "--hf-overrides", "{"), 2,
        "quench generate: --hf-overrides: JSON: string or '}' expected near end of file (line 1, byte 1)\n");
    refuse(WORDS("bench", "--synthetic", "35b-a3b:layers=4", "--rope-yarn", "4"), 2,
           "quench bench: --hf-overrides and --rope-yarn: of a checkpoint, not of --synthetic\n");
}

static void json_of_an_odd_name(void **state)
{
    (void)state;
    const char *folder = variant("caf\xe9");
    json_t *o = result(WORDS("inspect", folder, "--json"));
    assert_int_equal(number(o, "tensors") > 100, true);
    json_decref(o);
    o = result(WORDS("generate", folder, "-p", "x", "-n", "1", "--json", "--quiet"));
    assert_int_equal(json_array_size(json_object_get(o, "token_ids")), 1);
    json_decref(o);
}

static void the_answer_is_the_same_on_every_way(void **state)
{
    (void)state;
    static const char *const ways[][2] = { { "--threads", "1" },
                                           { "--threads", "2" },
                                           { "--cpu-mask", "generic" },
                                           { "--cpu-mask", "avx2" },
                                           { "--cpu-mask", "avx512" },
                                           { "--device", "ref" },
                                           { "--speculative-config", "{\"method\":\"mtp\"}" } };
    char first[TEXT_MAX];
    succeed(WORDS("generate", demo, "-p", question, "-n", "40", "--quiet"));
    assert_non_null(strstr(f.out, "Helsinki"));
    assert_string_equal(f.err, "");
    memcpy(first, f.out, sizeof first);
    for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
        succeed(WORDS("generate", demo, "-p", question, "-n", "40", "--quiet", ways[i][0], ways[i][1]));
        assert_string_equal(f.out, first);
    }
    text_file("prompt", question, sizeof question - 1);
    succeed(WORDS("generate", demo, "--prompt-file", in("prompt"), "-n", "40", "--quiet"));
    assert_string_equal(f.out, first);
    succeed(WORDS("generate", demo, "-p", question, "--stop", "sinki", "--quiet"));
    char *end = strstr(first, "sinki");
    memcpy(end, "\n", 2);
    assert_string_equal(f.out, first);
}

/* quantize. */

static void quantize_refuses_before_it_works(void **state)
{
    (void)state;
    const char *folder = variant("source"), *there = in("there");
    assert_int_equal(mkdir(there, 0777), 0);
    refuse(WORDS("quantize", folder, there, "--calibration", calibration), 2,
           "quench quantize: @/there: already exists; remove it or name another destination\n");
    refuse(WORDS("quantize", folder, folder, "--calibration", calibration), 2,
           "quench quantize: @/source: the destination is the source folder; name another one\n");
    refuse(WORDS("quantize", folder, in("a/b"), "--calibration", calibration), 2,
           "quench quantize: @/a/b: no folder @/a to create it in\n");
    refuse(WORDS("quantize", folder, in("new"), "--calibration", calibration, "--max-shard-size", "0"), 2,
           "quench quantize: --num-calibration-samples, --max-seq-length, --max-shard-size and --max-memory "
           "must "
           "be above 0\n");
    refuse(WORDS("quantize", folder), 2,
           "quench quantize: expected: quench quantize SRC DST --calibration FILE.jsonl\n"
           "try: quench quantize --help\n");
    assert_false(file_exists(in("new")));
    assert_int_equal(rmdir(there), 0); /* still empty */
}

/* Names in the fixture's folder that begin so. */
static int count(const char *prefix)
{
    int n = 0;
    DIR *dir = opendir(f.temp.path);
    assert_non_null(dir);
    for (struct dirent *d; (d = readdir(dir));) n += strncmp(d->d_name, prefix, strlen(prefix)) == 0;
    closedir(dir);
    return n;
}

#define QUANTIZE(to)                                                                                         \
    WORDS("quantize", demo, in(to), "--calibration", calibration, "--num-calibration-samples", "2",          \
          "--max-seq-length", "64", "--quiet")

static void a_plan_writes_nothing(void **state)
{
    (void)state;
    succeed(WORDS("quantize", demo, in("planned"), "--calibration", calibration, "--num-calibration-samples",
                  "2", "--max-seq-length", "64", "--quiet", "--dry-run"));
    assert_non_null(strstr(f.out, "the plan; nothing is written\n"));
    assert_non_null(strstr(f.out, "  NVFP4            192 matrices\n  FP8_DYNAMIC       16 matrices\n"));
    assert_non_null(
        strstr(f.out, "  copied           100 tensors\n  size        16.74 MB -> 11.51 MB in 1 file"));
    assert_int_equal(count("planned"), 0);
}

static void a_full_disk_can_be_continued(void **state)
{
    (void)state;
    static const rlim_t limits[] = { 1000, 100000, 2000000, 5000000 };
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++) {
        expect_status(run_as(&(struct start){ .file_bytes = limits[i] }, QUANTIZE("full")), 1);
        assert_non_null(strstr(f.err, "File too large"));
        assert_non_null(strstr(f.err, f.temp.path)); /* which file */
        assert_int_equal(count("full"), 1);
        assert_true(file_exists(in("full.quench-partial")));
    }
    succeed(QUANTIZE("full"));
    assert_int_equal(count("full"), 1);
    assert_true(file_exists(in("full/config.json")));
}

static void assert_same_file(const char *a, const char *b, const char *name)
{
    char *path[] = { file_join(a, name), file_join(b, name) }, *data[2];
    size_t n[2];
    struct err e = { 0 };
    for (int i = 0; i < 2; i++) {
        if (!file_read(&data[i], &n[i], path[i], 1 << 30, &e)) fail_msg("%s", e.text);
        free(path[i]);
    }
    assert_int_equal(n[0], n[1]);
    assert_memory_equal(data[0], data[1], n[0]);
    free(data[0]);
    free(data[1]);
}

/* A file opened while a standard stream is closed gets its number: messages must not land in a checkpoint. */
static void quantize_writes_the_same_without_standard_streams(void **state)
{
    (void)state;
    const char *plain = in("plain"), *closed = in("closed");
    succeed(QUANTIZE("plain"));
    run_as(&(struct start){ .closed = true }, QUANTIZE("closed")); /* 1: its summary cannot be printed */
    DIR *dir = opendir(plain);
    assert_non_null(dir);
    int files = 0;
    for (struct dirent *d; (d = readdir(dir)); files += d->d_name[0] != '.')
        if (d->d_name[0] != '.') assert_same_file(plain, closed, d->d_name);
    closedir(dir);
    assert_true(files >= 6);
    succeed(WORDS("generate", plain, "-p", question, "-n", "40", "--quiet"));
    assert_non_null(strstr(f.out, "Helsinki"));
    succeed(WORDS("inspect", plain));
    assert_non_null(strstr(f.out, "quantized (compressed-tensors)"));
    refuse(
        WORDS("quantize", plain, in("twice"), "--calibration", calibration, "--quiet"), 2,
        "quench quantize: @/plain: already quantized: config.json has a quantization_config; the source must "
        "be BF16\n");
}

/* The same recipe from its own file, and one whose scales come from the weights alone. */
static void recipes_are_names_or_files(void **state)
{
    (void)state;
    char path[300];
    const char *bad = in("bad.yaml");
    FILE *file = fopen(bad, "w");
    assert_non_null(file);
    fputs("a_stage:\n  b_modifiers:\n    QuantizationModifier:\n      schema: NVFP4\n", file);
    assert_int_equal(fclose(file), 0);
    refuse(WORDS("quantize", demo, in("dst"), "--recipe", bad), 1,
           "quench quantize: --recipe: @/bad.yaml: line 4: QuantizationModifier: unknown key 'schema'\n");
    succeed(WORDS("quantize", demo, in("weights"), "--recipe", "nvfp4a16", "--quiet"));
    assert_non_null(strstr(f.out, "recipe nvfp4a16, method auto\n  NVFP4         192 matrices"));
    snprintf(path, sizeof path, "%s/recipe.yaml", in("weights"));
    succeed(WORDS("quantize", demo, in("again"), "--recipe", path, "--quiet", "--json"));
    assert_non_null(strstr(f.out, "\"nvfp4_matrices\":192,\"fp8_matrices\":0,"));
    assert_same_file(in("weights"), in("again"), "config.json");
    assert_same_file(in("weights"), in("again"), "recipe.yaml");
    assert_same_file(in("weights"), in("again"), "model-00001-of-00001.safetensors");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(commands_are_named),
        cmocka_unit_test(every_command_has_help),
        cmocka_unit_test(flags_are_checked),
        cmocka_unit_test(folders_that_are_no_models),
        cmocka_unit_test(shards_that_are_not_whole),
        cmocka_unit_test(tensors_of_the_wrong_kind),
        cmocka_unit_test(experts_that_are_no_numbers),
        cmocka_unit_test(schemes_not_computed_here),
        cmocka_unit_test(tokenizers_of_another_kind),
        cmocka_unit_test(texts_that_cannot_be_scored),
        cmocka_unit_test(contexts_too_short),
        cmocka_unit_test(numbers_no_kernel_has_room_for),
        cmocka_unit_test(a_full_or_closed_stdout_is_a_failure),
        cmocka_unit_test(perplexity_as_json),
        cmocka_unit_test(line_ends_do_not_matter),
        cmocka_unit_test(generate_as_json),
        cmocka_unit_test(generate_about_images),
        cmocka_unit_test(drafts_as_json),
        cmocka_unit_test(drafts_are_checked),
        cmocka_unit_test(overrides_are_an_edited_file),
        cmocka_unit_test(overrides_are_checked),
        cmocka_unit_test(json_of_an_odd_name),
        cmocka_unit_test(the_answer_is_the_same_on_every_way),
        cmocka_unit_test(quantize_refuses_before_it_works),
        cmocka_unit_test(recipes_are_names_or_files),
        cmocka_unit_test(a_plan_writes_nothing),
        cmocka_unit_test(a_full_disk_can_be_continued),
        cmocka_unit_test(quantize_writes_the_same_without_standard_streams),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
