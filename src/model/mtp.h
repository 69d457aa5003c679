/* The MTP head's part of a model's life; the rest of it is in model.h. */
#ifndef MODEL_MTP_H
#define MODEL_MTP_H
#include "model/model.h"
void mtp_deinit(struct mtp *t, const struct backend *b); /* accepts a zeroed one */
#endif
