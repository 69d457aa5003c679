/* Checkpoint folders: the demo model, small folders made here, one case per message. */
#include "checkpoint/checkpoint.h"
#include "checkpoint/temp.h"

static const char INDEX[] = "model.safetensors.index.json";

/* A file of byte tensors [1] with these names, separated by spaces. */
static void make_shard(const struct temp *t, const char *file, const char *names)
{
    struct tensor tensors[8];
    struct safetensors_writer *w;
    struct err e = { 0 };
    char text[128];
    size_t n = 0;
    snprintf(text, sizeof text, "%s", names);
    for (char *name = strtok(text, " "); name; name = strtok(NULL, " "))
        tensors[n++] = (struct tensor){ .name = name, .dtype = DTYPE_U8, .n_dims = 1, .shape = { 1 } };
    if (!safetensors_writer_create(&w, temp_path(t, file), tensors, n, &e)) fail_msg("%s", e.text);
    for (size_t i = 0; i < n; i++) assert_true(safetensors_writer_append(w, file, 1, &e));
    assert_true(safetensors_writer_finish(w, &e));
}

/* config.json of the demo model, and an index with this weight_map unless NULL. */
static struct temp make_folder(const char *weight_map)
{
    struct temp t = temp_make();
    struct err e = { 0 };
    char index[1000];
    assert_true(file_copy("models/demo/config.json", temp_path(&t, "config.json"), &e));
    if (!weight_map) return t;
    snprintf(index, sizeof index, "{\"metadata\":{\"total_size\":71903645408.0},\"weight_map\":%s}",
             weight_map);
    temp_text(&t, INDEX, index);
    return t;
}

static void test_demo(void **state)
{
    (void)state;
    static const char *const paths[] = { "models/demo", "models/demo/", "models/demo//" };
    for (int k = 0; k < 3; k++) {
        struct checkpoint c;
        struct err e = { 0 };
        if (!checkpoint_open(&c, paths[k], &e)) fail_msg("%s", e.text);
        assert_string_equal(c.path, "models/demo");
        assert_int_equal(c.config.n_layers, 4);
        assert_null(c.quantization);
        assert_int_equal(c.n_shards, 2);
        assert_string_equal(c.shard_names[1], "model-00002-of-00002.safetensors");
        assert_int_equal(c.n_tensors, c.shards[0].n_tensors + c.shards[1].n_tensors);
        for (size_t i = 0; i < c.n_tensors; i++) {
            assert_ptr_equal(checkpoint_find(&c, c.tensors[i]->name), c.tensors[i]);
            assert_ptr_equal(safetensors_find(&c.shards[c.tensor_shard[i]], c.tensors[i]->name),
                             c.tensors[i]);
            if (i > 0) assert_true(strcmp(c.tensors[i - 1]->name, c.tensors[i]->name) < 0);
        }
        assert_null(checkpoint_find(&c, "mtp"));
        assert_non_null(checkpoint_find(&c, "mtp.fc.weight"));
        checkpoint_close(&c);
        checkpoint_close(&c);
    }
}

static void test_single_file(void **state)
{
    (void)state;
    struct temp t = make_folder(NULL);
    struct checkpoint c;
    struct err e = { 0 };
    make_shard(&t, "model.safetensors", "b a");
    if (!checkpoint_open(&c, t.path, &e)) fail_msg("%s", e.text);
    assert_int_equal(c.n_shards, 1);
    assert_int_equal(c.n_tensors, 2);
    assert_string_equal(c.tensors[0]->name, "a");
    checkpoint_close(&c);
    temp_remove(&t);
}

/* An index may name model.safetensors itself, with a second shard beside it. */
static void test_single_file_in_index(void **state)
{
    (void)state;
    struct temp t = make_folder(
        "{\"a\":\"model.safetensors\",\"b\":\"model_mtp.safetensors\",\"c\":\"model.safetensors\"}");
    struct checkpoint c;
    struct err e = { 0 };
    make_shard(&t, "model.safetensors", "c a");
    make_shard(&t, "model_mtp.safetensors", "b");
    if (!checkpoint_open(&c, t.path, &e)) fail_msg("%s", e.text);
    assert_int_equal(c.n_tensors, 3);
    assert_int_equal(c.tensor_shard[1], 1);
    assert_int_equal(checkpoint_find(&c, "b")->data[0], 'm');
    checkpoint_close(&c);
    temp_remove(&t);
}

/* Opening fails with this text behind the folder's path. */
static void expect_message(const struct temp *t, const char *message)
{
    struct checkpoint c;
    struct err e = { 0 };
    assert_false(checkpoint_open(&c, t->path, &e));
    assert_message(&e, t->path, message);
    assert_null(c.path);
}

static void test_folder_messages(void **state)
{
    (void)state;
    struct temp t = temp_make();
    struct checkpoint c;
    struct err e = { 0 };
    expect_message(&t, ": no config.json: not a checkpoint folder");
    temp_text(&t, "config.json", "{");
    expect_message(&t, "/config.json: JSON: ");
    temp_text(&t, "config.json", "{\"model_type\":\"gpt2\"}");
    expect_message(&t, "/config.json: model_type: 'gpt2' is not supported");
    assert_false(checkpoint_open(&c, temp_path(&t, "config.json"), &e));
    assert_message(&e, t.path, "/config.json: not a folder");
    assert_false(checkpoint_open(&c, temp_path(&t, "none/"), &e));
    assert_message(&e, t.path, "/none/: no such folder");
    temp_remove(&t);
}

static void test_quantization_message(void **state)
{
    (void)state;
    struct temp t = temp_make();
    json_t *config = must_load("models/demo/config.json");
    json_object_set_new(config, "quantization_config", must_parse("{\"quant_method\":\"gptq\"}"));
    char *text = json_dumps(config, 0);
    temp_text(&t, "config.json", text);
    expect_message(&t, "/config.json: quantization_config.quant_method: 'gptq' is not supported");
    free(text);
    json_decref(config);
    temp_remove(&t);
}

static void test_no_weights(void **state)
{
    (void)state;
    struct temp t = make_folder(NULL);
    expect_message(&t, ": neither model.safetensors.index.json nor model.safetensors");
    temp_text(&t, "model.safetensors", "");
    expect_message(&t, "/model.safetensors: 0 bytes, a safetensors file begins with");
    temp_remove(&t);
}

static void test_index_messages(void **state)
{
    (void)state;
    static const struct {
        const char *map, *message;
    } cases[] = {
        { "[]", "/model.safetensors.index.json: weight_map: expected an object" },
        { "{\"a\":3}", "/model.safetensors.index.json: weight_map: tensor 'a': expected a file name" },
        { "{\"a\":\"x\\u0000y\"}",
          "/model.safetensors.index.json: weight_map: tensor 'a': expected a file name" },
        { "{\"a\":\"\"}",
          "/model.safetensors.index.json: weight_map: tensor 'a': '' is not the name of a file" },
        { "{\"a\":\"..\"}",
          "/model.safetensors.index.json: weight_map: tensor 'a': '..' is not the name of a file" },
        { "{\"a\":\"../x\"}",
          "/model.safetensors.index.json: weight_map: tensor 'a': '../x' is not the name of" },
        { "{\"a\":\"/etc/passwd\"}",
          "/model.safetensors.index.json: weight_map: tensor 'a': '/etc/passwd' is not" },
        { "{\"a\":\"one\",\"a\":\"two\"}", "/model.safetensors.index.json: JSON: duplicate object key" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct temp t = make_folder(cases[i].map);
        expect_message(&t, cases[i].message);
        temp_remove(&t);
    }
}

static void test_shard_messages(void **state)
{
    (void)state;
    static const struct {
        const char *map, *one, *two, *message;
    } cases[] = {
        { "{\"a\":\"one\",\"b\":\"two\"}", "a", NULL,
          ": shard two is missing; model.safetensors.index.json places tensor 'b' in it" },
        { "{\"a\":\"one\",\"b\":\"two\"}", "a", "c",
          ": tensor 'b' is in no shard; model.safetensors.index.json places it in two" },
        { "{\"a\":\"one\",\"b\":\"two\"}", "a", "b c",
          ": tensor 'c' of two is not in model.safetensors.index.json" },
        { "{\"a\":\"one\",\"b\":\"two\",\"c\":\"one\"}", "a", "b c",
          ": tensor 'c' is in two; model.safetensors.index.json places it in one" },
        { "{\"a\":\"one\",\"b\":\"two\"}", "a", "a b", ": tensor 'a' is both in one and in two" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct temp t = make_folder(cases[i].map);
        make_shard(&t, "one", cases[i].one);
        if (cases[i].two) make_shard(&t, "two", cases[i].two);
        expect_message(&t, cases[i].message);
        temp_remove(&t);
    }
}

static void test_broken_shard(void **state)
{
    (void)state;
    struct temp t = make_folder("{\"a\":\"one\"}");
    temp_text(&t, "one", "nonsense!");
    expect_message(&t, "/one: header of 7310308002159816558 bytes, at most");
    temp_remove(&t);
}

static void test_stray_file(void **state)
{
    (void)state;
    struct temp t = make_folder("{\"a\":\"one\"}");
    make_shard(&t, "one", "a");
    make_shard(&t, "model.safetensors", "a");
    expect_message(&t,
                   ": model.safetensors lies beside model.safetensors.index.json, which does not name it: "
                   "remove it or the index: other tools would load it instead of the shards");
    temp_remove(&t);
}

static void test_empty_index(void **state)
{
    (void)state;
    struct temp t = make_folder("{}");
    struct checkpoint c;
    struct err e = { 0 };
    assert_true(checkpoint_open(&c, t.path, &e));
    assert_int_equal(c.n_tensors, 0);
    assert_null(checkpoint_find(&c, "a"));
    checkpoint_close(&c);
    temp_remove(&t);
}

static void test_eos_tokens(void **state)
{
    (void)state;
    struct checkpoint c;
    struct err e = { 0 };
    int32_t ids[4];
    int n;
    if (!checkpoint_open(&c, "models/demo", &e)) fail_msg("%s", e.text);
    assert_true(checkpoint_eos_tokens(&c, ids, 4, &n, &e));
    assert_int_equal(n, 2);
    assert_int_equal(ids[0], 2024);
    assert_int_equal(ids[1], 2022);
    assert_true(checkpoint_eos_tokens(&c, ids, 1, &n, &e));
    assert_int_equal(n, 1);
    checkpoint_close(&c);
}

static void test_eos_files(void **state)
{
    (void)state;
    static const struct {
        const char *generation; /* NULL: no file */
        int n;                  /* -1: an error with this message */
        const char *message;
    } cases[] = {
        { NULL, 1, NULL },
        { "{}", 1, NULL },
        { "{\"eos_token_id\":null}", 1, NULL },
        { "{\"eos_token_id\":5}", 2, NULL },
        { "{\"eos_token_id\":[5,6,2022,5]}", 3, NULL },
        { "[]", -1, "/generation_config.json: expected an object" },
        { "{\"eos", -1, "/generation_config.json: JSON: " },
        { "{\"eos_token_id\":\"x\"}", -1,
          "/generation_config.json: eos_token_id: expected an integer or a list" },
        { "{\"eos_token_id\":[2048]}", -1,
          "/generation_config.json: eos_token_id: 2048 is not from 0 to 2047" },
        { "{\"eos_token_id\":-1}", -1, "/generation_config.json: eos_token_id: -1 is not from 0 to 2047" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct temp t = make_folder("{}");
        struct checkpoint c;
        struct err e = { 0 };
        int32_t ids[8];
        int n;
        if (cases[i].generation) temp_text(&t, "generation_config.json", cases[i].generation);
        assert_true(checkpoint_open(&c, t.path, &e));
        assert_int_equal(checkpoint_eos_tokens(&c, ids, 8, &n, &e), cases[i].n >= 0);
        if (cases[i].n >= 0)
            assert_int_equal(n, cases[i].n);
        else
            assert_message(&e, t.path, cases[i].message);
        checkpoint_close(&c);
        temp_remove(&t);
    }
}

/* The eos id of config.json itself, behind its first: only a list has one, and only here is it checked. */
static void test_eos_config_message(void **state)
{
    (void)state;
    struct temp t = make_folder("{}");
    json_t *config = must_load("models/demo/config.json");
    json_change(config, "text_config.eos_token_id", "[1, 5000]");
    char *text = json_dumps(config, 0);
    temp_text(&t, "config.json", text);
    struct checkpoint c;
    struct err e = { 0 };
    int32_t ids[8];
    int n;
    assert_true(checkpoint_open(&c, t.path, &e));
    assert_false(checkpoint_eos_tokens(&c, ids, 8, &n, &e));
    assert_message(&e, t.path, "/config.json: eos_token_id: 5000 is not from 0 to 2047");
    checkpoint_close(&c);
    free(text);
    json_decref(config);
    temp_remove(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_demo),
        cmocka_unit_test(test_single_file),
        cmocka_unit_test(test_single_file_in_index),
        cmocka_unit_test(test_folder_messages),
        cmocka_unit_test(test_quantization_message),
        cmocka_unit_test(test_no_weights),
        cmocka_unit_test(test_index_messages),
        cmocka_unit_test(test_shard_messages),
        cmocka_unit_test(test_broken_shard),
        cmocka_unit_test(test_stray_file),
        cmocka_unit_test(test_empty_index),
        cmocka_unit_test(test_eos_tokens),
        cmocka_unit_test(test_eos_files),
        cmocka_unit_test(test_eos_config_message),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
