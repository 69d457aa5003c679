/* quench serve as a process, and sockets to talk to it. $BUILD/quench (build/quench) is the program. */
#ifndef TESTS_SERVER_SERVING_H
#define TESTS_SERVER_SERVING_H
#include "base/clock.h"
#include "checkpoint/temp.h"
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define START(s, ...) serving_start(s, (const char *const[]){ __VA_ARGS__, NULL })
#define QUESTION                                                                                             \
    "{\"model\":\"models/demo\",\"messages\":[{\"role\":\"user\",\"content\":\"What is the capital of "      \
    "Finland?\"}],\"temperature\":0,\"chat_template_kwargs\":{\"enable_thinking\":false}"
/* An answer that goes on for so many tokens. */
#define LONG(n)                                                                                              \
    "{\"model\":\"models/"                                                                                   \
    "demo\",\"prompt\":\"Count\",\"temperature\":0,\"ignore_eos\":true,\"max_tokens\":" #n
#define CHAT        "/v1/chat/completions"
#define COMPLETIONS "/v1/completions"

enum { REPLY_MAX = 1 << 20, WORDS_MAX = 32 };

struct serving {
    pid_t pid;
    int port;
    int out; /* what it says on stderr */
    char said[8192];
    size_t n_said;
};

/* Reads on until what was said holds `text` (NULL: until it ends). */
static inline bool serving_says(struct serving *s, const char *text, double seconds)
{
    double until = clock_seconds() + seconds;
    while (!text || !strstr(s->said, text)) {
        struct pollfd p = { s->out, POLLIN, 0 };
        double left = until - clock_seconds();
        if (left <= 0 || poll(&p, 1, (int)(1000 * left) + 1) <= 0) return false;
        if (s->n_said > sizeof s->said / 2) s->n_said = 0;
        ssize_t n = read(s->out, s->said + s->n_said, sizeof s->said - 1 - s->n_said);
        if (n <= 0) return !text;
        s->n_said += (size_t)n;
        s->said[s->n_said] = 0;
    }
    return true;
}

/* quench serve MODEL with these words besides, at a port that is free. */
static inline void serving_spawn_model(struct serving *s, const char *model, const char *const *words)
{
    char program[PATH_MAX];
    const char *build = getenv("BUILD"),
               *argv[WORDS_MAX + 1] = { program,    "serve", model,      "--port", "0",
                                        "--device", "cpu",   "--memory", "1G" };
    int n = 9, pipes[2];
    snprintf(program, sizeof program, "%s/quench", build ? build : "build");
    while (*words && n < WORDS_MAX) argv[n++] = *words++;
    assert_int_equal(pipe2(pipes, O_CLOEXEC), 0);
    *s = (struct serving){ .out = pipes[0] };
    s->pid = fork();
    assert_true(s->pid >= 0);
    if (s->pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* a test that fails leaves no server behind */
        dup2(pipes[1], STDERR_FILENO);
        dup2(pipes[1], STDOUT_FILENO);
        execv(program, (char *const *)(uintptr_t)argv);
        _exit(98);
    }
    close(pipes[1]);
}

static inline void serving_spawn(struct serving *s, const char *const *words)
{
    serving_spawn_model(s, "models/demo", words);
}

static inline void serving_await(struct serving *s)
{
    if (!serving_says(s, "ready after", 120)) fail_msg("not ready: %s", s->said);
    const char *at = strstr(s->said, "listening at ");
    assert_non_null(at);
    const char *comma = strchr(at, ',');
    assert_non_null(comma);
    while (comma[-1] >= '0' && comma[-1] <= '9') comma--;
    s->port = atoi(comma);
}

static inline void serving_start(struct serving *s, const char *const *words)
{
    serving_spawn(s, words);
    serving_await(s);
}

/* The exit status, or -1 and a signal's number below; -1000: it still runs. */
static inline int serving_wait(struct serving *s, double seconds)
{
    int status = 0;
    for (double until = clock_seconds() + seconds; clock_seconds() < until; usleep(2000)) {
        pid_t done = waitpid(s->pid, &status, WNOHANG);
        if (done == 0) continue;
        serving_says(s, NULL, 1);
        close(s->out);
        return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
    }
    return -1000;
}

static inline void serving_stop(struct serving *s)
{
    kill(s->pid, SIGTERM);
    int status = serving_wait(s, 60);
    if (status != 0) fail_msg("exit status %d: %s", status, s->said);
}

static inline int serving_descriptors(const struct serving *s)
{
    char path[64];
    int n = 0;
    snprintf(path, sizeof path, "/proc/%d/fd", (int)s->pid);
    DIR *d = opendir(path);
    assert_non_null(d);
    while (readdir(d)) n++;
    closedir(d);
    return n - 2;
}

/* KiB resident. */
static inline long serving_resident(const struct serving *s)
{
    char path[64];
    long pages = 0;
    snprintf(path, sizeof path, "/proc/%d/statm", (int)s->pid);
    FILE *f = fopen(path, "r");
    assert_non_null(f);
    assert_int_equal(fscanf(f, "%*d %ld", &pages), 1);
    fclose(f);
    return pages * (sysconf(_SC_PAGESIZE) / 1024);
}

/* A connection; receive_bytes > 0: the socket's own buffer, to be a slow reader. */
static inline int dial_with(const struct serving *s, int receive_bytes)
{
    struct sockaddr_in a = { .sin_family = AF_INET,
                             .sin_port = htons((uint16_t)s->port),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_true(fd >= 0);
    if (receive_bytes) setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &receive_bytes, sizeof receive_bytes);
    if (connect(fd, (struct sockaddr *)&a, sizeof a) != 0) {
        close(fd);
        return -1;
    }
    return fd;
}

static inline int dial(const struct serving *s)
{
    int fd = dial_with(s, 0);
    if (fd < 0) fail_msg("connect: %s", strerror(errno));
    return fd;
}

static inline bool send_bytes(int fd, const void *bytes, size_t n)
{
    for (size_t sent = 0; sent < n;) {
        ssize_t k = send(fd, (const char *)bytes + sent, n - sent, MSG_NOSIGNAL);
        if (k <= 0) return false;
        sent += (size_t)k;
    }
    return true;
}

struct reply {
    int status; /* 0: the connection ended, or nothing came in time */
    char *head, *body;
    size_t body_bytes;
    bool closed; /* the server closed the connection, or said it would */
    char bytes[REPLY_MAX];
    size_t n, used; /* what was read; the answer's part of it */
};

/* More bytes within so many seconds; false at the end. */
static inline bool reply_more(struct reply *r, int fd, double seconds)
{
    struct pollfd p = { fd, POLLIN, 0 };
    if (r->n >= sizeof r->bytes - 1 || poll(&p, 1, (int)(1000 * seconds)) <= 0) return false;
    ssize_t n = recv(fd, r->bytes + r->n, sizeof r->bytes - 1 - r->n, 0);
    if (n <= 0) return false;
    r->n += (size_t)n;
    r->bytes[r->n] = 0;
    return true;
}

/* Takes the chunks apart in place; false: they do not end yet. */
static inline bool reply_unchunk(struct reply *r, char *from)
{
    char *to = r->body, *end = r->bytes + r->n;
    for (;;) {
        char *stop;
        unsigned long size = strtoul(from, &stop, 16);
        if (stop == from || stop + 2 > end || strncmp(stop, "\r\n", 2) != 0) return false;
        if ((unsigned long)(end - stop) < size + 4) return false;
        if (strncmp(stop + 2 + size, "\r\n", 2) != 0) return false;
        memmove(to, stop + 2, size);
        to += size;
        from = stop + 4 + size;
        if (size > 0) continue;
        r->used = (size_t)(from - r->bytes);
        r->body_bytes = (size_t)(to - r->body);
        *to = 0;
        return true;
    }
}

/* One answer, of any kind. What came behind it on the connection is read by the next call. */
static inline int receive(struct reply *r, int fd, double seconds)
{
    size_t rest = r->n - r->used;
    memmove(r->bytes, r->bytes + r->used, rest);
    r->n = rest;
    r->used = 0;
    r->status = 0;
    r->closed = false;
    r->bytes[r->n] = 0;
    char *end;
    while (!(end = strstr(r->bytes, "\r\n\r\n")))
        if (!reply_more(r, fd, seconds)) return 0;
    r->head = r->bytes;
    r->body = end + 4;
    int status = 0;
    if (sscanf(r->bytes, "HTTP/1.1 %d ", &status) != 1) fail_msg("no status line: %.60s", r->bytes);
    char *length = strcasestr(r->bytes, "\r\nContent-Length: ");
    bool chunked = strcasestr(r->bytes, "\r\nTransfer-Encoding: chunked") != NULL;
    r->closed = strcasestr(r->bytes, "\r\nConnection: close") != NULL;
    if (length && length < end) {
        r->body_bytes = strtoul(length + 18, NULL, 10);
        while (r->n < (size_t)(r->body - r->bytes) + r->body_bytes)
            if (!reply_more(r, fd, seconds)) return 0;
        r->used = (size_t)(r->body - r->bytes) + r->body_bytes;
    } else if (chunked) {
        char *copy = NULL;
        for (;;) { /* on a copy: an answer that is not whole yet must stay as it is */
            free(copy);
            copy = malloc(r->n + 1);
            memcpy(copy, r->bytes, r->n + 1);
            if (reply_unchunk(r, r->body)) break;
            memcpy(r->bytes, copy, r->n + 1);
            if (!reply_more(r, fd, seconds)) {
                free(copy);
                return 0;
            }
        }
        free(copy);
    } else {
        r->body_bytes = 0;
        r->used = (size_t)(r->body - r->bytes);
    }
    return r->status = status;
}

/* The peer closes within so many seconds, whatever it still sends. */
static inline bool is_closed_within(int fd, double seconds)
{
    char waste[4096];
    double until = clock_seconds() + seconds;
    for (;;) {
        struct pollfd p = { fd, POLLIN, 0 };
        double left = until - clock_seconds();
        if (left <= 0 || poll(&p, 1, (int)(1000 * left) + 1) <= 0) return false;
        if (recv(fd, waste, sizeof waste, 0) <= 0) return true;
    }
}

/* A whole request over a connection of its own. */
static inline int ask(const struct serving *s, struct reply *r, const char *request)
{
    int fd = dial(s);
    r->n = r->used = 0;
    send_bytes(fd, request, strlen(request));
    int status = receive(r, fd, 60);
    close(fd);
    return status;
}

static inline int get(const struct serving *s, struct reply *r, const char *path)
{
    char request[1024];
    snprintf(request, sizeof request, "GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n", path);
    return ask(s, r, request);
}

/* Text of a POST; headers: each with its CR LF. */
static inline char *post_text(const char *path, const char *headers, const char *body)
{
    static char text[1 << 13];
    snprintf(text, sizeof text,
             "POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n%sContent-Length: "
             "%zu\r\n\r\n%s",
             path, headers, strlen(body), body);
    return text;
}

static inline int post(const struct serving *s, struct reply *r, const char *path, const char *body)
{
    return ask(s, r, post_text(path, "", body));
}

/* The value of a metric without further labels; -1: it is not there. */
static inline double metric(const struct serving *s, const char *name)
{
    static struct reply r;
    size_t n = strlen(name);
    if (get(s, &r, "/metrics") != 200) return -1;
    for (char *line = r.body; line && *line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL) {
        if (strncmp(line, name, n) != 0 || line[n] != '{') continue;
        char *value = strchr(line, '}');
        if (value) return strtod(value + 1, NULL);
    }
    return -1;
}

/* The server does nothing any more and holds what an idle one holds. */
static inline void check_idle(const struct serving *s, int descriptors)
{
    double until = clock_seconds() + 20, connections = -1;
    int now = -1;
    while (clock_seconds() < until) {
        connections = metric(s, "quench:connections"); /* the one that asks */
        bool runs_none = metric(s, "vllm:num_requests_running") == 0;
        usleep(50000); /* until the server has closed those connections */
        now = serving_descriptors(s);
        if (connections == 1 && runs_none && now <= descriptors) break;
    }
    assert_int_equal((int)connections, 1);
    assert_int_equal((int)metric(s, "quench:exchanges"), 0);
    assert_int_equal((int)metric(s, "quench:body_bytes"), 0);
    assert_int_equal((int)metric(s, "vllm:num_requests_running"), 0);
    assert_int_equal((int)metric(s, "vllm:num_requests_waiting"), 0);
    if (now > descriptors) fail_msg("%d descriptors, %d at first", now, descriptors);
}

/* Pages and states that nothing but a prefix cache could hold: without one, none. */
static inline void check_no_pages(const struct serving *s)
{
    assert_int_equal((int)metric(s, "quench:kv_pages_used"), 0);
    assert_int_equal((int)metric(s, "quench:states_used"), 0);
}

static inline const char *string_at(json_t *o, const char *a, const char *b, const char *c)
{
    json_t *choice = json_array_get(json_object_get(o, a), 0);
    return json_string_value(c ? json_object_get(json_object_get(choice, b), c) : json_object_get(choice, b));
}

/* The texts of all deltas of a stream that ends in [DONE]. */
static inline void join_stream(char *out, const char *body, bool chat)
{
    *out = 0;
    bool done = false;
    for (const char *line = body; line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL) {
        if (strncmp(line, "data: ", 6) != 0) continue;
        done = strncmp(line + 6, "[DONE]", 6) == 0;
        if (done) continue;
        json_t *o = json_loadb(line + 6, strcspn(line + 6, "\n"), 0, NULL);
        assert_non_null(o);
        const char *text =
            chat ? string_at(o, "choices", "delta", "content") : string_at(o, "choices", "text", NULL);
        strcat(out, text ? text : "");
        json_decref(o);
    }
    assert_true(done);
}
#endif
