/* Images by URL, for servers that were told where from: http and https, GET, nothing else. A host is one of
 * those listed, letter by letter; it is looked up once, and the address that is connected to is the one that
 * was judged. Addresses of private networks are refused whatever name they have, but for those that are
 * listed as numbers with their port. Certificates are verified. No redirects, no credentials, no proxy. */
#ifndef SERVER_FETCH_H
#define SERVER_FETCH_H
#include "base/err.h"
#include <stdbool.h>
#include <stddef.h>
#include <sys/socket.h>

struct fetch_rules {
    const char *const
        *hosts; /* "example.org": at its scheme's port; "example.org:8443"; "*": all public ones */
    int n_hosts;
};

struct fetch_url {
    bool tls;
    char host[254]; /* in lower case */
    int port;
    bool is_address;  /* the host is an IPv4 address */
    const char *path; /* from the first '/' or '?' on, borrow; without the fragment */
    size_t path_bytes;
};

/* Strict: printable ASCII without backslashes, no user, letters, digits, '-' and '.' for a host, addresses as
 * four decimal numbers only. */
bool fetch_parse(struct fetch_url *out, const char *url, struct err *e);
/* *by_number: listed as an address with a port. */
bool fetch_allows(const struct fetch_rules *r, const struct fetch_url *u, bool *by_number);
bool fetch_is_public(const struct sockaddr *a);

/* What is there as a data: URL, malloc'd; `until` on clock_seconds. Blocks until then at most. ERR_ARGUMENT:
 * not allowed, and nothing was connected to; ERR_LIMIT: larger than bytes_max; ERR_FORMAT: what was answered
 * is of no use. Sentences have the host, not the address. */
bool fetch_data_url(char **out, size_t *bytes, const struct fetch_rules *r, const char *url, size_t bytes_max,
                    double until, struct err *e);
#endif
