/* A decoder that dies takes one request with it: the others, those with pictures too, are answered as ever.
 */
#include "image/big_png.h"
#include "server/serving.h"
#include "support/videos.h"
#include <pthread.h>

static struct temp temp;

static int ask_picture(const struct serving *s, struct reply *r, const char *file)
{
    char body[1024];
    snprintf(body, sizeof body,
             "{\"temperature\":0,\"max_tokens\":8,\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":"
             "\"image_url\","
             "\"image_url\":{\"url\":\"file://%s/%s\"}},{\"type\":\"text\",\"text\":\"What?\"}]}]}",
             temp.path, file);
    char text[2048];
    snprintf(text, sizeof text,
             "POST %s HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s",
             CHAT, strlen(body), body);
    return ask(s, r, text);
}

struct asking {
    const struct serving *s;
    struct reply reply;
    int status;
};

static void *ask_big(void *ctx)
{
    struct asking *a = ctx;
    a->status = ask_picture(a->s, &a->reply, "big.png");
    return NULL;
}

static void test_decoder_dies(void **state)
{
    (void)state;
    enum { TIMES = 5 };
    static struct asking big;
    static struct reply reply, stream;
    static const int signals[TIMES] = { SIGSEGV, SIGKILL, SIGABRT, SIGSEGV, SIGBUS };
    struct serving s;
    char *data, *want = NULL;
    size_t n;
    struct err e = { 0 };
    assert_true(file_read(&data, &n, "tests/golden/images/rgb.png", 1 << 20, &e));
    temp_write(&temp, "small.png", data, n);
    free(data);
    big_png(temp_path(&temp, "big.png"), 6000);
    START(&s, "--max-num-seqs", "4", "--no-enable-prefix-caching", "--allowed-local-media-path", temp.path);
    if (strstr(s.said, "images are decoded in this process")) {
        printf("SKIP: no process without rights here: %s\n", s.said);
        serving_stop(&s);
        return;
    }
    int descriptors = serving_descriptors(&s), fd = dial(&s);
    const char *request = post_text(COMPLETIONS, "", LONG(1500) ",\"stream\":true}");
    send_bytes(fd, request, strlen(request));
    for (int i = 0; i < TIMES; i++) {
        pthread_t thread;
        pid_t child = 0;
        big = (struct asking){ .s = &s };
        assert_int_equal(pthread_create(&thread, NULL, ask_big, &big), 0);
        for (double until = clock_seconds() + 60; !child && clock_seconds() < until; usleep(200))
            child = restricted_child(s.pid);
        assert_true(child > 0);
        assert_int_equal(kill(child, signals[i]), 0);
        assert_int_equal(ask_picture(&s, &reply, "small.png"), 200);
        const char *answer = strstr(reply.body, "\"choices\"");
        if (!want) want = strdup(answer);
        assert_string_equal(answer, want);
        pthread_join(thread, NULL);
        assert_int_equal(big.status, 400);
        assert_non_null(strstr(big.reply.body, "could not bear it"));
    }
    stream.n = stream.used = 0;
    assert_int_equal(receive(&stream, fd, 60), 200);
    assert_non_null(strstr(stream.body, "data: [DONE]"));
    close(fd);
    free(want);
    check_idle(&s, descriptors);
    check_no_pages(&s);
    assert_int_equal(restricted_child(s.pid), 0);
    serving_stop(&s);
}

/* Frames go the same way as images; what one of them is spoils that request alone. */
static void test_video(void **state)
{
    (void)state;
    static const char *const good[] = { "tests/golden/demo/frames/0.png", "tests/golden/demo/frames/1.png" },
                             *const bad[] = { "tests/golden/demo/frames/0.png",
                                              "tests/golden/images/rgb.png" };
    static struct reply reply;
    struct serving s;
    START(&s, "--max-num-seqs", "2", "--limit-mm-per-prompt", "{\"video\":1}");
    int descriptors = serving_descriptors(&s);
    for (int i = 0; i < 4; i++) {
        char body[6000], *url = video_url(i % 2 ? bad : good, 2);
        snprintf(
            body, sizeof body,
            "{\"temperature\":0,\"max_tokens\":8,\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":"
            "\"video_url\",\"video_url\":{\"url\":\"%s\"}},{\"type\":\"text\",\"text\":\"What? %d\"}]}]}",
            url, i);
        free(url);
        assert_int_equal(post(&s, &reply, CHAT, body), i % 2 ? 400 : 200);
        if (i % 2)
            assert_non_null(strstr(reply.body, "video 1: frame 2 of 2: 23 x 14 pixels, the first frame has"));
        else
            assert_non_null(strstr(reply.body, "\"image_tokens\":6"));
    }
    assert_int_equal((int)metric(&s, "vllm:mm_cache_queries_total"), 2);
    assert_int_equal((int)metric(&s, "vllm:mm_cache_hits_total"), 1);
    assert_int_equal(get(&s, &reply, "/server_info"), 200);
    assert_non_null(strstr(reply.body, "\"max_images\":16,\"max_videos\":1"));
    check_idle(&s, descriptors);
    serving_stop(&s);
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
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_decoder_dies), cmocka_unit_test(test_video) };
    signal(SIGPIPE, SIG_IGN);
#if defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
    printf("SKIP: a sanitizer calls what it likes, so nothing is filtered\n");
    return 0;
#endif
    return cmocka_run_group_tests(tests, make_temp, remove_temp);
}
