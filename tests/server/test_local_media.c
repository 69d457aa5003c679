/* Images by file:// URL: what is below the folder is read, whatever a URL, a link or another process says
 * nothing else is. */
#include "server/local_media.h"
#include "server/serving.h"
#include <pthread.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/un.h>

enum { MOST = 20 << 20 };
static const char SECRET[] = "secret, secret!!"; /* 16 bytes, as the good ones */
static const char GOOD[] = "an image, a good";
static const char GOOD_URL[] = "data:image/x;base64,YW4gaW1hZ2UsIGEgZ29vZA=="; /* by base64(1) */

static struct temp temp;
static struct local_media media;

static bool try(const char *url, char **out, struct err *e)
{
    size_t bytes;
    *e = (struct err){ 0 };
    return local_media_data_url(out, &bytes, &media, url, MOST, e);
}

/* %s: the folder around `media`. */
static void check(const char *format, bool good, const char *says)
{
    char url[1024], *out = NULL;
    struct err e;
    snprintf(url, sizeof url, format, temp.path, temp.path);
    bool ok = try(url, &out, &e);
    if (ok != good) fail_msg("%s: %s", url, ok ? out : e.text);
    if (ok) assert_string_equal(out, GOOD_URL);
    if (!ok && !strstr(e.text, says)) fail_msg("%s: %s", url, e.text);
    if (!ok) assert_null(out);
    if (!ok) assert_null(strstr(e.text, temp.path)); /* nothing of where things lie */
    free(out);
}

static void link_to(const char *to, const char *name)
{
    char full[1024];
    snprintf(full, sizeof full, to, temp.path);
    assert_int_equal(symlink(full, temp_path(&temp, name)), 0);
}

static void make_folder(void)
{
    struct sockaddr_un a = { .sun_family = AF_UNIX };
    assert_int_equal(mkdir(temp_path(&temp, "media"), 0700), 0);
    assert_int_equal(mkdir(temp_path(&temp, "media/sub"), 0700), 0);
    assert_int_equal(mkdir(temp_path(&temp, "media2"), 0700), 0);
    temp_text(&temp, "secret", SECRET);
    temp_text(&temp, "media2/secret", SECRET);
    temp_text(&temp, "media/good", GOOD);
    temp_text(&temp, "media/a b+c\xc3\xa9", GOOD);
    temp_text(&temp, "media/sub/good", GOOD);
    temp_text(&temp, "media/..good", GOOD);
    link_to("sub/good", "media/inside");
    link_to("../good", "media/sub/up");
    link_to("%s/media/good", "media/inside-absolute");
    link_to("../secret", "media/out");
    link_to("sub/../../secret", "media/out-2");
    link_to("%s/secret", "media/out-absolute");
    link_to("..", "media/parent");
    link_to("/", "media/root");
    link_to("loop", "media/loop");
    link_to("/proc/self/fd/0", "media/magic");
    link_to("/dev/zero", "media/zero");
    link_to("%s/media", "alias");
    assert_int_equal(mkfifo(temp_path(&temp, "media/pipe"), 0600), 0);
    int fd = open(temp_path(&temp, "media/huge"), O_WRONLY | O_CREAT, 0600);
    assert_true(fd >= 0 && ftruncate(fd, (off_t)1 << 40) == 0); /* a TB, of nothing */
    close(fd);
    fd = open(temp_path(&temp, "media/larger"), O_WRONLY | O_CREAT, 0600);
    assert_true(fd >= 0 && ftruncate(fd, MOST + 1) == 0);
    close(fd);
    snprintf(a.sun_path, sizeof a.sun_path, "%s", temp_path(&temp, "media/socket"));
    fd = socket(AF_UNIX, SOCK_STREAM, 0);
    assert_int_equal(bind(fd, (struct sockaddr *)&a, sizeof a), 0);
    close(fd);
}

static void test_corpus(void **state)
{
    (void)state;
    static const char no[] = "names no file";
    static const char *const good[] = { "file://%s/media/good",
                                        "file://localhost%s/media/good",
                                        "FILE://%s/media/good",
                                        "file://LOCALHOST%s/media/good",
                                        "file://%s/media//sub///good",
                                        "file://%s/media/./good",
                                        "file://%s/media/sub/../good",
                                        "file://%s/media/%%67ood",
                                        "file://%s/media/sub%%2Fgood",
                                        "file://%s/media/inside",
                                        "file://%s/media/sub/up",
                                        "file://%s/media/..good",
                                        "file://%s/media/a%%20b+c%%C3%%A9" };
    static const char *const bad[] = {
        "file://%s/secret",
        "file://%s/media2/secret",
        "file://%s/media",
        "file://%s/media/",
        "file://%s/media/.",
        "file://%s/media/..",
        "file://%s/media/../secret",
        "file://%s/media/../media/../secret",
        "file://%s/media/sub/../../secret",
        "file://%s/media/%%2e%%2e/secret",
        "file://%s/media/%%2e./secret",
        "file://%s/media%%2f..%%2fsecret",
        "file://%s/media/..%%2fsecret",
        "file://%s/media/../media2/secret",
        "file://%s/media/%%252e%%252e/secret",
        "file://%s/media/..\\secret",
        "file://%s/media\\..\\secret",
        "file://%s/../etc/passwd",
        "file:////%s/media/good",
        "file://%s/x/../media/good",
        "file:///etc/passwd",
        "file:///proc/self/environ",
        "file:///proc/self/root/etc/passwd",
        "file:///dev/zero",
        "file:///",
        "file://%s/media/good/",
        "file://%s/media/good/.",
        "file://%s/media/nothing",
        "file://%s/media/sub",
        "file://%s/media/out",
        "file://%s/media/out-2",
        "file://%s/media/out-absolute",
        "file://%s/media/inside-absolute",
        "file://%s/media/parent/secret",
        "file://%s/media/parent/media/good",
        "file://%s/media/root/etc/passwd",
        "file://%s/media/root%s/secret",
        "file://%s/media/loop",
        "file://%s/media/magic",
        "file://%s/media/zero",
        "file://%s/media/pipe",
        "file://%s/media/socket",
        "file://%s/media/%%ff",
        "file://%s/alias/good",
    };
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) check(good[i], true, "");
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        check(bad[i], false, strstr(bad[i], "%%ff") ? "percent-encoded" : no);
    check("file://%s/media/go%%00od", false, "percent-encoded");
    check("file://%s/media/go%%0", false, "percent-encoded");
    check("file://elsewhere%s/media/good", false, "another machine");
    check("file://localhost@elsewhere%s/media/good", false, "another machine");
    check("file://..%s/media/good", false, "another machine");
    check("file:%s/media/good", false, "expected file:///");
    check("file:media/good", false, "expected file:///");
    check("file://%s/media/good?x", false, "percent-encoded");
    check("file://%s/media/good#x", false, "percent-encoded");
    check("file://%s/media/larger", false, "more than 21.0 MB");
    check("file://%s/media/huge", false, "more than 21.0 MB");
    printf("note: %zu URLs that lead out, or to what is no file, refused\n", sizeof bad / sizeof *bad + 11);
    if (mknod(temp_path(&temp, "media/device"), S_IFCHR | 0600, makedev(1, 5)) == 0)
        check("file://%s/media/device", false, no);
    else
        printf("SKIP: a device in the folder: only root can make one\n");
    if (geteuid() != 0) {
        assert_int_equal(chmod(temp_path(&temp, "media/good"), 0), 0);
        check("file://%s/media/good", false, no);
        assert_int_equal(chmod(temp_path(&temp, "media/good"), 0600), 0);
    }
}

/* Named by a link itself, it is the folder that the link meant when it was opened. */
static void test_folder(void **state)
{
    (void)state;
    struct local_media m, usual = media;
    struct err e = { 0 };
    char slashes[256];
    snprintf(slashes, sizeof slashes, "%s//", temp_path(&temp, "alias"));
    assert_true(local_media_open(&m, slashes, &e));
    media = m;
    check("file://%s/alias/good", true, "");
    check("file://%s/media/good", true, "");
    check("file://%s/alias/../secret", false, "names no file");
    media = usual;
    local_media_close(&m);
    static const char *const wrong[] = { "media", "/nowhere/at/all", "", "/etc/passwd" };
    for (size_t i = 0; i < 4; i++) {
        e = (struct err){ 0 };
        assert_false(local_media_open(&m, wrong[i], &e));
        assert_true(strlen(e.text) > 10);
        local_media_close(&m);
    }
}

static _Atomic bool swaps;

/* A folder that is a folder and a link out of it by turns. */
static void *swap(void *ctx)
{
    (void)ctx;
    char a[256], b[256], at[256];
    snprintf(a, sizeof a, "%s/media/door", temp.path);
    snprintf(b, sizeof b, "%s/media/other", temp.path);
    snprintf(at, sizeof at, "%s/media2", temp.path);
    assert_int_equal(mkdir(a, 0700), 0);
    assert_int_equal(symlink(at, b), 0);
    while (swaps) renameat2(AT_FDCWD, a, AT_FDCWD, b, RENAME_EXCHANGE);
    return NULL;
}

static void test_race(void **state)
{
    (void)state;
    char url[512], *out;
    struct err e;
    pthread_t thread;
    swaps = true;
    temp_text(&temp, "media2/good", SECRET);
    snprintf(url, sizeof url, "file://%s/media/door/good", temp.path);
    assert_int_equal(pthread_create(&thread, NULL, swap, NULL), 0);
    for (int i = 0; i < 20000; i++) {
        bool ok = try(url, &out, &e);
        if (ok) fail_msg("read %s", out);
    }
    swaps = false;
    pthread_join(thread, NULL);
}

/* The same picture, by file and as data, to the server; and without a folder no file. */
static int ask_picture(const struct serving *s, struct reply *r, const char *url)
{
    static char text[1 << 17], body[1 << 16];
    snprintf(
        body, sizeof body,
        "{\"temperature\":0,\"max_tokens\":8,\"logprobs\":true,\"messages\":[{\"role\":\"user\",\"content\":"
        "[{\"type\":\"image_url\",\"image_url\":{\"url\":\"%s\"}},{\"type\":\"text\",\"text\":\"What?\"}]}]}",
        url);
    snprintf(text, sizeof text,
             "POST %s HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
             CHAT, strlen(body), body);
    return ask(s, r, text);
}

static void test_server(void **state)
{
    (void)state;
    static struct reply reply;
    struct serving s;
    char url[512], *data, want[4096];
    size_t n;
    struct err e = { 0 };
    const char *folder = temp_path(&temp, "media");
    assert_true(file_read(&data, &n, "tests/golden/images/orientation_6.jpg", 1 << 20, &e));
    temp_write(&temp, "media/picture.jpg", data, n);
    free(data);
    START(&s, "--max-num-seqs", "1", "--no-enable-prefix-caching", "--allowed-local-media-path", folder);
    int descriptors = serving_descriptors(&s);
    snprintf(url, sizeof url, "file://%s/media/picture.jpg", temp.path);
    assert_int_equal(ask_picture(&s, &reply, url), 200);
    snprintf(want, sizeof want, "%s", strstr(reply.body, "\"choices\""));
    assert_true(try(url, &data, &e));
    assert_int_equal(ask_picture(&s, &reply, data), 200);
    assert_int_equal(strncmp(strstr(reply.body, "\"choices\""), want, strlen(want)), 0);
    free(data);
    static const char *const wrong[] = { "media/good", "media/out", "secret", "media/pipe", "media/huge" };
    for (size_t i = 0; i < 5; i++) {
        snprintf(url, sizeof url, "file://%s/%s", temp.path, wrong[i]);
        assert_int_equal(ask_picture(&s, &reply, url), 400);
        assert_null(strstr(reply.body, "secret,"));
    }
    check_idle(&s, descriptors);
    serving_stop(&s);
    START(&s, "--max-num-seqs", "1");
    snprintf(url, sizeof url, "file://%s/media/picture.jpg", temp.path);
    assert_int_equal(ask_picture(&s, &reply, url), 400);
    assert_non_null(strstr(reply.body, "--allowed-local-media-path"));
    serving_stop(&s);
    serving_spawn(&s, (const char *const[]){ "--allowed-local-media-path", "/nowhere/at/all", NULL });
    assert_int_equal(serving_wait(&s, 30), 1);
    assert_non_null(strstr(s.said, "--allowed-local-media-path: /nowhere/at/all: "));
}

static int set_up(void **state)
{
    (void)state;
    struct err e = { 0 };
    temp = temp_make();
    make_folder();
    if (!local_media_open(&media, temp_path(&temp, "media"), &e)) fail_msg("%s", e.text);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    local_media_close(&media);
    temp_remove(&temp);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_corpus),
        cmocka_unit_test(test_folder),
        cmocka_unit_test(test_race),
        cmocka_unit_test(test_server),
    };
    signal(SIGPIPE, SIG_IGN);
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
