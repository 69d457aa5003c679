/* When the loop looks at the scheduler's news: not before the time it has set itself, but for an answer's
 * end, and for a first token that is awaited. */
#include "base/clock.h"
#include "server/server_struct.h"
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/timerfd.h>
#include <unistd.h>

static int setup(void **state)
{
    struct server *s = calloc(1, sizeof *s);
    if (!s) return -1;
    s->wake_timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    atomic_store(&s->look_at, clock_seconds() + 1000);
    *state = s;
    return s->wake_timer < 0;
}

static int teardown(void **state)
{
    struct server *s = *state;
    close(s->wake_timer);
    free(s);
    return 0;
}

static bool is_awake(const struct server *s, int milliseconds)
{
    struct pollfd timer = { .fd = s->wake_timer, .events = POLLIN };
    return poll(&timer, 1, milliseconds) == 1;
}

static void news_waits(void **state)
{
    struct server *s = *state;
    server_wake(s, false);
    assert_false(is_awake(s, 20));
}

static void an_end_does_not(void **state)
{
    struct server *s = *state;
    server_wake(s, false);
    server_wake(s, true);
    assert_true(is_awake(s, 10000));
    server_wake(s, false);
    assert_true(is_awake(s, 0)); /* nor is it put off again */
}

static void a_first_token_does_not(void **state)
{
    struct server *s = *state;
    atomic_store(&s->look_at, 0);
    server_wake(s, false);
    assert_true(is_awake(s, 10000));
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = { TEST(news_waits), TEST(an_end_does_not),
                                        TEST(a_first_token_does_not) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
