/* Input: a safetensors file. Whatever the parser accepts must hold what its header promises: spans inside the
 * data that cover it once, sizes that fit, names in order that are found again. */
#include "checkpoint/safetensors.h"
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static void require(bool claim)
{
    if (!claim) abort();
}

static void check(const struct safetensors *s)
{
    uint64_t sum = 0;
    char text[32];
    for (size_t i = 0; i < s->n_tensors; i++) {
        const struct tensor *t = &s->tensors[i];
        require(t->data >= s->map.data && t->bytes <= s->map.bytes - (uint64_t)(t->data - s->map.data));
        require((uint64_t)tensor_elements(t) * dtype_bytes(t->dtype) == t->bytes);
        require(safetensors_find(s, t->name) == t);
        require(i == 0 || strcmp(s->tensors[i - 1].name, t->name) < 0);
        require(strlen(tensor_shape_text(t, text, sizeof text)) < sizeof text);
        sum += t->bytes;
    }
    require(sum <= s->map.bytes - 8);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct safetensors s;
    struct err e = { 0 };
    struct file_map map = { .bytes = bytes };
    if (bytes) {
        void *copy = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        require(copy != MAP_FAILED);
        memcpy(copy, data, bytes);
        map.data = copy;
    }
    if (safetensors_parse(&s, map, &e))
        check(&s);
    else
        require(e.code != ERR_NONE && e.text[0]);
    safetensors_close(&s);
    return 0;
}
