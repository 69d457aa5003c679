/* The certificate and key of TLS 1.2 and later, and clients' certificates where they are asked for. */
#ifndef SERVER_TLS_H
#define SERVER_TLS_H
#include "base/err.h"
#include <openssl/ssl.h>

struct tls_files {
    const char *certificate, *key; /* PEM; both or neither */
    const char *password;          /* of the key, or NULL */
    const char *client_ca;         /* clients must show a certificate signed by one of these; or NULL */
};

/* *out: NULL without files. Errors name the file and the flag. SSL_CTX_free. */
bool tls_load(SSL_CTX **out, const struct tls_files *f, struct err *e);
#endif
