/* Files: maps, limits, full disks, and folders removed with what they hold and nothing they point to. */
#include "base/file.h"
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

static char folder[] = "/tmp/quench-file-XXXXXX";

static int make_folder(void **state)
{
    (void)state;
    return mkdtemp(folder) ? 0 : -1;
}

static int remove_folder(void **state)
{
    (void)state;
    return file_remove_tree(folder, NULL) && !file_exists(folder) ? 0 : -1;
}

/* A path in the test's folder, valid until the eighth call after it. */
static const char *in_folder(const char *name)
{
    static char paths[8][256];
    static int next;
    char *path = paths[next++ % 8];
    snprintf(path, sizeof paths[0], "%s/%s", folder, name);
    return path;
}

static void put_file(const char *name, const char *text)
{
    struct err e = { 0 };
    if (!file_write(in_folder(name), text, strlen(text), &e)) fail_msg("%s", e.text);
}

static void expect(bool ok, const struct err *e, enum err_code code, const char *path, const char *rest)
{
    char want[512];
    snprintf(want, sizeof want, "%s%s", path, rest);
    assert_false(ok);
    assert_string_equal(e->text, want);
    assert_int_equal(e->code, code);
}

static void test_map(void **state)
{
    (void)state;
    struct file_map m;
    struct err e = { 0 };
    put_file("data", "0123456789");
    assert_true(file_map_open(&m, in_folder("data"), &e));
    assert_int_equal(m.bytes, 10);
    assert_memory_equal(m.data, "0123456789", 10);
    file_map_close(&m);
    assert_null(m.data);
    file_map_close(&m); /* accepts a zeroed one */
    put_file("empty", "");
    assert_true(file_map_open(&m, in_folder("empty"), &e));
    assert_null(m.data);
    assert_int_equal(m.bytes, 0);
    file_map_close(&m);
}

static void test_map_errors(void **state)
{
    (void)state;
    struct file_map m;
    struct err e = { 0 };
    expect(file_map_open(&m, in_folder("missing"), &e), &e, ERR_IO, in_folder("missing"),
           ": No such file or directory");
    assert_null(m.data);
    file_map_close(&m);
    expect(file_map_open(&m, folder, &e), &e, ERR_IO, folder, ": not a regular file");
    expect(file_map_open(&m, "/dev/null", &e), &e, ERR_IO, "/dev/null", ": not a regular file");
    assert_null(m.data);
}

static void test_read_limit(void **state)
{
    (void)state;
    char *text;
    size_t bytes;
    struct err e = { 0 };
    put_file("text", "abcdef");
    assert_true(file_read(&text, &bytes, in_folder("text"), 6, &e));
    assert_int_equal(bytes, 6);
    assert_string_equal(text, "abcdef"); /* NUL-terminated */
    free(text);
    expect(file_read(&text, &bytes, in_folder("text"), 5, &e), &e, ERR_LIMIT, in_folder("text"),
           ": 6 bytes, at most 5 are read");
    assert_null(text);
    assert_int_equal(bytes, 0);
    put_file("text", "");
    assert_true(file_read(&text, &bytes, in_folder("text"), 0, &e));
    assert_int_equal(bytes, 0);
    assert_string_equal(text, "");
    free(text);
    expect(file_read(&text, &bytes, in_folder("missing"), 5, &e), &e, ERR_IO, in_folder("missing"),
           ": No such file or directory");
    assert_null(text);
}

static void test_write_replaces(void **state)
{
    (void)state;
    char *text;
    size_t bytes;
    struct err e = { 0 };
    put_file("out", "a long first version");
    put_file("out", "short");
    assert_true(file_read(&text, &bytes, in_folder("out"), 100, &e));
    assert_string_equal(text, "short");
    free(text);
    expect(file_write(in_folder("no/out"), "x", 1, &e), &e, ERR_IO, in_folder("no/out"),
           ": No such file or directory");
}

static void test_full_disk(void **state)
{
    (void)state;
    struct err e = { 0 };
    int fd = open("/dev/full", O_WRONLY);
    assert_true(fd >= 0);
    assert_true(file_write_all(fd, "", 0, &e));
    expect(file_write_all(fd, "x", 1, &e), &e, ERR_IO, "write", ": No space left on device");
    close(fd);
    expect(file_write("/dev/full", "x", 1, &e), &e, ERR_IO, "/dev/full", ": write: No space left on device");
    expect(file_write_all(-1, "x", 1, &e), &e, ERR_IO, "write", ": Bad file descriptor");
}

static void ignore(int signal)
{
    (void)signal;
}

/* Writes into a slow pipe while a timer interrupts: now after a part of the bytes, now before the first. */
static void write_interrupted(int fd, const char *data, size_t bytes)
{
    struct itimerval timer = { .it_interval.tv_usec = 300, .it_value.tv_usec = 300 };
    struct sigaction action = { .sa_handler = ignore }; /* no SA_RESTART */
    sigaction(SIGALRM, &action, NULL);
    setitimer(ITIMER_REAL, &timer, NULL);
    _exit(file_write_all(fd, data, bytes, NULL) ? 0 : 1);
}

static void test_interrupted_writes(void **state)
{
    (void)state;
    enum { N = 1 << 18 };
    int ends[2], status = -1;
    char *data = malloc(N), buffer[4096];
    assert_non_null(data);
    for (size_t i = 0; i < N; i++) data[i] = (char)(i * 7 + i / 251);
    assert_int_equal(pipe(ends), 0);
    pid_t child = fork();
    assert_true(child >= 0);
    if (child == 0) {
        close(ends[0]);
        write_interrupted(ends[1], data, N);
    }
    close(ends[1]);
    size_t got = 0;
    for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0; got += (size_t)n, usleep(200)) {
        assert_true(got + (size_t)n <= N);
        assert_memory_equal(buffer, data + got, (size_t)n);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
    assert_int_equal(got, N);
    close(ends[0]);
    free(data);
}

static void test_questions(void **state)
{
    (void)state;
    put_file("one", "1");
    put_file("two", "1");
    assert_int_equal(symlink("nowhere", in_folder("dangling")), 0);
    assert_int_equal(symlink("one", in_folder("link")), 0);
    assert_true(file_exists(in_folder("one")) && file_exists(folder) && file_exists(in_folder("dangling")));
    assert_false(file_exists(in_folder("missing")) || file_exists(""));
    assert_true(file_is_folder(folder));
    assert_false(file_is_folder(in_folder("one")) || file_is_folder(in_folder("missing")));
    assert_true(file_same(in_folder("one"), in_folder("link")));
    assert_false(file_same(folder, in_folder("..")));
    assert_true(file_same(folder, in_folder(".")));
    assert_false(file_same(in_folder("one"), in_folder("two")));
    assert_false(file_same(in_folder("missing"), in_folder("missing")));
}

static void test_join(void **state)
{
    (void)state;
    char *path = file_join("a/b", "c.json");
    assert_string_equal(path, "a/b/c.json");
    free(path);
}

static void test_copy(void **state)
{
    (void)state;
    char *text;
    size_t bytes;
    struct err e = { 0 };
    put_file("from", "some bytes");
    assert_true(file_copy(in_folder("from"), in_folder("to"), &e));
    assert_true(file_read(&text, &bytes, in_folder("to"), 100, &e));
    assert_string_equal(text, "some bytes");
    free(text);
    put_file("from", "");
    assert_true(file_copy(in_folder("from"), in_folder("to"), &e));
    assert_true(file_read(&text, &bytes, in_folder("to"), 0, &e));
    free(text);
    expect(file_copy(in_folder("missing"), in_folder("to"), &e), &e, ERR_IO, in_folder("missing"),
           ": No such file or directory");
}

static void test_sync_folder(void **state)
{
    (void)state;
    struct err e = { 0 };
    put_file("plain", "x");
    assert_true(file_sync_folder(folder, &e));
    expect(file_sync_folder(in_folder("missing"), &e), &e, ERR_IO, in_folder("missing"),
           ": No such file or directory");
    expect(file_sync_folder(in_folder("plain"), &e), &e, ERR_IO, in_folder("plain"), ": Not a directory");
}

static void test_remove_tree(void **state)
{
    (void)state;
    struct err e = { 0 };
    assert_true(file_remove_tree(in_folder("missing"), &e));
    put_file("outside", "stays");
    assert_int_equal(mkdir(in_folder("kept"), 0777), 0);
    put_file("kept/inside", "stays");
    assert_int_equal(mkdir(in_folder("tree"), 0777), 0);
    assert_int_equal(mkdir(in_folder("tree/a"), 0777), 0);
    assert_int_equal(mkdir(in_folder("tree/a/b"), 0777), 0);
    put_file("tree/a/b/file", "x");
    put_file("tree/.hidden", "x");
    assert_int_equal(symlink("../outside", in_folder("tree/link")), 0);
    assert_int_equal(symlink("../../kept", in_folder("tree/a/link")), 0);
    assert_true(file_remove_tree(in_folder("tree"), &e));
    assert_false(file_exists(in_folder("tree")));
    assert_true(file_exists(in_folder("outside")) && file_exists(in_folder("kept/inside")));
    assert_true(file_remove_tree(in_folder("outside"), &e)); /* a plain file */
    assert_false(file_exists(in_folder("outside")));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_map),         cmocka_unit_test(test_map_errors),
        cmocka_unit_test(test_read_limit),  cmocka_unit_test(test_write_replaces),
        cmocka_unit_test(test_full_disk),   cmocka_unit_test(test_interrupted_writes),
        cmocka_unit_test(test_questions),   cmocka_unit_test(test_join),
        cmocka_unit_test(test_copy),        cmocka_unit_test(test_sync_folder),
        cmocka_unit_test(test_remove_tree),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
