#include "grammar/sets.h"
#include "grammar/rules.h"
#include <stdlib.h>
#include <string.h>

static uint32_t mix(uint32_t h, uint32_t x)
{
    h = (h ^ x) * 0x9e3779b1u;
    return h ^ h >> 15;
}

static uint32_t hash_pairs(const struct pair *p, int64_t n, uint32_t h)
{
    for (int64_t i = 0; i < n; i++) h = mix(mix(h, (uint32_t)p[i].state), (uint32_t)p[i].frame);
    return h;
}

static bool same_pairs(const struct pair *a, const struct pair *b, int64_t n)
{
    return n == 0 || memcmp(a, b, (size_t)n * sizeof *a) == 0;
}

uint64_t sets_bytes(const struct sets *s)
{
    return (uint64_t)s->n_pairs * sizeof *s->pairs + (uint64_t)s->n_frames * sizeof *s->frames +
           (uint64_t)s->n_sets * (sizeof *s->sets + (uint64_t)s->g->n_classes * sizeof *s->rows);
}

static bool keep_pairs(struct sets *s, const struct pair *p, int64_t n)
{
    if (sets_bytes(s) > SETS_BYTES_MAX) return false;
    if (!rules_room(&s->pairs, s->n_pairs, &s->pairs_room, n + 1, sizeof *s->pairs)) return false;
    if (n) memcpy(s->pairs + s->n_pairs, p, (size_t)n * sizeof *p);
    s->n_pairs += n;
    return true;
}

static uint32_t hash_frame(const struct sets *s, const struct frame *f)
{
    return hash_pairs(s->pairs + f->first, f->n, 1);
}

static uint32_t hash_set(const struct sets *s, const struct set *x)
{
    return hash_pairs(s->pairs + x->first, x->n, 2u + x->accepts);
}

/* Tables stay at most half full. */
static bool grow_table(int32_t **table, int64_t *slots, int64_t n)
{
    if ((n + 1) * 2 <= *slots) return true;
    int64_t want = *slots ? *slots * 2 : 64;
    int32_t *t = calloc((size_t)want, sizeof *t);
    if (!t) return false;
    free(*table);
    *table = t;
    *slots = want;
    return true;
}

static bool grow_frames(struct sets *s)
{
    int64_t before = s->frame_slots;
    if (!grow_table(&s->frame_table, &s->frame_slots, s->n_frames)) return false;
    for (int64_t i = 0; before != s->frame_slots && i < s->n_frames; i++) {
        uint64_t at = hash_frame(s, &s->frames[i]) & (uint64_t)(s->frame_slots - 1);
        while (s->frame_table[at]) at = (at + 1) & (uint64_t)(s->frame_slots - 1);
        s->frame_table[at] = (int32_t)i + 1;
    }
    return true;
}

/* p: sorted, without two of the same. */
static int32_t intern_frame(struct sets *s, const struct pair *p, int64_t n)
{
    if (!grow_frames(s)) return SETS_FAILED;
    uint64_t at = hash_pairs(p, n, 1) & (uint64_t)(s->frame_slots - 1);
    for (; s->frame_table[at]; at = (at + 1) & (uint64_t)(s->frame_slots - 1)) {
        const struct frame *f = &s->frames[s->frame_table[at] - 1];
        if (f->n == n && same_pairs(s->pairs + f->first, p, n)) return s->frame_table[at] - 1;
    }
    struct frame f = { .first = (int32_t)s->n_pairs, .n = (int32_t)n };
    for (int64_t i = 0; i < n; i++)
        if (s->frames[p[i].frame].depth >= f.depth) f.depth = s->frames[p[i].frame].depth + 1;
    if (!rules_room(&s->frames, s->n_frames, &s->frames_room, 1, sizeof f) || !keep_pairs(s, p, n))
        return SETS_FAILED;
    s->frames[s->n_frames] = f;
    s->frame_table[at] = (int32_t)s->n_frames + 1;
    return (int32_t)s->n_frames++;
}

static bool grow_sets(struct sets *s)
{
    int64_t before = s->set_slots;
    if (!grow_table(&s->set_table, &s->set_slots, s->n_sets)) return false;
    for (int64_t i = 0; before != s->set_slots && i < s->n_sets; i++) {
        uint64_t at = hash_set(s, &s->sets[i]) & (uint64_t)(s->set_slots - 1);
        while (s->set_table[at]) at = (at + 1) & (uint64_t)(s->set_slots - 1);
        s->set_table[at] = (int32_t)i + 1;
    }
    return true;
}

static int32_t intern_set(struct sets *s, const struct pair *p, int64_t n, bool accepts)
{
    if (!grow_sets(s)) return SETS_FAILED;
    uint64_t at = hash_pairs(p, n, 2u + accepts) & (uint64_t)(s->set_slots - 1);
    for (; s->set_table[at]; at = (at + 1) & (uint64_t)(s->set_slots - 1)) {
        const struct set *x = &s->sets[s->set_table[at] - 1];
        if (x->n == n && x->accepts == accepts && same_pairs(s->pairs + x->first, p, n))
            return s->set_table[at] - 1;
    }
    int64_t width = s->g->n_classes;
    struct set x = { .first = (int32_t)s->n_pairs, .n = (int32_t)n, .accepts = accepts, .mask = -1 };
    for (int i = 0; i < SLICES; i++) x.uniform[i] = -1;
    if (!rules_room(&s->sets, s->n_sets, &s->sets_room, 1, sizeof x) ||
        !rules_room(&s->rows, s->n_sets * width, &s->rows_room, width, sizeof *s->rows) ||
        !keep_pairs(s, p, n))
        return SETS_FAILED;
    s->sets[s->n_sets] = x;
    for (int64_t i = 0; i < width; i++) s->rows[s->n_sets * width + i] = -1;
    s->set_table[at] = (int32_t)s->n_sets + 1;
    return (int32_t)s->n_sets++;
}

/* Where p is, or would be, among what the closure saw. */
static struct seen_pair *find_seen(struct seen_pair *table, int64_t slots, struct pair p, uint32_t round)
{
    uint64_t at = hash_pairs(&p, 1, 0) & (uint64_t)(slots - 1);
    while (table[at].round == round && !same_pairs(&table[at].pair, &p, 1))
        at = (at + 1) & (uint64_t)(slots - 1);
    return &table[at];
}

static bool grow_seen(struct sets *s)
{
    if ((s->n_seen + 1) * 2 <= s->seen_slots) return true;
    int64_t slots = s->seen_slots ? s->seen_slots * 2 : 64;
    struct seen_pair *table = calloc((size_t)slots, sizeof *table);
    if (!table) return false;
    for (int64_t i = 0; i < s->seen_slots; i++)
        if (s->seen[i].round == s->round) *find_seen(table, slots, s->seen[i].pair, s->round) = s->seen[i];
    free(s->seen);
    s->seen = table;
    s->seen_slots = slots;
    return true;
}

/* Adds a pair to what the closure has still to look at, unless it has seen it. */
static bool visit(struct sets *s, int32_t state, int32_t frame)
{
    if (!s->g->states[state].is_alive) return true;
    struct pair p = { .state = state, .frame = frame };
    if (!grow_seen(s) || !rules_room(&s->todo, s->n_todo, &s->todo_room, 1, sizeof *s->todo)) return false;
    struct seen_pair *seen = find_seen(s->seen, s->seen_slots, p, s->round);
    if (seen->round == s->round) return true;
    *seen = (struct seen_pair){ p, s->round };
    s->todo[s->n_todo++] = p;
    s->n_seen++;
    return true;
}

static void sift(struct sets *s, int64_t at)
{
    const struct automaton_rule *rules = s->g->rules;
    for (;;) {
        int64_t least = at;
        for (int64_t kid = 2 * at + 1; kid <= 2 * at + 2 && kid < s->n_heap; kid++)
            if (rules[s->heap[kid]].order < rules[s->heap[least]].order) least = kid;
        if (least == at) return;
        int32_t t = s->heap[at];
        s->heap[at] = s->heap[least];
        s->heap[least] = t;
        at = least;
    }
}

static void push_rule(struct sets *s, int32_t rule)
{
    const struct automaton_rule *rules = s->g->rules;
    int64_t at = s->n_heap++;
    for (; at > 0 && rules[s->heap[(at - 1) / 2]].order > rules[rule].order; at = (at - 1) / 2)
        s->heap[at] = s->heap[(at - 1) / 2];
    s->heap[at] = rule;
}

static int32_t pop_rule(struct sets *s)
{
    int32_t rule = s->heap[0];
    s->heap[0] = s->heap[--s->n_heap];
    sift(s, 0);
    return rule;
}

static bool add_call(struct sets *s, int32_t rule, int32_t next, int32_t frame)
{
    if (!rules_room(&s->calls, s->n_calls, &s->calls_room, 1, sizeof *s->calls)) return false;
    if (s->first_call[rule] < 0) push_rule(s, rule);
    s->calls[s->n_calls] = (struct call){ .next = next, .frame = frame, .more = s->first_call[rule] };
    s->first_call[rule] = (int32_t)s->n_calls++;
    return true;
}

/* One pair. The end of a rule goes on in each place its frame names; frame 0 is the end of the text. */
static bool look_at(struct sets *s, struct pair p, bool *accepts)
{
    const struct grammar *g = s->g;
    const struct state *x = &g->states[p.state];
    if (++s->work > SETS_WORK_MAX) return false;
    switch (x->kind) {
    case STATE_BYTES:
        if (!rules_room(&s->kernel, s->n_kernel, &s->kernel_room, 1, sizeof p)) return false;
        s->kernel[s->n_kernel++] = p;
        return true;
    case STATE_SPLIT:
        for (int32_t i = 0; i < x->n; i++)
            if (!visit(s, g->edges[x->first + i].to, p.frame)) return false;
        return true;
    case STATE_CALL:
        return add_call(s, x->first, x->n, p.frame) &&
               (!g->rules[x->first].is_nullable || visit(s, x->n, p.frame));
    default:
        if (p.frame == 0) *accepts = true;
        struct frame f = s->frames[p.frame];
        s->work += f.n;
        for (int32_t i = 0; i < f.n; i++) {
            struct pair back = s->pairs[f.first + i];
            if (!visit(s, back.state, back.frame)) return false;
        }
        return true;
    }
}

static int compare(const void *x, const void *y)
{
    const struct pair *a = x, *b = y;
    return a->state != b->state ? (a->state > b->state ? 1 : -1)
                                : (a->frame > b->frame) - (a->frame < b->frame);
}

static bool add_content(struct sets *s, struct pair p)
{
    if (++s->work > SETS_WORK_MAX) return false;
    if (!rules_room(&s->content, s->n_content, &s->content_room, 1, sizeof p)) return false;
    s->content[s->n_content++] = p;
    return true;
}

/* Enters a rule: all calls of it in this closure are known, and are its frame. A call that is the last thing
 * in its own rule goes on where that rule would, so that a list written as "item list" needs no depth. */
static bool enter(struct sets *s, int32_t rule)
{
    s->n_content = 0;
    for (int32_t i = s->first_call[rule]; i >= 0; i = s->calls[i].more) {
        struct call c = s->calls[i];
        if (c.next != 0 || c.frame == 0) {
            if (!add_content(s, (struct pair){ c.next, c.frame })) return false;
            continue;
        }
        for (int32_t k = 0; k < s->frames[c.frame].n; k++)
            if (!add_content(s, s->pairs[s->frames[c.frame].first + k])) return false;
    }
    qsort(s->content, (size_t)s->n_content, sizeof *s->content, compare);
    int64_t n = 0;
    for (int64_t i = 0; i < s->n_content; i++)
        if (n == 0 || compare(&s->content[n - 1], &s->content[i]) != 0) s->content[n++] = s->content[i];
    s->first_call[rule] = -1;
    int32_t frame = intern_frame(s, s->content, n);
    if (frame == SETS_FAILED) return false;
    return s->frames[frame].depth > SETS_DEPTH_MAX || visit(s, s->g->rules[rule].start, frame);
}

static void forget_closure(struct sets *s)
{
    while (s->n_heap > 0) s->first_call[s->heap[--s->n_heap]] = -1;
    if (++s->round == 0) { /* after 2^32 closures the oldest marks would count again */
        if (s->seen_slots) memset(s->seen, 0, (size_t)s->seen_slots * sizeof *s->seen);
        s->round = 1;
    }
    s->n_todo = s->n_kernel = s->n_calls = s->n_seen = 0;
}

/* The set of all that is reached from what was visited. */
static int32_t close_set(struct sets *s)
{
    bool accepts = false, ok = true;
    while (ok && (s->n_todo || s->n_heap))
        ok = s->n_todo ? look_at(s, s->todo[--s->n_todo], &accepts) : enter(s, pop_rule(s));
    int32_t set = SETS_FAILED;
    if (ok) {
        if (s->n_kernel) qsort(s->kernel, (size_t)s->n_kernel, sizeof *s->kernel, compare);
        set = intern_set(s, s->kernel, s->n_kernel, accepts);
    }
    forget_closure(s);
    return set;
}

int32_t sets_start(struct sets *s)
{
    int32_t set = visit(s, s->g->start, 0) ? close_set(s) : SETS_FAILED;
    forget_closure(s);
    return set;
}

/* close_set(), unless the last one began with the same pairs. */
static int32_t close_again(struct sets *s)
{
    if (s->n_last == s->n_todo && same_pairs(s->last, s->todo, s->n_todo)) return s->last_set;
    s->n_last = -1;
    if (!rules_room(&s->last, 0, &s->last_room, s->n_todo, sizeof *s->last)) return SETS_FAILED;
    int64_t n = s->n_todo;
    if (n) memcpy(s->last, s->todo, (size_t)n * sizeof *s->last);
    s->last_set = close_set(s);
    if (s->last_set != SETS_FAILED) s->n_last = n;
    return s->last_set;
}

int32_t sets_step(struct sets *s, int32_t set, int class)
{
    const struct grammar *g = s->g;
    int32_t known = s->rows[(int64_t)set * g->n_classes + class];
    if (known >= 0) return known;
    int byte = g->member[class], low = 0, high = 255;
    bool ok = true;
    for (int32_t i = 0; i < s->sets[set].n && ok; i++) {
        struct pair p = s->pairs[s->sets[set].first + i];
        const struct state *x = &g->states[p.state];
        s->work += 1 + x->n / 8;
        for (int32_t k = 0; k < x->n && ok; k++) {
            const struct edge *edge = &g->edges[x->first + k];
            if (edge->low > byte)
                high = edge->low - 1 < high ? edge->low - 1 : high;
            else if (edge->high < byte)
                low = edge->high + 1 > low ? edge->high + 1 : low;
            else {
                low = edge->low > low ? edge->low : low;
                high = edge->high < high ? edge->high : high;
                ok = visit(s, edge->to, p.frame);
            }
        }
    }
    int32_t to = ok && s->work <= SETS_WORK_MAX ? close_again(s) : SETS_FAILED;
    forget_closure(s);
    int32_t *row = &s->rows[(int64_t)set * g->n_classes];
    for (int c = g->class_of[low]; to != SETS_FAILED && c <= g->class_of[high]; c++) row[c] = to;
    return to;
}

/* All sequences of bytes in ranges[0..n) lead from set to `want`. */
static bool all_lead(struct sets *s, int32_t set, const uint8_t (*ranges)[2], int n, int32_t want)
{
    int last = -1;
    for (int b = ranges[0][0]; b <= ranges[0][1]; b++) {
        if (s->g->class_of[b] == last) continue;
        last = s->g->class_of[b];
        int32_t to = sets_next(s, set, (uint8_t)b);
        if (to <= 0 || (n == 1 ? to != want : !all_lead(s, to, ranges + 1, n - 1, want))) return false;
    }
    return true;
}

static int32_t find_uniform(struct sets *s, int32_t set, const struct slice_chars *chars)
{
    static const struct {
        uint8_t ranges[4][2];
        int n;
    } utf8[] = {
        { { { 0xc2, 0xdf }, { 0x80, 0xbf } }, 2 },
        { { { 0xe0, 0xe0 }, { 0xa0, 0xbf }, { 0x80, 0xbf } }, 3 },
        { { { 0xe1, 0xec }, { 0x80, 0xbf }, { 0x80, 0xbf } }, 3 },
        { { { 0xed, 0xed }, { 0x80, 0x9f }, { 0x80, 0xbf } }, 3 },
        { { { 0xee, 0xef }, { 0x80, 0xbf }, { 0x80, 0xbf } }, 3 },
        { { { 0xf0, 0xf0 }, { 0x90, 0xbf }, { 0x80, 0xbf }, { 0x80, 0xbf } }, 4 },
        { { { 0xf1, 0xf3 }, { 0x80, 0xbf }, { 0x80, 0xbf }, { 0x80, 0xbf } }, 4 },
        { { { 0xf4, 0xf4 }, { 0x80, 0x8f }, { 0x80, 0xbf }, { 0x80, 0xbf } }, 4 },
    };
    int32_t want = SETS_DEAD;
    for (int b = 0; b < 0x80; b++) {
        if (!chars->ascii[b]) continue;
        int32_t to = sets_next(s, set, (uint8_t)b);
        if (to <= 0 || (want != SETS_DEAD && to != want)) return SETS_DEAD;
        want = to;
    }
    for (size_t i = 0; chars->others && i < sizeof utf8 / sizeof *utf8; i++)
        if (!all_lead(s, set, utf8[i].ranges, utf8[i].n, want)) return SETS_DEAD;
    return want;
}

int32_t sets_uniform(struct sets *s, int32_t set, const struct slice_chars *chars, int which)
{
    if (which >= 0 && s->sets[set].uniform[which] >= 0) return s->sets[set].uniform[which];
    int32_t to = find_uniform(s, set, chars);
    if (which >= 0) s->sets[set].uniform[which] = to;
    return to;
}

bool sets_is_closed(struct sets *s, int32_t set, const struct slice_chars *chars)
{
    for (int b = 0; b <= 0xf4; b++)
        if ((b < 0x80 ? chars->ascii[b] : chars->others && b >= 0xc2) &&
            sets_next(s, set, (uint8_t)b) != SETS_DEAD)
            return false;
    return true;
}

bool sets_init(struct sets *s, const struct grammar *g)
{
    *s = (struct sets){ .g = g, .round = 1, .n_last = -1 };
    s->first_call = malloc(((size_t)g->n_rules + 1) * sizeof *s->first_call);
    s->heap = malloc(((size_t)g->n_rules + 1) * sizeof *s->heap);
    if (s->first_call && s->heap) {
        for (int32_t i = 0; i < g->n_rules; i++) s->first_call[i] = -1;
        if (intern_frame(s, NULL, 0) == 0 && intern_set(s, NULL, 0, false) == SETS_DEAD) return true;
    }
    sets_deinit(s);
    return false;
}

void sets_deinit(struct sets *s)
{
    free(s->pairs);
    free(s->frames);
    free(s->sets);
    free(s->rows);
    free(s->frame_table);
    free(s->set_table);
    free(s->last);
    free(s->todo);
    free(s->kernel);
    free(s->content);
    free(s->calls);
    free(s->first_call);
    free(s->heap);
    free(s->seen);
    *s = (struct sets){ 0 };
}

/* Frames only name frames with smaller numbers, so what is needed is marked downwards and copied upwards;
 * numbers keep their order, so what was sorted stays sorted. */
static bool copy_frames(struct sets *to, const struct sets *from, int32_t *number)
{
    for (int64_t i = from->n_frames - 1; i > 0; i--)
        for (int32_t k = 0; number[i] >= 0 && k < from->frames[i].n; k++)
            number[from->pairs[from->frames[i].first + k].frame] = 0;
    number[0] = 0;
    for (int64_t i = 1; i < from->n_frames; i++) {
        if (number[i] < 0) continue;
        struct frame f = from->frames[i];
        to->n_content = 0;
        for (int32_t k = 0; k < f.n; k++) {
            struct pair p = from->pairs[f.first + k];
            if (!add_content(to, (struct pair){ p.state, number[p.frame] })) return false;
        }
        number[i] = intern_frame(to, to->content, f.n);
        if (number[i] == SETS_FAILED) return false;
    }
    return true;
}

bool sets_flush(struct sets *s, int32_t *keep, int n)
{
    struct sets fresh;
    int32_t *number = malloc((size_t)s->n_frames * sizeof *number);
    if (!number || !sets_init(&fresh, s->g)) {
        free(number);
        return false;
    }
    for (int64_t i = 0; i < s->n_frames; i++) number[i] = -1;
    for (int i = 0; i < n; i++)
        for (int32_t k = 0; k < s->sets[keep[i]].n; k++)
            number[s->pairs[s->sets[keep[i]].first + k].frame] = 0;
    bool ok = copy_frames(&fresh, s, number);
    for (int i = 0; i < n && ok; i++) {
        struct set x = s->sets[keep[i]];
        fresh.n_content = 0;
        for (int32_t k = 0; k < x.n && ok; k++) {
            struct pair p = s->pairs[x.first + k];
            ok = add_content(&fresh, (struct pair){ p.state, number[p.frame] });
        }
        int32_t set = ok ? intern_set(&fresh, fresh.content, x.n, x.accepts) : SETS_FAILED;
        ok = set != SETS_FAILED;
        if (ok) keep[i] = set;
    }
    free(number);
    struct sets *drop = ok ? s : &fresh;
    struct sets old = *drop;
    if (ok) *s = fresh;
    sets_deinit(&old);
    return ok;
}
