/* GIF by giflib: records are read up to the first image, and that one line by line. */
#include "image/decode.h"
#include <gif_lib.h>
#include <stdlib.h>
#include <string.h>

struct source {
    const uint8_t *data;
    size_t left;
};

static int read_bytes(GifFileType *gif, GifByteType *out, int n)
{
    struct source *s = gif->UserData;
    size_t some = (size_t)n < s->left ? (size_t)n : s->left;
    memcpy(out, s->data, some);
    s->data += some;
    s->left -= some;
    return (int)some;
}

static bool refused(const GifFileType *gif, int code, struct err *e)
{
    const char *why = GifErrorString(gif ? gif->Error : code);
    return err_set(e, ERR_FORMAT, "%s", why ? why : "damaged, or the file ends too early");
}

static bool read_extension(GifFileType *gif, int *transparent, struct err *e)
{
    int code;
    GifByteType *block;
    if (DGifGetExtension(gif, &code, &block) == GIF_ERROR) return refused(gif, 0, e);
    while (block) {
        GraphicsControlBlock control;
        if (code == GRAPHICS_EXT_FUNC_CODE && DGifExtensionToGCB(block[0], block + 1, &control) == GIF_OK)
            *transparent = control.TransparentColor;
        if (DGifGetExtensionNext(gif, &block) == GIF_ERROR) return refused(gif, 0, e);
    }
    return true;
}

/* transparent: a colour's number, or NO_TRANSPARENT_COLOR. */
static bool find_image(GifFileType *gif, int *transparent, struct err *e)
{
    for (;;) {
        GifRecordType type;
        if (DGifGetRecordType(gif, &type) == GIF_ERROR) return refused(gif, 0, e);
        if (type == TERMINATE_RECORD_TYPE) return err_set(e, ERR_FORMAT, "there is no image in it");
        if (type == IMAGE_DESC_RECORD_TYPE) break;
        if (type == EXTENSION_RECORD_TYPE && !read_extension(gif, transparent, e)) return false;
    }
    if (DGifGetImageDesc(gif) == GIF_ERROR) return refused(gif, 0, e);
    const GifImageDesc *d = &gif->Image;
    if (d->Width < 1 || d->Height < 1 || d->Left < 0 || d->Top < 0 || d->Width > gif->SWidth - d->Left ||
        d->Height > gif->SHeight - d->Top)
        return err_set(e, ERR_FORMAT, "the first frame leaves the canvas");
    return d->ColorMap || gif->SColorMap || err_set(e, ERR_FORMAT, "there are no colours in it");
}

static void lay_line(struct raster *out, const GifFileType *gif, const GifByteType *line, int y,
                     int transparent)
{
    const ColorMapObject *map = gif->Image.ColorMap ? gif->Image.ColorMap : gif->SColorMap;
    uint8_t *to = out->samples + 4 * ((gif->Image.Top + y) * out->width + gif->Image.Left);
    for (int x = 0; x < gif->Image.Width; x++, to += 4) {
        GifColorType black = { 0, 0, 0 }, c = line[x] < map->ColorCount ? map->Colors[line[x]] : black;
        to[0] = c.Red;
        to[1] = c.Green;
        to[2] = c.Blue;
        to[3] = line[x] == transparent ? 0 : 255;
    }
}

/* Interlaced: every 8th line from 0, from 4, every 4th from 2, every 2nd from 1. */
static bool read_lines(struct raster *out, GifFileType *gif, int transparent, struct err *e)
{
    static const int first[] = { 0, 4, 2, 1 }, step[] = { 8, 8, 4, 2 };
    GifByteType *line = malloc((size_t)gif->Image.Width);
    bool ok = line || err_memory(e, "pixels", (uint64_t)gif->Image.Width);
    bool interlaced = gif->Image.Interlace;
    for (int pass = 0; ok && pass < (interlaced ? 4 : 1); pass++)
        for (int y = interlaced ? first[pass] : 0; ok && y < gif->Image.Height;
             y += interlaced ? step[pass] : 1) {
            ok = DGifGetLine(gif, line, gif->Image.Width) == GIF_OK || refused(gif, 0, e);
            if (ok) lay_line(out, gif, line, y, transparent);
        }
    free(line);
    return ok;
}

bool decode_gif(struct raster *out, const uint8_t *data, size_t bytes, uint64_t pixels_max, struct err *e)
{
    struct source s = { data, bytes };
    int code = 0, transparent = NO_TRANSPARENT_COLOR;
    GifFileType *gif = DGifOpen(&s, read_bytes, &code);
    bool ok = (gif || refused(NULL, code, e)) && find_image(gif, &transparent, e) &&
              raster_create(out, gif->SWidth, gif->SHeight, 4, pixels_max, e) &&
              read_lines(out, gif, transparent, e);
    if (gif) DGifCloseFile(gif, &code);
    return ok || err_note(e, "GIF");
}
