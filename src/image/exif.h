/* The one thing EXIF data is read for. */
#ifndef IMAGE_EXIF_H
#define IMAGE_EXIF_H
#include <stddef.h>
#include <stdint.h>
/* Orientation, 1 to 8, of a TIFF structure as EXIF has it; 1 where it has none or makes no sense. Source:
 * EXIF 2.3, 4.6.4, tag 0x0112; TIFF 6.0, section 2. */
int exif_orientation(const uint8_t *tiff, size_t bytes);
#endif
