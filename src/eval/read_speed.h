/* What reading costs at least: a plain streaming read of memory that no cache holds, the bound that products
 * with one row are set against. */
#ifndef EVAL_READ_SPEED_H
#define EVAL_READ_SPEED_H
#include "base/err.h"

enum { READ_SPEED_BYTES = 512 << 20 }; /* of its buffer */
struct read_speed;
bool read_speed_create(struct read_speed **out, int threads, struct err *e);
void read_speed_free(struct read_speed *r); /* NULL is fine */
/* Bytes a second, the best of five passes: about 0.1 s. */
double read_speed_measure(struct read_speed *r);
#endif
