/* quench bench and quench synth from outside: exit status, keys and types of the JSON, rows of the other
 * formats, messages. $BUILD/quench (build/quench) is the program. */
#include "cli/program.h"

#define RUN(...) run(NULL, (const char *const[]){ __VA_ARGS__, NULL })

static void succeed(int status)
{
    if (status) fail_msg("exit status %d: %s", status, err);
}

static void expect_err(int status, int want, const char *text)
{
    assert_int_equal(status, want);
    assert_string_equal(err, text);
    assert_string_equal(out, "");
}

/* What the README of llama-bench documents, in its order and types (i, f, s, b; I and F: arrays of them). */
static const struct {
    const char *key;
    char type;
} documented[] = {
    { "build_commit", 's' },   { "build_number", 'i' }, { "cpu_info", 's' },       { "gpu_info", 's' },
    { "backends", 's' },       { "model_filename", 's' }, { "model_type", 's' },   { "model_size", 'i' },
    { "model_n_params", 'i' }, { "n_batch", 'i' },      { "n_ubatch", 'i' },       { "n_threads", 'i' },
    { "cpu_mask", 's' },       { "cpu_strict", 'b' },   { "poll", 'i' },           { "type_k", 's' },
    { "type_v", 's' },         { "n_gpu_layers", 'i' }, { "split_mode", 's' },     { "main_gpu", 'i' },
    { "no_kv_offload", 'b' },  { "flash_attn", 'b' },   { "tensor_split", 's' },   { "use_mmap", 'b' },
    { "embeddings", 'b' },     { "n_prompt", 'i' },     { "n_gen", 'i' },          { "n_depth", 'i' },
    { "test_time", 's' },      { "avg_ns", 'i' },       { "stddev_ns", 'i' },      { "avg_ts", 'f' },
    { "stddev_ts", 'f' },      { "samples_ns", 'I' },   { "samples_ts", 'F' },
}, own[] = {
    { "n_sequences", 'i' },   { "device", 's' },         { "isa", 's' },
    { "weight_mix", 's' }, { "nvfp4_activations", 's' },    { "tokens", 's' },         { "load_seconds", 'f' },
    { "median_ns", 'i' },     { "min_ns", 'i' },         { "max_ns", 'i' },
    { "median_ts", 'f' },     { "read_bandwidth", 'f' }, { "pct_of_bound", 'f' },
    { "product_speed", 'f' }, { "pct_of_peak", 'f' },
    { "flops_per_token", 'f' }, { "experts_per_step", 'f' }, { "bytes_per_token", 'f' },
    { "peak_memory", 'i' },   { "bytes_deltanet", 'f' }, { "bytes_attention", 'f' },
    { "bytes_shared_expert", 'f' }, { "bytes_experts", 'f' }, { "bytes_router", 'f' },
    { "bytes_lm_head", 'f' }, { "bytes_state", 'f' },    { "bytes_kv", 'f' },
};
enum { N_DOCUMENTED = sizeof documented / sizeof *documented, N_OWN = sizeof own / sizeof *own };

static char type_of(const json_t *v)
{
    if (json_is_array(v)) return json_is_integer(json_array_get(v, 0)) ? 'I' : 'F';
    return json_is_string(v) ? 's' : json_is_boolean(v) ? 'b' : json_is_integer(v) ? 'i' : 'f';
}

static void check_keys(json_t *o)
{
    int n = 0;
    const char *key;
    json_t *v;
    json_object_foreach(o, key, v)
    {
        const char *want = n < N_DOCUMENTED ? documented[n].key : own[n - N_DOCUMENTED].key;
        char type = n < N_DOCUMENTED ? documented[n].type : own[n - N_DOCUMENTED].type;
        assert_string_equal(key, want);
        if (type_of(v) != type) fail_msg("%s: expected type %c", key, type);
        if (++n == N_DOCUMENTED + N_OWN) break;
    }
    assert_int_equal(n, N_DOCUMENTED + N_OWN);
}

static double number(const json_t *o, const char *key)
{
    return json_number_value(json_object_get(o, key));
}

static void json_has_llama_benchs_keys(void **state)
{
    (void)state;
    succeed(RUN("bench", "models/demo", "-p", "8,16", "-n", "4", "-d", "0,64", "-b", "1,2", "-pg", "4,2",
                "-r", "3", "-t", "1", "-o", "json"));
    json_t *all = must_parse(out);
    assert_int_equal(json_array_size(all), 2 * 2 * 4); /* depths x sequences x (two pp, tg, pg) */
    for (size_t i = 0; i < json_array_size(all); i++) {
        json_t *o = json_array_get(all, i);
        double sum = 0;
        check_keys(o);
        for (size_t k = 0; k < 3; k++)
            sum += json_number_value(json_array_get(json_object_get(o, "samples_ns"), k)) / 3;
        assert_true(number(o, "avg_ns") <= sum + 1 && number(o, "avg_ns") >= sum - 1.1);
        double tokens = (number(o, "n_prompt") + number(o, "n_gen")) * number(o, "n_sequences");
        double bound = number(o, "read_bandwidth") / number(o, "bytes_per_token");
        double want = 100 * number(o, "median_ts") / bound;
        assert_true(number(o, "pct_of_bound") > 0.999 * want && number(o, "pct_of_bound") < 1.001 * want);
        want = 100 * number(o, "median_ts") * number(o, "flops_per_token") / number(o, "product_speed");
        assert_true(number(o, "pct_of_peak") > 0.999 * want && number(o, "pct_of_peak") < 1.001 * want);
        assert_true(number(o, "pct_of_peak") > 0 && number(o, "pct_of_peak") < 100);
        want = 1e9 * tokens / number(o, "median_ns");
        assert_true(number(o, "median_ts") > 0.999 * want && number(o, "median_ts") < 1.001 * want);
        assert_null(json_object_get(o, "profile"));
    }
    static const int order[][2] = { { 8, 0 }, { 16, 0 }, { 0, 4 }, { 4, 2 } };
    for (size_t i = 0; i < 4; i++) {
        assert_int_equal(number(json_array_get(all, i), "n_prompt"), order[i][0]);
        assert_int_equal(number(json_array_get(all, i), "n_gen"), order[i][1]);
    }
    json_decref(all);
}

static int count(const char *text, char c)
{
    int n = 0;
    for (; *text; text++) n += *text == c;
    return n;
}

static void other_formats_have_a_row_a_test(void **state)
{
    (void)state;
    succeed(RUN("bench", "models/demo", "-p", "0", "-n", "2,3", "-r", "1", "-t", "1,2", "-o", "csv"));
    assert_int_equal(count(out, '\n'), 1 + 4);
    assert_int_equal(strncmp(out, "build_commit,build_number,cpu_info,", 35), 0);
    int fields = N_DOCUMENTED + N_OWN - 2; /* without the arrays */
    assert_int_equal(count(strtok(out, "\n"), ',') + 1, fields);
    succeed(RUN("bench", "models/demo", "-p", "2", "-n", "2", "-r", "1", "-o", "jsonl", "--profile"));
    char *second = strchr(out, '\n');
    assert_non_null(second);
    *second++ = 0;
    json_t *o = must_parse(second);
    check_keys(o);
    const json_t *profile = json_object_get(o, "profile");
    double bytes = 0;
    for (size_t i = 0; i < json_array_size(profile); i++)
        bytes += number(json_array_get(profile, i), "bytes");
    assert_true(bytes > 0.999 * 2 * number(o, "bytes_per_token") &&
                bytes < 1.001 * 2 * number(o, "bytes_per_token"));
    json_decref(o);
    succeed(RUN("bench", "models/demo", "-p", "2", "-n", "2", "-r", "1", "-b", "2", "-d", "64", "--profile"));
    assert_non_null(strstr(out, "| model                          |       size |     params | backend    | "
                                "threads |            test |"));
    assert_non_null(strstr(out, " pp2 @ d64 x2 |"));
    assert_non_null(strstr(out, " tg2 @ d64 x2 |"));
    assert_non_null(strstr(out, "| matmul       | lm_head       | BF16 2048 x 256 "));
    assert_non_null(strstr(out, "\nweights BF16 "));
}

static void content_and_synthetic_models_run(void **state)
{
    (void)state;
    succeed(
        RUN("bench", "models/demo", "-p", "16", "-n", "0", "-r", "1", "--content", "README.md", "--json"));
    json_t *all = must_parse(out);
    assert_string_equal(json_string_value(json_object_get(json_array_get(all, 0), "tokens")), "README.md");
    json_decref(all);
    succeed(RUN("bench", "--synthetic", "models/demo:layers=2:format=fast", "-p", "0", "-n", "2", "-r", "1",
                "--kv-cache-dtype", "fp8", "--json"));
    all = must_parse(out);
    const json_t *o = json_array_get(all, 0);
    assert_string_equal(json_string_value(json_object_get(o, "model_type")), "qwen3_5_moe NVFP4+FP8+BF16");
    assert_string_equal(json_string_value(json_object_get(o, "type_k")), "fp8");
    assert_true(number(o, "experts_per_step") == 4);
    json_decref(all);
}

/* A token keeps a row of keys and one of values in the demo's layer of attention, 256 wide, and INT8 a scale
 * for each. 100 tokens are read, one is written. */
static void bytes_of_keys_and_values(void **state)
{
    static const struct {
        const char *dtype, *says;
        double row;
    } all[] = { { "f32", "f32", 1024 },
                { "bf16", "bf16", 512 },
                { "fp8", "fp8", 256 },
                { "int8", "int8_per_token_head", 260 } };
    (void)state;
    for (int i = 0; i < 4; i++) {
        succeed(RUN("bench", "models/demo", "-p", "0", "-n", "1", "-d", "99", "-r", "1", "--device", "cpu",
                    "--kv-cache-dtype", all[i].dtype, "--json"));
        json_t *list = must_parse(out);
        const json_t *o = json_array_get(list, 0);
        assert_string_equal(json_string_value(json_object_get(o, "type_k")), all[i].says);
        assert_true(number(o, "bytes_kv") == (100 + 1) * 2 * all[i].row);
        json_decref(list);
    }
}

static void bench_refuses_what_makes_no_sense(void **state)
{
    (void)state;
    expect_err(RUN("bench", "models/demo", "-p", "1,x"), 2,
               "quench bench: -p: expected whole numbers from 0 to 16777216, found '1,x'\n");
    expect_err(RUN("bench", "models/demo", "-b", "0"), 2,
               "quench bench: -b: expected whole numbers from 1 to 4096, found '0'\n");
    expect_err(RUN("bench", "models/demo", "-d", "1,"), 2,
               "quench bench: -d: expected whole numbers from 0 to 16777216, found '1,'\n");
    expect_err(RUN("bench", "models/demo", "-pg", "4"), 2,
               "quench bench: -pg: expected pairs PROMPT,GENERATED\n");
    expect_err(RUN("bench", "models/demo", "-r", "0"), 2,
               "quench bench: -r: expected 1 to 100000, found 0\n");
    expect_err(RUN("bench", "--synthetic", "35b-a3b", "--content", "README.md"), 2,
               "quench bench: --content: a synthetic model has no tokenizer\n");
    expect_err(RUN("bench", "models/demo", "-d", "300000", "-n", "1", "-p", "0"), 1,
               "quench bench: a context of 300001 tokens was asked for, the model allows 262144\n");
    expect_err(RUN("bench", "no/such"), 1, "quench bench: no/such: no such folder\n");
    expect_err(RUN("bench", "models/demo", "--content", "no/such", "-r", "1"), 1,
               "quench bench: no/such: No such file or directory\n");
}

static void synth_writes_and_says_what(void **state)
{
    (void)state;
    char to[256], want[400];
    snprintf(to, sizeof to, "%s/made", temp.path);
    succeed(RUN("synth", "models/demo", to, "--layers", "2", "--format", "card", "--json"));
    json_t *o = must_parse(out);
    assert_true(number(o, "tensors") > 100 && number(o, "bytes") > 1e6);
    assert_true(json_is_true(json_object_get(o, "has_tokenizer")));
    json_decref(o);
    succeed(RUN("generate", to, "-p", "Hello", "--max-tokens", "2", "--quiet"));
    snprintf(want, sizeof want, "quench synth: %s: already exists; remove it or name another destination\n",
             to);
    expect_err(RUN("synth", "models/demo", to), 2, want);
    expect_err(RUN("synth", "models/demo", to, "--format", "q4"), 2,
               "quench synth: --format: expected one of bf16, card, fast, nvfp4, nvfp4a16, found 'q4'\ntry: "
               "quench synth --help\n");
    expect_err(RUN("synth", "models/demo", to, "--max-shard-size", "0"), 2,
               "quench synth: --max-shard-size: expected a number of bytes above 0, found 0\n");
}

static int setup(void **state)
{
    (void)state;
    temp = temp_make();
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    temp_remove(&temp);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(json_has_llama_benchs_keys),
        cmocka_unit_test(other_formats_have_a_row_a_test),
        cmocka_unit_test(content_and_synthetic_models_run),
        cmocka_unit_test(bytes_of_keys_and_values),
        cmocka_unit_test(bench_refuses_what_makes_no_sense),
        cmocka_unit_test(synth_writes_and_says_what),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
