#include "server/page.h"
#include <openssl/evp.h>
#include <stdio.h>
#include <string.h>

__asm__(".section .rodata\n"
        ".global page_html, page_html_bytes\n"
        "page_html: .incbin \"src/server/page/page.html\"\n"
        "1: .byte 0\n"
        ".balign 8\n"
        "page_html_bytes: .quad 1b - page_html\n"
        ".previous\n");

enum { HASH_TEXT = 64 }; /* 44 characters of Base64 */

/* The hash of what stands between two tags, each of which occurs once. Source: CSP Level 3, 6.7.2.3. */
static bool hash_between(char out[HASH_TEXT], const char *open, const char *close)
{
    unsigned char digest[EVP_MAX_MD_SIZE];
    unsigned int bytes;
    const char *from = strstr(page_html, open), *to = from ? strstr(from, close) : NULL;
    if (!to) return false;
    from += strlen(open);
    if (!EVP_Digest(from, (size_t)(to - from), digest, &bytes, EVP_sha256(), NULL)) return false;
    return EVP_EncodeBlock((unsigned char *)out, digest, (int)bytes) > 0;
}

bool page_policy(char out[PAGE_POLICY_MAX])
{
    char style[HASH_TEXT], script[HASH_TEXT];
    if (!hash_between(style, "<style>", "</style>") || !hash_between(script, "<script>", "</script>"))
        return false;
    int n = snprintf(out, PAGE_POLICY_MAX,
                     "default-src 'none'; style-src 'sha256-%s'; script-src 'sha256-%s'; connect-src 'self'; "
                     "img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
                     "require-trusted-types-for 'script'; trusted-types 'none'",
                     style, script);
    return n > 0 && n < PAGE_POLICY_MAX;
}
