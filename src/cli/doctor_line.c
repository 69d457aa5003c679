#include "cli/doctor.h"
#include <stdarg.h>
#include <stdio.h>

static const char *const words[] = { "ok", "warn", "FAIL" }, *const json_words[] = { "ok", "warn", "fail" };

static void add_json(struct doctor *d, enum doctor_state state, const char *check, const char *text,
                     const char *advice)
{
    json_t *line =
        json_pack("{s:s, s:s, s:o, s:o}", "check", check, "state", json_words[state], "text",
                  common_json_path(text), "advice", advice ? common_json_path(advice) : json_null());
    json_array_append_new(d->lines, line);
}

void doctor_say(struct doctor *d, enum doctor_state state, const char *check, const char *advice,
                const char *format, ...)
{
    char text[1200];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    d->counts[state]++;
    if (d->lines) {
        add_json(d, state, check, text, advice);
        return;
    }
    printf("%-5s %-11s %s\n", words[state], check, text);
    if (advice) printf("%-5s %-11s -> %s\n", "", "", advice);
    fflush(stdout);
}
