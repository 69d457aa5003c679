#include "server/fault.h"
#include "tokenizer/utf8.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { RETRY_SECONDS = 1 };

/* Messages quote requests and are cut to fit: an incomplete character at the end goes. */
static void format_text(char *out, size_t size, const char *format, va_list args)
{
    vsnprintf(out, size, format, args);
    out[utf8_valid_prefix(out, strlen(out))] = 0;
}

void param_set(struct param *p, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    format_text(p->text, sizeof p->text, format, args);
    va_end(args);
}

bool fault_set(struct fault *f, const char *param, const char *format, ...)
{
    va_list args;
    *f = (struct fault){ .status = 400 };
    param_set(&f->param, "%s", param ? param : "");
    va_start(args, format);
    format_text(f->text, sizeof f->text, format, args);
    va_end(args);
    return false;
}

bool fault_status(struct fault *f, int status, const char *code, const char *format, ...)
{
    va_list args;
    *f = (struct fault){ .status = status, .code = code };
    if (status == 429 || status == 503) f->retry_after = RETRY_SECONDS;
    va_start(args, format);
    format_text(f->text, sizeof f->text, format, args);
    va_end(args);
    return false;
}

bool fault_memory(struct fault *f)
{
    return fault_status(f, 503, NULL, "the server is out of memory");
}

/* text is the name, or a part of it: "stop[3]". */
static bool is_named(const char *text, const char *name)
{
    size_t n = strlen(name);
    return strncmp(text, name, n) == 0 && (!text[n] || strchr(".[: ", text[n]));
}

static void rename_start(char *text, size_t size, const char *from, const char *to)
{
    char copy[sizeof((struct fault *)0)->text];
    snprintf(copy, sizeof copy, "%s", text + strlen(from));
    snprintf(text, size, "%s%s", to, copy);
    text[utf8_valid_prefix(text, strlen(text))] = 0;
}

bool fault_rename(struct fault *f, const char *const names[][2])
{
    for (; names[0][0]; names++) {
        const char *from = names[0][0], *to = names[0][1];
        if (!is_named(f->param.text, from)) continue;
        rename_start(f->param.text, sizeof f->param.text, from, to);
        if (is_named(f->text, from)) rename_start(f->text, sizeof f->text, from, to);
        break;
    }
    return false;
}

static int status_of(enum err_code code)
{
    switch (code) {
    case ERR_BUSY:
    case ERR_MEMORY: return 503;
    case ERR_LIMIT: return 413;
    case ERR_FORMAT:
    case ERR_UNSUPPORTED:
    case ERR_ARGUMENT: return 400;
    default: return 500;
    }
}

bool fault_from_err(struct fault *f, const char *param, const struct err *e)
{
    fault_status(f, status_of(e->code), NULL, "%s", e->text);
    param_set(&f->param, "%s", param ? param : "");
    return false;
}

/* Anthropic's words, then OpenAI's. */
static const char *type_of(int status, bool is_anthropic)
{
    switch (status) {
    case 401: return is_anthropic ? "authentication_error" : "invalid_request_error";
    case 403: return is_anthropic ? "permission_error" : "invalid_request_error";
    case 404: return is_anthropic ? "not_found_error" : "invalid_request_error";
    case 413: return is_anthropic ? "request_too_large" : "invalid_request_error";
    case 429: return "rate_limit_error";
    case 503: return is_anthropic ? "overloaded_error" : "service_unavailable";
    default: break;
    }
    return status < 500 ? "invalid_request_error" : is_anthropic ? "api_error" : "server_error";
}

void fault_write(struct json_out *o, enum api_route route, int status, const char *type, const char *param,
                 const char *code, const char *message)
{
    bool is_anthropic = route == API_MESSAGES || route == API_COUNT_TOKENS;
    json_out_open(o, '{');
    if (is_anthropic) json_out_key_text(o, "type", "error");
    json_out_key_open(o, "error", '{');
    json_out_key_text(o, "type", type ? type : type_of(status, is_anthropic));
    json_out_key_text(o, "message", message);
    if (!is_anthropic) {
        json_out_key_text(o, "param", param && *param ? param : NULL);
        json_out_key_text(o, "code", code);
    }
    json_out_close(o, '}');
    json_out_close(o, '}');
}

char *api_error(enum api_route route, int status, const char *type, const char *param, const char *message)
{
    struct json_out o = { 0 };
    fault_write(&o, route, status, type, param, NULL, message);
    json_out_raw(&o, "", 1);
    if (!o.failed) return o.data;
    json_out_deinit(&o);
    return NULL;
}
