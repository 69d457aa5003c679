/* Which backend this machine and these options get. The only file that knows every backend. */
#include "backend/cpu/cpu.h"
#ifdef QUENCH_CUDA
#include "backend/cuda/cuda.h"
#endif
#include "backend/ops.h"
#include "backend/ref/ref.h"
#include <stdio.h>

/* False: there is none, and why. */
static bool create_cuda(struct backend *b, const struct backend_options *options, struct err *e)
{
#ifdef QUENCH_CUDA
    b->ops = &cuda_ops;
    if (cuda_queue_create(&b->queue, options, e)) {
        b->queue_free = cuda_queue_free;
        snprintf(b->name, sizeof b->name, "%s", cuda_queue_name(b->queue));
        b->step_rows = 4096;
        b->few_differ = true;
        b->kv_int8 = false;
        cuda_queue_memory(&b->memory, &b->memory_free);
        return true;
    }
    b->ops = NULL;
    return false;
#else
    (void)b, (void)options;
    return err_set(e, ERR_UNSUPPORTED, "this program was built without CUDA kernels");
#endif
}

bool backend_create(struct backend *b, const struct backend_options *options, struct err *e)
{
    *b = (struct backend){ .fp4_activations = options->fp4_activations, .step_rows = 512, .kv_int8 = true };
    if (options->device == DEVICE_REF) {
        b->ops = &ref_ops;
        b->queue_free = ref_queue_free;
        snprintf(b->name, sizeof b->name, "ref, 1 thread");
        return ref_queue_create(&b->queue, options->rounded, e);
    }
    if (options->device == DEVICE_CUDA) return create_cuda(b, options, e);
    if (options->device == DEVICE_AUTO && create_cuda(b, options, NULL)) return true;
    b->ops = &cpu_ops;
    b->queue_free = cpu_queue_free;
    if (!cpu_queue_create(&b->queue, options, e)) return false;
    int n = cpu_queue_threads(b->queue);
    snprintf(b->name, sizeof b->name, "cpu %s, %d thread%s", cpu_queue_isa(b->queue), n, n == 1 ? "" : "s");
    return true;
}

void backend_destroy(struct backend *b)
{
    if (b->queue_free) b->queue_free(b->queue);
    *b = (struct backend){ 0 };
}
