#include "base/memory.h"
#include "base/pool.h"
#include "cli/doctor.h"
#include <errno.h>
#include <netinet/in.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timex.h>
#include <unistd.h>

enum {
    TEXT = 4096,
    SERVER_FILES = 4096 + 64 /* quench serve's connections, and what else it opens */
};

/* The file's text, without its line end; "" where it cannot be read. */
static const char *slurp(const struct doctor *d, const char *path, char *out, size_t size)
{
    char full[512];
    snprintf(full, sizeof full, "%s%s", d->root, path);
    FILE *f = fopen(full, "re");
    size_t n = f ? fread(out, 1, size - 1, f) : 0;
    if (f) fclose(f);
    while (n && (out[n - 1] == '\n' || out[n - 1] == '\0')) n--;
    out[n] = '\0';
    return out;
}

/* The value of the first "key : value" line of /proc/cpuinfo. */
static const char *cpu_field(const char *info, const char *key, char *out, size_t size)
{
    size_t n = strlen(key);
    *out = '\0';
    for (const char *p = info; p && *p; p = strchr(p, '\n'), p = p ? p + 1 : p)
        if (strncmp(p, key, n) == 0 && (p[n] == '\t' || p[n] == ' ' || p[n] == ':')) {
            const char *value = p + strcspn(p, ":\n");
            value += strspn(value, ": ");
            snprintf(out, size, "%.*s", (int)strcspn(value, "\n"), value);
            break;
        }
    return out;
}

static bool has_word(const char *text, const char *word)
{
    size_t n = strlen(word);
    for (const char *p = text; (p = strstr(p, word)); p += n)
        if ((p == text || p[-1] == ' ') && (p[n] == ' ' || p[n] == '\0')) return true;
    return false;
}

/* What each set of kernels asks of the processor, in the words of /proc/cpuinfo. */
static const struct {
    enum cpu_isa isa;
    const char *name, *needs[6];
} sets[] = {
    { CPU_ISA_AMX, "amx", { "amx_tile", "amx_int8", "amx_bf16", "avx512_bf16" } },
    { CPU_ISA_AVX512BF16, "avx512bf16", { "avx512_bf16", "avx512_vnni", "avx512vbmi" } },
    { CPU_ISA_AVX512, "avx512", { "avx512f", "avx512bw", "avx512dq", "avx512vl" } },
    { CPU_ISA_AVX2, "avx2", { "avx2", "fma", "f16c" } },
};
enum { N_SETS = sizeof sets / sizeof *sets };

/* Why the set is not used: what the processor lacks, or who forbids it. */
static void reason(char *out, size_t size, int set, const char *features, bool masked)
{
    int n = snprintf(out, size, "%s: ", sets[set].name);
    bool lacks = false;
    for (int i = 0; i < 6 && sets[set].needs[i]; i++)
        if (!has_word(features, sets[set].needs[i])) {
            n += snprintf(out + n, size - (size_t)n, "%s%s", lacks ? ", " : "no ", sets[set].needs[i]);
            lacks = true;
        }
    if (!lacks)
        snprintf(out + n, size - (size_t)n, "%s",
                 masked ? "left out by --cpu-mask" : "the system does not allow it");
}

/* "cpu avx512, 2 threads" -> "avx512" */
static void set_name(char *out, size_t size, const struct backend *b)
{
    const char *name = strncmp(b->name, "cpu ", 4) == 0 ? b->name + 4 : b->name;
    snprintf(out, size, "%.*s", (int)strcspn(name, ","), name);
}

static void say_cpu(struct doctor *d)
{
    char info[2 * TEXT]; /* the first processor's lines fit */
    char model[256], features[TEXT], used[64], why[TEXT] = "", one[256];
    struct err e = { 0 };
    struct backend b;
    struct common cpu = *d->common;
    cpu.device = 1;
    slurp(d, "/proc/cpuinfo", info, sizeof info);
    cpu_field(info, "model name", model, sizeof model);
    cpu_field(info, "flags", features, sizeof features);
    if (!common_backend(&b, &cpu, &e)) {
        doctor_say(d, DOCTOR_FAIL, "processor", NULL, "%s", e.text);
        return;
    }
    set_name(used, sizeof used, &b);
    for (int i = 0; i < N_SETS && strcmp(sets[i].name, used) != 0 && *features; i++) {
        reason(one, sizeof one, i, features, d->common->mask != 0);
        snprintf(why + strlen(why), sizeof why - strlen(why), "%s%s", *why ? "; " : "; not ", one);
    }
    bool slow = strcmp(used, "generic") == 0;
    doctor_say(d, slow ? DOCTOR_WARN : DOCTOR_OK, "processor",
               slow ? "expect a tenth of the speed; use a machine with AVX2 or better, or a GPU" : NULL,
               "%s: kernels %s%s", *model ? model : "unknown", used, why);
    backend_destroy(&b);
}

static void say_threads(struct doctor *d)
{
    char path[512], load[128];
    cpu_set_t set;
    CPU_ZERO(&set);
    long all = sysconf(_SC_NPROCESSORS_ONLN);
    int may = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : (int)all;
    snprintf(path, sizeof path, "%s/sys/fs/cgroup", d->root);
    int quota = pool_quota(path), share = may;
    if (quota > 0 && quota < share) share = quota;
    double busy = strtod(slurp(d, "/proc/loadavg", load, sizeof load), NULL);
    const char *of_quota = quota > 0 && quota < may ? ", the control group's quota" : "";
    const char *of_mask = may < all ? ", of which this process may use some only" : "";
    if (d->common->threads > share)
        doctor_say(d, DOCTOR_WARN, "threads",
                   "leave --threads out: more threads than processors wait for each other",
                   "%lld asked for, this process may use %d of %ld processors%s",
                   (long long)d->common->threads, share, all, of_quota);
    else if (busy > 0.5 * share)
        doctor_say(d, DOCTOR_WARN, "threads",
                   "stop what else computes here; a thread that has to wait holds up all",
                   "%d of %ld processors%s%s; others keep %.1f busy", share, all, of_quota, of_mask, busy);
    else
        doctor_say(d, DOCTOR_OK, "threads", NULL, "%d of %ld processors%s%s", share, all, of_quota, of_mask);
}

static void say_memory(struct doctor *d)
{
    char nodes[128], free[32];
    uint64_t bytes = memory_available();
    common_bytes(free, sizeof free, bytes);
    slurp(d, "/sys/devices/system/node/online", nodes, sizeof nodes);
    bool several = strchr(nodes, '-') || strchr(nodes, ',');
    if (several)
        doctor_say(d, DOCTOR_WARN, "memory",
                   "where the model fits one node: numactl --cpunodebind=0 --membind=0 quench ...",
                   "%s available, on several nodes (%s)", free, nodes);
    else
        doctor_say(d, bytes ? DOCTOR_OK : DOCTOR_WARN, "memory", NULL, "%s available",
                   bytes ? free : "unknown");
}

static void say_huge_pages(struct doctor *d)
{
    char text[128];
    slurp(d, "/sys/kernel/mm/transparent_hugepage/enabled", text, sizeof text);
    bool never = strstr(text, "[never]") || !*text;
    doctor_say(d, never ? DOCTOR_WARN : DOCTOR_OK, "huge pages",
               never ? "echo madvise >/sys/kernel/mm/transparent_hugepage/enabled, as root" : NULL, "%s",
               never ? "never given: weights are read through pages of 4 KiB" : "given to weights");
}

/* The backend that commands would take. */
static void say_gpu(struct doctor *d)
{
    char driver[256], memory[32], free[32];
    struct err e = { 0 };
    slurp(d, "/proc/driver/nvidia/version", driver, sizeof driver);
    driver[strcspn(driver, "\n")] = '\0';
    struct common cuda = *d->common;
    cuda.device = 2;
    if (d->common->device == 1)
        doctor_say(d, DOCTOR_OK, "GPU", NULL, "left out by --device cpu");
    else if (common_backend(&d->backend, &cuda, &e))
        doctor_say(d, DOCTOR_OK, "GPU", NULL, "%s; %s, %s free%s%s", d->backend.name,
                   common_bytes(memory, sizeof memory, d->backend.memory),
                   common_bytes(free, sizeof free, d->backend.memory_free), *driver ? "; " : "", driver);
    else if (*driver || d->common->device == 2)
        doctor_say(d, d->common->device == 2 ? DOCTOR_FAIL : DOCTOR_WARN, "GPU",
                   e.code == ERR_ARGUMENT ? NULL
                   : strstr(e.text, "without CUDA kernels")
                       ? "build where nvcc is (make CUDA=1)"
                       : "check nvidia-smi, /dev/nvidia* and the container's devices",
                   "not used: %s%s%s", e.text, *driver ? "; driver: " : "", driver);
    else
        doctor_say(d, DOCTOR_OK, "GPU", NULL, "none: %s", e.text);
    if (d->backend.ops) return;
    struct common cpu = *d->common;
    cpu.device = cpu.device == 3 ? 3 : 1;
    common_backend(&d->backend, &cpu, &e);
}

static void say_files(struct doctor *d)
{
    struct rlimit l;
    if (getrlimit(RLIMIT_NOFILE, &l) != 0) return;
    bool few = l.rlim_max < SERVER_FILES;
    doctor_say(d, few ? DOCTOR_WARN : DOCTOR_OK, "open files",
               few ? "raise it (ulimit -Hn, LimitNOFILE= of the unit), or lower --max-connections" : NULL,
               "%llu at a time%s", (unsigned long long)l.rlim_max,
               few ? ", fewer than a server's 4096 connections" : "");
}

static void say_port(struct doctor *d)
{
    struct sockaddr_in at = { .sin_family = AF_INET,
                              .sin_port = htons((uint16_t)d->port),
                              .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1;
    if (fd < 0) return;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    bool free = bind(fd, (const struct sockaddr *)&at, sizeof at) == 0;
    int why = errno;
    close(fd);
    if (free)
        doctor_say(d, DOCTOR_OK, "port", NULL, "%lld is free", (long long)d->port);
    else if (why == EADDRINUSE && d->url)
        doctor_say(d, DOCTOR_OK, "port", NULL, "%lld is in use", (long long)d->port);
    else
        doctor_say(d, DOCTOR_WARN, "port",
                   "quench serve --port N with another, or stop who has it (ss -ltnp)", "%lld: %s",
                   (long long)d->port, strerror(why));
}

static void say_clock(struct doctor *d)
{
    char source[64], governor[64];
    struct timex t = { 0 };
    slurp(d, "/sys/devices/system/clocksource/clocksource0/current_clocksource", source, sizeof source);
    slurp(d, "/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", governor, sizeof governor);
    bool slow = strcmp(source, "hpet") == 0 || strcmp(source, "acpi_pm") == 0;
    if (slow)
        doctor_say(d, DOCTOR_WARN, "clock", "boot with clocksource=tsc where the processor's is stable",
                   "read through %s, which takes microseconds", source);
    else if (strcmp(governor, "powersave") == 0)
        doctor_say(d, DOCTOR_WARN, "clock", "cpupower frequency-set -g performance",
                   "the processor saves power (governor powersave)");
    else if (adjtimex(&t) == TIME_ERROR)
        doctor_say(d, DOCTOR_WARN, "clock",
                   "timedatectl set-ntp true; certificates and logs need the time of day",
                   "%s, not synchronised", *source ? source : "unknown source");
    else
        doctor_say(d, DOCTOR_OK, "clock", NULL, "%s, synchronised%s%s", *source ? source : "unknown source",
                   *governor ? ", governor " : "", governor);
}

void doctor_machine(struct doctor *d)
{
    say_cpu(d);
    say_threads(d);
    say_memory(d);
    say_huge_pages(d);
    say_gpu(d);
    say_files(d);
    say_port(d);
    say_clock(d);
}
