/* Text of any content inside Markdown: what a file's name or another card holds must not become markup.
 * Source: GitHub Flavored Markdown 0.29, sections 2.4, 4.10, 6.1. Texts are UTF-8; control characters become
 * spaces. */
#ifndef QUANTIZE_MARKDOWN_H
#define QUANTIZE_MARKDOWN_H
#include <stdbool.h>
#include <stdio.h>

void markdown_text(FILE *f, const char *text); /* plain, also in a table */
/* A code span; in a table's cell a bar needs an escape that would show anywhere else. */
void markdown_code(FILE *f, const char *text, bool in_table);
#endif
