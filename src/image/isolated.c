#include "image/isolated.h"
#include "base/clock.h"
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* What the child says, into its standard output, then 3 * width * height bytes. */
struct answer {
    int32_t code; /* of enum err_code */
    int64_t width, height;
    char text[200];
};

/* Decoders hold at most a picture of 4 bytes a pixel, a copy of it, and JPEG's coefficients, 6 bytes a pixel.
 */
enum {
    BYTES_A_PIXEL = 16,
    MEMORY_SPARE = 64 << 20,
    PIPE_BYTES = 1 << 20,
    CPU_SECONDS = 60 /* should the parent be gone */
};

/* The child. */

#if defined __x86_64__
#define ARCHITECTURE AUDIT_ARCH_X86_64
#elif defined __aarch64__
#define ARCHITECTURE AUDIT_ARCH_AARCH64
#else
#define ARCHITECTURE 0 /* no filter is known */
#endif

#define FIELD(f) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, f))
#define ALLOW(call)                                                                                          \
    BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_##call, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
#define KILL BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS)

/* Memory that can be executed is not to be had either. */
static bool filter_calls(struct err *e)
{
#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
    (void)e;
    return true; /* they call what they like */
#else
    struct sock_filter filter[] = {
        FIELD(arch),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCHITECTURE, 1, 0),
        KILL,
        FIELD(nr),
        ALLOW(read),
        ALLOW(write),
        ALLOW(brk),
        ALLOW(munmap),
        ALLOW(mremap),
        ALLOW(madvise),
        ALLOW(exit_group),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mmap, 1, 0),
        KILL,
        FIELD(args[2]),
        BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, PROT_EXEC, 0, 1),
        KILL,
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    const struct sock_fprog program = { sizeof filter / sizeof *filter, filter };
    if (ARCHITECTURE == 0) return err_set(e, ERR_UNSUPPORTED, "seccomp on this architecture");
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) return err_errno(e, "PR_SET_NO_NEW_PRIVS");
    return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0 || err_errno(e, "seccomp");
#endif
}

static bool bound(int what, uint64_t most)
{
    const struct rlimit l = { most, most };
    return setrlimit((__rlimit_resource_t)what, &l) == 0;
}

static uint64_t data_bytes(void)
{
    unsigned long long pages = 0;
    FILE *f = fopen("/proc/self/statm", "re");
    if (f && fscanf(f, "%*d %*d %*d %*d %*d %llu", &pages) != 1) pages = 0;
    if (f) fclose(f);
    return pages * (uint64_t)sysconf(_SC_PAGESIZE);
}

bool isolated_restrict(uint64_t memory, uint64_t output, struct err *e)
{
#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
    memory = RLIM_INFINITY - data_bytes(); /* shadows take terabytes */
#endif
    bool ok = bound(RLIMIT_DATA, data_bytes() + memory) && bound(RLIMIT_CORE, 0) &&
              bound(RLIMIT_CPU, CPU_SECONDS) && bound(RLIMIT_FSIZE, output) && bound(RLIMIT_NOFILE, 0) &&
              bound(RLIMIT_NPROC, 0);
    return ok ? filter_calls(e) : err_errno(e, "setrlimit");
}

static bool read_input(uint8_t **data, size_t *n, uint64_t most, struct err *e)
{
    struct stat st;
    *n = 0;
    if (fstat(STDIN_FILENO, &st) != 0 || st.st_size < 0 || (uint64_t)st.st_size > most)
        return err_set(e, ERR_LIMIT, "more than %" PRIu64 " bytes", most);
    *data = malloc((size_t)st.st_size + 1);
    if (!*data) return err_memory(e, "an image", (uint64_t)st.st_size);
    while (*n < (size_t)st.st_size) {
        ssize_t k = read(STDIN_FILENO, *data + *n, (size_t)st.st_size - *n);
        if (k <= 0) return err_set(e, ERR_IO, "it cannot be read");
        *n += (size_t)k;
    }
    return true;
}

static bool write_all(const void *bytes, size_t n)
{
    for (size_t sent = 0; sent < n;) {
        ssize_t k = write(STDOUT_FILENO, (const char *)bytes + sent, n - sent);
        if (k <= 0) return false;
        sent += (size_t)k;
    }
    return true;
}

int isolated_main(uint64_t bytes, uint64_t pixels)
{
    struct image m = { 0 };
    struct err e = { 0 };
    uint8_t *data = NULL;
    size_t n = 0;
    const struct image_limits l = { .bytes = bytes, .pixels = pixels };
    syscall(SYS_close_range, 2U, ~0U, 0U);
    bool ok =
        read_input(&data, &n, bytes, &e) &&
        isolated_restrict(BYTES_A_PIXEL * pixels + MEMORY_SPARE, sizeof(struct answer) + 3 * pixels, &e) &&
        image_decode(&m, data, n, &l, &e);
    struct answer a = { .code = (int32_t)e.code, .width = m.width, .height = m.height };
    snprintf(a.text, sizeof a.text, "%.*s", (int)sizeof a.text - 1, e.text);
    ok = write_all(&a, sizeof a) && ok && write_all(m.rgb, 3 * (size_t)(m.width * m.height));
    _exit(!ok); /* no handler of the program's end may run: there is nothing that it may do */
}

/* The parent, which believes nothing. */

struct child {
    pid_t pid;   /* 0: not started */
    int in, out; /* files in memory: the image, what the child says */
};

static bool make_files(struct child *c, const uint8_t *data, size_t bytes, struct err *e)
{
    c->in = memfd_create("image", MFD_CLOEXEC);
    c->out = memfd_create("pixels", MFD_CLOEXEC);
    if (c->in < 0 || c->out < 0) return err_errno(e, "memfd_create");
    for (size_t put = 0; put < bytes;) {
        ssize_t k = write(c->in, data + put, bytes - put);
        if (k <= 0) return err_errno(e, "an image in memory");
        put += (size_t)k;
    }
    return lseek(c->in, 0, SEEK_SET) == 0 || err_errno(e, "an image in memory");
}

static bool start(struct child *c, const struct image_limits *l, struct err *e)
{
    posix_spawn_file_actions_t actions;
    char most_bytes[24], most_pixels[24], name[] = "quench", word[] = "decode-image", *none[] = { NULL };
    char *argv[] = { name, word, most_bytes, most_pixels, NULL };
    snprintf(most_bytes, sizeof most_bytes, "%" PRIu64, l->bytes);
    snprintf(most_pixels, sizeof most_pixels, "%" PRIu64, l->pixels);
    if ((errno = posix_spawn_file_actions_init(&actions)) != 0) return err_errno(e, l->program);
    int fault = posix_spawn_file_actions_adddup2(&actions, c->in, STDIN_FILENO);
    if (!fault) fault = posix_spawn_file_actions_adddup2(&actions, c->out, STDOUT_FILENO);
    if (!fault) fault = posix_spawn(&c->pid, l->program, &actions, NULL, argv, none);
    posix_spawn_file_actions_destroy(&actions);
    if (!fault) return true;
    c->pid = 0;
    errno = fault;
    return err_errno(e, l->program);
}

/* *status as waitpid has it. False: it was not over in time, or was not to be waited for. */
static bool await(int *status, const struct child *c, double until, struct err *e)
{
    double left;
    struct pollfd p = { (int)syscall(SYS_pidfd_open, c->pid, 0U), POLLIN, 0 };
    int n = p.fd >= 0 ? 0 : -1, fault = errno;
    while (p.fd >= 0 && n <= 0 && (left = until - clock_seconds()) > 0)
        n = poll(&p, 1, (int)(1000 * left) + 1);
    if (p.fd >= 0) close(p.fd);
    if (n <= 0) kill(c->pid, SIGKILL);
    while (waitpid(c->pid, status, 0) < 0 && errno == EINTR) continue;
    errno = fault;
    if (p.fd < 0) return err_errno(e, "pidfd_open");
    return n > 0 || err_set(e, ERR_LIMIT, "decoding takes longer than the images of a request may");
}

static bool receive(const struct child *c, void *out, size_t n, off_t from)
{
    for (size_t got = 0; got < n;) {
        ssize_t k = pread(c->out, (char *)out + got, n - got, from + (off_t)got);
        if (k <= 0) return false;
        got += (size_t)k;
    }
    return true;
}

static void make_printable(char *text, size_t room)
{
    text[room - 1] = 0;
    for (; *text; text++)
        if (*text < ' ' || *text > '~') *text = '?';
}

static bool odd(struct err *e)
{
    return err_set(e, ERR_FORMAT, "the decoder does not say what it should");
}

static bool take(struct image *out, const struct child *c, const struct image_limits *l, struct err *e)
{
    struct answer a;
    if (!receive(c, &a, sizeof a, 0)) return odd(e);
    make_printable(a.text, sizeof a.text);
    bool known = a.code == ERR_LIMIT || a.code == ERR_UNSUPPORTED || a.code == ERR_IO;
    if (a.code != ERR_NONE) return err_set(e, known ? (enum err_code)a.code : ERR_FORMAT, "%s", a.text);
    if (a.width < 1 || a.height < 1 || (uint64_t)a.width > l->pixels / (uint64_t)a.height) return odd(e);
    size_t bytes = 3 * (size_t)(a.width * a.height);
    *out = (struct image){ a.width, a.height, malloc(bytes) };
    if (!out->rgb) return err_memory(e, "pixels", bytes);
    return receive(c, out->rgb, bytes, sizeof a) || odd(e);
}

static bool end_well(int status, struct err *e)
{
    return !WIFSIGNALED(status) ||
           err_set(e, ERR_FORMAT, "the decoder could not bear it (signal %d)", WTERMSIG(status));
}

bool isolated_decode(struct image *out, const uint8_t *data, size_t bytes, const struct image_limits *l,
                     struct err *e)
{
    struct child c = { .in = -1, .out = -1 };
    int status = 0;
    *out = (struct image){ 0 };
    bool ok = make_files(&c, data, bytes, e) && start(&c, l, e) && await(&status, &c, l->until, e) &&
              end_well(status, e) && take(out, &c, l, e);
    if (c.in >= 0) close(c.in);
    if (c.out >= 0) close(c.out);
    if (!ok) image_free(out);
    return ok;
}

bool isolated_works(const char *program, struct err *e)
{
    static const uint8_t dot[] = "GIF89a\1\0\1\0\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0\1\0\1\0\0\2\2D\1\0;";
    const struct image_limits l = {
        .bytes = 1 << 10, .pixels = 1 << 10, .until = clock_seconds() + IMAGE_SECONDS, .program = program
    };
    struct image m;
    bool ok = isolated_decode(&m, dot, sizeof dot - 1, &l, e);
    image_free(&m);
    return ok;
}
