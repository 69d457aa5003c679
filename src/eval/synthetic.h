/* A model of random weights without files: a checkpoint whose tensors lie on a few runs of random values,
 * mapped over and over until they are as long as the largest tensor. Each tensor begins somewhere else on its
 * run, so experts and layers differ; a backend lays them out as it does real ones, so that it reads as many
 * bytes. */
#ifndef EVAL_SYNTHETIC_H
#define EVAL_SYNTHETIC_H
#include "quantize/synth.h"

struct synthetic {
    struct synth synth;
    struct run_of_values *runs; /* and one of tensors with values of their own: routers, norms, decays */
};
/* "35b-a3b", "35b-a3b:layers=4", "35b-a3b:layers=4:format=fast", or a path of a config.json in place of the
 * name; format as for synth, card unless given. */
bool synthetic_create(struct synthetic *s, const char *what, struct err *e);
void synthetic_destroy(struct synthetic *s); /* accepts a zeroed one */
#endif
