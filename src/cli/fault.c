/* Reading a map whose file no longer has the page: which file that was, then the end. */
#include "cli/fault.h"
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

/* A line of /proc/self/maps: "begin-end flags offset device inode   path", numbers in hexadecimal. */
struct line {
    char text[4400];
    size_t n;
};

/* After the number it stops. */
static uintptr_t hex(const char **p)
{
    uintptr_t x = 0;
    for (;; (*p)++) {
        char c = **p;
        int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
        if (digit < 0) return x;
        x = x << 4 | (uintptr_t)digit;
    }
}

/* The path in the line if its map holds the address. */
static const char *path_at(const struct line *l, uintptr_t address)
{
    const char *p = l->text;
    uintptr_t begin = hex(&p), end = *p == '-' ? (p++, hex(&p)) : 0;
    return address >= begin && address < end ? strchr(p, '/') : NULL;
}

/* Only calls that a signal handler may make. */
static const char *find_path(struct line *l, uintptr_t address)
{
    char c;
    int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
    const char *path = NULL;
    for (l->n = 0; fd >= 0 && !path && read(fd, &c, 1) == 1;) {
        bool is_end = c == '\n';
        if (!is_end && l->n + 1 < sizeof l->text) l->text[l->n++] = c;
        l->text[l->n] = 0;
        if (is_end) path = path_at(l, address);
        if (is_end) l->n = 0;
    }
    if (fd >= 0) close(fd);
    return path;
}

static void say(const char *text)
{
    ssize_t n = write(STDERR_FILENO, text, strlen(text));
    (void)n;
}

static void fail_reading(int number, siginfo_t *info, void *context)
{
    struct line line;
    (void)number, (void)context;
    const char *path = find_path(&line, (uintptr_t)info->si_addr);
    say("quench: ");
    say(path ? path : "a file of the checkpoint");
    say(" could not be read: it was cut short, or its disk or network failed. Check it, then repeat the "
        "command\n");
    _exit(1);
}

void fault_name_files(void)
{
    struct sigaction action = { .sa_sigaction = fail_reading, .sa_flags = SA_SIGINFO };
    sigaction(SIGBUS, &action, NULL);
}
