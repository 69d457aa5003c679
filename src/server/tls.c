#include "server/tls.h"
#include <openssl/err.h>
#include <stdio.h>
#include <string.h>

/* OpenSSL's own words for what went wrong last. */
static bool refused(const char *flag, const char *path, struct err *e)
{
    unsigned long code = ERR_peek_last_error();
    const char *reason = ERR_reason_error_string(code);
    ERR_clear_error();
    return err_set(e, ERR_FORMAT, "%s: %s: %s", flag, path, reason ? reason : "cannot be read");
}

static int give_password(char *out, int size, int writing, void *password)
{
    (void)writing;
    if (!password) return -1; /* never ask on a terminal */
    size_t n = strlen(password);
    if (n >= (size_t)size) return -1;
    memcpy(out, password, n + 1);
    return (int)n;
}

static bool fill(SSL_CTX *c, const struct tls_files *f, struct err *e)
{
    SSL_CTX_set_default_passwd_cb(c, give_password);
    SSL_CTX_set_default_passwd_cb_userdata(c, (void *)(uintptr_t)f->password);
    SSL_CTX_set_options(c, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_COMPRESSION);
    if (!SSL_CTX_set_min_proto_version(c, TLS1_2_VERSION)) return refused("TLS", "1.2", e);
    if (SSL_CTX_use_certificate_chain_file(c, f->certificate) != 1)
        return refused("--ssl-certfile", f->certificate, e);
    if (SSL_CTX_use_PrivateKey_file(c, f->key, SSL_FILETYPE_PEM) != 1 || SSL_CTX_check_private_key(c) != 1)
        return refused("--ssl-keyfile", f->key, e);
    if (!f->client_ca) return true;
    STACK_OF(X509_NAME) *names = SSL_load_client_CA_file(f->client_ca);
    if (!names || SSL_CTX_load_verify_locations(c, f->client_ca, NULL) != 1) {
        sk_X509_NAME_pop_free(names, X509_NAME_free);
        return refused("--ssl-ca-certs", f->client_ca, e);
    }
    SSL_CTX_set_client_CA_list(c, names);
    SSL_CTX_set_verify(c, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
    static const unsigned char id[] = "quench"; /* sessions of verified clients need a context to resume in */
    SSL_CTX_set_session_id_context(c, id, sizeof id - 1);
    return true;
}

bool tls_load(SSL_CTX **out, const struct tls_files *f, struct err *e)
{
    *out = NULL;
    if (!f->certificate && !f->key && !f->client_ca) return true;
    if (!f->certificate || !f->key)
        return err_set(e, ERR_ARGUMENT, "TLS needs both --ssl-certfile and --ssl-keyfile");
    SSL_CTX *c = SSL_CTX_new(TLS_server_method());
    if (!c) return err_memory(e, "TLS", 0);
    if (fill(c, f, e)) {
        *out = c;
        return true;
    }
    SSL_CTX_free(c);
    return false;
}
