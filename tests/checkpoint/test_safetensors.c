/* safetensors: what it accepts, one case per message, files cut anywhere, and that reading undoes writing. */
#include "base/file.h"
#include "checkpoint/safetensors.h"
#include "checkpoint/temp.h"
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>

/* A map as safetensors_close() expects it: its own pages. */
static struct file_map map_bytes(const void *data, size_t bytes)
{
    struct file_map m = { .bytes = bytes };
    if (bytes == 0) return m;
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(p != MAP_FAILED);
    memcpy(p, data, bytes);
    m.data = p;
    return m;
}

/* Parses a file made of this header (its true length in front) and `data_bytes` bytes 0, 1, 2, ... */
static bool parse(struct safetensors *s, const char *header, size_t data_bytes, struct err *e)
{
    size_t n = strlen(header), bytes = 8 + n + data_bytes;
    uint8_t *file = calloc(1, bytes);
    assert_non_null(file);
    for (unsigned i = 0; i < 8; i++) file[i] = (uint8_t)((uint64_t)n >> (8 * i));
    memcpy(file + 8, header, n);
    for (size_t i = 0; i < data_bytes; i++) file[8 + n + i] = (uint8_t)i;
    bool ok = safetensors_parse(s, map_bytes(file, bytes), e);
    free(file);
    return ok;
}

#define F32_2 "\"dtype\":\"F32\",\"shape\":[2]"

static void test_accepts(void **state)
{
    (void)state;
    struct safetensors s;
    struct err e = { 0 };
    char text[64];
    const char *header = "{\"__metadata__\":{\"format\":\"pt\"},"
                         "\"b\":{\"shape\":[2,3],\"data_offsets\":[4,16],\"dtype\":\"BF16\"},"
                         "\"none\":{\"dtype\":\"F32\",\"shape\":[4,0,9],\"data_offsets\":[4,4]},"
                         "\"\\u00e9 \\\"q\\\"\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[16,17]},"
                         "\"scalar\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]}}   \n";
    if (!parse(&s, header, 17, &e)) fail_msg("%s", e.text);
    assert_int_equal(s.n_tensors, 4);
    assert_string_equal(s.tensors[0].name, "b");
    assert_string_equal(s.tensors[1].name, "none");
    assert_string_equal(s.tensors[2].name, "scalar");
    const struct tensor *b = safetensors_find(&s, "b");
    assert_ptr_equal(b, &s.tensors[0]);
    assert_int_equal(b->dtype, DTYPE_BF16);
    assert_int_equal(b->bytes, 12);
    assert_int_equal(b->data[0], 4);
    assert_int_equal(tensor_elements(b), 6);
    assert_string_equal(tensor_shape_text(b, text, sizeof text), "[2, 3]");
    assert_int_equal(tensor_elements(&s.tensors[1]), 0);
    assert_int_equal(tensor_elements(&s.tensors[2]), 1);
    assert_string_equal(tensor_shape_text(&s.tensors[2], text, sizeof text), "[]");
    assert_string_equal(tensor_shape_text(b, text, 4), "[2,");
    assert_int_equal(safetensors_find(&s, "\xc3\xa9 \"q\"")->data[0], 16);
    assert_null(safetensors_find(&s, "a"));
    safetensors_close(&s);
    safetensors_close(&s);
}

static void test_empty_list(void **state)
{
    (void)state;
    struct safetensors s;
    struct err e = { 0 };
    assert_true(parse(&s, "{}", 0, &e));
    assert_int_equal(s.n_tensors, 0);
    assert_null(safetensors_find(&s, "x"));
    safetensors_close(&s);
}

static void test_header_messages(void **state)
{
    (void)state;
    static const struct {
        const char *file;
        size_t bytes;
        const char *message;
    } cases[] = {
        { "", 0, "0 bytes, a safetensors file begins with an 8-byte header length" },
        { "\2\0\0", 3, "3 bytes, a safetensors file begins with an 8-byte header length" },
        { "\2\0\0\0\0\0\0\0{", 9, "header of 2 bytes, only 1 are left in the file" },
        { "\1\xe1\xf5\5\0\0\0\0{}", 10, "header of 100000001 bytes, at most 100000000 are read" },
        { "\xff\xff\xff\xff\xff\xff\xff\xff{}", 10, "header of 18446744073709551615 bytes, at most" },
        { "\0\0\0\0\0\0\0\0{}", 10, "header does not begin with '{'" },
        { "\3\0\0\0\0\0\0\0 {}", 11, "header does not begin with '{'" },
        { "\2\0\0\0\0\0\0\0{]", 10, "header: JSON: " },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct safetensors s;
        struct err e = { 0 };
        assert_false(safetensors_parse(&s, map_bytes(cases[i].file, cases[i].bytes), &e));
        assert_message(&e, "", cases[i].message);
        assert_null(s.map.data);
    }
}

static void test_tensor_messages(void **state)
{
    (void)state;
    static const struct {
        const char *header;
        size_t data_bytes;
        const char *message;
    } cases[] = {
        { "{\"__metadata__\":[]}", 0, "__metadata__: expected an object" },
        { "{\"__metadata__\":{\"k\":1}}", 0, "__metadata__.k: expected a string" },
        { "{\"a\":3}", 0, "tensor 'a': expected an object" },
        { "{\"a\":{}}", 0, "tensor 'a': dtype: expected a string, found absent" },
        { "{\"a\":{\"dtype\":\"F4\"}}", 0, "tensor 'a': unknown dtype 'F4'" },
        { "{\"a\":{\"dtype\":\"F32\"}}", 0, "tensor 'a': shape: expected an array" },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,1]}}", 0,
          "tensor 'a': shape: 9 dimensions, at most 8 are read" },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[2.0]}}", 0, "tensor 'a': shape[0]: expected an integer" },
        { "{\"a\":{\"dtype\":\"F32\",\"shape\":[1,-2]}}", 0, "tensor 'a': shape[1]: -2 is negative" },
        { "{\"a\":{" F32_2 "}}", 0, "tensor 'a': data_offsets: expected an array of two integers" },
        { "{\"a\":{" F32_2 ",\"data_offsets\":[0]}}", 0,
          "tensor 'a': data_offsets: expected an array of two integers" },
        { "{\"a\":{" F32_2 ",\"data_offsets\":[0,\"8\"]}}", 8,
          "tensor 'a': data_offsets[1]: expected an integer" },
        { "{\"a\":{" F32_2 ",\"data_offsets\":[-8,0]}}", 8, "tensor 'a': data_offsets[0]: -8 is negative" },
        { "{\"a\":{" F32_2 ",\"data_offsets\":[8,0]}}", 8, "tensor 'a': bytes [8, 0) of 8" },
        { "{\"a\":{" F32_2 ",\"data_offsets\":[64,96]}}", 80, "tensor 'a': bytes [64, 96) of 80" },
        { "{\"a\":{" F32_2 ",\"data_offsets\":[0,8],\"x\":1}}", 8,
          "tensor 'a': expected dtype, shape and data_offsets, found 4 fields" },
        { "{\"a\":{" F32_2 ",\"data_offsets\":[0,7]}}", 7,
          "tensor 'a': F32 [2] needs 8 bytes, its span has 7" },
        { "{\"a\":{\"dtype\":\"U8\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,0]}}", 0,
          "tensor 'a': shape [4294967296, 4294967296]: its size does not fit 63 bits" },
        { "{\"a\":{\"dtype\":\"U8\",\"shape\":[4249967296,4294967296,0],\"data_offsets\":[0,0]}}", 0,
          "tensor 'a': shape [4249967296, 4294967296, 0]: its size does not fit 63 bits" },
        { "{\"a\":{\"dtype\":\"F64\",\"shape\":[4611686018427387904],\"data_offsets\":[0,0]}}", 0,
          "tensor 'a': shape [4611686018427387904]: its size does not fit 63 bits" },
        { "{\"a\":{" F32_2 ",\"data_offsets\":[0,8]},\"a\":{" F32_2 ",\"data_offsets\":[8,16]}}", 16,
          "header: JSON: duplicate object key" },
        { "{\"a\":{" F32_2 ",\"data_offsets\":[0,8]},\"b\":{" F32_2 ",\"data_offsets\":[4,12]}}", 12,
          "tensor 'b': begins at byte 4, overlaps 'a' that ends at 8" },
        { "{\"a\":{" F32_2 ",\"data_offsets\":[0,8]},\"b\":{" F32_2 ",\"data_offsets\":[12,20]}}", 20,
          "tensor 'b': begins at byte 12, hole of 4 bytes before it" },
        { "{\"a\":{" F32_2 ",\"data_offsets\":[4,12]}}", 12,
          "tensor 'a': begins at byte 4, hole of 4 bytes before it" },
        { "{\"a\":{" F32_2 ",\"data_offsets\":[0,8]}}", 11, "3 bytes after the last tensor" },
        { "{}", 5, "5 bytes after the last tensor" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct safetensors s;
        struct err e = { 0 };
        assert_false(parse(&s, cases[i].header, cases[i].data_bytes, &e));
        assert_message(&e, "", cases[i].message);
    }
}

static void test_open_messages(void **state)
{
    (void)state;
    struct temp t = temp_make();
    struct safetensors s;
    struct err e = { 0 };
    assert_false(safetensors_open(&s, temp_path(&t, "x"), &e));
    assert_message(&e, t.path, "/x: No such file or directory");
    temp_text(&t, "x", "abc");
    assert_false(safetensors_open(&s, temp_path(&t, "x"), &e));
    assert_message(&e, t.path, "/x: 3 bytes, a safetensors file begins");
    temp_remove(&t);
}

static const struct tensor sample[] = {
    { .name = "z.weight", .dtype = DTYPE_BF16, .n_dims = 2, .shape = { 3, 5 } },
    { .name = "scalar", .dtype = DTYPE_F32 },
    { .name = "empty", .dtype = DTYPE_U8, .n_dims = 3, .shape = { 7, 0, 2 } },
    { .name = "a \"quoted\" \xc3\xa9\n", .dtype = DTYPE_F8_E4M3, .n_dims = 1, .shape = { 9 } },
    { .name = "m", .dtype = DTYPE_I64, .n_dims = 8, .shape = { 1, 2, 1, 1, 1, 1, 1, 2 } },
    { .name = "last", .dtype = DTYPE_U8, .n_dims = 1, .shape = { 0 } },
};
enum { N_SAMPLE = sizeof sample / sizeof *sample };

static uint8_t byte_of(size_t tensor, uint64_t i)
{
    return (uint8_t)(tensor * 41 + i * 7 + 3);
}

static uint64_t bytes_of(const struct tensor *t)
{
    return (uint64_t)tensor_elements(t) * dtype_bytes(t->dtype);
}

/* Writes the sample in pieces of at most `piece` bytes. */
static void write_sample(const char *path, uint64_t piece)
{
    struct safetensors_writer *w;
    struct err e = { 0 };
    uint8_t buffer[64];
    if (!safetensors_writer_create(&w, path, sample, N_SAMPLE, &e)) fail_msg("%s", e.text);
    for (size_t k = 0; k < N_SAMPLE; k++) {
        uint64_t n = bytes_of(&sample[k]);
        for (uint64_t i = 0; i < n; i++) buffer[i] = byte_of(k, i);
        for (uint64_t at = 0; at < n; at += piece)
            assert_true(safetensors_writer_append(w, buffer + at, n - at < piece ? n - at : piece, &e));
    }
    assert_true(safetensors_writer_append(w, NULL, 0, &e));
    if (!safetensors_writer_finish(w, &e)) fail_msg("%s", e.text);
}

static void test_read_undoes_write(void **state)
{
    (void)state;
    struct temp t = temp_make();
    const char *path = temp_path(&t, "x.safetensors");
    struct safetensors s;
    struct err e = { 0 };
    uint64_t bytes;
    write_sample(path, 7);
    if (!safetensors_open(&s, path, &e)) fail_msg("%s", e.text);
    assert_int_equal(s.n_tensors, N_SAMPLE);
    for (size_t k = 0; k < N_SAMPLE; k++) {
        const struct tensor *got = safetensors_find(&s, sample[k].name);
        assert_non_null(got);
        assert_int_equal(got->dtype, sample[k].dtype);
        assert_int_equal(got->n_dims, sample[k].n_dims);
        assert_memory_equal(got->shape, sample[k].shape, sizeof got->shape);
        assert_int_equal(got->bytes, bytes_of(&sample[k]));
        for (uint64_t i = 0; i < got->bytes; i++) assert_int_equal(got->data[i], byte_of(k, i));
    }
    assert_true(safetensors_file_bytes(&bytes, sample, N_SAMPLE, &e));
    assert_int_equal(bytes, s.map.bytes);
    assert_int_equal(s.map.data[0] % 8, 0);
    static const char begin[] = "{\"__metadata__\":{\"format\":\"pt\"},\"z.weight\":";
    assert_memory_equal(s.map.data + 8, begin, sizeof begin - 1);
    safetensors_close(&s);
    temp_remove(&t);
}

static void test_cut_at_every_byte(void **state)
{
    (void)state;
    struct temp t = temp_make();
    struct err e = { 0 };
    char *file;
    size_t bytes;
    write_sample(temp_path(&t, "x"), 64);
    assert_true(file_read(&file, &bytes, temp_path(&t, "x"), 1 << 20, &e));
    for (size_t n = 0; n < bytes; n++) {
        struct safetensors s;
        e = (struct err){ 0 };
        assert_false(safetensors_parse(&s, map_bytes(file, n), &e));
        assert_int_equal(e.code, ERR_FORMAT);
    }
    free(file);
    temp_remove(&t);
}

/* Any one changed byte is either refused or gives tensors that lie inside the file. */
static void test_changed_bytes(void **state)
{
    (void)state;
    struct temp t = temp_make();
    struct err e = { 0 };
    char *file;
    size_t bytes;
    write_sample(temp_path(&t, "x"), 64);
    assert_true(file_read(&file, &bytes, temp_path(&t, "x"), 1 << 20, &e));
    for (size_t n = 0; n < 8 * bytes; n++) {
        struct safetensors s;
        file[n / 8] ^= (char)(1 << n % 8);
        if (safetensors_parse(&s, map_bytes(file, bytes), &e)) {
            for (size_t k = 0; k < s.n_tensors; k++)
                assert_true(s.tensors[k].data >= s.map.data &&
                            s.tensors[k].data + s.tensors[k].bytes <= s.map.data + bytes);
            safetensors_close(&s);
        }
        file[n / 8] ^= (char)(1 << n % 8);
    }
    free(file);
    temp_remove(&t);
}

static void test_announce_messages(void **state)
{
    (void)state;
    struct temp t = temp_make();
    const struct {
        struct tensor tensors[2];
        const char *message;
    } cases[] = {
        { { { .name = "a" }, { .name = "a" } }, "/x: tensor 'a': announced twice" },
        { { { .name = "__metadata__" }, { .name = "b" } },
          "/x: tensor '__metadata__': the name is reserved" },
        { { { .name = "\xff" }, { .name = "b" } }, "/x: tensor '\xff': name is not UTF-8" },
        { { { .name = "a", .n_dims = 9 }, { .name = "b" } }, "/x: tensor 'a': 9 dimensions, at most 8" },
        { { { .name = "a", .n_dims = 1, .shape = { -1 } }, { .name = "b" } },
          "/x: tensor 'a': dimension -1 is negative" },
        { { { .name = "a", .n_dims = 2, .shape = { INT64_MAX, 2 } }, { .name = "b" } },
          "/x: tensor 'a': shape [9223372036854775807, 2]: its size does not fit 63 bits" },
        { { { .name = "a", .n_dims = 3, .shape = { 4249967296, 4294967296, 0 } }, { .name = "b" } },
          "/x: tensor 'a': shape [4249967296, 4294967296, 0]: its size does not fit 63 bits" },
        { { { .name = "a", .dtype = DTYPE_U8, .n_dims = 1, .shape = { INT64_MAX } },
            { .name = "b", .dtype = DTYPE_U8, .n_dims = 1, .shape = { 1 } } },
          "/x: tensor 'b': ends beyond 2^63 bytes of data" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct safetensors_writer *w;
        struct err e = { 0 };
        assert_false(safetensors_writer_create(&w, temp_path(&t, "x"), cases[i].tensors, 2, &e));
        assert_message(&e, t.path, cases[i].message);
        assert_null(w);
        assert_false(file_exists(temp_path(&t, "x")));
    }
    temp_remove(&t);
}

static void test_header_limit(void **state)
{
    (void)state;
    struct err e = { 0 };
    uint64_t bytes;
    char *name = malloc(SAFETENSORS_HEADER_MAX + 1);
    assert_non_null(name);
    memset(name, 'n', SAFETENSORS_HEADER_MAX);
    name[SAFETENSORS_HEADER_MAX] = 0;
    assert_false(safetensors_file_bytes(&bytes, &(struct tensor){ .name = name }, 1, &e));
    assert_message(&e, "", "header of 1000000");
    assert_non_null(strstr(e.text, "for 1 tensors, readers accept at most 100000000"));
    assert_int_equal(e.code, ERR_LIMIT);
    free(name);
}

static void test_create_messages(void **state)
{
    (void)state;
    struct temp t = temp_make();
    struct safetensors_writer *w;
    struct err e = { 0 };
    temp_text(&t, "x", "");
    assert_false(safetensors_writer_create(&w, temp_path(&t, "x"), sample, N_SAMPLE, &e));
    assert_message(&e, t.path, "/x: File exists");
    assert_false(safetensors_writer_create(&w, temp_path(&t, "no/x"), sample, N_SAMPLE, &e));
    assert_message(&e, t.path, "/no/x: No such file or directory");
    assert_false(safetensors_writer_create(&w, "/dev/full", sample, N_SAMPLE, &e));
    assert_message(&e, "", "/dev/full: File exists");
    temp_remove(&t);
}

static void test_append_messages(void **state)
{
    (void)state;
    struct temp t = temp_make();
    const struct tensor two[] = { { .name = "a", .dtype = DTYPE_U8, .n_dims = 1, .shape = { 4 } },
                                  { .name = "b", .dtype = DTYPE_U8, .n_dims = 1, .shape = { 2 } } };
    struct safetensors_writer *w;
    struct err e = { 0 };
    assert_true(safetensors_writer_create(&w, temp_path(&t, "x"), two, 2, &e));
    assert_true(safetensors_writer_append(w, "123", 3, &e));
    assert_false(safetensors_writer_append(w, "123", 3, &e));
    assert_message(&e, t.path, "/x: tensor 'a': 3 bytes given, 1 of 4 are left");
    assert_true(safetensors_writer_append(w, "4", 1, &e));
    assert_true(safetensors_writer_append(w, "56", 2, &e));
    assert_false(safetensors_writer_append(w, "7", 1, &e));
    assert_message(&e, t.path, "/x: 1 bytes given after the last tensor");
    assert_true(safetensors_writer_finish(w, &e));
    temp_remove(&t);
}

static void test_incomplete(void **state)
{
    (void)state;
    struct temp t = temp_make();
    struct safetensors_writer *w;
    struct err e = { 0 };
    assert_true(safetensors_writer_create(&w, temp_path(&t, "x"), sample, N_SAMPLE, &e));
    assert_true(safetensors_writer_append(w, "0123456789", 10, &e));
    assert_false(safetensors_writer_finish(w, &e));
    assert_message(&e, t.path, "/x: tensor 'z.weight': 10 of 30 bytes were written");
    assert_true(safetensors_writer_create(&w, temp_path(&t, "y"), sample, N_SAMPLE, &e));
    safetensors_writer_abandon(w);
    assert_true(file_exists(temp_path(&t, "y")));
    safetensors_writer_abandon(NULL);
    temp_remove(&t);
}

/* A file size limit stands for the full disk: write(2) fails in the same place. */
static void limit_file_size(rlim_t bytes)
{
    signal(SIGXFSZ, SIG_IGN);
    struct rlimit r;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &r), 0);
    r.rlim_cur = bytes;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &r), 0);
}

static void test_full_disk(void **state)
{
    (void)state;
    struct temp t = temp_make();
    struct safetensors_writer *w;
    struct err e = { 0 };
    static const uint8_t data[1 << 16];
    const struct tensor one = { .name = "a", .dtype = DTYPE_U8, .n_dims = 1, .shape = { sizeof data } };
    limit_file_size(16);
    assert_false(safetensors_writer_create(&w, temp_path(&t, "x"), &one, 1, &e));
    limit_file_size(4096);
    assert_message(&e, t.path, "/x: write: File too large");
    assert_false(file_exists(temp_path(&t, "x")));
    assert_true(safetensors_writer_create(&w, temp_path(&t, "x"), &one, 1, &e));
    bool appended = safetensors_writer_append(w, data, sizeof data, &e);
    limit_file_size(RLIM_INFINITY);
    assert_false(appended);
    assert_message(&e, t.path, "/x: tensor 'a': write: File too large");
    assert_int_equal(e.code, ERR_IO);
    assert_false(safetensors_writer_finish(w, &e));
    assert_message(&e, t.path, "/x: a write failed, the file is not complete");
    temp_remove(&t);
}

/* As many tensors as a quantized model of 40 layers with 256 experts has; anything quadratic would take
 * minutes. */
static void test_many_tensors(void **state)
{
    (void)state;
    enum { N = 123000, NAME = 80 };
    struct temp t = temp_make();
    struct tensor *tensors = calloc(N, sizeof *tensors);
    char(*names)[NAME] = calloc(N, sizeof *names);
    struct safetensors_writer *w;
    struct safetensors s;
    struct err e = { 0 };
    assert_true(tensors && names);
    for (int i = 0; i < N; i++) {
        snprintf(names[i], NAME, "model.language_model.layers.%d.mlp.experts.%d.up_proj.weight_packed",
                 i % 41, i / 41);
        tensors[i] = (struct tensor){ .name = names[i], .dtype = DTYPE_U8, .n_dims = 1, .shape = { i % 2 } };
    }
    assert_true(safetensors_writer_create(&w, temp_path(&t, "x"), tensors, N, &e));
    for (int i = 1; i < N; i += 2) assert_true(safetensors_writer_append(w, "x", 1, &e));
    assert_true(safetensors_writer_finish(w, &e));
    if (!safetensors_open(&s, temp_path(&t, "x"), &e)) fail_msg("%s", e.text);
    assert_int_equal(s.n_tensors, N);
    for (int i = 0; i < N; i++) assert_int_equal(safetensors_find(&s, names[i])->bytes, i % 2);
    safetensors_close(&s);
    free(names);
    free(tensors);
    temp_remove(&t);
}

static void test_demo_model(void **state)
{
    (void)state;
    struct safetensors s;
    struct err e = { 0 };
    char shape[64];
    if (!safetensors_open(&s, "models/demo/model-00001-of-00002.safetensors", &e)) fail_msg("%s", e.text);
    const struct tensor *t = safetensors_find(&s, "model.language_model.embed_tokens.weight");
    assert_non_null(t);
    assert_int_equal(t->dtype, DTYPE_BF16);
    assert_string_equal(tensor_shape_text(t, shape, sizeof shape), "[2048, 256]");
    assert_int_equal(t->bytes, 2048 * 256 * 2);
    safetensors_close(&s);
}

/* Written by another implementation. */
static void test_golden_files(void **state)
{
    (void)state;
    static const char *const paths[] = { "tests/golden/demo/golden_text.safetensors",
                                         "tests/golden/demo/golden_image.safetensors" };
    for (int i = 0; i < 2; i++) {
        struct safetensors s;
        struct err e = { 0 };
        if (!safetensors_open(&s, paths[i], &e)) fail_msg("%s", e.text);
        assert_true(s.n_tensors > 0);
        safetensors_close(&s);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_accepts),           cmocka_unit_test(test_empty_list),
        cmocka_unit_test(test_header_messages),   cmocka_unit_test(test_tensor_messages),
        cmocka_unit_test(test_open_messages),     cmocka_unit_test(test_read_undoes_write),
        cmocka_unit_test(test_cut_at_every_byte), cmocka_unit_test(test_changed_bytes),
        cmocka_unit_test(test_announce_messages), cmocka_unit_test(test_header_limit),
        cmocka_unit_test(test_create_messages),   cmocka_unit_test(test_append_messages),
        cmocka_unit_test(test_incomplete),        cmocka_unit_test(test_full_disk),
        cmocka_unit_test(test_many_tensors),      cmocka_unit_test(test_demo_model),
        cmocka_unit_test(test_golden_files),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
