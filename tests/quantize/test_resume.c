/* A run that is killed, or stopped by the system, and repeated until it is through writes the bytes of one
 * that was left alone. Children are this program again: sanitizers take no threads after a fork. */
#include "quantize/fixture.h"
#include "quantize/journal.h"
#include "support/sanitized.h"
#include <dirent.h>
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <time.h>

enum { KILLS = SANITIZED ? 5 : 50, SHARD_BYTES = 3000000, SYNC_BYTES = 1000000, SKIPPED = 77 };
static const unsigned SEED = 20261123;

static struct fixture fixture;

/* Small enough to be run a hundred times: a few tokens, and points to continue from all over the output. */
static struct quantize_options small_run(struct fixture *f, const char *source, const char *destination,
                                         enum quantize_method method)
{
    struct quantize_options o = fixture_options(f, source, destination);
    o.method = method;
    o.num_calibration_samples = 2;
    o.max_seq_length = 12;
    o.max_shard_bytes = SHARD_BYTES;
    o.sync_bytes = SYNC_BYTES;
    o.threads = 1;
    return o;
}

/* --- folders
 * ------------------------------------------------------------------------------------------------------ */

static int count_files(const char *folder)
{
    int n = 0;
    DIR *dir = opendir(folder);
    if (!dir) return -1;
    for (struct dirent *x; (x = readdir(dir));) n += x->d_name[0] != '.';
    closedir(dir);
    return n;
}

static void same_file(const char *a, const char *b)
{
    struct file_map x, y;
    struct err e = { 0 };
    if (!file_map_open(&x, a, &e) || !file_map_open(&y, b, &e)) fail_msg("%s", e.text);
    if (x.bytes != y.bytes || memcmp(x.data, y.data, x.bytes) != 0) fail_msg("%s and %s differ", a, b);
    file_map_close(&x);
    file_map_close(&y);
}

static void same_folder(const char *want, const char *have)
{
    DIR *dir = opendir(want);
    assert_non_null(dir);
    assert_int_equal(count_files(want), count_files(have));
    for (struct dirent *x; (x = readdir(dir));) {
        char a[600], b[600];
        if (x->d_name[0] == '.') continue;
        snprintf(a, sizeof a, "%s/%s", want, x->d_name);
        snprintf(b, sizeof b, "%s/%s", have, x->d_name);
        same_file(a, b);
    }
    closedir(dir);
}

static void copy_tree(const char *from, const char *to)
{
    DIR *dir = opendir(from);
    struct err e = { 0 };
    assert_non_null(dir);
    assert_int_equal(mkdir(to, 0777), 0);
    for (struct dirent *x; (x = readdir(dir));) {
        char a[600], b[600];
        if (x->d_name[0] == '.') continue;
        snprintf(a, sizeof a, "%s/%s", from, x->d_name);
        snprintf(b, sizeof b, "%s/%s", to, x->d_name);
        if (file_is_folder(a))
            copy_tree(a, b);
        else if (!file_copy(a, b, &e))
            fail_msg("%s", e.text);
    }
    closedir(dir);
}

static void remove_tree(const char *path)
{
    assert_true(file_remove_tree(path, NULL));
}

/* --- children
 * ----------------------------------------------------------------------------------------------------- */

/* Dies by SIGKILL at a share of a stage, as "quantize 500" in thousandths. */
struct death {
    const char *stage;
    uint64_t at;
};

static void die_there(void *ctx, const char *what, uint64_t done, uint64_t total)
{
    const struct death *d = ctx;
    if (strcmp(what, d->stage) == 0 && done * 1000 >= total * d->at) raise(SIGKILL);
}

static int child_run(char **argv)
{
    struct death death = { argv[3], (uint64_t)atoi(argv[4]) };
    struct fixture child = { .report = { .ctx = &death, .progress = die_there } };
    struct backend_options options = { .device = DEVICE_CPU, .threads = 1 };
    struct quantize_result r;
    struct err e = { 0 };
    if (!backend_create(&child.backend, &options, NULL)) return 1;
    struct quantize_options o = small_run(&child, argv[0], argv[1], (enum quantize_method)atoi(argv[2]));
    bool ok = quantize_run(&o, &r, &e);
    if (!ok) fprintf(stderr, "%s\n", e.text);
    backend_destroy(&child.backend);
    return ok ? 0 : 1;
}

static pid_t start(const char *source, const char *destination, enum quantize_method method,
                   const char *stage, int at)
{
    char number[16], where[16];
    snprintf(number, sizeof number, "%d", (int)method);
    snprintf(where, sizeof where, "%d", at);
    pid_t child = fork();
    if (child == 0) {
        execl("/proc/self/exe", "test_resume", "run", source, destination, number, stage, where,
              (char *)NULL);
        _exit(1);
    }
    assert_true(child > 0);
    return child;
}

/* True: killed; false: it ended well before. */
static bool was_killed(pid_t child)
{
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    if (WIFEXITED(status)) assert_int_equal(WEXITSTATUS(status), 0);
    return WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void wait_seconds(double s)
{
    struct timespec t = { (time_t)s, (long)((s - (double)(time_t)s) * 1e9) };
    nanosleep(&t, NULL);
}

static const char *reference(enum quantize_method method)
{
    char name[64];
    snprintf(name, sizeof name, "want-%s", quantize_method_name(method));
    const char *path = in(&fixture, name);
    if (!file_exists(path)) {
        struct quantize_options o = small_run(&fixture, DEMO, path, method);
        must_run(&o);
    }
    return path;
}

/* --- kills
 * -------------------------------------------------------------------------------------------------------- */

static void kill_often(enum quantize_method method, int kills)
{
    const char *want = reference(method), *path = in(&fixture, "killed");
    double begin = now();
    assert_false(was_killed(start(DEMO, path, method, "none", 0)));
    double length = now() - begin;
    same_folder(want, path);
    remove_tree(path);
    int runs = 0, through = 1;
    for (int hit = 0; hit < kills; runs++) {
        pid_t child = start(DEMO, path, method, "none", 0);
        wait_seconds(length * (double)rand() / (double)RAND_MAX);
        kill(child, SIGKILL);
        bool is_hit = was_killed(child);
        hit += is_hit;
        if (is_hit && (!file_exists(path) || file_exists(in(&fixture, "killed.quench-partial/journal"))))
            continue;
        if (is_hit) rmdir(in(&fixture, "killed.quench-partial")); /* the very last step was left */
        same_folder(want, path);
        assert_false(has_partial(path));
        remove_tree(path);
        through++;
    }
    /* The last kill may have come after the renaming. */
    assert_false(was_killed(start(DEMO, path, method, "none", 0)));
    same_folder(want, path);
    assert_false(has_partial(path));
    remove_tree(path);
    printf("note: %d kills in %d runs of %.2f s, %d went through\n", kills, runs, length, through);
}

static void kill_at_random_moments(void **state)
{
    (void)state;
    printf("note: seed %u\n", SEED);
    srand(SEED);
    kill_often(QUANTIZE_NEAREST, KILLS * 2 / 5);
    kill_often(QUANTIZE_GPTQ, KILLS * 3 / 10);
    kill_often(QUANTIZE_AUTO, KILLS * 3 / 10);
}

/* Work that was done is not done again: each run gets a little further, and all of them together through. */
static void progress_is_kept(void **state)
{
    (void)state;
    static const struct death deaths[] = { { "calibrate", 300 }, { "calibrate", 600 }, { "calibrate", 900 },
                                           { "quantize", 200 },  { "quantize", 700 },  { "quantize", 1000 } };
    const char *path = in(&fixture, "steps");
    for (size_t i = 0; i < sizeof deaths / sizeof *deaths; i++)
        assert_true(was_killed(start(DEMO, path, QUANTIZE_GPTQ, deaths[i].stage, (int)deaths[i].at)));
    /* The calibration is over: one more progress line of it would be the death of this one. */
    assert_false(was_killed(start(DEMO, path, QUANTIZE_GPTQ, "calibrate", 0)));
    same_folder(reference(QUANTIZE_GPTQ), path);
    remove_tree(path);
}

/* What has its name already, and lacks only the removal of the work folder. */
static void renamed_is_finished(void **state)
{
    (void)state;
    const char *path = in(&fixture, "late"), *work = in(&fixture, "late.quench-partial");
    assert_true(was_killed(start(DEMO, path, QUANTIZE_NEAREST, "quantize", 1000)));
    copy_tree(work, in(&fixture, "saved"));
    assert_false(was_killed(start(DEMO, path, QUANTIZE_NEAREST, "none", 0)));
    assert_int_equal(rename(in(&fixture, "saved"), work), 0);
    remove_tree(in(&fixture, "late.quench-partial/checkpoint"));
    struct quantize_options o = small_run(&fixture, DEMO, path, QUANTIZE_MSE), same = o;
    must_fail_keeping(&o, ERR_ARGUMENT, "already exists");
    same.method = QUANTIZE_NEAREST;
    struct quantize_result r = must_run(&same);
    assert_true(r.shards > 0 && r.n_worst == 10 && r.coverage.experts == 64);
    same_folder(reference(QUANTIZE_NEAREST), path);
    assert_false(has_partial(path));
    remove_tree(path);
}

/* The run fails and leaves the destination where it is, with nothing beside it. */
static void must_leave(const struct quantize_options *o, enum err_code code, const char *want)
{
    struct quantize_result r;
    struct err e = { 0 };
    assert_false(quantize_run(o, &r, &e));
    if (e.code != code || !strstr(e.text, want)) fail_msg("code %d: %s", e.code, e.text);
    assert_true(file_exists(o->destination) && !has_partial(o->destination));
}

/* Killed between the last two steps, or repeated after the end; and what only looks like it. */
static void finished_is_told(void **state)
{
    (void)state;
    const char *path = in(&fixture, "done"), *work = in(&fixture, "done.quench-partial");
    struct quantize_options o = small_run(&fixture, DEMO, path, QUANTIZE_NEAREST), other = o;
    assert_false(must_run(&o).was_finished);
    assert_int_equal(mkdir(work, 0777), 0); /* the journal went, the folder did not */
    assert_true(must_run(&o).was_finished);
    assert_false(file_exists(work));
    assert_true(must_run(&o).was_finished);
    same_folder(reference(QUANTIZE_NEAREST), path);
    other.method = QUANTIZE_MSE;
    must_leave(&other, ERR_ARGUMENT, "already exists");
    assert_int_equal(truncate(in(&fixture, "done/model-00001-of-00004.safetensors"), 100000), 0);
    must_leave(&o, ERR_FORMAT, "census");
    remove_tree(path);
}

/* --- other runs
 * --------------------------------------------------------------------------------------------------- */

static void another_run_is_refused(void **state)
{
    (void)state;
    const char *path = in(&fixture, "other");
    assert_true(was_killed(start(DEMO, path, QUANTIZE_NEAREST, "quantize", 500)));
    struct quantize_options o = small_run(&fixture, DEMO, path, QUANTIZE_MSE);
    must_fail_keeping(
        &o, ERR_ARGUMENT,
        "other.quench-partial: holds an interrupted run that differs (method nearest, now mse); "
        "repeat that run's command to continue it, or remove the folder to start anew");
    o.method = QUANTIZE_NEAREST;
    o.max_seq_length = 13;
    must_fail_keeping(&o, ERR_ARGUMENT, "differs (calibration samples ");
    o.max_seq_length = 12;
    o.max_shard_bytes = 4000000;
    must_fail_keeping(&o, ERR_ARGUMENT, "differs (shard size 3000000, now 4000000)");
    o.max_shard_bytes = SHARD_BYTES;
    copy_demo(&fixture, "patched");
    patch(&fixture, "patched", "model.language_model.norm.weight", 128, 1, 3);
    o.source = in(&fixture, "patched");
    must_fail_keeping(&o, ERR_ARGUMENT, "differs (source's weights ");
    remove_tree(in(&fixture, "patched"));
    o.source = DEMO;
    o.threads = 2; /* has no part in the result */
    must_run(&o);
    same_folder(reference(QUANTIZE_NEAREST), path);
    remove_tree(path);
}

/* Of two at once one does it all and the other says why not. */
static void two_at_once_exclude_each_other(void **state)
{
    (void)state;
    const char *path = in(&fixture, "two");
    pid_t child = start(DEMO, path, QUANTIZE_GPTQ, "none", 0);
    while (!has_partial(path) && !file_exists(path)) wait_seconds(0.001);
    struct quantize_options o = small_run(&fixture, DEMO, path, QUANTIZE_GPTQ);
    struct quantize_result r;
    struct err e = { 0 };
    assert_false(quantize_run(&o, &r, &e));
    if (!strstr(e.text, "another run is writing it")) fail_msg("%s", e.text);
    assert_false(was_killed(child));
    same_folder(reference(QUANTIZE_GPTQ), path);
    remove_tree(path);
}

/* --- the journal
 * -------------------------------------------------------------------------------------------------- */

static size_t count_records(const char *folder)
{
    struct journal j;
    struct journal_record x;
    struct err e = { 0 };
    size_t at = 0, n = 0;
    if (!journal_open(&j, folder, &e)) fail_msg("%s", e.text);
    while (journal_next(&j, &at, &x)) {
        assert_int_equal(x.kind, n + 1);
        assert_int_equal(x.bytes, 7 * n);
        n++;
    }
    assert_true(journal_append(&j, (uint32_t)n + 1, "0123456789012345678901234567890", 7 * n, false, &e));
    journal_close(&j);
    assert_true(journal_open(&j, folder, &e));
    for (at = 0; journal_next(&j, &at, &x);) {
    }
    assert_int_equal(at, j.end);
    journal_close(&j);
    return n;
}

/* Cut at every byte, and every byte of the last record damaged: what came before still counts. */
static void torn_tail_is_ignored(void **state)
{
    (void)state;
    const char *folder = in(&fixture, "records"), *path = in(&fixture, "records/journal");
    struct err e = { 0 };
    char *text;
    size_t bytes, ends[4] = { 0 };
    assert_int_equal(mkdir(folder, 0777), 0);
    for (size_t n = 0; n < 3; n++) {
        assert_int_equal(count_records(folder), n);
        struct stat st;
        assert_int_equal(stat(path, &st), 0);
        ends[n + 1] = (size_t)st.st_size;
    }
    assert_true(file_read(&text, &bytes, path, 1000, &e));
    assert_int_equal(bytes, ends[3]);
    for (size_t cut = 0; cut <= bytes; cut++) {
        assert_true(file_write(path, text, cut, &e));
        assert_int_equal(count_records(folder), (cut >= ends[1]) + (cut >= ends[2]) + (cut >= ends[3]));
    }
    for (size_t i = ends[2]; i < ends[3]; i++) {
        text[i] ^= 0x10;
        assert_true(file_write(path, text, bytes, &e));
        assert_int_equal(count_records(folder), 2);
        text[i] ^= 0x10;
    }
    free(text);
}

/* The first byte behind the record of the last layer: those of layers are synced before the run goes on. */
static off_t data_records(const char *folder)
{
    struct journal j;
    struct journal_record x;
    struct err e = { 0 };
    off_t end = 0;
    if (!journal_open(&j, folder, &e)) fail_msg("%s", e.text);
    for (size_t at = 0; journal_next(&j, &at, &x);)
        if (x.kind != JOURNAL_DATA) end = (off_t)at;
    journal_close(&j);
    return end;
}

/* A real one, cut at many places: less is known, but nothing wrong. */
static void torn_journal_loses_only_time(void **state)
{
    (void)state;
    enum { CUTS = 12 };
    const char *path = in(&fixture, "torn"), *work = in(&fixture, "torn.quench-partial"),
               *saved = in(&fixture, "torn-saved"), *journal = in(&fixture, "torn.quench-partial/journal");
    struct stat st;
    assert_true(was_killed(start(DEMO, path, QUANTIZE_GPTQ, "quantize", 900)));
    assert_int_equal(stat(journal, &st), 0);
    copy_tree(work, saved);
    off_t begin = data_records(work);
    for (int i = 0; i < CUTS; i++) {
        remove_tree(work);
        copy_tree(saved, work);
        assert_int_equal(truncate(journal, begin + (st.st_size - begin) * i / CUTS + i), 0);
        struct quantize_options o = small_run(&fixture, DEMO, path, QUANTIZE_GPTQ);
        must_run(&o);
        same_folder(reference(QUANTIZE_GPTQ), path);
        remove_tree(path);
    }
    remove_tree(saved);
}

/* Work files that lost what the journal vouches for. */
static void lost_work_is_noticed(void **state)
{
    (void)state;
    static const char *const files[] = { "spool", "checkpoint/model-00001-of-00004.safetensors",
                                         "checkpoint/model-00002-of-00004.safetensors" };
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        char name[100];
        const char *path = in(&fixture, "lost");
        assert_true(was_killed(start(DEMO, path, QUANTIZE_GPTQ, "quantize", 800)));
        snprintf(name, sizeof name, "lost.quench-partial/%s", files[i]);
        if (truncate(in(&fixture, name), 1000) != 0) fail_msg("%s: %s", name, strerror(errno));
        struct quantize_options o = small_run(&fixture, DEMO, path, QUANTIZE_GPTQ);
        must_fail_keeping(&o, ERR_FORMAT, files[i]);
        remove_tree(in(&fixture, "lost.quench-partial"));
    }
}

/* --- the system refuses
 * ------------------------------------------------------------------------------------------- */

/* Every file that grows beyond a limit fails, whichever comes first: journal, hidden states, spool, shards,
 * side files. */
static void failed_writes_can_be_continued(void **state)
{
    (void)state;
    static const rlim_t limits[] = { 10, 700, 3000, 20000, 100000, 1000000, 2500000 };
    const char *path = in(&fixture, "limited");
    struct rlimit old;
    struct quantize_result r;
    struct quantize_options o = small_run(&fixture, DEMO, path, QUANTIZE_GPTQ);
    getrlimit(RLIMIT_FSIZE, &old);
    void (*handler)(int) = signal(SIGXFSZ, SIG_IGN);
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++) {
        struct err e = { 0 };
        setrlimit(RLIMIT_FSIZE, &(struct rlimit){ limits[i], old.rlim_max });
        bool ok = quantize_run(&o, &r, &e);
        setrlimit(RLIMIT_FSIZE, &old);
        assert_false(ok);
        assert_int_equal(e.code, ERR_IO);
        assert_non_null(strstr(e.text, "File too large"));
        assert_false(file_exists(path));
        assert_int_equal(has_partial(path), limits[i] > 10); /* with no journal there is nothing to keep */
    }
    signal(SIGXFSZ, handler);
    must_run(&o);
    same_folder(reference(QUANTIZE_GPTQ), path);
    remove_tree(path);
}

/* Progress calls until something happens to the world. */
struct fault {
    int64_t calls;
    const char *path; /* of the file that something happens to */
    bool fills;       /* the disk gets full; else the file is cut short */
};

static void fill(const char *path)
{
    static char zeros[4096];
    int fd = open(path, O_WRONLY | O_CREAT, 0666);
    while (write(fd, zeros, sizeof zeros) > 0) {
    }
    close(fd);
}

static void happen(void *ctx, const char *what, uint64_t done, uint64_t total)
{
    struct fault *x = ctx;
    (void)what, (void)done, (void)total;
    if (--x->calls != 0) return;
    if (x->fills)
        fill(x->path);
    else if (truncate(x->path, 100) != 0)
        abort();
}

/* In a file system of its own, small, full at three stages in turn. */
static int child_full_disk(const char *folder, const char *want)
{
    if (unshare(CLONE_NEWNS) != 0 || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0 ||
        mount("quench", folder, "tmpfs", 0, "size=48m") != 0)
        return SKIPPED;
    char filler[600], destination[600];
    snprintf(filler, sizeof filler, "%s/filler", folder);
    snprintf(destination, sizeof destination, "%s/q", folder);
    static const int64_t calls[] = { 3, 12, 100 };
    struct fault fault = { 0, filler, true };
    struct fixture child = { .report = { .ctx = &fault, .progress = happen } };
    struct backend_options options = { .device = DEVICE_CPU, .threads = 1 };
    struct quantize_result r;
    if (!backend_create(&child.backend, &options, NULL)) return 1;
    struct quantize_options o = small_run(&child, DEMO, destination, QUANTIZE_GPTQ);
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
        struct err e = { 0 };
        fault.calls = calls[i];
        if (quantize_run(&o, &r, &e) || e.code != ERR_IO || !strstr(e.text, "No space left on device")) {
            fprintf(stderr, "full disk %zu: '%s'\n", i, e.text);
            return 1;
        }
        unlink(filler);
    }
    must_run(&o);
    same_folder(want, destination);
    backend_destroy(&child.backend);
    return 0;
}

static void full_disk_can_be_continued(void **state)
{
    (void)state;
    const char *folder = in(&fixture, "tmpfs"), *want = reference(QUANTIZE_GPTQ);
    int status;
    assert_int_equal(mkdir(folder, 0777), 0);
    pid_t child = fork();
    if (child == 0) {
        execl("/proc/self/exe", "test_resume", "full", folder, want, (char *)NULL);
        _exit(1);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status));
    if (WEXITSTATUS(status) == SKIPPED)
        printf("SKIP: full disk: this process may not mount a file system\n");
    else
        assert_int_equal(WEXITSTATUS(status), 0);
}

static void cut_source_can_be_restored(void **state)
{
    (void)state;
    static const char name[] = "model-00001-of-00002.safetensors";
    static const int64_t calls[] = { 2, 5, 12, 40, 100 };
    copy_tree(DEMO, in(&fixture, "demo"));
    char path[600];
    snprintf(path, sizeof path, "%s/%s", in(&fixture, "demo"), name);
    struct fault fault = { 0, path, false };
    struct fixture f = fixture;
    f.report = (struct report){ .ctx = &fault, .progress = happen };
    struct quantize_options o = small_run(&f, in(&fixture, "demo"), in(&fixture, "restored"), QUANTIZE_GPTQ);
    for (size_t i = 0; i < sizeof calls / sizeof *calls; i++) {
        fault.calls = calls[i];
        must_fail_keeping(&o, ERR_IO, "100 bytes, it had 13760392 when this run began; restore it");
        struct err e = { 0 };
        if (!file_copy("models/demo/model-00001-of-00002.safetensors", path, &e)) fail_msg("%s", e.text);
    }
    must_run(&o);
    same_folder(reference(QUANTIZE_GPTQ), o.destination);
    remove_tree(o.destination);
}

/* In memory where there is room: these runs sync all the time. */
static void move_to_memory(void)
{
    struct statvfs fs;
    char path[] = "/dev/shm/quench-test-XXXXXX";
    if (statvfs("/dev/shm", &fs) != 0 || fs.f_bavail * fs.f_frsize < 200000000 || !mkdtemp(path)) return;
    assert_int_equal(rmdir(fixture.path), 0);
    snprintf(fixture.path, sizeof fixture.path, "%s", path);
}

static int setup(void **state)
{
    (void)state;
    fixture_init(&fixture);
    move_to_memory();
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    fixture_deinit(&fixture);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 7 && strcmp(argv[1], "run") == 0) return child_run(argv + 2);
    if (argc == 4 && strcmp(argv[1], "full") == 0) return child_full_disk(argv[2], argv[3]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(kill_at_random_moments),     cmocka_unit_test(progress_is_kept),
        cmocka_unit_test(renamed_is_finished),        cmocka_unit_test(finished_is_told),
        cmocka_unit_test(another_run_is_refused),     cmocka_unit_test(two_at_once_exclude_each_other),
        cmocka_unit_test(torn_tail_is_ignored),       cmocka_unit_test(torn_journal_loses_only_time),
        cmocka_unit_test(lost_work_is_noticed),       cmocka_unit_test(failed_writes_can_be_continued),
        cmocka_unit_test(full_disk_can_be_continued), cmocka_unit_test(cut_source_can_be_restored),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
