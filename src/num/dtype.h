/* Element types of stored tensors, by their safetensors names. */
#ifndef NUM_DTYPE_H
#define NUM_DTYPE_H
#include <stdbool.h>
#include <stdint.h>

enum dtype {
    DTYPE_BF16,
    DTYPE_F16,
    DTYPE_F32,
    DTYPE_F8_E4M3,
    DTYPE_U8,
    /* Carried (listed, copied) but never computed with: */
    DTYPE_F64,
    DTYPE_I64,
    DTYPE_I32,
    DTYPE_I16,
    DTYPE_I8,
    DTYPE_BOOL,
    DTYPE_F8_E5M2,
    DTYPE_U16,
    DTYPE_U32,
    DTYPE_U64,
    DTYPE_COUNT
};

const char *dtype_name(enum dtype d);                    /* "BF16" */
bool dtype_from_name(enum dtype *out, const char *name); /* false: no such type */
unsigned dtype_bytes(enum dtype d);                      /* per element */
#endif
