#include "num/dtype.h"
#include <string.h>

static const struct {
    const char *name;
    unsigned bytes;
} types[DTYPE_COUNT] = {
    [DTYPE_BF16] = { "BF16", 2 },       [DTYPE_F16] = { "F16", 2 },   [DTYPE_F32] = { "F32", 4 },
    [DTYPE_F8_E4M3] = { "F8_E4M3", 1 }, [DTYPE_U8] = { "U8", 1 },     [DTYPE_F64] = { "F64", 8 },
    [DTYPE_I64] = { "I64", 8 },         [DTYPE_I32] = { "I32", 4 },   [DTYPE_I16] = { "I16", 2 },
    [DTYPE_I8] = { "I8", 1 },           [DTYPE_BOOL] = { "BOOL", 1 }, [DTYPE_F8_E5M2] = { "F8_E5M2", 1 },
    [DTYPE_U16] = { "U16", 2 },         [DTYPE_U32] = { "U32", 4 },   [DTYPE_U64] = { "U64", 8 },
};

const char *dtype_name(enum dtype d)
{
    return types[d].name;
}

bool dtype_from_name(enum dtype *out, const char *name)
{
    for (int d = 0; d < DTYPE_COUNT; d++) {
        if (strcmp(types[d].name, name) != 0) continue;
        *out = (enum dtype)d;
        return true;
    }
    return false;
}

unsigned dtype_bytes(enum dtype d)
{
    return types[d].bytes;
}
