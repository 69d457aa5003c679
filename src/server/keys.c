#include "server/keys.h"
#include "base/file.h"
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

enum { FILE_BYTES_MAX = 1 << 20 };

static bool digest(uint8_t out[KEY_DIGEST], const char *domain, const void *bytes, size_t n)
{
    EVP_MD_CTX *c = EVP_MD_CTX_new();
    bool ok = c && EVP_DigestInit_ex(c, EVP_sha256(), NULL) && EVP_DigestUpdate(c, domain, strlen(domain)) &&
              EVP_DigestUpdate(c, bytes, n) && EVP_DigestFinal_ex(c, out, NULL);
    EVP_MD_CTX_free(c);
    return ok;
}

static bool add(struct keys *k, const char *key, size_t n, struct err *e)
{
    if (n < KEY_BYTES_MIN || n > KEY_BYTES_MAX)
        return err_set(e, ERR_ARGUMENT, "a key has %zu bytes, expected %d to %d", n, KEY_BYTES_MIN,
                       KEY_BYTES_MAX);
    for (size_t i = 0; i < n; i++)
        if (key[i] <= ' ' || key[i] > '~')
            return err_set(e, ERR_ARGUMENT, "byte %zu of a key is not printable ASCII", i);
    void *grown = realloc(k->digests, (k->n + 1) * sizeof *k->digests);
    if (!grown) return err_memory(e, "keys", n);
    k->digests = grown;
    return digest(k->digests[k->n++], "", key, n) || err_set(e, ERR_IO, "SHA-256 is not available");
}

static bool add_lines(struct keys *k, char *text, struct err *e)
{
    int line = 1;
    for (char *p = text; *p; line++) {
        size_t n = strcspn(p, "\n"), used = n;
        while (used > 0 && (p[used - 1] == '\r' || p[used - 1] == ' ')) used--;
        if (used > 0 && *p != '#' && !add(k, p, used, e)) return err_note(e, "line %d", line);
        p += n + (p[n] == '\n');
    }
    return true;
}

static bool add_file(struct keys *k, const char *path, struct err *e)
{
    char *text;
    size_t bytes;
    if (!file_read(&text, &bytes, path, FILE_BYTES_MAX, e)) return err_note(e, "--api-key-file");
    size_t before = k->n;
    bool ok = add_lines(k, text, e) &&
              (k->n > before || err_set(e, ERR_FORMAT, "no key in it; expected one a line"));
    OPENSSL_cleanse(text, bytes);
    free(text);
    return ok || err_note(e, "--api-key-file: %s", path);
}

bool keys_load(struct keys *k, const char *flag, const char *const *words, int n_words, const char *path,
               struct err *e)
{
    *k = (struct keys){ 0 };
    bool ok = true;
    for (int i = 0; ok && i < n_words; i++)
        ok = add(k, words[i], strlen(words[i]), e) || err_note(e, "%s", flag);
    if (ok && (!path || add_file(k, path, e))) return true;
    keys_free(k);
    return false;
}

void keys_free(struct keys *k)
{
    free(k->digests);
    *k = (struct keys){ 0 };
}

bool keys_find(const struct keys *k, const char *key, uint64_t *owner, uint8_t salt[KEY_DIGEST])
{
    uint8_t given[KEY_DIGEST];
    size_t n = strlen(key);
    bool found = false;
    if (n > KEY_BYTES_MAX || !digest(given, "", key, n)) return false;
    for (size_t i = 0; i < k->n; i++) found |= CRYPTO_memcmp(k->digests[i], given, KEY_DIGEST) == 0;
    /* not the digest itself: owners and salts go further than keys may */
    if (!found || !digest(salt, "quench prefix cache", given, KEY_DIGEST)) return false;
    memcpy(owner, salt, sizeof *owner);
    return true;
}

const char *keys_bearer(const char *authorization)
{
    if (!authorization || strncasecmp(authorization, "Bearer ", 7) != 0) return NULL;
    authorization += 7;
    return authorization + strspn(authorization, " ");
}
