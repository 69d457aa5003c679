/* quench doctor: what it makes of a machine whose /proc and /sys are ours, what it says of this one and of
 * checkpoints. Servers: tools/test_clients.py. */
#include "cli/doctor.h"
#include "cli/program.h"
#include <arpa/inet.h>
#include <sys/socket.h>
#include <sys/stat.h>

#define RUN(...) run(NULL, (const char *const[]){ __VA_ARGS__, NULL })

/* A file of the made-up machine, with its folders. */
static void put(const char *path, const char *text)
{
    char full[PATH_MAX];
    struct err e = { 0 };
    snprintf(full, sizeof full, "%s%s", temp_path(&temp, "machine"), path);
    for (char *p = full + 1; (p = strchr(p, '/')); p++) {
        *p = '\0';
        mkdir(full, 0777);
        *p = '/';
    }
    if (!file_write(full, text, strlen(text), &e)) fail_msg("%s", e.text);
}

static json_t *examine(const char *root)
{
    struct common common = { .quiet = true, .device = 0 };
    struct doctor d = { .common = &common, .port = 1, .root = root, .lines = json_array() };
    doctor_machine(&d);
    backend_destroy(&d.backend);
    assert_int_equal(d.counts[0] + d.counts[1] + d.counts[2], json_array_size(d.lines));
    return d.lines;
}

static const char *field(const json_t *lines, const char *check, const char *key)
{
    size_t i;
    json_t *line;
    json_array_foreach((json_t *)lines, i,
                       line) if (strcmp(json_string_value(json_object_get(line, "check")), check) ==
                                 0) return json_string_value(json_object_get(line, key));
    fail_msg("no line '%s'", check);
    return NULL;
}

static void expect(const json_t *lines, const char *check, const char *state, const char *text)
{
    assert_string_equal(field(lines, check, "state"), state);
    if (!strstr(field(lines, check, "text"), text))
        fail_msg("%s: expected '%s' in '%s'", check, text, field(lines, check, "text"));
    bool advised = field(lines, check, "advice") != NULL;
    if (advised != (strcmp(state, "ok") != 0)) fail_msg("%s: advice belongs to what is wrong", check);
}

static void poor_machine_is_told(void **state)
{
    (void)state;
    put("/proc/cpuinfo",
        "processor\t: 0\nmodel name\t: Testium 9\nflags\t\t: fpu avx2 fma f16c avx512f_not\n");
    put("/proc/loadavg", "0.00 0.00 0.00 1/100 1\n");
    put("/proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX 999.99\nGCC version: x\n");
    put("/sys/fs/cgroup/cpu.max", "50000 100000\n");
    put("/sys/devices/system/node/online", "0-1\n");
    put("/sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]\n");
    put("/sys/devices/system/clocksource/clocksource0/current_clocksource", "hpet\n");
    json_t *lines = examine(temp_path(&temp, "machine"));
    assert_non_null(strstr(field(lines, "processor", "text"), "Testium 9: kernels "));
    expect(lines, "threads", "ok", "1 of ");
    expect(lines, "threads", "ok", "the control group's quota");
    expect(lines, "memory", "warn", "several nodes (0-1)");
    expect(lines, "huge pages", "warn", "4 KiB");
    expect(lines, "clock", "warn", "hpet");
    if (strcmp(field(lines, "GPU", "state"), "warn") == 0) expect(lines, "GPU", "warn", "NVIDIA UNIX 999.99");
    json_decref(lines);
    put("/proc/loadavg", "3.50 0.00 0.00 1/100 1\n");
    put("/sys/kernel/mm/transparent_hugepage/enabled", "[always] madvise never\n");
    put("/sys/devices/system/node/online", "0\n");
    put("/sys/devices/system/clocksource/clocksource0/current_clocksource", "tsc\n");
    put("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "powersave\n");
    lines = examine(temp_path(&temp, "machine"));
    expect(lines, "threads", "warn", "others keep 3.5 busy");
    expect(lines, "memory", "ok", "available");
    expect(lines, "huge pages", "ok", "given");
    expect(lines, "clock", "warn", "powersave");
    json_decref(lines);
}

/* The words for a set that is not taken name a missing feature exactly when the set cannot be had. */
static void reasons_agree_with_the_kernels(void **state)
{
    static const char *const sets[] = { "avx2", "avx512", "avx512bf16", "amx" };
    bool had[4];
    char needle[64];
    (void)state;
    for (int i = 0; i < 4; i++) {
        assert_int_equal(RUN("doctor", "--device", "cpu", "--cpu-mask", sets[i]), 0);
        snprintf(needle, sizeof needle, "kernels %s", sets[i]);
        char *at = strstr(out, needle);
        had[i] = at && strchr("; \n", at[strlen(needle)]);
    }
    assert_int_equal(RUN("doctor", "--device", "cpu", "--cpu-mask", "generic"), 0);
    if (!strstr(out, "kernels generic; not ")) {
        printf("SKIP: no instruction sets to choose from on this processor\n");
        return;
    }
    for (int i = 0; i < 4; i++) {
        snprintf(needle, sizeof needle, "%s: no ", sets[i]);
        if (had[i] == (strstr(out, needle) != NULL))
            fail_msg("%s is%s had: %s", sets[i], had[i] ? "" : " not", out);
    }
}

static void checkpoints_are_looked_at(void **state)
{
    (void)state;
    assert_int_equal(RUN("doctor", "models/demo", "--device", "cpu"), 0);
    assert_non_null(
        strstr(out, "ok    checkpoint  124 tensors, 16.74 MB in 2 files, vision tower, MTP head\n"));
    assert_non_null(strstr(out, "ok    chat "));
    assert_non_null(strstr(out, "one sequence of 262144 tokens, all the model allows"));
    assert_non_null(strstr(out, "of 16.76 MB are in memory already"));
    assert_int_equal(RUN("doctor", "/nowhere", "--device", "cpu"), 1);
    assert_non_null(strstr(out, "FAIL  checkpoint  /nowhere"));
    assert_int_equal(RUN("doctor", "--port", "0"), 2);
    assert_string_equal(err, "quench doctor: --port: expected 1 to 65535, found 0\n");
    assert_int_equal(RUN("doctor", "a", "b"), 2);
}

static void taken_port_is_told(void **state)
{
    char port[8], want[64];
    struct sockaddr_in at = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t n = sizeof at;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    (void)state;
    assert_true(bind(fd, (struct sockaddr *)&at, sizeof at) == 0 && listen(fd, 1) == 0 &&
                getsockname(fd, (struct sockaddr *)&at, &n) == 0);
    snprintf(port, sizeof port, "%d", ntohs(at.sin_port));
    assert_int_equal(RUN("doctor", "--port", port, "--device", "cpu"), 0);
    snprintf(want, sizeof want, "warn  port        %s: Address already in use", port);
    assert_non_null(strstr(out, want));
    close(fd);
    assert_int_equal(RUN("doctor", "--port", port, "--device", "cpu"), 0);
    snprintf(want, sizeof want, "ok    port        %s is free", port);
    assert_non_null(strstr(out, want));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(poor_machine_is_told),
        cmocka_unit_test(reasons_agree_with_the_kernels),
        cmocka_unit_test(checkpoints_are_looked_at),
        cmocka_unit_test(taken_port_is_told),
    };
    temp = temp_make();
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    temp_remove(&temp);
    return failed;
}
