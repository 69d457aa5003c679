/* The tags of tool calls. */
#ifndef TOKENIZER_REPLY_TAGS_H
#define TOKENIZER_REPLY_TAGS_H
#include "tokenizer/jinja/pystr.h"

#define OPEN          "<tool_call>"
#define CLOSE         "</tool_call>"
#define FUNCTION      "<function="
#define END_FUNCTION  "</function>"
#define PARAMETER     "<parameter="
#define END_PARAMETER "</parameter>"

static inline bool starts(struct span s, const char *marker)
{
    return pystr_starts(s, span_of(marker));
}

/* s may become the marker when more comes. */
static inline bool may_start(struct span s, const char *marker)
{
    return s.bytes < strlen(marker) && pystr_starts(span_of(marker), s);
}
#endif
