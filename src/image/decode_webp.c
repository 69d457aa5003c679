/* WebP by libwebp: the first frame, where it lies on the canvas. */
#include "image/decode.h"
#include "image/exif.h"
#include <string.h>
#include <webp/decode.h>
#include <webp/demux.h>

static void read_orientation(struct raster *out, const WebPDemuxer *demux)
{
    WebPChunkIterator chunk;
    if (!WebPDemuxGetChunk(demux, "EXIF", 1, &chunk)) return;
    const uint8_t *data = chunk.chunk.bytes;
    size_t n = chunk.chunk.size;
    bool prefixed = n > 6 && memcmp(data, "Exif\0\0", 6) == 0; /* some writers keep JPEG's mark */
    out->orientation = prefixed ? exif_orientation(data + 6, n - 6) : exif_orientation(data, n);
    WebPDemuxReleaseChunkIterator(&chunk);
}

static bool read_frame(struct raster *out, const WebPIterator *f, const WebPDemuxer *demux,
                       uint64_t pixels_max, struct err *e)
{
    int64_t width = WebPDemuxGetI(demux, WEBP_FF_CANVAS_WIDTH),
            height = WebPDemuxGetI(demux, WEBP_FF_CANVAS_HEIGHT);
    bool whole = f->x_offset == 0 && f->y_offset == 0 && f->width == width && f->height == height;
    if (f->width < 1 || f->height < 1 || f->x_offset < 0 || f->y_offset < 0 ||
        f->width > width - f->x_offset || f->height > height - f->y_offset)
        return err_set(e, ERR_FORMAT, "the first frame leaves the canvas");
    if (!raster_create(out, width, height, f->has_alpha || !whole ? 4 : 3, pixels_max, e)) return false;
    size_t row = (size_t)width * (size_t)out->channels;
    size_t first = (size_t)f->y_offset * row + (size_t)f->x_offset * (size_t)out->channels;
    size_t room = (size_t)height * row - first;
    uint8_t *to = out->samples + first;
    const WebPData *d = &f->fragment;
    bool ok = out->channels == 4 ? WebPDecodeRGBAInto(d->bytes, d->size, to, room, (int)row) != NULL
                                 : WebPDecodeRGBInto(d->bytes, d->size, to, room, (int)row) != NULL;
    return ok || err_set(e, ERR_FORMAT, "the frame is damaged");
}

bool decode_webp(struct raster *out, const uint8_t *data, size_t bytes, uint64_t pixels_max, struct err *e)
{
    WebPData all = { data, bytes };
    WebPDemuxer *demux = WebPDemux(&all);
    WebPIterator frame;
    bool ok = demux && WebPDemuxGetFrame(demux, 1, &frame);
    if (ok) {
        ok = read_frame(out, &frame, demux, pixels_max, e);
        if (ok) read_orientation(out, demux);
        WebPDemuxReleaseIterator(&frame);
    } else {
        err_set(e, ERR_FORMAT, "damaged, or the file ends too early");
    }
    WebPDemuxDelete(demux);
    return ok || err_note(e, "WebP");
}
