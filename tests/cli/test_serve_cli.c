/* quench serve's flags from outside: command line, environment, file, other servers' flags, refusals. None of
 * these runs gets as far as serving. */
#include "cli/program.h"

#define SERVE(...) run(NULL, (const char *const[]){ "serve", __VA_ARGS__, NULL })

static void expect(int status, int want, const char *text)
{
    assert_int_equal(status, want);
    if (!strstr(err, text)) fail_msg("expected '%s', found '%s'", text, err);
}

static void has_line(const char *line)
{
    const char *at = strstr(out, line);
    if (!at || (at != out && at[-1] != '\n') || at[strlen(line)] != '\n')
        fail_msg("no line '%s' in %s", line, out);
}

static void test_sources(void **state)
{
    (void)state;
    char path[PATH_MAX], from[PATH_MAX + 128];
    static const char file[] =
        "model: models/demo\nport: 9001\nmax_num_seqs: 3\nserved-model-name: [a, 'b c']\n"
        "speculative-config:\n  method: mtp\n  num_speculative_tokens: 2\n"
        "enable-prefix-caching: false\nhost: ::1\n";
    snprintf(path, sizeof path, "%s", temp_path(&temp, "serve.yaml"));
    temp_text(&temp, "serve.yaml", file);
    setenv("QUENCH_PORT", "9002", 1);
    setenv("QUENCH_MAX_NUM_SEQS", "4", 1);
    setenv("QUENCH_API_KEY", "secret-one,secret-two", 1);
    assert_int_equal(SERVE("--config", path, "--port=9003", "--max_model_len", "32k", "--kv-cache-dtype",
                           "int8_per_token_head", "--print-config"),
                     0);
    unsetenv("QUENCH_PORT");
    unsetenv("QUENCH_MAX_NUM_SEQS");
    unsetenv("QUENCH_API_KEY");
    has_line("model: 'models/demo'");
    has_line("port: 9003  # command line");
    has_line("max-model-len: '32k'  # command line");
    has_line("kv-cache-dtype: int8_per_token_head  # command line");
    has_line("max-num-seqs: 4  # QUENCH_MAX_NUM_SEQS");
    has_line("# api-key: not shown  # QUENCH_API_KEY");
    has_line("shutdown-timeout: 30  # default");
    snprintf(from, sizeof from, "served-model-name: ['a', 'b c']  # %s, line 4", path);
    has_line(from);
    snprintf(from, sizeof from,
             "speculative-config: '{\"method\":\"mtp\",\"num_speculative_tokens\":2}'  # %s, line 5", path);
    has_line(from);
    snprintf(from, sizeof from, "enable-prefix-caching: false  # %s, line 8", path);
    has_line(from);
    assert_null(strstr(out, "secret"));
    /* what it prints is a file that gives the same values */
    char first[TEXT_MAX];
    strcpy(first, out);
    temp_text(&temp, "again.yaml", first);
    snprintf(path, sizeof path, "%s", temp_path(&temp, "again.yaml"));
    assert_int_equal(SERVE("--config", path, "--print-config"), 0);
    for (const char *a = first, *b = out; *a; a = strchr(a, '\n') + 1, b = strchr(b, '\n') + 1)
        if (*a != '#')
            assert_memory_equal(a, b, strstr(a, "  # ") ? (size_t)(strstr(a, "  # ") - a) : strcspn(a, "\n"));
}

static void test_file_refusals(void **state)
{
    (void)state;
    static const struct {
        const char *text, *says;
    } cases[] = {
        { "port: 8000\nprot: 1\n", "line 2: 'prot' is no flag of quench serve" },
        { "port: &a 8000\n", "line 1: anchors and aliases are not read" },
        { "port: many\n", "line 1: --port: expected a whole number, found 'many'" },
        { "port: [1]\n", "line 1: --port: expected one value" },
        { "enable-prefix-caching: maybe\n", "expected true or false, found 'maybe'" },
        { "- a\n", "expected lines such as 'port: 8000'" },
    };
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s", temp_path(&temp, "bad.yaml"));
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        temp_text(&temp, "bad.yaml", cases[i].text);
        int status = SERVE("models/demo", "--config", path);
        assert_int_not_equal(status, 0);
        expect(status, status, cases[i].says);
    }
    setenv("QUENCH_PORT", "x", 1);
    expect(SERVE("models/demo"), 2, "QUENCH_PORT: --port: expected a whole number, found 'x'");
    unsetenv("QUENCH_PORT");
}

static void test_other_servers(void **state)
{
    (void)state;
    expect(SERVE("models/demo", "--ctx-size", "4096"), 2,
           "--ctx-size is a flag of llama.cpp; here it is --max-model-len");
    expect(SERVE("models/demo", "--mem-fraction-static=0.8"), 2,
           "--mem-fraction-static is a flag of SGLang; here it is --gpu-memory-utilization");
    expect(SERVE("models/demo", "--tensor-parallel-size", "2"), 1, "--tensor-parallel-size 2: not supported");
    expect(SERVE("models/demo", "--reasoning-parser", "deepseek_r1"), 1, "what is done here: qwen3");
    expect(SERVE("models/demo", "--nonsense"), 2, "unknown flag '--nonsense'");
    expect(SERVE("models/demo", "--kv-cache-memory-bytes", "1G"), 2, "here it is --memory");
    expect(SERVE("models/demo", "--max-logprobs", "100"), 1, "what is done here: 20");
    expect(SERVE("models/demo", "--generation-config", "/a/folder"), 2, "expected one of auto, vllm");
    /* vLLM's short flags; all are followed by one that is refused */
    static const char *const levels[] = { "-O3", "-O0", "-O.mode=3", "-O=2", "-O" };
    for (size_t i = 0; i < 5; i++) {
        bool alone = strcmp(levels[i], "-O") == 0;
        int status = alone ? SERVE("models/demo", "-O", "3", "--port", "65536")
                           : SERVE("models/demo", levels[i], "--port", "65536");
        expect(status, 2, "--port: expected 0 to 65535, found 65536");
        if (!strstr(err, "no need of --optimization-level")) fail_msg("%s", err);
    }
}

/* A checkpoint with a number that is none is not served where it was to be looked at first. */
static void test_verify(void **state)
{
    (void)state;
    char command[4 * PATH_MAX], model[PATH_MAX];
    snprintf(model, sizeof model, "%s", temp_path(&temp, "damaged"));
    snprintf(command, sizeof command,
             "cp -r models/demo %s && printf '\\377\\377' | dd of=%s/model-00001-of-00002.safetensors bs=1 "
             "seek=5000000 conv=notrunc 2>/dev/null",
             model, model);
    assert_int_equal(system(command), 0);
    expect(SERVE(model, "--verify", "--port", "0", "--device", "cpu"), 1,
           "--verify: the checkpoint has faults (1); quench verify ");
    assert_null(strstr(err, "ready after"));
}

static void test_refusals(void **state)
{
    (void)state;
    expect(SERVE("--port", "1"), 2, "expected: quench serve MODEL");
    expect(SERVE("models/demo", "--port", "65536"), 2, "--port: expected 0 to 65535, found 65536");
    expect(SERVE("models/demo", "--max-model-len", "lots"), 2, "--max-model-len: expected a size");
    expect(SERVE("models/demo", "--host", "0.0.0.0", "--port", "0"), 2,
           "lets other machines connect, and no key");
    expect(SERVE("models/demo", "--host", "::", "--port", "0"), 2, "--allow-open-bind");
    expect(SERVE("models/demo", "--ssl-keyfile", "k"), 2, "TLS needs both --ssl-certfile and --ssl-keyfile");
    expect(SERVE("models/demo", "--api-key", "a b", "--port", "0"), 2,
           "--api-key: byte 1 of a key is not printable");
    assert_null(strstr(err, "a b"));
    expect(SERVE("models/demo", "--mtp", "9"), 2, "--mtp: expected 0 to 8, found 9");
    expect(SERVE("models/demo", "--max-model-len", "1m", "--port", "0"), 1,
           "--max-model-len: 1000000, the model allows 262144");
    expect(SERVE("models/demo", "--max-model-len", "2m", "--rope-yarn", "4", "--port", "0"), 1,
           "--max-model-len: 2000000, the model allows 1048576");
    expect(SERVE("models/demo", "--rope-yarn", "0.5", "--port", "0"), 2,
           "--rope-yarn: expected 1 or more, found 0.5");
    expect(SERVE("models/demo", "--hf-overrides", "{\"text_config\":{\"head_dim\":64}}", "--port", "0"), 2,
           "overrides of config.json: text_config.head_dim: fixed by the weights, which were made for 256");
    expect(SERVE("models/demo", "--rope-scaling", "{}"), 2,
           "--rope-scaling is a flag of llama.cpp and of older vLLMs; here it is --rope-yarn FACTOR, or "
           "--hf-overrides");
    expect(SERVE("models/demo", "--memory", "70M", "--max-num-seqs", "64", "--max-model-len", "4k", "--port",
                 "0"),
           1, "64 sequences, one of them of 4000 tokens, need ");
    expect(SERVE("models/demo", "--mm-processor-cache-gb", "-1", "--port", "0"), 2,
           "--mm-processor-cache-gb: expected 0 to 100000, found -1");
    expect(SERVE("models/demo", "--memory", "300M", "--mm-processor-cache-gb", "1", "--port", "0"), 1,
           "more than the budget of");
    expect(SERVE("models/none", "--port", "0"), 1, "models/none");
    expect(SERVE("models/demo", "--limit-mm-per-prompt", "{}"), 2,
           "--limit-mm-per-prompt: expected '{\"image\": N, \"video\": N}'");
    expect(SERVE("models/demo", "--limit-mm-per-prompt", "{\"image\":2,\"video\":1.5}"), 2,
           "--limit-mm-per-prompt: expected");
}

static int make_temp(void **state)
{
    (void)state;
    temp = temp_make();
    return 0;
}

static int remove_temp(void **state)
{
    (void)state;
    temp_remove(&temp);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sources),       cmocka_unit_test(test_file_refusals),
        cmocka_unit_test(test_other_servers), cmocka_unit_test(test_verify),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, make_temp, remove_temp);
}
