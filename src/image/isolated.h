/* Decoding in a process that can do nothing else: libpng, libjpeg, libwebp and giflib read bytes that anyone
 * may have made. The program is started again for each image with the words "decode-image BYTES PIXELS", the
 * file as its standard input, and gives up everything but reading, writing and memory before it looks at a
 * byte: no other descriptor, no environment, seccomp, bounds on memory and time. What goes wrong in there is
 * an error of that image alone. Linux. */
#ifndef IMAGE_ISOLATED_H
#define IMAGE_ISOLATED_H
#include "image/image.h"

/* As image_decode, in a process of l->program. l: complete, no zeroes. Blocks until l->until at most. */
bool isolated_decode(struct image *out, const uint8_t *data, size_t bytes, const struct image_limits *l,
                     struct err *e);
/* Whether that works here. */
bool isolated_works(const char *program, struct err *e);

/* The child's life; returns its exit status. */
int isolated_main(uint64_t bytes, uint64_t pixels);
/* The process's rights from now on: so many bytes of memory beyond what it has, so many of output; reading
 * and writing what is open. Any other system call ends it. */
bool isolated_restrict(uint64_t memory, uint64_t output, struct err *e);
#endif
