/* Bringing the MTP head back: what changes, what is refused, and that whatever happens in between leaves the
 * old checkpoint or the new one. */
#include "quantize/merge_mtp.h"
#include "quantize/variant.h"
#include "quantize/verify.h"
#include <dirent.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>

#define IGNORE "quantization_config.ignore"
#define LAYERS "text_config.mtp_num_hidden_layers"

enum { MTP_TENSORS = 19, DEMO_TENSORS = 124 };
static const char index_name[] = "model.safetensors.index.json", mtp_name[] = "model_mtp.safetensors";

static struct fixture fixture;
static const char *good; /* quantized, several shards */

static bool merge(const char *model, const char *source, struct merge_mtp_result *r, struct err *e)
{
    *e = (struct err){ 0 };
    return merge_mtp(&(struct merge_mtp_options){ .model = model, .source = source }, r, e);
}

static struct merge_mtp_result must_merge(const char *model)
{
    struct merge_mtp_result r;
    struct err e;
    if (!merge(model, DEMO, &r, &e)) fail_msg("%s", e.text);
    assert_int_equal(r.tensors, MTP_TENSORS);
    return r;
}

static bool has_leftovers(const char *folder)
{
    DIR *dir = opendir(folder);
    bool found = false;
    assert_non_null(dir);
    for (struct dirent *d; (d = readdir(dir));) found = found || strstr(d->d_name, ".quench-partial");
    closedir(dir);
    return found;
}

static void must_refuse(const char *model, const char *source, enum err_code code, const char *want)
{
    struct merge_mtp_result r;
    struct err e;
    if (merge(model, source, &r, &e)) fail_msg("no error, expected '%s'", want);
    if (!strstr(e.text, want)) fail_msg("expected '%s', found '%s'", want, e.text);
    assert_int_equal(e.code, code);
    assert_false(has_leftovers(model));
}

static void write_config(const char *folder, json_t *config)
{
    char path[700], *text = json_dumps(config, JSON_INDENT(2));
    snprintf(path, sizeof path, "%s/config.json", folder);
    write_text(path, text);
    free(text);
}

static void change_config(const char *folder, const char *path, const char *value)
{
    char file[700];
    snprintf(file, sizeof file, "%s/config.json", folder);
    json_t *config = must_load(file);
    json_change(config, path, value);
    write_config(folder, config);
    json_decref(config);
}

/* The good checkpoint over two shards and an index, without its head. */
static const char *lost(const char *name)
{
    const char *folder = in(&fixture, name);
    struct checkpoint c;
    struct err e = { 0 };
    must_open(&c, good);
    assert_true(file_remove_tree(folder, NULL));
    assert_int_equal(mkdir(folder, 0777), 0);
    json_t *map = json_object();
    uint64_t total = 0;
    for (int shard = 0; shard < 2; shard++) {
        struct safetensors_writer *w;
        struct tensor *all = malloc(c.n_tensors * sizeof *all);
        size_t n = 0;
        char file[64], path[700];
        snprintf(file, sizeof file, "model-%05d-of-00002.safetensors", shard + 1);
        snprintf(path, sizeof path, "%s/%s", folder, file);
        for (size_t i = 0; i < c.n_tensors; i++)
            if (strncmp(c.tensors[i]->name, "mtp.", 4) != 0 && i % 2 == (size_t)shard)
                all[n++] = *c.tensors[i];
        assert_true(safetensors_writer_create(&w, path, all, n, &e));
        for (size_t i = 0; i < n; i++) {
            assert_true(safetensors_writer_append(w, all[i].data, all[i].bytes, &e));
            json_object_set_new(map, all[i].name, json_string(file));
            total += all[i].bytes;
        }
        assert_true(safetensors_writer_finish(w, &e));
        free(all);
    }
    json_t *index =
        json_pack("{s:{s:I}, s:o}", "metadata", "total_size", (json_int_t)total, "weight_map", map);
    char path[700], *text = json_dumps(index, 0);
    snprintf(path, sizeof path, "%s/%s", folder, index_name);
    write_text(path, text);
    write_config(folder, c.config_json);
    free(text);
    json_decref(index);
    checkpoint_close(&c);
    return folder;
}

static const char *lost_single(const char *name)
{
    variant_without(&fixture, name, good, "mtp.", NULL, NULL);
    return in(&fixture, name);
}

static void assert_same_tensor(const struct tensor *a, const struct tensor *b)
{
    assert_int_equal(a->dtype, b->dtype);
    assert_int_equal(a->n_dims, b->n_dims);
    assert_memory_equal(a->shape, b->shape, (size_t)a->n_dims * sizeof *a->shape);
    assert_memory_equal(a->data, b->data, a->bytes);
}

/* The folder holds what `good` holds, its head from the source, and verify has nothing to say. */
static void assert_whole(const char *folder)
{
    struct checkpoint a, b, source;
    struct verify_result r;
    struct err e = { 0 };
    must_open(&a, good);
    must_open(&b, folder);
    must_open(&source, DEMO);
    assert_int_equal(a.n_tensors, b.n_tensors);
    for (size_t i = 0; i < a.n_tensors; i++) {
        assert_string_equal(a.tensors[i]->name, b.tensors[i]->name);
        assert_same_tensor(a.tensors[i], b.tensors[i]);
    }
    for (size_t i = 0; i < source.n_tensors; i++)
        if (strncmp(source.tensors[i]->name, "mtp.", 4) == 0)
            assert_same_tensor(source.tensors[i], must_find(&b, "%s", source.tensors[i]->name));
    checkpoint_close(&a);
    checkpoint_close(&b);
    checkpoint_close(&source);
    struct verify_options o = { .path = folder, .source = DEMO, .threads = 1, .backend = &fixture.backend };
    assert_true(verify_run(&r, &o, &e));
    assert_int_equal(r.findings.n, 0);
    verify_deinit(&r);
    assert_false(has_leftovers(folder));
}

/* What it does. */

static void a_sharded_checkpoint_gets_one_more_shard(void **state)
{
    (void)state;
    const char *folder = lost("sharded");
    char path[700];
    struct merge_mtp_result r = must_merge(folder);
    assert_string_equal(r.file, mtp_name);
    assert_false(r.ignore_added); /* our quantizer put it there */
    assert_false(r.layers_added);
    assert_whole(folder);
    snprintf(path, sizeof path, "%s/%s", folder, index_name);
    json_t *index = must_load(path), *map = json_object_get(index, "weight_map");
    assert_string_equal(json_string_value(json_object_get(map, "mtp.fc.weight")), mtp_name);
    struct checkpoint c;
    uint64_t total = 0;
    must_open(&c, folder);
    for (size_t i = 0; i < c.n_tensors; i++) total += c.tensors[i]->bytes;
    assert_int_equal(json_integer_value(json_object_get(json_object_get(index, "metadata"), "total_size")),
                     total);
    checkpoint_close(&c);
    json_decref(index);
    must_refuse(folder, DEMO, ERR_ARGUMENT, "/sharded: already has 19 mtp tensors");
}

static void a_single_file_stays_one(void **state)
{
    (void)state;
    char path[700];
    const char *folder = lost_single("single");
    struct merge_mtp_result r = must_merge(folder);
    assert_string_equal(r.file, "model.safetensors");
    assert_whole(folder);
    snprintf(path, sizeof path, "%s/%s", folder, index_name);
    assert_false(file_exists(path));
}

static void the_config_covers_the_head(void **state)
{
    (void)state;
    static const char *const ignores[] = { "[\"lm_head\"]", "null", NULL };
    struct checkpoint c;
    for (int i = 0; i < 3; i++) {
        const char *folder = lost("config");
        change_config(folder, IGNORE, ignores[i]);
        change_config(folder, LAYERS, i == 1 ? "null" : NULL);
        struct merge_mtp_result r = must_merge(folder);
        assert_true(r.ignore_added);
        assert_true(r.layers_added);
        must_open(&c, folder);
        assert_int_equal(c.config.mtp_layers, 1);
        const json_t *block = json_object_get(c.config_json, "quantization_config");
        const json_t *list = json_object_get(block, "ignore");
        size_t n = json_array_size(list);
        assert_int_equal(n, i == 0 ? 2 : 1);
        assert_string_equal(json_string_value(json_array_get(list, n - 1)), "re:.*mtp.*");
        assert_int_equal(quantization_scheme(c.quantization, "mtp.layers.0.mlp.experts.0.up_proj", "Linear"),
                         SCHEME_NONE);
        const json_t *text = json_object_get(c.config_json, "text_config");
        assert_true(json_number_value(json_object_get(text, "rms_norm_eps")) == 1e-6);
        checkpoint_close(&c);
    }
}

static void both_places_of_the_block_stay_equal(void **state)
{
    (void)state;
    struct checkpoint c;
    const char *folder = lost("config");
    change_config(folder, IGNORE, "[]");
    char path[700];
    snprintf(path, sizeof path, "%s/config.json", folder);
    json_t *config = must_load(path);
    json_object_set_new(json_object_get(config, "text_config"), "quantization_config",
                        json_deep_copy(json_object_get(config, "quantization_config")));
    write_config(folder, config);
    json_decref(config);
    assert_true(must_merge(folder).ignore_added);
    must_open(&c, folder); /* refuses blocks that differ */
    checkpoint_close(&c);
}

static void an_unquantized_model_keeps_its_config(void **state)
{
    (void)state;
    struct checkpoint c;
    variant_without(&fixture, "plain", DEMO, "mtp.", NULL, NULL);
    struct merge_mtp_result r = must_merge(in(&fixture, "plain"));
    assert_false(r.ignore_added);
    must_open(&c, in(&fixture, "plain"));
    assert_int_equal(c.n_tensors, DEMO_TENSORS);
    assert_null(c.quantization);
    checkpoint_close(&c);
}

/* What it refuses. */

static void models_and_sources_that_do_not_fit(void **state)
{
    (void)state;
    static const struct {
        struct variant_of variant;
        enum err_code code;
        const char *want;
    } sources[] = {
        { { .config = LAYERS, .value = "0" }, ERR_ARGUMENT, "config.json has no mtp_num_hidden_layers" },
        { { .config = "text_config.num_experts_per_tok", .value = "2" },
          ERR_ARGUMENT,
          "num_experts_per_tok is 4 in the model, 2 in the source: not the same network" },
        { { .config = LAYERS, .value = "2" }, ERR_ARGUMENT, "mtp_num_hidden_layers is 1 in the model, 2 in" },
        { { .edits = { { .tensor = "mtp.norm.weight", .kind = EDIT_DROP } } },
          ERR_FORMAT,
          "tensor 'mtp.norm.weight' is missing" },
        { { .edits = { { .tensor = "mtp.fc.weight", .kind = EDIT_FLATTEN } } },
          ERR_FORMAT,
          "tensor 'mtp.fc.weight': shape [131072] is not what config.json asks for" },
        { { .edits = { { .tensor = "mtp.fc.weight", .kind = EDIT_DTYPE, .dtype = DTYPE_I16 } } },
          ERR_UNSUPPORTED,
          "tensor 'mtp.fc.weight' is I16; only unquantized heads are taken over" },
    };
    const char *folder = lost("odd");
    for (size_t i = 0; i < sizeof sources / sizeof *sources; i++) {
        variant_write(&fixture, "source", DEMO, &sources[i].variant);
        must_refuse(folder, in(&fixture, "source"), sources[i].code, sources[i].want);
    }
    variant_without(&fixture, "source", DEMO, "mtp.", NULL, NULL);
    must_refuse(folder, in(&fixture, "source"), ERR_ARGUMENT, "it has no mtp tensors either");
    must_refuse(folder, in(&fixture, "nowhere"), ERR_IO, "no such folder");
    must_refuse(DEMO, DEMO, ERR_ARGUMENT, "already has 19 mtp tensors");
    must_merge(folder); /* nothing of this was in its way */
}

static void names_that_are_taken(void **state)
{
    (void)state;
    char path[700];
    const char *folder = lost("taken");
    snprintf(path, sizeof path, "%s/%s", folder, mtp_name);
    write_text(path, "mine");
    must_refuse(folder, DEMO, ERR_ARGUMENT, "model_mtp.safetensors: already exists and holds something else");
    assert_int_equal(unlink(path), 0);
    int lock = open(folder, O_RDONLY | O_DIRECTORY);
    assert_int_equal(flock(lock, LOCK_EX), 0);
    must_refuse(folder, DEMO, ERR_ARGUMENT, "another run is writing it");
    close(lock);
    must_merge(folder);
}

/* What happens in between. */

static size_t tensors_of(const char *folder)
{
    struct checkpoint c;
    must_open(&c, folder);
    size_t n = c.n_tensors;
    checkpoint_close(&c);
    return n;
}

/* The folder reads as the old checkpoint, and a second run makes it the new one. */
static void assert_old(const char *folder, size_t n)
{
    assert_int_equal(tensors_of(folder), n);
    must_merge(folder);
    assert_whole(folder);
}

static void copy_into(const char *folder, const char *from, const char *name)
{
    char a[700], b[700];
    struct err e = { 0 };
    snprintf(a, sizeof a, "%s/%s", from, name);
    snprintf(b, sizeof b, "%s/%s", folder, name);
    if (!file_copy(a, b, &e)) fail_msg("%s", e.text);
}

static void every_state_between_the_renames_is_the_old_one(void **state)
{
    (void)state;
    size_t n = tensors_of(lost("whole"));
    const char *whole = in(&fixture, "whole"), *folder = lost("between");
    must_merge(whole);
    copy_into(folder, whole, mtp_name);
    assert_old(folder, n);
    folder = lost("between");
    copy_into(folder, whole, mtp_name);
    copy_into(folder, whole, "config.json");
    assert_old(folder, n);
}

/* Files that an interrupted run left, and such that cannot be written. */
static void failures_leave_the_old_state(void **state)
{
    (void)state;
    static const char *const names[] = { "model_mtp.safetensors", "config.json",
                                         "model.safetensors.index.json" };
    char path[700];
    struct merge_mtp_result r;
    struct err e;
    for (int i = 0; i < 3; i++) {
        const char *folder = lost("fails");
        size_t n = tensors_of(folder);
        change_config(folder, IGNORE,
                      "[\"re:^mtp.*\", \"re:.*(mlp.gate|shared_expert_gate|lm_head|visual|linear_attn).*\"]");
        snprintf(path, sizeof path, "%s/%s.quench-partial", folder, names[i]);
        assert_int_equal(mkdir(path, 0777), 0);
        strcat(path, "/x");
        write_text(path, "so that it is not empty");
        assert_false(merge(folder, DEMO, &r, &e));
        assert_int_equal(e.code, ERR_IO);
        assert_int_equal(tensors_of(folder), n);
        snprintf(path, sizeof path, "%s/%s", folder, mtp_name);
        assert_false(file_exists(path));
        snprintf(path, sizeof path, "%s/%s.quench-partial", folder, names[i]);
        assert_true(file_remove_tree(path, NULL));
        write_text(path, "left by an interrupted run");
        assert_old(folder, n);
    }
}

static void a_full_disk_leaves_the_old_state(void **state)
{
    (void)state;
    for (int single = 0; single < 2; single++) {
        const char *folder = single ? lost_single("full") : lost("full");
        size_t n = tensors_of(folder);
        pid_t pid = fork();
        assert_true(pid >= 0);
        if (pid == 0) {
            struct merge_mtp_result r;
            struct err e;
            setrlimit(RLIMIT_FSIZE, &(struct rlimit){ 1 << 20, 1 << 20 });
            signal(SIGXFSZ, SIG_IGN); /* the write fails instead, as on a full disk */
            _exit(merge(folder, DEMO, &r, &e) ? 1 : e.code == ERR_IO ? 0 : 2);
        }
        int status;
        assert_int_equal(waitpid(pid, &status, 0), pid);
        assert_true(WIFEXITED(status));
        assert_int_equal(WEXITSTATUS(status), 0);
        assert_false(has_leftovers(folder));
        assert_old(folder, n);
    }
}

static void a_killed_run_leaves_the_old_state_or_the_new(void **state)
{
    (void)state;
    enum { KILLS = 24, STEP_US = 700 };
    int old = 0;
    for (int i = 0; i < KILLS; i++) {
        const char *folder = i % 2 ? lost_single("killed") : lost("killed");
        size_t n = tensors_of(folder);
        pid_t pid = fork();
        assert_true(pid >= 0);
        if (pid == 0) {
            struct merge_mtp_result r;
            struct err e;
            _exit(merge(folder, DEMO, &r, &e) ? 0 : 1);
        }
        nanosleep(&(struct timespec){ .tv_nsec = 1000L * STEP_US * i }, NULL);
        kill(pid, SIGKILL);
        assert_int_equal(waitpid(pid, NULL, 0), pid);
        size_t found = tensors_of(folder);
        assert_true(found == n || found == n + MTP_TENSORS);
        old += found == n;
        if (found == n) must_merge(folder);
        assert_int_equal(tensors_of(folder), n + MTP_TENSORS);
    }
    assert_true(old > 0);
}

static int setup(void **state)
{
    (void)state;
    static char path[512];
    fixture_init(&fixture);
    snprintf(path, sizeof path, "%s", in(&fixture, "good"));
    good = path;
    struct quantize_options o = fixture_options(&fixture, DEMO, good);
    must_run(&o);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    fixture_deinit(&fixture);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_sharded_checkpoint_gets_one_more_shard),
        cmocka_unit_test(a_single_file_stays_one),
        cmocka_unit_test(the_config_covers_the_head),
        cmocka_unit_test(both_places_of_the_block_stay_equal),
        cmocka_unit_test(an_unquantized_model_keeps_its_config),
        cmocka_unit_test(models_and_sources_that_do_not_fit),
        cmocka_unit_test(names_that_are_taken),
        cmocka_unit_test(every_state_between_the_renames_is_the_old_one),
        cmocka_unit_test(failures_leave_the_old_state),
        cmocka_unit_test(a_full_disk_leaves_the_old_state),
        cmocka_unit_test(a_killed_run_leaves_the_old_state_or_the_new),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
