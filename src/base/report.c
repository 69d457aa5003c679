#include "base/report.h"
#include <stdarg.h>
#include <stdio.h>

void report_warn(const struct report *r, const char *format, ...)
{
    if (!r || !r->warn) return;
    char text[1000];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    r->warn(r->ctx, text);
}
