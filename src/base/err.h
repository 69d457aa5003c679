/* Errors of the world (files, requests, limits), carried by value to whoever can act on them.
 * A function that can fail returns bool, true means done, and takes a caller-owned struct err last. Who finds
 * the fault says what with err_set; each caller on the way up says where with err_note, which puts its text
 * in front: model-00003.safetensors: tensor 'mtp.fc.weight': bytes [64, 96) of 80 */
#ifndef BASE_ERR_H
#define BASE_ERR_H
#include <stdbool.h>

enum err_code {
    ERR_NONE,
    ERR_IO,          /* the operating system refused: message ends in strerror */
    ERR_FORMAT,      /* a file does not say what its format requires */
    ERR_UNSUPPORTED, /* a valid file that asks for something this program does not do */
    ERR_LIMIT,       /* more than the configured or the model's maximum */
    ERR_MEMORY,
    ERR_ARGUMENT, /* the user's request makes no sense */
    ERR_BUSY,     /* full for the moment: try again later */
};

struct err {
    enum err_code code;
    char text[1000];
};

/* Both return false, so that `return err_set(...)` and `... || err_note(...)` read well. e may be NULL. */
bool err_set(struct err *e, enum err_code code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
bool err_note(struct err *e, const char *format, ...) __attribute__((format(printf, 2, 3)));
bool err_errno(struct err *e, const char *what); /* ERR_IO: "what: strerror(errno)" */
bool err_memory(struct err *e, const char *what, unsigned long long bytes);
#endif
