/* Escapes. */
#include "quantize/markdown.h"
#include <string.h>

static bool is_control(char c)
{
    return (unsigned char)c < 0x20 || c == 0x7f;
}

void markdown_text(FILE *f, const char *text)
{
    for (const char *p = text; *p; p++) {
        if (strchr("\\`*_{}[]<>()#!|~&$@:\"'", *p)) fputc('\\', f);
        fputc(is_control(*p) ? ' ' : *p, f);
    }
}

static int longest_fence(const char *text)
{
    int longest = 0, run = 0;
    for (; *text; text++) {
        run = *text == '`' ? run + 1 : 0;
        longest = run > longest ? run : longest;
    }
    return longest;
}

static void fence(FILE *f, int n)
{
    for (int i = 0; i < n; i++) fputc('`', f);
}

/* A fence longer than any run of backticks inside; a space keeps backticks and spaces at the ends apart from
 * it. */
void markdown_code(FILE *f, const char *text, bool in_table)
{
    size_t n = strlen(text);
    int ticks = longest_fence(text) + 1;
    bool pad = n == 0 || strchr("` ", text[0]) || strchr("` ", text[n - 1]);
    fence(f, ticks);
    if (pad) fputc(' ', f);
    for (const char *p = text; *p; p++) {
        if (*p == '|' && in_table) fputc('\\', f);
        fputc(is_control(*p) ? ' ' : *p, f);
    }
    if (pad) fputc(' ', f);
    fence(f, ticks);
}
