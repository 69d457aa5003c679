/* quench decode-image BYTES PIXELS: not for people. The server starts it for each image; see
 * image/isolated.h. */
#include "cli/commands.h"
#include "image/isolated.h"
#include <stdio.h>
#include <stdlib.h>

int cli_decode_image(int argc, char **argv)
{
    if (argc == 2) return isolated_main(strtoull(argv[0], NULL, 10), strtoull(argv[1], NULL, 10));
    fprintf(stderr, "quench decode-image: quench serve starts this for each image\n");
    return 2;
}
