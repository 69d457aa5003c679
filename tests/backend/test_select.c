/* A backend's queue ends as what it began as, whatever table of operations is used with it: tests and the
 * account of operations (backend/trace.h) put their own in its place. Of use under ASan. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "backend/ops.h"
#include "backend/trace.h"
#include "support/models.h"
#include <stdlib.h>
#include <string.h>

static const struct ops *real;
static int calls;

static bool counting_wait(struct queue *q, struct err *e)
{
    calls++;
    return real->wait(q, e);
}

static void end_under_another_table(enum device device)
{
    struct backend b;
    struct ops counting;
    struct err e = { 0 };
    must(backend_create(&b, &(struct backend_options){ .device = device, .threads = 2 }, &e), &e);
    real = b.ops;
    counting = *real;
    counting.wait = counting_wait;
    b.ops = &counting;
    struct step_limits limits = { 4, 64, 64, 64, 2, 4, 0, 64 }; /* so that the queue has memory of its own */
    must(b.ops->reserve(b.queue, &limits, &e), &e);
    calls = 0;
    must(b.ops->wait(b.queue, &e), &e);
    assert_int_equal(calls, 1);
    backend_destroy(&b);
    assert_null(b.ops);
    backend_destroy(&b); /* a zeroed one */
}

static void a_queue_ends_as_it_began(void **state)
{
    (void)state;
    const char *device = getenv("QUENCH_DEVICE");
    end_under_another_table(DEVICE_REF);
    end_under_another_table(DEVICE_CPU);
    if (device && strcmp(device, "cuda") == 0) end_under_another_table(DEVICE_CUDA);
}

static void an_account_leaves_the_queue(void **state)
{
    (void)state;
    struct backend inner, trace;
    struct err e = { 0 };
    must(backend_create(&inner, &(struct backend_options){ .device = DEVICE_REF }, &e), &e);
    must(trace_create(&trace, &inner, &e), &e);
    assert_null(trace.queue_free);
    trace_destroy(&trace);
    must(inner.ops->wait(inner.queue, &e), &e);
    backend_destroy(&inner);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_queue_ends_as_it_began),
        cmocka_unit_test(an_account_leaves_the_queue),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
