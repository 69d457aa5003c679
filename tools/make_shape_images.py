"""Questions about pictures of coloured shapes, in the manner of those that models/demo learned from.
usage: make_shape_images.py N [SEED]    (pillow) > tasks.jsonl

One JSON object a line: {"prompt": question, "images": [a PNG of 96 x 96 as data: URL], "answer": what is expected, word for
word}. Of the four questions each is asked equally often; a shape's colour, kind, place and size are drawn at random."""
import base64, io, json, random, sys
from PIL import Image, ImageDraw

SIZE = 96
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 70, 220), "yellow": (230, 210, 40),
           "purple": (150, 40, 190), "white": (245, 245, 245)}
PLACES = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}
QUESTIONS = {"What is in the image?": "A {colour} {shape} at the {place}.", "What color is the shape?": "{Colour}.",
             "What shape is it?": "A {shape}.", "Where is the shape?": "At the {place}."}

def circle(d, box, fill):
    d.ellipse(box, fill=fill)

def square(d, box, fill):
    d.rectangle(box, fill=fill)

def triangle(d, box, fill):
    x0, y0, x1, y1 = box
    d.polygon([((x0 + x1) // 2, y0), (x0, y1), (x1, y1)], fill=fill)

def cross(d, box, fill):
    x0, y0, x1, y1 = box
    across, down = (x1 - x0) // 3, (y1 - y0) // 3
    d.rectangle([x0, y0 + down, x1, y1 - down], fill=fill)
    d.rectangle([x0 + across, y0, x1 - across, y1], fill=fill)

SHAPES = {f.__name__: f for f in (circle, square, triangle, cross)}

def draw(r, shape, colour, place, size=(SIZE, SIZE)):
    """Drawn for SIZE x SIZE, stretched to `size` (width, height)."""
    im = Image.new("RGB", size, (r.randint(0, 40),) * 3)
    x, y = (p * SIZE // 2 + r.randint(4, 12) for p in PLACES[place])
    w = r.randint(22, 30)
    box = [x * size[0] // SIZE, y * size[1] // SIZE, (x + w) * size[0] // SIZE, (y + w) * size[1] // SIZE]
    SHAPES[shape](ImageDraw.Draw(im), box, COLOURS[colour])
    return im

def url(im):
    b = io.BytesIO()
    im.save(b, "PNG")
    return "data:image/png;base64," + base64.b64encode(b.getvalue()).decode()

def random_case(r, size=(SIZE, SIZE), question=None):
    """A picture, a question about it and the answer."""
    shape, colour, place = r.choice(list(SHAPES)), r.choice(list(COLOURS)), r.choice(list(PLACES))
    question = question or r.choice(list(QUESTIONS))
    answer = QUESTIONS[question].format(shape=shape, colour=colour, Colour=colour.capitalize(), place=place)
    return draw(r, shape, colour, place, size), question, answer

def main(n, seed):
    r = random.Random(seed)
    for i in range(n):
        im, question, answer = random_case(r, question=list(QUESTIONS)[i % len(QUESTIONS)])
        print(json.dumps({"prompt": question, "images": [url(im)], "answer": answer}))

if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
