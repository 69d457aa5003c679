/* PNG by libpng, which leaves this file by longjmp when something is wrong: all that must survive is in
 * `struct reader`. */
#include "image/decode.h"
#include "image/exif.h"
#include <png.h>
#include <string.h>

struct reader {
    struct raster *out;
    const uint8_t *data;
    size_t left;
    uint64_t pixels_max;
    struct err *e;
    png_structp png;
    png_infop info;
};

static void on_error(png_structp png, png_const_charp message)
{
    struct reader *r = png_get_error_ptr(png);
    err_set(r->e, ERR_FORMAT, "%s", message);
    png_longjmp(png, 1);
}

static void on_warning(png_structp png, png_const_charp message)
{
    (void)png, (void)message;
}

static void read_bytes(png_structp png, png_bytep out, size_t n)
{
    struct reader *r = png_get_io_ptr(png);
    if (n > r->left) png_error(png, "the file ends too early");
    memcpy(out, r->data, n);
    r->data += n;
    r->left -= n;
}

/* Whatever is stored becomes 8-bit RGB, with alpha where there is transparency of any kind. */
static bool read_header(struct reader *r)
{
    png_read_info(r->png, r->info);
    int64_t width = png_get_image_width(r->png, r->info), height = png_get_image_height(r->png, r->info);
    bool alpha = png_get_color_type(r->png, r->info) & PNG_COLOR_MASK_ALPHA ||
                 png_get_valid(r->png, r->info, PNG_INFO_tRNS);
    png_set_expand(r->png);
    png_set_strip_16(r->png);
    png_set_gray_to_rgb(r->png);
    return raster_create(r->out, width, height, alpha ? 4 : 3, r->pixels_max, r->e);
}

static bool read_rows(struct reader *r)
{
    size_t row = (size_t)r->out->width * (size_t)r->out->channels;
    int passes = png_set_interlace_handling(r->png);
    png_read_update_info(r->png, r->info);
    if (png_get_rowbytes(r->png, r->info) != row) png_error(r->png, "rows of an unexpected length");
    for (int pass = 0; pass < passes; pass++)
        for (int64_t y = 0; y < r->out->height; y++)
            png_read_row(r->png, r->out->samples + (size_t)y * row, NULL);
    png_read_end(r->png, r->info);
    return true;
}

static void read_orientation(struct reader *r)
{
    png_uint_32 bytes = 0;
    png_bytep exif = NULL;
    if (png_get_eXIf_1(r->png, r->info, &bytes, &exif) && exif)
        r->out->orientation = exif_orientation(exif, bytes);
}

static bool read_all(struct reader *r)
{
    if (setjmp(png_jmpbuf(r->png))) return false;
    png_set_read_fn(r->png, r, read_bytes);
    if (!read_header(r) || !read_rows(r)) return false;
    read_orientation(r);
    return true;
}

bool decode_png(struct raster *out, const uint8_t *data, size_t bytes, uint64_t pixels_max, struct err *e)
{
    struct reader r = { .out = out, .data = data, .left = bytes, .pixels_max = pixels_max, .e = e };
    r.png = png_create_read_struct(PNG_LIBPNG_VER_STRING, &r, on_error, on_warning);
    r.info = r.png ? png_create_info_struct(r.png) : NULL;
    bool ok = (r.info || err_memory(e, "PNG decoder", 0)) && read_all(&r);
    png_destroy_read_struct(&r.png, &r.info, NULL);
    return ok || err_note(e, "PNG");
}
