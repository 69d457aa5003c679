/* Conversations that go from A to B and back to A, with branches, edits, pictures and tools, by a scheduler
 * that keeps prefixes, at times in files over a restart, without drafts and with two a round, against the
 * same prompts one at a time and cold, with keys and values of each dtype: tokens, scores and every row of
 * logits to the bit. usage:
 * test_histories [COUNT [SEED]] */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include "base/file.h"
#include "engine/sequence.h"
#include "support/requests.h"
#include "support/sanitized.h"
#include "support/videos.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    LANES = 4,       /* histories under way at once */
    BLOCK = 8,       /* histories before other sizes of everything are taken */
    TALK_MOST = 420, /* tokens of a prompt */
    TURNS_MOST = 16,
    PICTURES_MOST = 2
};

/* The three: without drafts, with two a round, and cold. Each has a model and a backend of its own, since a
 * scheduler's thread keeps and stores what it knows while the next one's is at work already. */
enum { PLAIN, DRAFTING, COLD, SERVICES };
static const char *const names[] = { "no drafts", "2 drafts" };
static struct demo demos[SERVICES];
static long histories = SANITIZED ? 16 : 24; /* without files, with them */

/* What conversations are made of. */
enum part { SYSTEM, USER, PICTURE, VIDEO, REPLY, THOUGHT, CALL, RESULT, RESULT_END, END, PARTS };
static const char *const part_texts[PARTS] = {
    [SYSTEM] =
        "<|im_start|>system\n# Tools\n\nYou have access to the following functions:\n\n<tools>\n"
        "{\"type\": \"function\", \"function\": {\"name\": \"get_weather\", \"parameters\": {\"type\": "
        "\"object\", \"properties\": {\"city\": {\"type\": \"string\"}}}}}\n</tools><|im_end|>\n",
    [USER] = "<|im_start|>user\n",
    [PICTURE] = "<|vision_start|><|image_pad|><|vision_end|>",
    [VIDEO] = "<0.5 seconds><|vision_start|><|video_pad|><|vision_end|>"
              "<2.0 seconds><|vision_start|><|video_pad|><|vision_end|>",
    [REPLY] = "<|im_end|>\n<|im_start|>assistant\n",
    [THOUGHT] = "<think>\n\n</think>\n\n",
    [CALL] = "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n"
             "</tool_call>",
    [RESULT] = "<|im_start|>user\n<tool_response>\n",
    [RESULT_END] = "\n</tool_response>",
    [END] = "<|im_end|>\n",
};
static struct token_list parts[PARTS], words;
static const char word_text[] =
    "A farmer has 17 sheep and buys 5 more. How many does he have? Write the sum, then a sentence about "
    "sheep, "
    "rivers, mountains and the sea, as a list in JSON with the keys name and size. What is the capital of "
    "Finland? The capital of Finland is Helsinki. Spell the word river. It is raining in the north, 7 "
    "degrees, "
    "with wind from the west; tomorrow there will be sun. Repeat: stone market mirror forest. Then translate "
    "it and count the letters of every word, and say which of them is longest.";
static const char *const shapes[] = { "tests/golden/images/grey.png", "tests/golden/images/cmyk.jpg",
                                      "tests/golden/images/full_colour.jpg" };
static const char *const frames[] = { "tests/golden/demo/frames/0.png", "tests/golden/demo/frames/1.png",
                                      "tests/golden/demo/frames/2.png" };
static char *video; /* of them */

/* A conversation: its prompt, and where its turns begin. */
struct talk {
    int32_t ids[2 * TALK_MOST];
    int64_t n, turns[TURNS_MOST];
    const char *pictures[PICTURES_MOST];
    int n_turns, n_pictures, pictures_at[TURNS_MOST];
    uint8_t salt;
};

static void say(struct talk *t, const int32_t *ids, int64_t n)
{
    assert_true(t->n + n <= 2 * TALK_MOST);
    memcpy(t->ids + t->n, ids, (size_t)n * sizeof *ids);
    t->n += n;
}

static void say_part(struct talk *t, enum part part)
{
    say(t, parts[part].ids, (int64_t)parts[part].n);
}

static void say_words(struct talk *t, int64_t most)
{
    int64_t n = 5 + random_below(most - 4);
    say(t, words.ids + random_below((int64_t)words.n - n), n);
}

static void begin_turn(struct talk *t)
{
    t->turns[t->n_turns] = t->n;
    t->pictures_at[t->n_turns++] = t->n_pictures;
}

static void say_reply_begins(struct talk *t)
{
    say_part(t, REPLY);
    if (random_below(2)) say_part(t, THOUGHT);
}

static void say_user(struct talk *t)
{
    begin_turn(t);
    say_part(t, USER);
    if (t->n_pictures < PICTURES_MOST && random_below(4) == 0) {
        bool moves = random_below(4) == 0;
        t->pictures[t->n_pictures++] = moves ? video : shapes[random_below(3)];
        say_part(t, moves ? VIDEO : PICTURE);
    }
    say_words(t, 80);
    say_reply_begins(t);
}

/* The assistant has called a tool, which has answered. */
static void say_tool(struct talk *t)
{
    say_part(t, CALL);
    say_part(t, END);
    begin_turn(t);
    say_part(t, RESULT);
    say_words(t, 40);
    say_part(t, RESULT_END);
    say_reply_begins(t);
}

static void say_answer(struct talk *t, const struct answer *a)
{
    for (int i = 0; i < a->n; i++) say(t, &a->tokens[i].token.id, 1);
    if (random_below(6) == 0) t->ids[t->n - 1] = words.ids[0]; /* somebody has edited it */
    say_part(t, END);
}

static void back_to_a_turn(struct talk *t)
{
    int turn = (int)random_below(t->n_turns);
    t->n = t->turns[turn];
    t->n_pictures = t->pictures_at[turn];
    t->n_turns = turn;
}

static void begin_talk(struct talk *t)
{
    *t = (struct talk){ .salt = random_below(5) == 0 };
    if (random_below(2)) say_part(t, SYSTEM);
    say_user(t);
}

/* Grows by a turn, goes back to an earlier one, or asks the same again. a: what was answered last. */
static void go_on(struct talk *t, const struct answer *a)
{
    int64_t how = random_below(8);
    if (how == 0) return;
    if (how == 1 && t->n < TALK_MOST - 100 && t->n_turns < TURNS_MOST) {
        say_tool(t);
        return;
    }
    if (how <= 3 || t->n > TALK_MOST - 130 || t->n_turns == TURNS_MOST)
        back_to_a_turn(t);
    else
        say_answer(t, a);
    say_user(t);
}

/* Every row of logits that a scheduler looks at, as a sum of hashes: requests of a step come in any order. */
static struct {
    const float *first, *end;
    uint64_t sum;
    int64_t n;
} seen[SERVICES];
static void (*real_download)(struct queue *q, void *to, const void *from, uint64_t bytes);

static uint64_t hash(const float *row, int64_t n)
{
    uint64_t h = 14695981039346656037u, bits = 0;
    for (int64_t i = 0; i < n; i += 2) {
        memcpy(&bits, row + i, n - i < 2 ? sizeof *row : sizeof bits);
        h = (h ^ bits) * 0x9fb21c651e98df25u;
        h ^= h >> 32;
    }
    return h;
}

static void watching_download(struct queue *q, void *to, const void *from, uint64_t bytes)
{
    real_download(q, to, from, bytes);
    int64_t vocab = demos[0].loaded.checkpoint.config.vocab_size;
    const float *at = to;
    for (int i = 0; i < SERVICES; i++) {
        if (at < seen[i].first || at >= seen[i].end) continue;
        assert_int_equal(bytes, (uint64_t)vocab * sizeof *at);
        seen[i].sum += hash(at, vocab);
        seen[i].n++;
    }
}

struct run {
    struct service services[SERVICES];
    struct answer *answers[SERVICES]; /* [LANES] */
    struct engine_options engine;
    struct scheduler_options scheduler;
    char folder[64], folders[2][80]; /* of files */
    bool has_files;
    int64_t blocks, turns, rows_asked, rows_found, rows_read, drafted, accepted, preempted;
    int64_t pictures_asked, pictures_found;
};

static void no_warning(void *ctx, const char *text)
{
    (void)ctx;
    fail_msg("%s", text);
}

static void choose(struct run *r)
{
    static const int32_t turn_end[] = { IM_END, NEWLINE };
    static const enum kv_dtype dtypes[KV_DTYPES] = { KV_F32, KV_INT8, KV_BF16, KV_FP8 };
    r->scheduler = (struct scheduler_options){ .turn_end = turn_end,
                                               .n_turn_end = 2,
                                               .interval = 64 * (1 + random_below(4)),
                                               .step_tokens = 110 + random_below(300) };
    bool has_all = demos[0].loaded.backend.kv_int8;
    r->engine = (struct engine_options){ .kv = has_all ? dtypes[r->blocks % KV_DTYPES] : KV_F32,
                                         .sequences = LANES,
                                         .snapshots = 2 + (int)random_below(12),
                                         .pages = 13 + random_below(40) };
    r->has_files = (r->blocks + 1) / 2 % 2;
    r->scheduler.host_cache_bytes = random_below(3) == 0 ? (uint64_t)random_below(32) << 20 : 0;
    r->scheduler.encoder_cache_bytes = (uint64_t)random_below(96) << 10;
    r->scheduler.disk_bytes = (uint64_t)(4 + random_below(60)) << 20;
    r->scheduler.warn = no_warning;
    r->blocks++;
}

static void start(struct run *r)
{
    struct engine_options g = r->engine;
    struct scheduler_options o = r->scheduler;
    for (int i = 0; i < SERVICES; i++) {
        struct service *s = &r->services[i];
        if (i == DRAFTING) g.drafts = 2, o.fixed_drafts = r->blocks % 2 == 0;
        if (i == COLD) {
            g = (struct engine_options){ .kv = g.kv, .sequences = 1 };
            o.step_tokens = 0;
            o.host_cache_bytes = o.encoder_cache_bytes = 0;
        }
        o.disk_folder = r->has_files && i != COLD ? r->folders[i] : NULL;
        service_start(s, &demos[i], g, o);
        seen[i].first = s->engine->host_logits;
        seen[i].end = seen[i].first + s->engine->logits_rows * engine_vocab(s->engine);
    }
}

static void stop(struct run *r)
{
    for (int i = 0; i < SERVICES; i++) {
        struct scheduler_stats stats;
        scheduler_stats(r->services[i].scheduler, &stats);
        r->rows_asked += stats.prefix_queries;
        r->rows_found += stats.prefix_hits;
        r->rows_read += stats.disk_hits;
        r->drafted += stats.drafted;
        r->accepted += stats.accepted;
        r->preempted += stats.preemptions;
        r->pictures_asked += stats.encoder_queries;
        r->pictures_found += stats.encoder_hits;
        service_stop(&r->services[i]);
    }
}

static struct request_options ask_of(const struct talk *t)
{
    static const int32_t stops[] = { IM_END, 2022 }, never[] = { 2023, 2031, 2032, 2034, 2035 };
    struct request_options o = answer_options(t->ids, t->n, 3 + random_below(random_below(8) ? 8 : 60));
    o.stop_tokens = stops, o.n_stop_tokens = 2;
    o.never = never, o.n_never = 5;
    o.pictures = t->pictures, o.n_pictures = t->n_pictures;
    o.salt[0] = t->salt;
    if (random_below(2)) o.sampling = (struct sampling){ 1, 50, 0.95f, 0, (uint64_t)random_below(1 << 20) };
    return o;
}

static int64_t tokens_seen(const struct answer *a)
{
    return a->n + (a->stop_token >= 0);
}

/* The prompts of all lanes at once to those that remember, then one at a time to the one that does not. */
static void compare(struct run *r, const struct talk *const *talks, long history)
{
    struct request_options o[LANES];
    int64_t tokens = 0;
    for (int k = 0; k < LANES; k++) o[k] = ask_of(talks[k]);
    for (int i = 0; i < SERVICES; i++) seen[i].sum = 0, seen[i].n = 0;
    for (int i = PLAIN; i <= DRAFTING; i++) {
        for (int k = 0; k < LANES; k++) answer_submit(&r->answers[i][k], &r->services[i], &o[k]);
        answer_finish_all(r->answers[i], LANES, &r->services[i]);
    }
    for (int k = 0; k < LANES; k++) {
        struct answer *cold = &r->answers[COLD][k];
        answer_ask(cold, &r->services[COLD], &o[k]);
        assert_int_equal(cold->usage.cached_tokens, 0);
        tokens += tokens_seen(cold);
        for (int i = PLAIN; i <= DRAFTING; i++) {
            char what[96];
            const struct answer *a = &r->answers[i][k];
            snprintf(what, sizeof what, "history %ld, %s, %d of %d cached", history + k, names[i],
                     (int)a->usage.cached_tokens, (int)a->usage.prompt_tokens);
            answer_same(a, cold, what);
        }
    }
    for (int i = 0; i < SERVICES; i++)
        if (seen[i].n != tokens || seen[i].sum != seen[COLD].sum)
            fail_msg("history %ld: other logits, %s: %d rows, %d tokens", history, i < 2 ? names[i] : "cold",
                     (int)seen[i].n, (int)tokens);
    r->turns += LANES;
}

/* A for a turn or two, B for one or two, A again. */
static void converse(struct run *r, struct talk a[LANES], struct talk b[LANES], long history)
{
    struct answer *last = calloc(LANES, sizeof *last); /* of A */
    for (int leg = 0; leg < 3; leg++) {
        struct talk *t = leg == 1 ? b : a;
        if (leg == 2 && r->has_files) {
            stop(r);
            start(r);
        }
        const struct talk *now[LANES];
        for (int turn = 0, turns = 1 + (int)random_below(2); turn < turns; turn++) {
            for (int k = 0; k < LANES; k++) {
                if (leg < 2 && turn == 0)
                    begin_talk(&t[k]);
                else
                    go_on(&t[k], leg == 2 && turn == 0 ? &last[k] : &r->answers[COLD][k]);
                now[k] = &t[k];
            }
            if (leg < 2 && turn == 0 && random_below(3) == 0) t[1] = t[0]; /* two that begin alike */
            compare(r, now, history);
        }
        if (leg == 0) memcpy(last, r->answers[COLD], LANES * sizeof *last);
    }
    free(last);
}

static void from_a_to_b_and_back(void **state)
{
    (void)state;
    struct run r = { 0 };
    struct talk *a = calloc(LANES, sizeof *a), *b = calloc(LANES, sizeof *b);
    for (int i = 0; i < SERVICES; i++) r.answers[i] = calloc(LANES, sizeof *r.answers[i]);
    long done = 0, block_end = 0;
    struct err e = { 0 };
    strcpy(r.folder, "/tmp/quench-test-histories-XXXXXX");
    assert_non_null(mkdtemp(r.folder));
    for (int i = 0; i < 2; i++) snprintf(r.folders[i], sizeof r.folders[i], "%s/%d", r.folder, i);
    for (; done < histories; done += LANES) {
        if (done >= block_end) {
            if (done > 0) stop(&r);
            choose(&r);
            start(&r);
            block_end = done + BLOCK;
        }
        converse(&r, a, b, done);
    }
    stop(&r);
    must(file_remove_tree(r.folder, &e), &e);
    printf(
        "note: %ld histories, %lld prompts, 0 and 2 drafts: %lld of %lld rows found, %lld in files, %lld of "
        "%lld drafts right, preempted %lld times, %lld of %lld pictures found; no bit differs\n",
        done, (long long)r.turns, (long long)r.rows_found, (long long)r.rows_asked, (long long)r.rows_read,
        (long long)r.accepted, (long long)r.drafted, (long long)r.preempted, (long long)r.pictures_found,
        (long long)r.pictures_asked);
    assert_true(r.rows_read > 0);
    assert_true(r.pictures_found > 0 && r.pictures_found < r.pictures_asked);
    assert_true(r.rows_found * 5 > r.rows_asked);
    assert_true(r.accepted * 3 > r.turns);
    for (int i = 0; i < SERVICES; i++) free(r.answers[i]);
    free(a);
    free(b);
}

static int load(void **state)
{
    (void)state;
    static struct ops watching;
    for (int i = 0; i < SERVICES; i++) demo_load(&demos[i]);
    watching = *demos[0].loaded.backend.ops;
    real_download = watching.download;
    watching.download = watching_download;
    for (int i = 0; i < SERVICES; i++) demos[i].loaded.backend.ops = &watching;
    for (int i = 0; i < PARTS; i++) parts[i] = demo_encode(&demos[0], part_texts[i]);
    words = demo_encode(&demos[0], word_text);
    video = video_url(frames, 3);
    return 0;
}

static int unload(void **state)
{
    (void)state;
    for (int i = 0; i < PARTS; i++) free(parts[i].ids);
    free(words.ids);
    free(video);
    for (int i = 0; i < SERVICES; i++) demo_unload(&demos[i]);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc > 1) histories = atol(argv[1]);
    if (argc > 2) random_state = strtoull(argv[2], NULL, 10);
    const struct CMUnitTest tests[] = { cmocka_unit_test(from_a_to_b_and_back) };
    return cmocka_run_group_tests(tests, load, unload);
}
