/* A page that a shortened file no longer has: the sentence names the file, the status is 1. */
#include "cli/fault.h"
#include "checkpoint/temp.h"
#include <limits.h>
#include <sys/wait.h>
#include <unistd.h>

static int touch_what_is_gone(const char *path, int err)
{
    struct file_map m;
    if (dup2(err, STDERR_FILENO) < 0 || !file_map_open(&m, path, NULL) || truncate(path, 0) != 0) return 99;
    fault_name_files();
    return *(const volatile uint8_t *)(m.data + m.bytes - 1) + 90;
}

static void the_file_is_named(void **state)
{
    (void)state;
    struct temp t = temp_make();
    char path[PATH_MAX], want[PATH_MAX + 200], got[PATH_MAX + 200] = "";
    int ends[2], status;
    struct err e = { 0 };
    assert_non_null(realpath(t.path, path));
    strcat(path, "/a shard");
    char *text = calloc(1, 100000);
    assert_true(text && file_write(path, text, 100000, &e) && pipe(ends) == 0);
    pid_t child = fork();
    if (child == 0) _exit(touch_what_is_gone(path, ends[1]));
    assert_true(waitpid(child, &status, 0) == child && WIFEXITED(status));
    assert_true(read(ends[0], got, sizeof got - 1) > 0);
    snprintf(want, sizeof want,
             "quench: %s could not be read: it was cut short, or its disk or network failed. Check it, then "
             "repeat the command\n",
             path);
    assert_string_equal(got, want);
    assert_int_equal(WEXITSTATUS(status), 1);
    close(ends[0]);
    close(ends[1]);
    free(text);
    temp_remove(&t);
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(the_file_is_named) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
