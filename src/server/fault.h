/* What is wrong with a request, as its client is told. */
#ifndef SERVER_FAULT_H
#define SERVER_FAULT_H
#include "base/err.h"
#include "server/api.h"
#include "server/json_out.h"

/* A field's name, put together; cut where it is very long. */
struct param {
    char text[120];
};
void param_set(struct param *p, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Zero-initialise: nothing is wrong. */
struct fault {
    int status;         /* of HTTP; 0: nothing */
    const char *code;   /* for programs, static; NULL: none */
    int retry_after;    /* seconds; 0: not said */
    struct param param; /* the field: "messages[0].content"; "": none */
    char text[1000];
};

/* All return false. The first: status 400. param may be NULL. */
bool fault_set(struct fault *f, const char *param, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
bool fault_status(struct fault *f, int status, const char *code, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
/* The status follows from the code; memory and a full queue are 503. */
bool fault_from_err(struct fault *f, const char *param, const struct err *e);
bool fault_memory(struct fault *f);
/* A field of another name, {as it was called, as the client calls it}, {NULL} at the end: in the field and at
 * the beginning of the sentence. Returns false. */
bool fault_rename(struct fault *f, const char *const names[][2]);

/* The body of an error, in the route's own shape. type NULL: what goes with the status. */
void fault_write(struct json_out *o, enum api_route route, int status, const char *type, const char *param,
                 const char *code, const char *message);
#endif
