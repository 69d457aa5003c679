#!/usr/bin/env python3
"""Writes tests/golden/tokenizer_demo.json: what Hugging Face tokenizers makes of nasty texts with models/demo.

Needs tokenizers==0.22.2 and Python 3.11 (whose Unicode tables pick the characters); then the output is the same each
time. Run from the repository root."""
import json
import random
import unicodedata

import tokenizers
from tokenizers import AddedToken, Tokenizer

MODEL = "models/demo"
OUT = "tests/golden/tokenizer_demo.json"

SPACES = [9, 10, 11, 12, 13, 28, 31, 32, 0x85, 0xA0, 0x1680, 0x180E, 0x2000, 0x2009, 0x200B, 0x2028, 0x2029,
          0x202F, 0x205F, 0x3000, 0xFEFF]
# letters, marks and numbers of Unicode 15 and 16
LATER = [0x897, 0xCF3, 0xECE, 0x1C89, 0xA7CB, 0xA7DA, 0x105C0, 0x10D4A, 0x10D69, 0x10EFD, 0x11241, 0x113B8, 0x11F02,
         0x11F34, 0x11F50, 0x116D0, 0x13460, 0x16D40, 0x16D70, 0x1CCF0, 0x1D2C0, 0x1E030, 0x1E08F, 0x1E4D0, 0x1E4EC,
         0x1E4F0, 0x2EBF0, 0x31350]
SPLITS = ["  one\t two\n\nthree  \n", "  a\t\ta  1x  \n \n  x!\r\n\r\nx", ".foo ..foo !a !!a", "Hello, world!",
          "I'm 1234, we're coding.", "def f(x: int) -> str:\n    return f\"{x=}\"\n", "\u0301!I",
          "can't I'RE '\u017fx '\u00dfx '\u017fx", "I'LL 'Ve'VE'd 'D 'm'M'sS 'lL're'rE x'y ''s '",
          "\U0001F469\u200d\U0001F4BB caf\u00e8 e\u0301", "a\u00a0b\u0085c\u2028d \u0661\u216b\u00b2",
          "\u4e2d\u6587\u6d4b\u8bd5\uff1a\u3053\u3093\u306b\u3061\u306f\u3002", "", " ", "\n", "\0", "a\0b \0\0",
          "   ", "\r", "\r\n\r\n", "\n \n ", " \t\r\n x", "1 22 333  4444", "\u0660\u0661 \u00bd\u2167", "!!!\n\n!", "a" * 65,
          "the" * 60, " " * 70 + "x", "=" * 200, "ab" * 150 + "\n" * 90, "\ud55c\uad6d\uc5b4 \u1112\u1161\u11ab"]
NORMAL = ["e\u0301", "\u00e9", "e\u0327\u0301", "e\u0301\u0327", "\u0344", "\u0340\u0341\u0343", "\u2126\u212a\u212b",
          "\u1100\u1161", "\u1100\u1161\u11a8", "\uac00\u11a8", "\uac01\u11a8", "\u304b\u3099 \u309b", "\u0958\u0915\u093c",
          "\ufb1d\ufb2c", "\U0001d15e\U0001d1bb", "\uf900\u2f00\U0002f800", "a\u0315\u0300\u05ae\u0062", "\u0301\u0327\u0316",
          "q\u0307\u0323", "\u1e0b\u0323", "\u09c7\u09be \u0b47\u0b57", "\u0fb2\u0f71\u0f80", "o\u0302\u0323\u0302",
          "a" + "\u0301\u0316" * 40, "A\u030a\u0301", "\u0374\u037e\u0387\u2000\u2001", "\u212b\u0327",
          # after Unicode 9: neither composed nor reordered
          "\U00011935\U00011930", "\U000105d2\u0307", "a\u0301\U00010eab\u0316", "a\u08d3\u0301\u0316", "\u1dfa\u0300",
          "\U00016d67\U00016d67", "\U00011382\U000113c9", "\u1715\u0301", "e\U0001e130\u0301"]


def load(added):
    with open(f"{MODEL}/tokenizer.json", encoding="utf-8") as f:
        text = json.load(f)
    if not added:
        text["added_tokens"] = []
        return Tokenizer.from_str(json.dumps(text))
    tokenizer = Tokenizer.from_str(json.dumps(text))
    with open(f"{MODEL}/tokenizer_config.json", encoding="utf-8") as f:
        decoder = json.load(f)["added_tokens_decoder"]
    for key, token in sorted(decoder.items(), key=lambda item: int(item[0])):
        if tokenizer.token_to_id(token["content"]) is None:
            one = AddedToken(token["content"], normalized=False, special=token["special"])
            (tokenizer.add_special_tokens if token["special"] else tokenizer.add_tokens)([one])
        assert tokenizer.token_to_id(token["content"]) == int(key)
    return tokenizer, [token["content"] for token in decoder.values()]


def category_texts():
    by_category = {}
    for c in range(0x110000):
        category = unicodedata.category(chr(c))
        if category != "Cs":
            by_category.setdefault(category, []).append(chr(c))
    rng = random.Random(1)
    for _, chars in sorted(by_category.items()):
        for c in rng.sample(chars, min(2, len(chars))):
            yield f"a{c}b {c}{c}1{c}\n{c}!{c} "


def added_texts(added):
    yield from (f"{t}x" for t in added[:3])
    yield "".join(added)
    yield " ".join(added)
    yield "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    yield "<<|im_end|>><|im_end|<|im_end|>|>"
    yield "e<|im_end|>\u0301 x<think>\u0327</think>'<tool_call>s"
    yield "<tts_text_bos><tts_text_bos_single><tts_text_bos_singl"
    yield "  <think>  \n </think>\n"
    yield "<|im_end"


def random_texts(added, n):
    rng = random.Random(2)
    parts = SPLITS[1:8] + NORMAL + added + [chr(c) for c in SPACES + LATER] + ["<", "'s", "12", "\r\n", " the"]
    for _ in range(n):
        yield "".join(rng.choice(parts) for _ in range(rng.randrange(2, 8)))


def main():
    tokenizer, added = load(True)
    plain = load(False)
    texts = SPLITS + NORMAL + list(category_texts()) + list(added_texts(added)) + list(random_texts(added, 40))
    texts += [f"x{chr(c)}{chr(c)} {chr(c)}y1{chr(c)}" for c in SPACES]
    texts += [f" {chr(c)}a!{chr(c)}{chr(c)} " for c in LATER]
    rng = random.Random(3)
    size = tokenizer.get_vocab_size()
    lists = [[rng.randrange(size + 3) for _ in range(rng.randrange(1, 12))] for _ in range(30)]
    lists += [[rng.randrange(94, 256) for _ in range(8)] for _ in range(30)]  # single bytes: mostly broken UTF-8
    golden = {
        "source": f"tokenizers {tokenizers.__version__}, {MODEL}, by tools/make_tokenizer_golden.py",
        "encode": [{"text": t, "ids": tokenizer.encode(t, add_special_tokens=False).ids,
                    "ids_as_data": plain.encode(t, add_special_tokens=False).ids} for t in texts],
        "decode": [{"ids": i, "text": tokenizer.decode(i, skip_special_tokens=False),
                    "text_without_special": tokenizer.decode(i, skip_special_tokens=True)} for i in lists],
    }
    with open(OUT, "w", encoding="ascii") as f:
        rows = {k: v if isinstance(v, str) else [json.dumps(row) for row in v] for k, v in golden.items()}
        f.write('{"source": %s,\n' % json.dumps(rows["source"]))
        f.write('"encode": [\n' + ",\n".join(rows["encode"]) + '\n],\n')
        f.write('"decode": [\n' + ",\n".join(rows["decode"]) + '\n]}\n')
    print(f"{OUT}: {len(texts)} texts, {len(lists)} lists of ids")


if __name__ == "__main__":
    main()
