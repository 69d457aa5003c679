/* What the parts of a verification share. Each step appends to the findings; only lack of memory and a source
 * that does not open stop it. */
#ifndef QUANTIZE_VERIFY_STEPS_H
#define QUANTIZE_VERIFY_STEPS_H
#include "quantize/stored.h"
#include "quantize/verify.h"

struct verify_steps {
    const struct verify_options *options;
    struct verify_result *result;
    struct checkpoint model;
    struct stored_list list;
};

void verify_steps_scales(struct verify_steps *v);
bool verify_steps_fused(struct verify_steps *v, struct err *e);
void verify_steps_mtp(struct verify_steps *v);
bool verify_steps_source(struct verify_steps *v, struct err *e);

static inline void verify_steps_note(struct verify_steps *v, enum verify_step step, bool is_fault,
                                     const char *name, const char *what)
{
    findings_add(&v->result->findings,
                 &(struct finding_note){ .step = step, .is_fault = is_fault, .what = what, .name = name });
}
#endif
