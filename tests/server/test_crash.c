/* What is left of a process that dies of a fault: real ones, in a child of this program while requests are
 * noted, and in quench serve under load. */
#include "server/crash.h"
#include "server/serving.h"
#include "support/sanitized.h"
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>

static struct temp temp;

/* Faults. */

static volatile int zero;
static int *volatile nowhere;

/* Sanitizers would see these coming. */
#define BARE __attribute__((no_sanitize("undefined"), no_sanitize("address")))

BARE static void null_write(void)
{
    *nowhere = 1;
}

static void ends(void)
{
    abort();
}

BARE static void divides(void)
{
    zero = 7 / zero;
}

static void traps(void)
{
    __builtin_trap();
}

BARE static void reads_beyond(void)
{
    int fd = open(temp_path(&temp, "empty"), O_RDWR | O_CREAT, 0600);
    char *map = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);
    zero = *(volatile char *)map;
}

BARE static int deeper(volatile char *above)
{
    volatile char here[4096];
    here[0] = above ? above[0] : 0;
    if (zero > 1) return 0; /* it never is */
    return deeper(here) + here[0];
}

static void overflows(void)
{
    zero = deeper(NULL);
}

static const struct {
    void (*fault)(void);
    int number;
    const char *name;
} faults[] = {
    { null_write, SIGSEGV, "SIGSEGV" }, { ends, SIGABRT, "SIGABRT" }, { reads_beyond, SIGBUS, "SIGBUS" },
#if defined __x86_64__
    { divides, SIGFPE, "SIGFPE" },      { traps, SIGILL, "SIGILL" },
#endif
    { overflows, SIGSEGV, "SIGSEGV" },
};

static void *do_fault(void *ctx)
{
    crash_own_stack();
    ((void (*)(void))(uintptr_t)ctx)();
    return NULL;
}

/* Requests come and end while another thread faults; three never end. */
static void child(void (*fault)(void), const char *path)
{
    struct err e = { 0 };
    uint64_t forever[3] = { 0 };
    pthread_t thread;
    struct crash_request r = {
        .path = "/v1/chat/completions", .state = "decode", .owner = 0xabc, .answer_tokens = 7
    };
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        signal(faults[i].number, SIG_DFL); /* cmocka has its own, sanitizers too */
    if (!crash_arm(path, "test", &e)) _exit(97);
    alarm(60); /* a fault that is none ends here */
    for (int i = 0; i < 3; i++) {
        snprintf(r.id, sizeof r.id, "forever-%d", i);
        r.began = clock_seconds();
        crash_note(&forever[i], &r);
    }
    for (int i = 0;; i++) {
        uint64_t place = 0;
        snprintf(r.id, sizeof r.id, "short-%d", i);
        r.state = "preparing";
        crash_note(&place, &r);
        r.state = NULL;
        r.status = 200;
        crash_note(&place, &r);
        if (i == 5000) pthread_create(&thread, NULL, do_fault, (void *)(uintptr_t)fault);
    }
}

/* The file's lines, each of them JSON: an array of objects. */
static json_t *lines_of(const char *path)
{
    char *text;
    size_t n;
    struct err e = { 0 };
    json_t *all = json_array();
    if (!file_read(&text, &n, path, 1 << 24, &e)) fail_msg("%s", e.text);
    for (char *line = text, *end; (end = strchr(line, '\n')); line = end + 1) {
        json_t *o = json_loadb(line, (size_t)(end - line), JSON_REJECT_DUPLICATES, NULL);
        if (!o) fail_msg("not JSON: %.*s", (int)(end - line), line);
        json_array_append_new(all, o);
    }
    free(text);
    return all;
}

static const char *text_at(json_t *all, size_t i, const char *key)
{
    return json_string_value(json_object_get(json_array_get(all, i), key));
}

static size_t find(json_t *all, const char *id)
{
    size_t i = 1;
    while (i < json_array_size(all) && strcmp(text_at(all, i, "id"), id) != 0) i++;
    if (i == json_array_size(all)) fail_msg("no line of %s", id);
    return i;
}

static void check_signal(int status, int number)
{
    assert_true(WIFSIGNALED(status));
    assert_int_equal(WTERMSIG(status), number);
}

static void test_faults(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) {
        char path[PATH_MAX], address[32];
        int status;
        snprintf(path, sizeof path, "%s", temp_path(&temp, "crash"));
        unlink(path);
        fflush(stdout);
        pid_t pid = fork();
        if (pid == 0) {
            int null = open("/dev/null", O_WRONLY);
            dup2(null, STDERR_FILENO);
            prctl(PR_SET_DUMPABLE, 0); /* no core */
            child(faults[i].fault, path);
        }
        assert_int_equal(waitpid(pid, &status, 0), pid);
        check_signal(status, faults[i].number);
        json_t *all = lines_of(path);
        assert_string_equal(text_at(all, 0, "crash"), faults[i].name);
        assert_string_equal(text_at(all, 0, "version"), "test");
        assert_int_equal(json_integer_value(json_object_get(json_array_get(all, 0), "process")), pid);
        if (faults[i].fault == null_write) {
            uint64_t at = strtoull(text_at(all, 0, "at"), NULL, 16);
            assert_true(at >= (uintptr_t)null_write && at < (uintptr_t)null_write + 64);
            snprintf(address, sizeof address, "0x0");
            assert_string_equal(text_at(all, 0, "address"), address);
        }
        assert_int_equal(json_array_size(all), 1 + CRASH_REQUESTS);
        for (int k = 0; k < 3; k++) { /* the first ones, though thousands came since */
            assert_int_equal(strncmp(text_at(all, (size_t)k + 1, "id"), "forever-", 8), 0);
            assert_string_equal(text_at(all, (size_t)k + 1, "state"), "decode");
            assert_string_equal(text_at(all, (size_t)k + 1, "key"), "0000000000000abc");
        }
        int last = 0;
        for (size_t k = 4; k + 1 < json_array_size(all); k++) { /* but the last, which may be half written */
            int n = atoi(text_at(all, k, "id") + 6);
            assert_true(n > last);
            last = n;
        }
        assert_true(last >= 4000);
        json_decref(all);
    }
}

/* Where no handler may be: the file cannot be made. */
static void test_unwritable(void **state)
{
    (void)state;
    struct serving s;
    serving_spawn(&s, (const char *const[]){ "--crash-log", "/nowhere/at/all", NULL });
    assert_int_equal(serving_wait(&s, 30), 1);
    assert_non_null(strstr(s.said, "--crash-log: /nowhere/at/all: "));
    assert_null(strstr(s.said, "listening"));
}

static int begin(const struct serving *s, const char *id, const char *body)
{
    char headers[128];
    snprintf(headers, sizeof headers, "Authorization: Bearer user-key\r\nX-Request-Id: %s\r\n", id);
    const char *text = post_text(COMPLETIONS, headers, body);
    int fd = dial(s);
    assert_true(send_bytes(fd, text, strlen(text)));
    return fd;
}

static void await_metric(const struct serving *s, const char *name, int value)
{
    for (double until = clock_seconds() + 60; metric(s, name) != value; usleep(5000))
        assert_true(clock_seconds() < until);
}

/* A server with requests over, running and waiting. */
static void start_loaded(struct serving *s, const char *model, const char *log, int fds[3])
{
    static struct reply reply;
    serving_spawn_model(s, model,
                        (const char *const[]){ "--max-num-seqs", "2", "--api-key", "user-key",
                                               "--public-metrics", "--served-model-name", "models/demo",
                                               log ? "--crash-log" : NULL, log, NULL });
    serving_await(s);
    fds[0] = begin(s, "over", LONG(5) "}");
    reply.n = reply.used = 0;
    assert_int_equal(receive(&reply, fds[0], 60), 200);
    close(fds[0]);
    fds[0] = begin(s, "runs-1", LONG(100000) ",\"stream\":true}");
    await_metric(s, "vllm:num_requests_running", 1);
    fds[1] = begin(s, "runs-2", LONG(100000) "}");
    await_metric(s, "vllm:num_requests_running", 2);
    fds[2] = begin(s, "waits", LONG(100000) "}");
    await_metric(s, "vllm:num_requests_waiting", 1);
    for (double most = metric(s, "vllm:generation_tokens_total") + 200;
         metric(s, "vllm:generation_tokens_total") < most;)
        usleep(5000);
    usleep(150000); /* answers that are not streamed are looked at ten times a second */
}

static void check_requests(json_t *all)
{
    static const char *const ids[] = { "over", "runs-1", "runs-2", "waits" };
    for (size_t i = 0; i < 4; i++) {
        json_t *o = json_array_get(all, find(all, ids[i]));
        assert_string_equal(json_string_value(json_object_get(o, "path")), COMPLETIONS);
        assert_int_equal(strlen(json_string_value(json_object_get(o, "key"))), 16);
        assert_true(json_integer_value(json_object_get(o, "body_bytes")) > 80);
        const char *state = json_string_value(json_object_get(o, "state"));
        assert_string_equal(state, i == 0 ? "over" : i == 3 ? "prefill" : "decode");
        int64_t answer = json_integer_value(json_object_get(o, "answer_tokens"));
        assert_true(i == 0 ? answer == 5 : i == 3 ? answer == 0 : answer > 5);
    }
    assert_int_equal(json_integer_value(json_object_get(json_array_get(all, find(all, "over")), "status")),
                     200);
}

/* Signals from outside, each of the five: as the signal says it ends. */
static void test_server(void **state)
{
    (void)state;
    static const int numbers[] = { SIGSEGV, SIGABRT, SIGBUS, SIGFPE, SIGILL };
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        struct serving s;
        int fds[3];
        char path[PATH_MAX], *text;
        size_t n;
        struct stat st;
        struct err e = { 0 };
        snprintf(path, sizeof path, "%s", temp_path(&temp, "server"));
        unlink(path);
        start_loaded(&s, "models/demo", path, fds);
        kill(s.pid, numbers[i]);
        int status = serving_wait(&s, 30);
        /* SIGBUS has a sentence of its own about files; a sanitizer's handlers come next and exit */
        if (status != -numbers[i] && !(numbers[i] == SIGBUS && status == 1) && !SANITIZED)
            fail_msg("status %d of signal %d", status, numbers[i]);
        json_t *all = lines_of(path);
        check_requests(all);
        json_decref(all);
        assert_int_equal(stat(path, &st), 0);
        assert_int_equal(st.st_mode & 0777, 0600);
        assert_true(file_read(&text, &n, path, 1 << 20, &e));
        assert_null(strstr(text, "Count")); /* the prompt */
        assert_null(strstr(text, "user-key"));
        free(text);
        for (int k = 0; k < 3; k++) close(fds[k]);
    }
}

/* A fault of its own: the weights' files are cut short under it. Without a file named, on standard error;
 * what said which file that was still does. */
static void test_server_fault(void **state)
{
    (void)state;
    struct serving s;
    int fds[3];
    char model[PATH_MAX], command[2 * PATH_MAX];
    snprintf(model, sizeof model, "%s", temp_path(&temp, "model"));
    snprintf(command, sizeof command, "cp -r models/demo %s", model);
    assert_int_equal(system(command), 0);
    start_loaded(&s, model, NULL, fds);
    snprintf(command, sizeof command, "truncate -s 0 %s/*.safetensors", model);
    assert_int_equal(system(command), 0);
    int other = dial_with(&s, 0); /* it may be over by now */
    if (other >= 0) send_bytes(other, "GET /v1/models HTTP/1.1\r\n", 25);
    int status = serving_wait(&s, 60);
    for (int k = 0; k < 3; k++) close(fds[k]);
    if (other >= 0) close(other);
    if (status != 1) fail_msg("status %d: %s", status, s.said);
    assert_non_null(strstr(s.said, "{\"crash\":\"SIGBUS\""));
    assert_non_null(strstr(s.said, "{\"id\":\"runs-1\",\"path\":\"/v1/completions\",\"state\":\"decode\""));
    assert_non_null(strstr(s.said, "could not be read: it was cut short"));
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
        cmocka_unit_test(test_faults),
        cmocka_unit_test(test_unwritable),
        cmocka_unit_test(test_server),
        cmocka_unit_test(test_server_fault),
    };
    signal(SIGPIPE, SIG_IGN);
    return cmocka_run_group_tests(tests, make_temp, remove_temp);
}
