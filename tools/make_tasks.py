#!/usr/bin/env python3
"""Prints N tasks for `quench eval --tasks`, of the kinds the demo and study models were trained on.

make_tasks.py N SEED: sums, capitals, spelling, counting, repeating. The same seed gives the same tasks. Of pictures:
make_shape_images.py."""
import json
import random
import sys

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


def main():
    n, r = int(sys.argv[1]), random.Random(int(sys.argv[2]))
    for _ in range(n):
        prompt, answer = r.choice([add, capital, spell, count, repeat])(r)
        system = r.choice(SYSTEMS)
        print(json.dumps({"prompt": prompt, "answer": answer, **({"system": system} if system else {})}))


main()
