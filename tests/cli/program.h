/* quench as a program: run with words and perhaps an input, its exit status, what it wrote. $BUILD/quench
 * (build/quench) is the program; `temp` is the test's, made before the first run. */
#ifndef TESTS_CLI_PROGRAM_H
#define TESTS_CLI_PROGRAM_H
#include "checkpoint/temp.h"
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

enum { TEXT_MAX = 1 << 18, ARGUMENTS_MAX = 24 };

static struct temp temp;
static char out[TEXT_MAX], err[TEXT_MAX];

static void read_back(char *to, const char *name)
{
    char *all;
    size_t n;
    struct err e = { 0 };
    if (!file_read(&all, &n, temp_path(&temp, name), TEXT_MAX - 1, &e)) fail_msg("%s", e.text);
    memcpy(to, all, n + 1);
    free(all);
}

static void redirect(int fd, const char *path, int flags)
{
    int opened = open(path, flags, 0666);
    if (opened < 0 || dup2(opened, fd) != fd) _exit(99);
    close(opened);
}

/* input: NULL, an empty one */
static int run(const char *input, const char *const *words)
{
    char program[PATH_MAX];
    const char *build = getenv("BUILD"), *argv[ARGUMENTS_MAX] = { program };
    int n = 1, status;
    snprintf(program, sizeof program, "%s/quench", build ? build : "build");
    while (*words) argv[n++] = *words++;
    struct err e = { 0 };
    if (!input) input = "";
    assert_true(n < ARGUMENTS_MAX && file_write(temp_path(&temp, "in"), input, strlen(input), &e));
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        redirect(STDIN_FILENO, temp_path(&temp, "in"), O_RDONLY);
        redirect(STDOUT_FILENO, temp_path(&temp, "out"), O_WRONLY | O_CREAT | O_TRUNC);
        redirect(STDERR_FILENO, temp_path(&temp, "err"), O_WRONLY | O_CREAT | O_TRUNC);
        execv(argv[0], (char *const *)(uintptr_t)argv);
        _exit(98);
    }
    assert_int_equal(waitpid(pid, &status, 0), pid);
    if (!WIFEXITED(status)) fail_msg("ended by signal %d", WTERMSIG(status));
    read_back(out, "out");
    read_back(err, "err");
    return WEXITSTATUS(status);
}
#endif
