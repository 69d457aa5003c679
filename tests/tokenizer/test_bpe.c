/* bpe_encode against the definition, written as plainly as possible; pieces on both sides of the switch to
 * the heap. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include "base/clock.h"
#include "tokenizer/bpe.h"
#include <stdlib.h>
#include <string.h>

enum { LETTERS = 4, MERGES = 120, LONGEST = 400 };

struct plain_merge {
    int32_t left, right, id;
};

static uint32_t random_next(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(*state >> 33);
}

/* Merges of random earlier symbols; ids 0..255 are the bytes. */
static void make_merges(struct bpe *b, struct plain_merge *merges, uint64_t *seed)
{
    struct err e = { 0 };
    assert_true(bpe_init(b, MERGES, &e));
    for (int i = 0; i < 256; i++) b->byte_id[i] = i;
    for (int rank = 0; rank < MERGES;) {
        int known = LETTERS + rank;
        int32_t left = (int32_t)(random_next(seed) % known), right = (int32_t)(random_next(seed) % known);
        left = left < LETTERS ? left + 'a' : left - LETTERS + 256;
        right = right < LETTERS ? right + 'a' : right - LETTERS + 256;
        if (!bpe_add(b, left, right, (uint32_t)rank, 256 + rank)) continue;
        merges[rank] = (struct plain_merge){ left, right, 256 + rank };
        rank++;
    }
}

static size_t encode_plainly(const struct plain_merge *merges, const unsigned char *piece, size_t n,
                             int32_t *ids)
{
    for (size_t i = 0; i < n; i++) ids[i] = piece[i];
    for (int rank = 0; rank < MERGES; rank++) {
        for (size_t i = 0; i + 1 < n; i++) {
            if (ids[i] != merges[rank].left || ids[i + 1] != merges[rank].right) continue;
            ids[i] = merges[rank].id;
            memmove(ids + i + 1, ids + i + 2, (n - i - 2) * sizeof *ids);
            n--;
            rank = -1; /* a join may make a pair of lower rank: look at all again */
            break;
        }
    }
    return n;
}

static void test_against_definition(void **state)
{
    (void)state;
    uint64_t seed = 7;
    for (int round = 0; round < 20; round++) {
        struct bpe b = { 0 };
        struct plain_merge merges[MERGES];
        struct bpe_work work = { 0 };
        make_merges(&b, merges, &seed);
        for (int text = 0; text < 100; text++) {
            unsigned char piece[LONGEST];
            int32_t got[LONGEST], want[LONGEST];
            size_t n = 1 + random_next(&seed) % (text % 2 ? LONGEST : 80), n_got;
            for (size_t i = 0; i < n; i++) piece[i] = (unsigned char)('a' + random_next(&seed) % LETTERS);
            size_t n_want = encode_plainly(merges, piece, n, want);
            struct err e = { 0 };
            assert_true(bpe_encode(&b, &work, piece, n, got, &n_got, &e));
            assert_int_equal(n_got, n_want);
            assert_memory_equal(got, want, n_want * sizeof *want);
        }
        bpe_work_deinit(&work);
        bpe_deinit(&b);
    }
}

/* a a -> 256, 256 256 -> 257, ...: every level of the heap is used, and the time is not quadratic. */
static void test_long_run(void **state)
{
    (void)state;
    enum { BYTES = 1 << 20, LEVELS = 10 };
    struct bpe b = { 0 };
    struct err e = { 0 };
    struct bpe_work work = { 0 };
    assert_true(bpe_init(&b, LEVELS, &e));
    for (int i = 0; i < 256; i++) b.byte_id[i] = i;
    for (int i = 0; i < LEVELS; i++) {
        int32_t from = i == 0 ? 'a' : 255 + i;
        assert_true(bpe_add(&b, from, from, (uint32_t)i, 256 + i));
        assert_false(bpe_add(&b, from, from, 99, 99));
    }
    unsigned char *piece = malloc(BYTES);
    int32_t *ids = malloc(BYTES * sizeof *ids);
    memset(piece, 'a', BYTES);
    size_t n;
    double begin = clock_seconds();
    assert_true(bpe_encode(&b, &work, piece, BYTES - 1, ids, &n, &e));
    assert_true(clock_seconds() - begin < 30); /* quadratic takes hours; a sanitizer takes a second */
    assert_int_equal(n, (BYTES >> LEVELS) - 1 + LEVELS);
    for (size_t i = 0; i < (BYTES >> LEVELS) - 1; i++) assert_int_equal(ids[i], 255 + LEVELS);
    for (int i = 0; i < LEVELS; i++) assert_int_equal(ids[n - 1 - (size_t)i], i == 0 ? 'a' : 255 + i);
    free(piece);
    free(ids);
    bpe_work_deinit(&work);
    bpe_deinit(&b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_against_definition),
        cmocka_unit_test(test_long_run),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
