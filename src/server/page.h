/* The chat page at /: one HTML file (page/page.html) with its style and its script, that asks this server and
 * nobody else. To be served as text/html; charset=utf-8 with page_policy. */
#ifndef SERVER_PAGE_H
#define SERVER_PAGE_H
#include <stdbool.h>
#include <stddef.h>

extern const char page_html[]; /* UTF-8; a NUL follows */
extern const size_t page_html_bytes;

enum { PAGE_POLICY_MAX = 512 };
/* The value of the header Content-Security-Policy: only that very style and that very script, data of this
 * origin, pictures from the user. False: out of memory, or no SHA-256 in this OpenSSL. */
bool page_policy(char out[PAGE_POLICY_MAX]);
#endif
