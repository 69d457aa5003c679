#include "server/crash.h"
#include "base/clock.h"
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

enum { SIGNALS = 5, STACK_BYTES = 64 << 10 };
static const int numbers[SIGNALS] = { SIGSEGV, SIGABRT, SIGBUS, SIGFPE, SIGILL };
static const char *const names[SIGNALS] = { "SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL" };

struct record {
    _Atomic uint64_t serial; /* 0: unused */
    struct crash_request r;
};

/* A handler is given nothing, so what it needs is here, and nowhere else is there such a thing. */
static struct {
    struct record *records; /* [CRASH_REQUESTS] NULL: not armed */
    _Atomic uint64_t last;  /* serial given out */
    int fd;
    const char *version;
    struct sigaction before[SIGNALS];
    pthread_key_t stacks;
    atomic_bool writes; /* and nothing is noted any more */
} crash = { .fd = -1 };

/* Writing: only what a handler may call, into a buffer of its own. */

struct out {
    char text[4096];
    size_t n;
};

static void flush(struct out *o)
{
    for (size_t sent = 0; sent < o->n;) {
        ssize_t k = write(crash.fd, o->text + sent, o->n - sent);
        if (k <= 0 && errno != EINTR) break;
        if (k > 0) sent += (size_t)k;
    }
    o->n = 0;
}

static void put(struct out *o, const char *text)
{
    for (; *text; text++) {
        if (o->n == sizeof o->text) flush(o);
        o->text[o->n++] = *text;
    }
}

/* A string's content, at most `most` bytes of it; what was half written must not break the line. */
static void put_text(struct out *o, const char *text, size_t most)
{
    for (size_t i = 0; i < most && text[i]; i++) {
        char one[2] = { text[i], 0 };
        if (one[0] < ' ' || one[0] > '~' || one[0] == '"' || one[0] == '\\') one[0] = '?';
        put(o, one);
    }
}

static void put_number(struct out *o, uint64_t x, unsigned base, size_t least)
{
    char digits[32];
    size_t n = sizeof digits - 1;
    digits[n] = 0;
    for (size_t k = 0; x > 0 || k < least; k++, x /= base) digits[--n] = "0123456789abcdef"[x % base];
    put(o, digits + n);
}

static void put_int(struct out *o, const char *key, int64_t x)
{
    put(o, key);
    if (x < 0) put(o, "-");
    put_number(o, x < 0 ? -(uint64_t)x : (uint64_t)x, 10, 1);
}

static void put_hex(struct out *o, const char *key, uint64_t x)
{
    put(o, key);
    put(o, "\"0x");
    put_number(o, x, 16, 1);
    put(o, "\"");
}

static int64_t in_ms(double seconds)
{
    return (int64_t)(1000 * seconds);
}

/* In the program's text, as addr2line wants it: an offset from its beginning. */
static void put_place(struct out *o, const ucontext_t *c)
{
    extern char __executable_start[], etext[];
    uintptr_t at = 0;
#if defined __x86_64__
    at = (uintptr_t)c->uc_mcontext.gregs[REG_RIP];
#elif defined __aarch64__
    at = (uintptr_t)c->uc_mcontext.pc;
#endif
    put_hex(o, ",\"at\":", at);
    if (at >= (uintptr_t)__executable_start && at < (uintptr_t)etext)
        put_hex(o, ",\"offset\":", at - (uintptr_t)__executable_start);
}

static void put_first(struct out *o, int number, const siginfo_t *info, const ucontext_t *c)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    put(o, "{\"crash\":\"");
    for (int i = 0; i < SIGNALS; i++)
        if (numbers[i] == number) put(o, names[i]);
    put_int(o, "\",\"code\":", info->si_code);
    if (info->si_code > 0) put_hex(o, ",\"address\":", (uintptr_t)info->si_addr);
    put_place(o, c);
    put_int(o, ",\"process\":", getpid());
    put_int(o, ",\"thread\":", syscall(SYS_gettid));
    put_int(o, ",\"time_ms\":", (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000);
    put(o, ",\"version\":\"");
    put_text(o, crash.version, 200);
    put(o, "\"}\n");
}

static void put_request(struct out *o, const struct crash_request *r, double now)
{
    put(o, "{\"id\":\"");
    put_text(o, r->id, sizeof r->id);
    put(o, "\",\"path\":\"");
    put_text(o, r->path ? r->path : "", 200);
    put(o, "\",\"state\":\"");
    put_text(o, r->state ? r->state : "over", 20);
    put_int(o, "\",\"ms_ago\":", in_ms(now - r->began));
    put_int(o, ",\"ms\":", in_ms(r->state ? now - r->began : r->seconds));
    if (r->status) put_int(o, ",\"status\":", r->status);
    if (r->owner) {
        put(o, ",\"key\":\"");
        put_number(o, r->owner, 16, 16);
        put(o, "\"");
    }
    put(o, r->stream ? ",\"stream\":true" : ",\"stream\":false");
    put_int(o, ",\"body_bytes\":", r->body_bytes);
    put_int(o, ",\"prompt_tokens\":", r->prompt_tokens);
    put_int(o, ",\"cached_tokens\":", r->cached_tokens);
    put_int(o, ",\"answer_tokens\":", r->answer_tokens);
    put(o, "}\n");
}

/* In the order in which they came. */
static void put_all(struct out *o)
{
    double now = clock_seconds();
    const uint64_t most = crash.last;
    for (uint64_t last = 0;;) {
        const struct record *next = NULL;
        for (int i = 0; i < CRASH_REQUESTS; i++) {
            uint64_t serial = crash.records[i].serial;
            if (serial > last && serial <= most && (!next || serial < next->serial)) next = &crash.records[i];
        }
        if (!next) return;
        last = next->serial;
        put_request(o, &next->r, now);
    }
}

/* All of these signals are blocked meanwhile, so a fault in here ends the process. */
static void on_crash(int number, siginfo_t *info, void *context)
{
    static struct out o;
    int was = errno;
    while (atomic_exchange(&crash.writes, true)) pause(); /* another thread is at it, and ends all */
    put_first(&o, number, info, context);
    put_all(&o);
    flush(&o);
    fsync(crash.fd);
    for (int i = 0; i < SIGNALS; i++) sigaction(numbers[i], &crash.before[i], NULL);
    if (info->si_code <= 0) raise(number); /* was sent; a fault comes again by itself */
    errno = was;
}

static void drop_stack(void *stack)
{
    const stack_t none = { .ss_flags = SS_DISABLE };
    sigaltstack(&none, NULL);
    free(stack);
}

void crash_own_stack(void)
{
    if (!crash.records) return;
    stack_t s = { .ss_sp = malloc(STACK_BYTES), .ss_size = STACK_BYTES };
    if (s.ss_sp && pthread_setspecific(crash.stacks, s.ss_sp) == 0 && sigaltstack(&s, NULL) == 0) return;
    pthread_setspecific(crash.stacks, NULL);
    free(s.ss_sp);
}

bool crash_arm(const char *path, const char *version, struct err *e)
{
    int fd = path ? open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | O_NONBLOCK, 0600)
                  : fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 0);
    if (fd < 0) return err_errno(e, path ? path : "standard error") || err_note(e, "--crash-log");
    struct record *records = calloc(CRASH_REQUESTS, sizeof *records);
    if (!records || pthread_key_create(&crash.stacks, drop_stack) != 0) {
        free(records);
        close(fd);
        return err_memory(e, "the last requests", CRASH_REQUESTS * sizeof *records);
    }
    crash.fd = fd;
    crash.version = version;
    crash.last = 0;
    crash.records = records;
    struct sigaction action = { .sa_sigaction = on_crash, .sa_flags = SA_SIGINFO | SA_ONSTACK };
    for (int i = 0; i < SIGNALS; i++) sigaddset(&action.sa_mask, numbers[i]);
    for (int i = 0; i < SIGNALS; i++) sigaction(numbers[i], &action, &crash.before[i]);
    return true;
}

void crash_disarm(void)
{
    if (!crash.records) return;
    for (int i = 0; i < SIGNALS; i++) sigaction(numbers[i], &crash.before[i], NULL);
    void *stack = pthread_getspecific(crash.stacks);
    if (stack) drop_stack(stack);
    pthread_key_delete(crash.stacks);
    close(crash.fd);
    free(crash.records);
    crash.records = NULL;
    crash.fd = -1;
}

/* One that is not used, else of those that are over the oldest, else the oldest. */
static struct record *place_for_new(void)
{
    struct record *best = &crash.records[0];
    for (int i = 0; i < CRASH_REQUESTS; i++) {
        struct record *x = &crash.records[i];
        if (x->serial == 0) return x;
        bool over = !x->r.state, best_over = !best->r.state;
        if (over != best_over ? over : x->serial < best->serial) best = x;
    }
    return best;
}

static struct record *find(uint64_t serial)
{
    for (int i = 0; i < CRASH_REQUESTS; i++)
        if (crash.records[i].serial == serial) return &crash.records[i];
    return NULL;
}

void crash_note(uint64_t *place, const struct crash_request *r)
{
    if (!crash.records || crash.writes) return;
    bool is_new = *place == 0;
    struct record *x = is_new ? place_for_new() : find(*place);
    if (!x) return;
    if (is_new) *place = ++crash.last;
    x->r = *r;
    x->serial = *place;
}
