"""Small images of every kind the program reads, with the pixels PIL makes of them.
usage: make_image_goldens.py OUTDIR    (pillow, numpy; only needed to make them anew)

NAME.EXT is the image, NAME.EXT.ppm what PIL shows after EXIF orientation: alpha over white, the rest as convert("RGB")
gives it. resize.bin holds pictures resampled by PIL: records of int32 height, width, new height, new width, then the bytes
of both."""
import io, os, struct, sys, zlib
import numpy as np
from PIL import Image, ImageOps

OUT = sys.argv[1]
os.makedirs(OUT, exist_ok=True)
W, H = 23, 14
RNG = np.random.default_rng(1)

def picture(w=W, h=H, channels=3):
    """Smooth colours with an edge, so that orientation and chroma show."""
    y, x = np.mgrid[0:h, 0:w]
    a = np.stack([x * 255 // (w - 1), y * 255 // (h - 1), (x + 2 * y) * 5 % 256], -1).astype(np.uint8)
    a[2:5, 3:9] = (250, 20, 30)
    if channels == 4:
        a = np.concatenate([a, ((x * 37 + y * 11) % 256).astype(np.uint8)[..., None]], -1)
    return a

def reference(im):
    im = ImageOps.exif_transpose(im)
    if im.mode in ("RGBA", "LA", "PA") or "transparency" in im.info:
        rgba = im.convert("RGBA")
        white = Image.new("RGB", rgba.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.split()[3])
        return white
    if im.mode.startswith("I;16") or im.mode == "I":
        return Image.fromarray((np.asarray(im).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    return im.convert("RGB")

def keep(name, data, want=None):
    open(f"{OUT}/{name}", "wb").write(data)
    if want is None:
        want = reference(Image.open(io.BytesIO(data)))
    want.save(f"{OUT}/{name}.ppm", "PPM")

def save(name, im, **options):
    b = io.BytesIO()
    im.save(b, **options)
    keep(name, b.getvalue())

def exif(orientation, big=False):
    """A TIFF structure with the one entry and another before it."""
    e = ">" if big else "<"
    return (b"MM\0*" if big else b"II*\0") + struct.pack(e + "I", 8) + struct.pack(e + "H", 2) + \
        struct.pack(e + "HHIHH", 0x0100, 3, 1, 7, 0) + struct.pack(e + "HHIHH", 0x0112, 3, 1, orientation, 0) + b"\0\0\0\0"

def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

def png(w, h, depth, colour, rows, interlace=0, extra=b""):
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, interlace)) + extra + \
        chunk(b"IDAT", zlib.compress(b"".join(b"\0" + r for r in rows), 9)) + chunk(b"IEND", b"")

rgb, rgba = picture(), picture(channels=4)
grey = Image.fromarray(rgb).convert("L")

save("rgb.png", Image.fromarray(rgb), format="PNG")
save("rgba.png", Image.fromarray(rgba), format="PNG")
save("grey.png", grey, format="PNG")
save("grey_alpha.png", Image.fromarray(rgba).convert("LA"), format="PNG")
save("one_bit.png", grey.convert("1"), format="PNG")
save("palette.png", Image.fromarray(rgb).quantize(13), format="PNG")
save("palette_transparent.png", Image.fromarray(rgb).quantize(13), format="PNG", transparency=bytes(range(0, 260, 20)))
save("rgb_transparent.png", Image.fromarray(rgb), format="PNG", transparency=(250, 20, 30))
save("orientation.png", Image.fromarray(rgb), format="PNG", exif=exif(6))
deep = RNG.integers(0, 65536, (H, W, 3), dtype=np.uint16)
keep("rgb16.png", png(W, H, 16, 2, [r.astype(">u2").tobytes() for r in deep]), Image.fromarray((deep >> 8).astype(np.uint8)))
keep("grey16.png", png(W, H, 16, 0, [r.astype(">u2").tobytes() for r in deep[..., 0]]))
four = RNG.integers(0, 16, (H, 24), dtype=np.uint8)
keep("grey4.png", png(24, H, 4, 0, [(r[::2] << 4 | r[1::2]).tobytes() for r in four]))
ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
keep("interlaced.png", png(W, H, 8, 2, [r.tobytes() for x, y, dx, dy in ADAM7 for r in rgb[y::dy, x::dx]], 1))

for o in range(1, 9):
    save(f"orientation_{o}.jpg", Image.fromarray(rgb), format="JPEG", quality=92, exif=b"Exif\0\0" + exif(o, o % 2 == 1))
save("grey.jpg", grey, format="JPEG", quality=90)
save("progressive.jpg", Image.fromarray(rgb), format="JPEG", quality=85, progressive=True)
save("full_colour.jpg", Image.fromarray(rgb), format="JPEG", quality=95, subsampling=0)
save("cmyk.jpg", Image.fromarray(rgb).convert("CMYK"), format="JPEG", quality=95)

save("lossy.webp", Image.fromarray(rgb), format="WEBP", quality=80)
save("lossless.webp", Image.fromarray(rgb), format="WEBP", lossless=True)
save("alpha.webp", Image.fromarray(rgba), format="WEBP", lossless=True, exact=True)
save("orientation.webp", Image.fromarray(rgb), format="WEBP", lossless=True, exif=exif(8))
save("animated.webp", Image.fromarray(rgb), format="WEBP", lossless=True, save_all=True,
     append_images=[Image.fromarray(rgb[::-1].copy())], duration=100)

p = Image.fromarray(rgb).quantize(16)
save("plain.gif", p, format="GIF", interlace=0)
save("interlaced.gif", p, format="GIF", interlace=1)
save("transparent.gif", p, format="GIF", transparency=int(np.asarray(p)[3, 4]))
save("animated.gif", p, format="GIF", save_all=True, append_images=[Image.fromarray(rgb[::-1].copy()).quantize(16)])

with open(f"{OUT}/resize.bin", "wb") as f:
    for w, h, nw, nh in [(45, 33, 48, 32), (40, 30, 64, 64), (130, 70, 32, 32), (31, 64, 32, 64), (64, 33, 64, 32), (3, 90, 32, 32),
                         (7, 5, 96, 64)]:
        a = picture(w, h)
        a = np.clip(a.astype(int) + RNG.integers(-60, 60, a.shape), 0, 255).astype(np.uint8)
        # one axis after the other: newer versions of PIL may begin with the columns
        b = np.asarray(Image.fromarray(a).resize((nw, h), Image.BICUBIC).resize((nw, nh), Image.BICUBIC))
        f.write(struct.pack("<4i", h, w, nh, nw) + a.tobytes() + b.tobytes())
print(len(os.listdir(OUT)), "files,", sum(os.path.getsize(f"{OUT}/{n}") for n in os.listdir(OUT)), "bytes")
