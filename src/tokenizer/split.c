#include "tokenizer/split.h"
#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A class body, and its complement. */
#define SPACE                                                                                                \
    "\\x{9}-\\x{d}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}\\x{" \
    "3000}"
#define NOT_SPACE                                                                                            \
    "\\x{0}-\\x{8}\\x{e}-\\x{1f}\\x{21}-\\x{84}\\x{86}-\\x{9f}\\x{a1}-\\x{167f}\\x{1681}-\\x{1fff}"          \
    "\\x{200b}-\\x{2027}\\x{202a}-\\x{202e}\\x{2030}-\\x{205e}\\x{2060}-\\x{2fff}\\x{3001}-\\x{10ffff}"

enum {
    REGEX_MAX = 16384,          /* bytes; the one in use has 119 */
    MATCH_LIMIT = 1000000,      /* a good expression needs a few steps per byte */
    MATCH_LIMIT_PER_BYTE = 16,  /* a run of spaces is walked a few times, so long texts need more */
    HEAP_LIMIT_KIB = 64 * 1024, /* used where there is no JIT */
    STACK_FIRST = 32 * 1024,
    STACK_MAX = 4 * 1024 * 1024,
};

/* Oniguruma and PCRE2 read these alike; others (\h, \v, \w, \K, nested classes, verbs) they do not. */
static const char ESCAPES[] = "sSpPrntfdx";
static const char *const GROUPS[] = { "?:", "?i:", "?=", "?!", "?<=", "?<!", "?>" };

static bool group_is_known(const char *s)
{
    if (*s == '*') return false;
    for (size_t i = 0; i < sizeof GROUPS / sizeof *GROUPS; i++)
        if (strncmp(s, GROUPS[i], strlen(GROUPS[i])) == 0) return true;
    return *s != '?';
}

static bool is_foreign(const char *s, bool in_class)
{
    if (*s == '\\') return !s[1] || (isalnum((unsigned char)s[1]) && !strchr(ESCAPES, s[1]));
    if (in_class) return *s == '[' || (*s == '&' && s[1] == '&');
    if (*s == '[') return s[1] == ']' || (s[1] == '^' && s[2] == ']'); /* a member, or an empty class? */
    return *s == '(' && !group_is_known(s + 1);
}

bool split_rewrite(char **out, const char *regex, struct err *e)
{
    size_t bytes = strlen(regex), room = bytes * (sizeof NOT_SPACE + 2) + 1;
    *out = NULL;
    if (bytes > REGEX_MAX)
        return err_set(e, ERR_LIMIT, "expression of %zu bytes, at most %d", bytes, REGEX_MAX);
    char *to = malloc(room);
    if (!to) return err_memory(e, "expression", room);
    *out = to;
    bool in_class = false;
    for (const char *s = regex; *s; s++) {
        if (is_foreign(s, in_class))
            return err_set(e, ERR_UNSUPPORTED, "\"%.8s\" at byte %zu of the expression is not supported", s,
                           (size_t)(s - regex));
        if (*s == '\\' && (s[1] == 's' || s[1] == 'S')) {
            to += sprintf(to, in_class ? "%s" : "[%s]", *++s == 's' ? SPACE : NOT_SPACE);
        } else if (*s == '\\') {
            *to++ = *s;
            *to++ = *++s;
        } else {
            *to++ = *s;
            if (*s == '[') in_class = true;
            if (*s == ']') in_class = false;
        }
    }
    *to = 0;
    return true;
}

static bool compile_rewritten(struct split *s, const char *regex, struct err *e)
{
    int code;
    PCRE2_SIZE at;
    uint32_t options = PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C;
    s->code = pcre2_compile((PCRE2_SPTR)regex, PCRE2_ZERO_TERMINATED, options, &code, &at, NULL);
    if (!s->code) {
        PCRE2_UCHAR text[160] = "";
        pcre2_get_error_message(code, text, sizeof text);
        return err_set(e, ERR_UNSUPPORTED, "PCRE2 refuses the expression at byte %zu: %s", (size_t)at,
                       (char *)text);
    }
    uint32_t can_be_empty = 0;
    pcre2_pattern_info(s->code, PCRE2_INFO_MATCHEMPTY, &can_be_empty);
    if (can_be_empty) return err_set(e, ERR_UNSUPPORTED, "the expression can match the empty string");
    size_t jit_bytes = 0;
    pcre2_jit_compile(s->code,
                      PCRE2_JIT_COMPLETE); /* without JIT the interpreter gives the same matches, slowly */
    pcre2_pattern_info(s->code, PCRE2_INFO_JITSIZE, &jit_bytes);
    s->has_jit = jit_bytes > 0;
    return true;
}

bool split_compile(struct split *s, const char *regex, struct err *e)
{
    *s = (struct split){ 0 };
    char *rewritten = NULL;
    bool ok = split_rewrite(&rewritten, regex, e) && compile_rewritten(s, rewritten, e);
    free(rewritten);
    if (!ok) split_free(s);
    return ok;
}

void split_free(struct split *s)
{
    pcre2_code_free(s->code);
    *s = (struct split){ 0 };
}

bool split_work_init(struct split_work *w, const struct split *s, size_t text_bytes, struct err *e)
{
    w->split = s;
    w->match = pcre2_match_data_create(1, NULL);
    w->context = pcre2_match_context_create(NULL);
    if (s->has_jit) w->stack = pcre2_jit_stack_create(STACK_FIRST, STACK_MAX, NULL);
    if (!w->match || !w->context || (s->has_jit && !w->stack)) return err_memory(e, "PCRE2", STACK_FIRST);
    size_t limit = MATCH_LIMIT + text_bytes * MATCH_LIMIT_PER_BYTE;
    pcre2_set_match_limit(w->context, limit < UINT32_MAX ? (uint32_t)limit : UINT32_MAX);
    pcre2_set_heap_limit(w->context, HEAP_LIMIT_KIB);
    if (w->stack) pcre2_jit_stack_assign(w->context, NULL, w->stack);
    return true;
}

void split_work_deinit(struct split_work *w)
{
    pcre2_jit_stack_free(w->stack);
    pcre2_match_context_free(w->context);
    pcre2_match_data_free(w->match);
    *w = (struct split_work){ 0 };
}

static bool match_failed(int code, size_t at, struct err *e)
{
    PCRE2_UCHAR text[160] = "";
    pcre2_get_error_message(code, text, sizeof text);
    return err_set(e, code == PCRE2_ERROR_NOMEMORY ? ERR_MEMORY : ERR_LIMIT,
                   "the Split expression gave up at byte %zu of the text: %s", at, (char *)text);
}

bool split_next(struct split_work *w, const char *text, size_t bytes, size_t at, size_t *begin, size_t *end,
                struct err *e)
{
    PCRE2_SPTR s = (PCRE2_SPTR)text;
    const pcre2_code *code = w->split->code;
    int rc = w->split->has_jit ? pcre2_jit_match(code, s, bytes, at, 0, w->match, w->context)
                               : pcre2_match(code, s, bytes, at, PCRE2_NO_UTF_CHECK, w->match, w->context);
    *begin = *end = bytes;
    if (rc == PCRE2_ERROR_NOMATCH) return true;
    if (rc < 0) return match_failed(rc, at, e);
    const PCRE2_SIZE *found = pcre2_get_ovector_pointer(w->match);
    *begin = found[0];
    *end = found[1];
    /* \K and (*ACCEPT) make what the pattern's own description rules out */
    if (*begin >= at && *begin < *end) return true;
    return err_set(e, ERR_UNSUPPORTED, "the Split expression matches nothing at byte %zu of the text", at);
}
