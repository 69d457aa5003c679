/* Files of the prefix cache: what was put is found again, also by the next process; what is cut off, changed,
 * of another model or version is not; full disks and kill -9 cost what was not written yet, and no more. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "base/file.h"
#include "engine/disk_cache.h"
#include "support/requests.h"
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { DATA = 100 }; /* bytes of a parcel */

/* A folder, who works in it, and what was said. */
struct shelf {
    char folder[64];
    struct disk_cache *cache;
    pthread_mutex_t lock;
    int n_warnings;
    char warning[1200]; /* the last */
};

static void warn(void *ctx, const char *text)
{
    struct shelf *s = ctx;
    pthread_mutex_lock(&s->lock);
    s->n_warnings++;
    snprintf(s->warning, sizeof s->warning, "%s", text);
    pthread_mutex_unlock(&s->lock);
}

static bool open_as(struct shelf *s, uint64_t bytes, uint8_t identity, struct err *e)
{
    struct disk_cache_options o = {
        .folder = s->folder, .bytes = bytes, .identity = { identity }, .ctx = s, .warn = warn
    };
    s->n_warnings = 0;
    return disk_cache_create(&s->cache, &o, e);
}

static void open_shelf(struct shelf *s, uint64_t bytes)
{
    struct err e = { 0 };
    must(open_as(s, bytes, 1, &e), &e);
}

static void make_shelf(struct shelf *s)
{
    *s = (struct shelf){ .folder = "/tmp/quench-test-disk-XXXXXX", .lock = PTHREAD_MUTEX_INITIALIZER };
    assert_non_null(mkdtemp(s->folder));
}

static void remove_shelf(struct shelf *s)
{
    struct err e = { 0 };
    disk_cache_free(s->cache);
    must(file_remove_tree(s->folder, &e), &e);
}

static void close_shelf(struct shelf *s)
{
    disk_cache_free(s->cache);
    s->cache = NULL;
}

static void put(struct disk_cache *d, int number)
{
    struct err e = { 0 };
    struct parcel *p;
    uint8_t key[32] = { (uint8_t)number, (uint8_t)(number >> 8) };
    must(parcel_create(&p, &(struct parcel_place){ .length = number, .bytes = DATA }, &e), &e);
    memset(parcel_room(p), number, DATA);
    disk_cache_await_room(d);
    disk_cache_put(d, key, p);
    parcel_free(p);
}

/* Whether parcel `number` can be had; it is right then. */
static bool get(struct disk_cache *d, int number)
{
    uint8_t key[32] = { (uint8_t)number, (uint8_t)(number >> 8) }, got[32];
    struct parcel *p;
    if (!disk_cache_fetch(d, key)) return false;
    while (!disk_cache_fetched(d, got, &p)) nanosleep(&(struct timespec){ .tv_nsec = 100000 }, NULL);
    assert_memory_equal(got, key, 32);
    if (!p) return false;
    const uint8_t *data = parcel_data(p);
    assert_int_equal(parcel_place(p)->length, number);
    assert_int_equal(parcel_bytes(p), DATA);
    for (int i = 0; i < DATA; i++) assert_int_equal(data[i], (uint8_t)number);
    parcel_free(p);
    return true;
}

/* Paths of the files, at most `most`; returns how many there are. */
static int list(const struct shelf *s, char (*paths)[256], int most)
{
    int n = 0;
    DIR *dir = opendir(s->folder);
    for (struct dirent *x; (x = readdir(dir));) {
        if (!strstr(x->d_name, ".kv")) continue;
        if (n < most) snprintf(paths[n], sizeof paths[n], "%.64s/%.100s", s->folder, x->d_name);
        n++;
    }
    closedir(dir);
    return n;
}

static void found_again(void **state)
{
    (void)state;
    struct shelf s;
    struct err e = { 0 };
    struct disk_cache *second;
    make_shelf(&s);
    open_shelf(&s, 1 << 20);
    for (int i = 0; i < 40; i++) put(s.cache, i);
    for (int i = 0; i < 40; i++) assert_true(get(s.cache, i));
    assert_false(get(s.cache, 40));
    struct disk_cache_options o = { .folder = s.folder, .bytes = 1 << 20, .identity = { 1 } };
    assert_false(disk_cache_create(&second, &o, &e));
    assert_int_equal(e.code, ERR_BUSY);
    close_shelf(&s);
    open_shelf(&s, 1 << 20);
    for (int i = 0; i < 40; i++) assert_true(get(s.cache, i));
    assert_int_equal(s.n_warnings, 0);
    remove_shelf(&s);
}

/* The least recently used go, in this process and by the next one's start. */
static void never_larger_than_allowed(void **state)
{
    (void)state;
    struct shelf s;
    char paths[1][256];
    struct stat st;
    make_shelf(&s);
    open_shelf(&s, 1 << 20);
    put(s.cache, 0);
    close_shelf(&s);
    assert_int_equal(list(&s, paths, 1), 1);
    assert_int_equal(stat(paths[0], &st), 0);
    uint64_t each = (uint64_t)st.st_size;
    open_shelf(&s, 10 * each + each / 2);
    for (int i = 0; i < 10; i++) put(s.cache, i);
    assert_true(get(s.cache, 0)); /* it is the last used now */
    for (int i = 10; i < 15; i++) put(s.cache, i);
    close_shelf(&s);
    assert_int_equal(list(&s, paths, 1), 10);
    open_shelf(&s, 3 * each);
    assert_int_equal(list(&s, paths, 1), 3);
    for (int i = 0; i < 15; i++) assert_int_equal(get(s.cache, i), i >= 12);
    close_shelf(&s);
    open_shelf(&s, each - 1);
    put(s.cache, 20);
    close_shelf(&s);
    assert_int_equal(list(&s, paths, 1), 0);
    remove_shelf(&s);
}

static size_t read_all(const char *path, uint8_t *out, size_t most)
{
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    size_t n = fread(out, 1, most, f);
    fclose(f);
    return n;
}

static void write_all(const char *path, const uint8_t *data, size_t n)
{
    struct err e = { 0 };
    must(file_write(path, data, n, &e), &e);
}

/* The file with each byte changed, and cut off before each byte, known before and after the change. */
static void damaged_ones_are_never_used(void **state)
{
    (void)state;
    struct shelf s;
    char paths[1][256];
    uint8_t whole[1024], changed[1024];
    make_shelf(&s);
    open_shelf(&s, 1 << 20);
    put(s.cache, 7);
    close_shelf(&s);
    assert_int_equal(list(&s, paths, 1), 1);
    size_t n = read_all(paths[0], whole, sizeof whole);
    assert_true(n > DATA && n < sizeof whole);
    for (size_t i = 0; i < n; i++) {
        memcpy(changed, whole, n);
        changed[i] ^= (uint8_t)(1 << i % 8);
        write_all(paths[0], whole, n);
        open_shelf(&s, 1 << 20);
        write_all(paths[0], changed, i % 2 ? n : i); /* under a process that knows it */
        assert_false(get(s.cache, 7));
        assert_int_equal(s.n_warnings, 1);
        assert_false(get(s.cache, 7));
        assert_int_equal(s.n_warnings, 1);
        assert_int_equal(list(&s, paths, 0), 0);
        put(s.cache, 7); /* and it can be written anew */
        assert_true(get(s.cache, 7));
        close_shelf(&s);
        write_all(paths[0], changed, i % 2 ? i : n); /* before the next one starts */
        open_shelf(&s, 1 << 20);
        assert_false(get(s.cache, 7));
        assert_in_range(s.n_warnings, 1, 2); /* of another identity is said at once, too */
        close_shelf(&s);
    }
    remove_shelf(&s);
}

/* Another model's files are left alone, and counted; one with the name of ours is not taken for it. */
static void foreign_ones_are_never_used(void **state)
{
    (void)state;
    struct shelf s;
    struct err e = { 0 };
    char paths[2][256];
    uint8_t whole[1024];
    make_shelf(&s);
    must(open_as(&s, 1 << 20, 2, &e), &e);
    put(s.cache, 7);
    close_shelf(&s);
    assert_int_equal(list(&s, paths, 1), 1);
    open_shelf(&s, 1 << 20);
    assert_int_equal(s.n_warnings, 1);
    assert_non_null(strstr(s.warning, "1 files are of another model"));
    assert_false(get(s.cache, 7));
    put(s.cache, 7);
    assert_true(get(s.cache, 7));
    size_t n = read_all(paths[0], whole, sizeof whole);
    close_shelf(&s);
    assert_int_equal(list(&s, paths, 2), 2);
    for (int i = 0; i < 2; i++) write_all(paths[i], whole, n);
    open_shelf(&s, 1 << 20);
    assert_false(get(s.cache, 7));
    assert_non_null(strstr(s.warning, "another model, program, option or prompt"));
    remove_shelf(&s);
}

/* Writing fails as on a full disk; one line says so, what was there stays, and later it goes on. */
static void a_full_disk_costs_nothing_else(void **state)
{
    (void)state;
    struct shelf s;
    char paths[1][256];
    make_shelf(&s);
    open_shelf(&s, 1 << 20);
    put(s.cache, 1);
    close_shelf(&s);
    open_shelf(&s, 1 << 20);
    struct rlimit old, small = { .rlim_cur = 150 };
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &old), 0);
    small.rlim_max = old.rlim_max;
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &small), 0);
    for (int i = 2; i < 8; i++) put(s.cache, i);
    close_shelf(&s);
    int said = s.n_warnings;
    open_shelf(&s, 1 << 20);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &old), 0);
    assert_int_equal(said, 1);
    for (int i = 2; i < 8; i++) assert_false(get(s.cache, i));
    assert_true(get(s.cache, 1));
    put(s.cache, 9);
    close_shelf(&s);
    assert_int_equal(list(&s, paths, 1), 2);
    remove_shelf(&s);
}

/* A process that is killed while it writes leaves whole files. It is killed once there is one, however long a
 * busy machine takes to write it. */
static void killed_at_any_moment(void **state)
{
    (void)state;
    struct shelf s;
    int found = 0, kills = rounds(60);
    make_shelf(&s);
    for (int i = 0; i < kills; i++) {
        pid_t child = fork();
        assert_true(child >= 0);
        if (child == 0) {
            struct err e = { 0 };
            if (!open_as(&s, 1 << 14, 1, &e)) _exit(1);
            for (int k = 0;; k++) put(s.cache, k % 1000);
        }
        char first[1][256];
        int status;
        while (list(&s, first, 1) == 0 && waitpid(child, &status, WNOHANG) == 0)
            nanosleep(&(struct timespec){ .tv_nsec = 1000000 }, NULL);
        nanosleep(&(struct timespec){ .tv_nsec = 2000000 + 1000 * random_below(9000) }, NULL);
        kill(child, SIGKILL);
        waitpid(child, &status, 0);
        assert_true(WIFSIGNALED(status));
        open_shelf(&s, 1 << 14);
        for (int k = 0; k < 1000; k += 7) found += get(s.cache, k);
        assert_int_equal(s.n_warnings, 0);
        close_shelf(&s);
        char path[128];
        snprintf(path, sizeof path, "%s/unfinished", s.folder);
        assert_false(file_exists(path));
    }
    printf("note: killed %d times, %d files read after\n", kills, found);
    assert_true(found > kills / 2);
    remove_shelf(&s);
}

int main(int argc, char **argv)
{
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(found_again),
        cmocka_unit_test(never_larger_than_allowed),
        cmocka_unit_test(damaged_ones_are_never_used),
        cmocka_unit_test(foreign_ones_are_never_used),
        cmocka_unit_test(a_full_disk_costs_nothing_else),
        cmocka_unit_test(killed_at_any_moment),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
