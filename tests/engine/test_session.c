/* A session answers as if it computed everything anew, whatever it kept; and it can be stopped at any token.
 */
#include "engine/session.h"
#include "support/models.h"
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

enum { CONTEXT = 160, ANSWER = 12 };

struct fixture {
    struct loaded loaded;
    struct tokenizer *tokenizer;
    struct engine *engine, *drafting;
};

/* The text of an answer, and after how many pieces it is stopped. */
struct seen {
    char text[1000];
    size_t n;
    int pieces, stop_after;
};

static int setup(void **state)
{
    struct fixture *f = *state = calloc(1, sizeof *f);
    struct err e = { 0 };
    struct engine_options o = { .context = CONTEXT, .sequences = 2, .step_rows = 16 };
    load_model(&f->loaded, "models/demo", &(struct backend_options){ .device = DEVICE_CPU, .threads = 1 });
    must(tokenizer_load(&f->tokenizer, "models/demo", &e), &e);
    must(model_bind_mtp(&f->loaded.model, true, &e), &e);
    must(engine_create(&f->engine, &f->loaded.model, &o, &e), &e);
    o.drafts = 4;
    must(engine_create(&f->drafting, &f->loaded.model, &o, &e), &e);
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    engine_free(f->engine);
    engine_free(f->drafting);
    tokenizer_free(f->tokenizer);
    unload_model(&f->loaded);
    free(f);
    return 0;
}

static void take(void *ctx, const char *bytes, size_t n)
{
    struct seen *s = ctx;
    assert_true(s->n + n < sizeof s->text);
    memcpy(s->text + s->n, bytes, n);
    s->n += n;
    s->pieces++;
}

static bool is_stopped(void *ctx)
{
    const struct seen *s = ctx;
    return s->stop_after > 0 && s->pieces >= s->stop_after;
}

static bool answer(struct session *session, struct session_result *r, struct seen *seen,
                   const struct fixture *f, const char *text, float temperature, struct err *e)
{
    struct token_list tokens = { 0 };
    struct prompt prompt;
    struct session_options o = { .sampling = { .temperature = temperature, .seed = 7 },
                                 .max_tokens = ANSWER,
                                 .ctx = seen,
                                 .text = take,
                                 .cancelled = is_stopped };
    must(tokenizer_encode(f->tokenizer, &tokens, text, strlen(text), 0, e) &&
             prompt_create(&prompt, tokens.ids, (int64_t)tokens.n, (struct place_tokens){ -1, -1 }, NULL, 0,
                           0, e),
         e);
    bool ok = session_answer(session, r, &prompt, &o, e);
    prompt_free(&prompt);
    free(tokens.ids);
    return ok;
}

static struct session *new_session(const struct fixture *f)
{
    struct session *s;
    struct err e = { 0 };
    must(session_create(&s, f->engine, f->tokenizer, &e), &e);
    return s;
}

static void test_kept(void **state)
{
    struct fixture *f = *state;
    static const char first[] = "The river rose that night, and in the morning";
    struct session *kept = new_session(f), *fresh = new_session(f);
    struct session_result r, anew;
    struct seen a = { 0 }, b = { 0 }, c = { 0 };
    struct err e = { 0 };
    char second[2000];
    must(answer(kept, &r, &a, f, first, 0, &e), &e);
    assert_int_equal(r.reused_tokens, 0);
    assert_int_equal(r.tokens, ANSWER);
    assert_int_equal(r.finish, SESSION_LENGTH);
    int n = snprintf(second, sizeof second, "%s%s\nAnd then", first, a.text);
    assert_true(n > 0 && (size_t)n < sizeof second);
    must(answer(kept, &r, &b, f, second, 0, &e) && answer(fresh, &anew, &c, f, second, 0, &e), &e);
    assert_true(r.reused_tokens > 0 && anew.reused_tokens == 0);
    assert_int_equal(r.prompt_tokens, anew.prompt_tokens);
    assert_string_equal(b.text, c.text);
    session_free(kept);
    session_free(fresh);
}

/* Another prompt, the same one, and one that is shorter than what is held are computed from their beginning.
 */
static void test_not_kept(void **state)
{
    struct fixture *f = *state;
    struct session *s = new_session(f);
    struct session_result r;
    struct err e = { 0 };
    static const char *const prompts[] = { "One two three four", "One two three four", "One two", "Two one" };
    char texts[4][1000];
    for (int i = 0; i < 4; i++) {
        struct seen seen = { 0 };
        must(answer(s, &r, &seen, f, prompts[i], 0, &e), &e);
        assert_int_equal(r.reused_tokens, 0);
        memcpy(texts[i], seen.text, sizeof texts[i]);
    }
    assert_string_equal(texts[0], texts[1]);
    session_free(s);
}

static void test_stopped(void **state)
{
    struct fixture *f = *state;
    struct session *s = new_session(f), *fresh = new_session(f);
    struct session_result r;
    struct err e = { 0 };
    struct seen whole = { 0 }, after = { 0 };
    must(answer(fresh, &r, &whole, f, "The sea was", 0, &e), &e);
    for (int k = 1; k < 4; k++) {
        struct seen part = { .stop_after = k };
        must(answer(s, &r, &part, f, "The sea was", 0, &e), &e);
        assert_int_equal(r.finish, SESSION_CANCELLED);
        assert_memory_equal(part.text, whole.text, part.n);
    }
    must(answer(s, &r, &after, f, "The sea was", 0, &e), &e);
    assert_string_equal(after.text, whole.text);
    session_free(s);
    session_free(fresh);
}

static void test_full(void **state)
{
    struct fixture *f = *state;
    struct session *s = new_session(f);
    struct session_result r;
    struct err e = { 0 };
    struct seen seen = { 0 };
    char text[2 * CONTEXT + 1];
    for (int i = 0; i < CONTEXT; i++) memcpy(text + 2 * i, " a", 2);
    text[2 * CONTEXT] = 0;
    assert_false(answer(s, &r, &seen, f, text, 0, &e));
    assert_int_equal(e.code, ERR_LIMIT);
    assert_non_null(strstr(e.text, "the context is 160 with the answer"));
    text[2 * (CONTEXT - 5)] = 0;
    e = (struct err){ 0 };
    must(answer(s, &r, &seen, f, text, 0, &e), &e);
    assert_true(r.tokens <= 5 && r.prompt_tokens + r.tokens <= CONTEXT);
    session_free(s);
}

/* The sampler goes on where it was: the same question twice is not the same draw twice. */
static void test_draws(void **state)
{
    struct fixture *f = *state;
    struct session *s = new_session(f), *again = new_session(f);
    struct session_result r;
    struct err e = { 0 };
    struct seen a = { 0 }, b = { 0 }, c = { 0 };
    must(answer(s, &r, &a, f, "Once upon a time", 1.5f, &e) &&
             answer(s, &r, &b, f, "Once upon a time", 1.5f, &e),
         &e);
    must(answer(again, &r, &c, f, "Once upon a time", 1.5f, &e), &e);
    assert_string_not_equal(a.text, b.text);
    assert_string_equal(a.text, c.text);
    session_free(s);
    session_free(again);
}

/* Turn after turn, whole answers and such that are stopped: with drafts the same text, the same reuse but for
 * the last tokens, which drafts may have computed already. */
static void test_drafts(void **state)
{
    struct fixture *f = *state;
    struct session *plain = new_session(f), *drafting;
    struct err e = { 0 };
    char text[1000] = "Repeat: stone market mirror forest. stone market mirror forest. stone";
    int64_t drafted = 0, accepted = 0, foreseen = 0;
    must(session_create(&drafting, f->drafting, f->tokenizer, &e), &e);
    for (int turn = 0; turn < 6; turn++) {
        struct seen a = { .stop_after = turn % 3 * 4 }, b = { .stop_after = turn % 3 * 4 };
        struct session_result r, s;
        float temperature = turn < 3 ? 0 : 0.7f;
        must(answer(plain, &r, &a, f, text, temperature, &e), &e);
        must(answer(drafting, &s, &b, f, text, temperature, &e), &e);
        assert_string_equal(a.text, b.text);
        assert_int_equal(r.tokens, s.tokens);
        assert_int_equal(r.finish, s.finish);
        assert_int_equal(r.drafted, 0);
        assert_true(s.reused_tokens >= r.reused_tokens && s.reused_tokens <= r.reused_tokens + 4);
        /* the token after an answer's last draft is not sampled, a stop token is none of its tokens */
        int64_t more = s.rounds + s.accepted + 1 - s.tokens;
        assert_true(more >= 0 && more <= 1 + (s.finish == SESSION_STOP));
        drafted += s.drafted;
        accepted += s.accepted;
        foreseen += s.reused_tokens > r.reused_tokens;
        size_t used = strlen(text);
        int n = snprintf(text + used, sizeof text - used, "%s and then", a.text);
        assert_true(n > 0 && used + (size_t)n < sizeof text);
    }
    printf("note: %d drafted, %d accepted; %d answers' last token was computed already\n", (int)drafted,
           (int)accepted, (int)foreseen);
    assert_true(accepted > 0 && accepted < drafted);
    session_free(plain);
    session_free(drafting);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_kept), cmocka_unit_test(test_not_kept), cmocka_unit_test(test_stopped),
        cmocka_unit_test(test_full), cmocka_unit_test(test_draws),    cmocka_unit_test(test_drafts),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
