/* The embedded page against its file, its policy against sha256sum. What it does in a browser:
 * tools/test_page.py. */
#include "base/file.h"
#include "server/page.h"
#include <setjmp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>
#include <openssl/evp.h>
#include <unistd.h>

static void page_is_the_file(void **state)
{
    (void)state;
    char *text;
    size_t bytes;
    struct err e = { 0 };
    if (!file_read(&text, &bytes, "src/server/page/page.html", 1 << 20, &e)) fail_msg("%s", e.text);
    assert_int_equal(bytes, page_html_bytes);
    assert_memory_equal(text, page_html, bytes);
    assert_int_equal(page_html[page_html_bytes], 0);
    free(text);
}

static int count(const char *word)
{
    int n = 0;
    for (const char *p = page_html; (p = strstr(p, word)); p++) n++;
    return n;
}

/* The policy would stop these in the browser; here they are named. */
static void nothing_is_fetched_or_evaluated(void **state)
{
    static const char *const never[] = { "innerHTML",      "outerHTML",    "insertAdjacentHTML",
                                         "document.write", "eval(",        "new Function",
                                         "src=\"",         "localStorage", "@import",
                                         "url(",           "onclick=",     "style=\"" };
    (void)state;
    for (size_t i = 0; i < sizeof never / sizeof *never; i++)
        if (count(never[i])) fail_msg("the page says %s", never[i]);
    assert_int_equal(count("<script>"), 1);
    assert_int_equal(count("<style>"), 1);
}

static void hex_of(char *hex, const char *begin, const char *end)
{
    char path[] = "/tmp/quench-page-XXXXXX", command[128];
    struct err e = { 0 };
    const char *from = strstr(page_html, begin) + strlen(begin);
    int fd = mkstemp(path);
    assert_true(fd >= 0 && file_write_all(fd, from, (size_t)(strstr(from, end) - from), &e));
    close(fd);
    snprintf(command, sizeof command, "sha256sum %s", path);
    FILE *f = popen(command, "r");
    assert_non_null(f);
    assert_int_equal(fscanf(f, "%64s", hex), 1);
    pclose(f);
    unlink(path);
}

static void policy_has_the_digests(void **state)
{
    static const char *const parts[][3] = { { "style-src 'sha256-", "<style>", "</style>" },
                                            { "script-src 'sha256-", "<script>", "</script>" } };
    char policy[PAGE_POLICY_MAX];
    (void)state;
    assert_true(page_policy(policy));
    assert_non_null(strstr(policy, "default-src 'none'"));
    assert_null(strstr(policy, "unsafe"));
    for (int i = 0; i < 2; i++) {
        char want[65], found[97] = "";
        unsigned char digest[33];
        const char *text = strstr(policy, parts[i][0]);
        assert_non_null(text);
        assert_int_equal(EVP_DecodeBlock(digest, (const unsigned char *)text + strlen(parts[i][0]), 44), 33);
        for (int k = 0; k < 32; k++) snprintf(found + 2 * k, 3, "%02x", digest[k]);
        hex_of(want, parts[i][1], parts[i][2]);
        assert_string_equal(found, want);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(page_is_the_file),
        cmocka_unit_test(nothing_is_fetched_or_evaluated),
        cmocka_unit_test(policy_has_the_digests),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
