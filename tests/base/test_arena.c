/* Arenas: what was counted is what is placed, aligned and apart, and sizes that do not fit are found while
 * counting. */
#include "base/arena.h"
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

enum { PARTS = 8 };

struct layout {
    uint8_t *part[PARTS];
};

static const int64_t counts[PARTS] = { 1, 3, 0, 7, 1000, 1, 129, 5 };
static const uint64_t each[PARTS] = { 1, 4, 8, 3, 2, 1, 64, 12 },
                      aligns[PARTS] = { 1, 4, 64, 1, 2, 64, 32, 8 };

static void place(struct layout *l, struct arena *a)
{
    for (int i = 0; i < PARTS; i++) l->part[i] = arena_take(a, counts[i], each[i], aligns[i]);
}

static void test_count_then_place(void **state)
{
    (void)state;
    struct layout l;
    struct arena a = { 0 };
    struct err e = { 0 };
    place(&l, &a);
    for (int i = 0; i < PARTS; i++) assert_null(l.part[i]);
    uint64_t counted = a.used;
    assert_true(arena_back(&a, "test", &e));
    assert_int_equal(a.used, 0);
    place(&l, &a);
    assert_int_equal(a.used, counted);
    assert_true(a.used <= a.size && !a.overflow);
    for (int i = 0; i < PARTS; i++) {
        uint64_t bytes = (uint64_t)counts[i] * each[i];
        assert_int_equal((uintptr_t)l.part[i] % aligns[i], 0);
        assert_true(l.part[i] + bytes <= a.memory + a.size);
        if (i > 0) assert_true(l.part[i] >= l.part[i - 1] + (uint64_t)counts[i - 1] * each[i - 1]);
        for (uint64_t j = 0; j < bytes; j++) assert_int_equal(l.part[i][j], 0);
        memset(l.part[i], 0xff,
               bytes); /* a following part is still zero when its turn comes: they do not overlap */
    }
    arena_free(&a);
    assert_null(a.memory);
}

static void test_empty(void **state)
{
    (void)state;
    struct arena a = { 0 };
    struct err e = { 0 };
    arena_free(&a);
    assert_true(arena_back(&a, "nothing", &e));
    assert_non_null(a.memory);
    assert_non_null(arena_take(&a, 0, 8, 64));
    assert_int_equal(a.used, 0);
    arena_free(&a);
}

static void check_overflow(uint64_t used, int64_t count, uint64_t bytes_each, uint64_t align)
{
    struct arena a = { .used = used };
    struct err e = { 0 };
    assert_null(arena_take(&a, count, bytes_each, align));
    assert_true(a.overflow);
    assert_int_equal(a.used, used);
    assert_null(arena_take(&a, 1, 1, 1)); /* what fits does not clear it */
    assert_false(arena_back(&a, "step buffers", &e));
    assert_int_equal(e.code, ERR_LIMIT);
    assert_string_equal(e.text, "step buffers: size does not fit 64 bits");
    assert_null(a.memory);
}

static void test_overflow(void **state)
{
    (void)state;
    check_overflow(0, -1, 1, 1);
    check_overflow(0, INT64_MIN, 0, 1);
    check_overflow(0, INT64_MAX, 3, 1);
    check_overflow(0, 1 << 16, 1ull << 48, 1);
    check_overflow(64, 1, UINT64_MAX - 63, 1);
    check_overflow(UINT64_MAX - 5, 1, 1, 64); /* the padding alone */
}

/* Counted without overflow, but the rounded block size does not fit. */
static void test_block_size_overflow(void **state)
{
    (void)state;
    struct arena a = { 0 };
    struct err e = { 0 };
    arena_take(&a, 1, UINT64_MAX - 10, 1);
    assert_false(a.overflow);
    assert_false(arena_back(&a, "x", &e));
    assert_string_equal(e.text, "x: size does not fit 64 bits");
}

static void test_no_memory(void **state)
{
    (void)state;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    print_message("SKIP: the sanitizer's allocator aborts where malloc returns NULL\n");
    skip();
#else
    struct arena a = { 0 };
    struct err e = { 0 };
    arena_take(&a, INT64_MAX / 64, 64, 64);
    assert_false(arena_back(&a, "KV cache", &e));
    assert_int_equal(e.code, ERR_MEMORY);
    assert_string_equal(e.text, "no memory for KV cache (9223372036854775744 bytes)");
    arena_free(&a);
#endif
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_count_then_place), cmocka_unit_test(test_empty),
        cmocka_unit_test(test_overflow),         cmocka_unit_test(test_block_size_overflow),
        cmocka_unit_test(test_no_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
