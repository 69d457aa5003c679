/* Which paths are answered, by what, and who may ask: everything else needs a key and is 404. */
#ifndef SERVER_ROUTES_H
#define SERVER_ROUTES_H
#include "server/api.h"

enum route_kind {
    ROUTE_API, /* an exchange */
    ROUTE_HEALTH,
    ROUTE_READY,
    ROUTE_METRICS,
    ROUTE_VERSION,
    ROUTE_LOAD,
    ROUTE_PAGE,
    ROUTE_ADMIN, /* of admin.c, not in this table */
    ROUTE_ABSENT /* known elsewhere, not of this model: 404 with a sentence */
};

struct route {
    const char *path; /* ends in '/': what follows is the argument */
    const char *method;
    enum route_kind kind;
    enum api_route api; /* of ROUTE_API; else whose shape errors have */
    bool is_public;     /* needs no key */
    const char *says;   /* of ROUTE_ABSENT */
};

/* NULL: no such path. *path_exists: with another method. A HEAD is a GET. *argument: behind the path, not
 * decoded. path as sent: what is percent-encoded matches nothing but an argument. */
const struct route *route_find(const char *method, const char *path, const char **argument,
                               bool *path_exists);
/* For an Allow header: "GET, HEAD, OPTIONS". */
const char *route_methods(const char *path);
const struct route *route_at(int i); /* the whole table; NULL ends it */
#endif
