/* Lines from standard input: with editing and a history where it is a terminal, plain where it is not. */
#ifndef CLI_LINE_H
#define CLI_LINE_H
#include "base/err.h"
#include <stdbool.h>

struct line;
bool line_open(struct line **out, const char *prompt, struct err *e);
void line_close(struct line *l); /* saves the history; NULL is fine */
bool line_is_interactive(const struct line *l);
/* The next line without its newline, borrowed until the next call; NULL at the end of the input. */
const char *line_next(struct line *l);
#endif
