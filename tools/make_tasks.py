#!/usr/bin/env python3
"""Prints N tasks for `quench eval --tasks`, of the kinds the demo and study models were trained on.

  make_tasks.py N SEED             sums, capitals, spelling, counting, repeating
  make_tasks.py N SEED --images    a coloured shape in a picture of 96 x 96, as a data: URL

The same seed gives the same tasks."""
import base64
import json
import random
import struct
import sys
import zlib

CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "China": "Beijing",
    "India": "Delhi", "Egypt": "Cairo", "Peru": "Lima", "Cuba": "Havana", "Kenya": "Nairobi", "Norway": "Oslo",
    "Sweden": "Stockholm", "Finland": "Helsinki", "Greece": "Athens", "Turkey": "Ankara", "Poland": "Warsaw",
    "Austria": "Vienna", "Portugal": "Lisbon", "Ireland": "Dublin", "Canada": "Ottawa", "Chile": "Santiago",
    "Iran": "Tehran", "Iraq": "Baghdad", "Hungary": "Budapest", "Belgium": "Brussels",
}
WORDS = "apple river stone cloud green table light horse paper winter silver garden window bridge candle forest".split()
SYSTEMS = [None, None, "You are a helpful assistant.", "Answer briefly.", "You are a small model."]


def add(r):
    a, b = r.randint(0, 99), r.randint(0, 99)
    return r.choice(["What is {} + {}?", "Add {} and {}.", "Compute {} plus {}."]).format(a, b), f"{a} + {b} = {a + b}"


def capital(r):
    country, city = r.choice(list(CAPITALS.items()))
    if r.random() < 0.3:
        return f"{city} is the capital of which country?", f"{country}."
    return r.choice(["What is the capital of {}?", "Name the capital of {}."]).format(country), f"The capital of {country} is {city}."


def spell(r):
    word = r.choice(WORDS)
    return f"Spell the word {word}.", "-".join(word)


def count(r):
    n = r.randint(2, 12)
    return f"Count from 1 to {n}.", ", ".join(str(i) for i in range(1, n + 1))


def repeat(r):
    words = " ".join(r.sample(WORDS, r.randint(2, 4)))
    return f"Repeat: {words}", words


SIZE = 96
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 70, 220), "yellow": (230, 210, 40), "purple": (150, 40, 190), "white": (245, 245, 245)}
PLACES = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}
# Whether the pixel x, y of a square of w + 1 pixels belongs to the shape.
SHAPES = {
    "circle": lambda x, y, w: (2 * x - w) ** 2 + (2 * y - w) ** 2 <= w * w,
    "square": lambda x, y, w: True,
    "triangle": lambda x, y, w: abs(2 * x - w) <= y,
    "cross": lambda x, y, w: w // 3 <= x <= w - w // 3 or w // 3 <= y <= w - w // 3,
}


def png(rows):
    """An 8-bit RGB file of rows of (r, g, b)."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 2, 0, 0, 0)
    data = b"".join(b"\0" + bytes(c for pixel in row for c in pixel) for row in rows)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data, 9)) + chunk(b"IEND", b"")


def picture(r, colour, shape, place):
    dark, w = r.randint(0, 40), r.randint(22, 30)
    x0, y0 = (SIZE // 2 * half + r.randint(4, 12) for half in PLACES[place])
    inside = lambda x, y: 0 <= x <= w and 0 <= y <= w and SHAPES[shape](x, y, w)
    return png([[COLOURS[colour] if inside(x - x0, y - y0) else (dark,) * 3 for x in range(SIZE)] for y in range(SIZE)])


def look(r):
    colour, shape, place = r.choice(list(COLOURS)), r.choice(list(SHAPES)), r.choice(list(PLACES))
    prompt, answer = r.choice([
        ("What is in the image?", f"A {colour} {shape} at the {place}."), ("What color is the shape?", f"{colour.capitalize()}."),
        ("What shape is it?", f"A {shape}."), ("Where is the shape?", f"At the {place}."),
    ])
    url = "data:image/png;base64," + base64.b64encode(picture(r, colour, shape, place)).decode()
    return {"prompt": prompt, "answer": answer, "images": [url]}


def main():
    n, r = int(sys.argv[1]), random.Random(int(sys.argv[2]))
    for _ in range(n):
        if "--images" in sys.argv[3:]:
            print(json.dumps(look(r)))
            continue
        prompt, answer = r.choice([add, capital, spell, count, repeat])(r)
        system = r.choice(SYSTEMS)
        print(json.dumps({"prompt": prompt, "answer": answer, **({"system": system} if system else {})}))


main()
