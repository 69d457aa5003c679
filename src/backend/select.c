/* Which backend this machine and these options get. The only file that knows every backend. */
#include "backend/cpu/cpu.h"
#include "backend/ops.h"
#include "backend/ref/ref.h"
#include <stdio.h>

bool backend_create(struct backend *b, const struct backend_options *options, struct err *e)
{
    *b = (struct backend){ .fp4_activations = options->fp4_activations };
    if (options->device == DEVICE_REF) {
        b->ops = &ref_ops;
        snprintf(b->name, sizeof b->name, "ref, 1 thread");
        return ref_queue_create(&b->queue, options->rounded, e);
    }
    b->ops = &cpu_ops;
    if (!cpu_queue_create(&b->queue, options, e)) return false;
    int n = cpu_queue_threads(b->queue);
    snprintf(b->name, sizeof b->name, "cpu %s, %d thread%s", cpu_queue_isa(b->queue), n, n == 1 ? "" : "s");
    return true;
}

void backend_destroy(struct backend *b)
{
    if (b->ops == &ref_ops)
        ref_queue_free(b->queue);
    else if (b->ops)
        cpu_queue_free(b->queue);
    *b = (struct backend){ 0 };
}
