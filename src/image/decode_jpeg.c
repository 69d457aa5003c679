/* JPEG by libjpeg-turbo, which leaves this file by longjmp when something is wrong: all that must survive is
 * in `struct reader`. */
#include "image/decode.h"
#include "image/exif.h"
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <jpeglib.h>
#include <jerror.h>

/* A progressive file may name as many passes over the whole picture as it likes. */
enum { SCANS_MAX = 100 };

struct reader {
    struct jpeg_decompress_struct jpeg;
    struct jpeg_error_mgr errors;
    struct jpeg_progress_mgr progress;
    jmp_buf leave;
    struct raster *out;
    uint64_t pixels_max;
    uint8_t *line; /* CMYK: one row */
    struct err *e;
};

static struct reader *reader_of(j_common_ptr jpeg)
{
    return jpeg->client_data;
}

static void on_error(j_common_ptr jpeg)
{
    char text[JMSG_LENGTH_MAX];
    jpeg->err->format_message(jpeg, text);
    err_set(reader_of(jpeg)->e, ERR_FORMAT, "%s", text);
    longjmp(reader_of(jpeg)->leave, 1);
}

/* The library goes on past what it calls a warning. Those that mean missing data are errors here. */
static void on_message(j_common_ptr jpeg, int level)
{
    int code = jpeg->err->msg_code;
    if (level < 0 && (code == JWRN_HIT_MARKER || code == JWRN_JPEG_EOF || code == JWRN_HUFF_BAD_CODE ||
                      code == JWRN_ARITH_BAD_CODE))
        on_error(jpeg);
}

static void on_progress(j_common_ptr jpeg)
{
    if (((j_decompress_ptr)jpeg)->input_scan_number <= SCANS_MAX) return;
    err_set(reader_of(jpeg)->e, ERR_LIMIT, "more than %d scans", SCANS_MAX);
    longjmp(reader_of(jpeg)->leave, 1);
}

static void read_orientation(struct reader *r)
{
    static const char mark[] = "Exif\0";
    for (jpeg_saved_marker_ptr m = r->jpeg.marker_list; m; m = m->next)
        if (m->marker == JPEG_APP0 + 1 && m->data_length > sizeof mark &&
            memcmp(m->data, mark, sizeof mark) == 0) {
            r->out->orientation = exif_orientation(m->data + sizeof mark, m->data_length - sizeof mark);
            return;
        }
}

static bool read_header(struct reader *r, const uint8_t *data, size_t bytes)
{
    jpeg_create_decompress(&r->jpeg);
    r->jpeg.client_data = r;
    r->jpeg.progress = &r->progress;
    r->progress.progress_monitor = on_progress;
    jpeg_mem_src(&r->jpeg, data, bytes);
    jpeg_save_markers(&r->jpeg, JPEG_APP0 + 1, 0xffff);
    jpeg_read_header(&r->jpeg, TRUE);
    if (!raster_create(r->out, r->jpeg.image_width, r->jpeg.image_height, 3, r->pixels_max, r->e))
        return false;
    read_orientation(r);
    bool four = r->jpeg.jpeg_color_space == JCS_CMYK || r->jpeg.jpeg_color_space == JCS_YCCK;
    r->jpeg.out_color_space = four ? JCS_CMYK : JCS_RGB;
    if (four) r->line = malloc((size_t)r->out->width * 4);
    return !four || r->line || err_memory(r->e, "pixels", (uint64_t)r->out->width * 4);
}

/* Stored inverted, as Adobe's programs do: 255 is no ink. */
static void cmyk_to_rgb(uint8_t *out, const uint8_t *cmyk, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        for (int c = 0; c < 3; c++) {
            int black = cmyk[4 * i + 3], x = (255 - cmyk[4 * i + c]) * black + 128;
            int value = black - ((x + (x >> 8)) >> 8);
            out[3 * i + c] = (uint8_t)(value > 0 ? value : 0);
        }
}

static void read_rows(struct reader *r)
{
    jpeg_start_decompress(&r->jpeg);
    while (r->jpeg.output_scanline < r->jpeg.output_height) {
        uint8_t *row = r->out->samples + (size_t)r->jpeg.output_scanline * (size_t)r->out->width * 3;
        jpeg_read_scanlines(&r->jpeg, r->line ? &r->line : &row, 1);
        if (r->line) cmyk_to_rgb(row, r->line, r->out->width);
    }
    jpeg_finish_decompress(&r->jpeg);
}

static bool read_all(struct reader *r, const uint8_t *data, size_t bytes)
{
    if (setjmp(r->leave)) return false;
    if (!read_header(r, data, bytes)) return false;
    read_rows(r);
    return true;
}

bool decode_jpeg(struct raster *out, const uint8_t *data, size_t bytes, uint64_t pixels_max, struct err *e)
{
    struct reader r = { .out = out, .pixels_max = pixels_max, .e = e };
    r.jpeg.err = jpeg_std_error(&r.errors);
    r.jpeg.client_data = &r;
    r.errors.error_exit = on_error;
    r.errors.emit_message = on_message;
    bool ok = read_all(&r, data, bytes);
    jpeg_destroy_decompress(&r.jpeg);
    free(r.line);
    return ok || err_note(e, "JPEG");
}
