/* Decoding in a process without rights: the same pixels and the same sentences, and what the process may not
 * do, seen from outside, while it is hurt. $BUILD/quench (build/quench) is the program. */
#include "image/isolated.h"
#include "base/clock.h"
#include "checkpoint/temp.h"
#include "image/big_png.h"
#include "support/sanitized.h"
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>

static char program[PATH_MAX];
static struct temp temp;

static int descriptors(void)
{
    int n = 0;
    DIR *d = opendir("/proc/self/fd");
    while (readdir(d)) n++;
    closedir(d);
    return n;
}

static void check_same(const uint8_t *data, size_t n, const char *name)
{
    struct image here, there;
    struct err e = { 0 }, f = { 0 };
    const struct image_limits l = { .program = program };
    bool ok = image_decode(&here, data, n, NULL, &e), same = image_decode(&there, data, n, &l, &f);
    if (ok != same) fail_msg("%s: '%s', isolated '%s'", name, e.text, f.text);
    if (!ok) {
        assert_string_equal(f.text, e.text);
        assert_int_equal(f.code, e.code);
        return;
    }
    assert_int_equal(there.width, here.width);
    assert_int_equal(there.height, here.height);
    assert_memory_equal(there.rgb, here.rgb, (size_t)(3 * here.width * here.height));
    image_free(&here);
    image_free(&there);
}

/* Whole, cut, and with a byte changed. */
static void test_same(void **state)
{
    (void)state;
    int before = descriptors(), n_images = 0;
    DIR *d = opendir("tests/golden/images");
    assert_non_null(d);
    for (struct dirent *x; (x = readdir(d));) {
        char path[PATH_MAX], *data;
        size_t n;
        struct err e = { 0 };
        snprintf(path, sizeof path, "tests/golden/images/%s", x->d_name);
        if (x->d_name[0] == '.' || strstr(x->d_name, ".ppm") || strstr(x->d_name, ".bin")) continue;
        assert_true(file_read(&data, &n, path, 1 << 24, &e));
        check_same((uint8_t *)data, n, path);
        check_same((uint8_t *)data, n / 2, path);
        data[n / 3] ^= 0x55;
        check_same((uint8_t *)data, n, path);
        free(data);
        n_images++;
    }
    closedir(d);
    check_same((const uint8_t *)"no image", 8, "text");
    check_same(NULL, 0, "nothing");
    assert_true(n_images > 25);
    assert_int_equal(descriptors(), before);
    assert_true(waitpid(-1, NULL, WNOHANG) == -1 && errno == ECHILD);
}

/* What a decoder that was taken over would try. */

static void opens(void)
{
    (void)!open("/etc/passwd", O_RDONLY);
}

static void connects(void)
{
    (void)!socket(AF_INET, SOCK_STREAM, 0);
}

static void forks(void)
{
    (void)!fork();
}

static void executes(void)
{
    execl("/bin/sh", "sh", NULL);
}

static void kills(void)
{
    kill(getppid(), SIGKILL);
}

static void traces(void)
{
    ptrace(PTRACE_ATTACH, getppid(), NULL, NULL);
}

static void maps_code(void)
{
    (void)!mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

static void makes_code(void)
{
    static char page[8192];
    (void)!mprotect((void *)(((uintptr_t)page + 4095) & ~(uintptr_t)4095), 4096, PROT_READ | PROT_EXEC);
}

static void copies_descriptor(void)
{
    (void)!dup(0);
}

static void takes_memory(void)
{
    for (int i = 0; i < 64; i++) { /* 4 MB each; 64 MB are allowed */
        char *p = malloc(4 << 20);
        if (!p) _exit(i > 10 ? 42 : 43);
        memset(p, 1, 4 << 20);
    }
}

static void writes_much(void)
{
    static char bytes[1 << 16];
    for (int i = 0; i < 64; i++) /* 4 MB; 1 MB is allowed */
        if (write(STDOUT_FILENO, bytes, sizeof bytes) <= 0) _exit(44);
}

static void works(void)
{
    char *p = malloc(32 << 20);
    if (!p) _exit(45);
    memset(p, 7, 32 << 20);
    free(p);
    _exit(write(STDOUT_FILENO, "ok", 2) == 2 ? 42 : 46);
}

static const struct {
    const char *name;
    void (*what)(void);
    int signal, status;
} attempts[] = {
    { "open", opens, SIGSYS, 0 },
    { "socket", connects, SIGSYS, 0 },
    { "fork", forks, SIGSYS, 0 },
    { "execve", executes, SIGSYS, 0 },
    { "kill", kills, SIGSYS, 0 },
    { "ptrace", traces, SIGSYS, 0 },
    { "mmap of code", maps_code, SIGSYS, 0 },
    { "mprotect", makes_code, SIGSYS, 0 },
    { "dup", copies_descriptor, SIGSYS, 0 },
    { "256 MB", takes_memory, 0, 42 },
    { "output", writes_much, SIGXFSZ, 0 },
    { "what it should", works, 0, 42 },
};

static void test_rights(void **state)
{
    (void)state;
    if (SANITIZED) {
        printf("SKIP: a sanitizer calls what it likes, so nothing is filtered\n");
        return;
    }
    for (size_t i = 0; i < sizeof attempts / sizeof *attempts; i++) {
        int status;
        fflush(stdout);
        pid_t pid = fork();
        if (pid == 0) {
            int out = open(temp_path(&temp, "output"), O_WRONLY | O_CREAT | O_TRUNC, 0600);
            struct err e = { 0 };
            dup2(out, STDOUT_FILENO);
            for (int s = 1; s < 32; s++) signal(s, SIG_DFL);
            prctl(PR_SET_DUMPABLE, 0);
            if (!isolated_restrict(64 << 20, 1 << 20, &e)) _exit(97);
            attempts[i].what();
            _exit(98);
        }
        assert_int_equal(waitpid(pid, &status, 0), pid);
        bool as_should = attempts[i].signal ? WIFSIGNALED(status) && WTERMSIG(status) == attempts[i].signal
                                            : WIFEXITED(status) && WEXITSTATUS(status) == attempts[i].status;
        if (!as_should) fail_msg("%s: status %#x", attempts[i].name, status);
    }
}

/* Decoding on a thread, while its process is looked at. */
struct task {
    struct image image;
    struct err e;
    struct image_limits l;
    const char *path;
    bool ok;
    _Atomic bool done;
};

static void *decode(void *ctx)
{
    struct task *t = ctx;
    t->ok = image_load(&t->image, t->path, &t->l, &t->e);
    t->done = true;
    return NULL;
}

/* The child of a decoder that runs; 0: it was too fast. */
static pid_t begin(struct task *t, pthread_t *thread)
{
    assert_int_equal(pthread_create(thread, NULL, decode, t), 0);
    pid_t pid = 0;
    while (!t->done && !(pid = restricted_child(getpid()))) usleep(200);
    return pid;
}

static void test_seen_from_outside(void **state)
{
    (void)state;
    char text[8192], path[PATH_MAX];
    pthread_t thread;
    int before = descriptors(), status;
    if (SANITIZED) {
        printf("SKIP: a sanitizer calls what it likes, so nothing is filtered\n");
        return;
    }
    snprintf(path, sizeof path, "%s", temp_path(&temp, "big.png"));
    big_png(path, 6000);
    setenv("A_SECRET", "of this process", 1);
    struct task t = { .l = { .program = program }, .path = path };
    pid_t pid = begin(&t, &thread);
    assert_true(pid > 0);
    assert_true(proc_text(text, sizeof text, pid, "status") > 0);
    assert_non_null(strstr(text, "\nNoNewPrivs:\t1\n"));
    assert_non_null(strstr(text, "\nThreads:\t1\n"));
    assert_int_equal(proc_text(text, sizeof text, pid, "environ"), 0);
    assert_true(proc_text(text, sizeof text, pid, "limits") > 0);
    assert_non_null(strstr(text, "Max open files            0 "));
    assert_non_null(strstr(text, "Max processes             0 "));
    snprintf(text, sizeof text, "/proc/%d/fd", (int)pid);
    int n = 0;
    DIR *d = opendir(text);
    for (struct dirent *x; d && (x = readdir(d));) n += x->d_name[0] != '.';
    if (d) closedir(d);
    assert_int_equal(n, 2);
    pthread_join(thread, NULL);
    assert_true(t.ok);
    assert_int_equal(t.image.width, 6000);
    image_free(&t.image);

    /* it crashes; it is killed for want of memory; it hangs */
    static const int signals[] = { SIGSEGV, SIGKILL, SIGSTOP };
    static const char *const says[] = { "could not bear it (signal 11)", "could not bear it (signal 9)",
                                        "takes longer than" };
    for (int i = 0; i < 3; i++) {
        struct task hurt = { .l = { .program = program, .until = i == 2 ? clock_seconds() + 1 : 0 },
                             .path = path };
        pid = begin(&hurt, &thread);
        assert_true(pid > 0);
        assert_int_equal(kill(pid, signals[i]), 0);
        pthread_join(thread, NULL);
        assert_false(hurt.ok);
        assert_null(hurt.image.rgb);
        if (!strstr(hurt.e.text, says[i])) fail_msg("%s", hurt.e.text);
        assert_int_equal(hurt.e.code, i == 2 ? ERR_LIMIT : ERR_FORMAT);
    }
    assert_int_equal(descriptors(), before);
    assert_true(waitpid(-1, &status, WNOHANG) == -1 && errno == ECHILD);
}

/* Programs that are not what they should be, or were taken over: what they say is not believed. */
static void test_liars(void **state)
{
    (void)state;
    static const uint8_t dot[] = "GIF89a\1\0\1\0\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\1\0\1\0\0\2\2D\1\0;";
    /* code, four bytes of nothing, width, height, 200 bytes of text */
    static const struct {
        const char *script, *says;
    } cases[] = {
        { "exit 0", "does not say what it should" },
        { "echo hello", "does not say what it should" },
        { "printf '\\0%.0s' $(seq 224)", "does not say what it should" }, /* 0 x 0 */
        { "printf '\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\0\\100\\0\\0\\0\\0\\0\\0\\0\\100'; printf "
          "'\\0%.0s' $(seq 200)",
          "does not say what it should" }, /* 2^62 x 2^62 */
        { "printf "
          "'\\0\\0\\0\\0\\0\\0\\0\\0\\377\\377\\377\\377\\377\\377\\377\\377\\377\\377\\377\\377\\377\\377\\3"
          "77\\377'; "
          "printf '\\0%.0s' $(seq 200)",
          "does not say what it should" }, /* -1 x -1 */
        { "printf '\\0\\0\\0\\0\\0\\0\\0\\0\\4\\0\\0\\0\\0\\0\\0\\0\\4\\0\\0\\0\\0\\0\\0\\0'; printf "
          "'\\0%.0s' $(seq 200)",
          "does not say what it should" }, /* 4 x 4, and no pixels */
        { "printf '\\2\\0\\0\\0\\0\\0\\0\\0'; printf '\\0%.0s' $(seq 16); printf '\\033]x\\377\"%.0s' $(seq "
          "100)",
          "?]x?" },
        { "printf '\\377\\0\\0\\0\\0\\0\\0\\0'; printf '\\0%.0s' $(seq 16); printf 'a%.0s' $(seq 300)",
          "aaa" },
        { "kill -SEGV $$", "signal 11" },
        { "exec sleep 60", "takes longer than" },
    };
    struct image m;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[1024], path[PATH_MAX];
        struct err e = { 0 };
        snprintf(path, sizeof path, "%s", temp_path(&temp, "liar"));
        snprintf(text, sizeof text, "#!/bin/bash\nPATH=/bin:/usr/bin\n%s\n", cases[i].script);
        temp_text(&temp, "liar", text);
        assert_int_equal(chmod(path, 0700), 0);
        const struct image_limits l = {
            .program = path, .until = clock_seconds() + (i + 1 == sizeof cases / sizeof *cases ? 0.5 : 20)
        };
        assert_false(image_decode(&m, dot, sizeof dot - 1, &l, &e));
        if (!strstr(e.text, cases[i].says)) fail_msg("%s: %s", cases[i].script, e.text);
        assert_true(strlen(e.text) < 300);
        assert_null(m.rgb);
    }
    struct err e = { 0 };
    assert_false(isolated_works("/nowhere/at/all", &e));
    assert_string_equal(e.text, "/nowhere/at/all: No such file or directory");
    assert_true(isolated_works(program, &e));
}

static int make_temp(void **state)
{
    (void)state;
    const char *build = getenv("BUILD");
    snprintf(program, sizeof program, "%s/quench", build ? build : "build");
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
        cmocka_unit_test(test_same),
        cmocka_unit_test(test_rights),
        cmocka_unit_test(test_seen_from_outside),
        cmocka_unit_test(test_liars),
    };
    return cmocka_run_group_tests(tests, make_temp, remove_temp);
}
