#include "base/err.h"
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

bool err_set(struct err *e, enum err_code code, const char *format, ...)
{
    if (!e) return false;
    e->code = code;
    va_list args;
    va_start(args, format);
    vsnprintf(e->text, sizeof e->text, format, args);
    va_end(args);
    return false;
}

bool err_note(struct err *e, const char *format, ...)
{
    if (!e) return false;
    char text[sizeof e->text];
    va_list args;
    va_start(args, format);
    int n = vsnprintf(text, sizeof text - 2, format, args);
    va_end(args);
    if (n < 0) return false;
    size_t used = (size_t)n < sizeof text - 3 ? (size_t)n : sizeof text - 3;
    memcpy(text + used, ": ", 2);
    used += 2;
    size_t keep = strnlen(e->text, sizeof e->text - 1 - used);
    memcpy(text + used, e->text, keep);
    text[used + keep] = 0;
    memcpy(e->text, text, used + keep + 1);
    return false;
}

bool err_errno(struct err *e, const char *what)
{
    return err_set(e, ERR_IO, "%s: %s", what, strerror(errno));
}

bool err_memory(struct err *e, const char *what, unsigned long long bytes)
{
    return err_set(e, ERR_MEMORY, "no memory for %s (%llu bytes)", what, bytes);
}
