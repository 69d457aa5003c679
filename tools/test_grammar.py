#!/usr/bin/env python3
"""Checks the grammar engine (src/grammar) against Python's re and the jsonschema package.

  test_grammar.py BUILD/tests/grammar/grammar_lines [--regexes N] [--grammars N] [--schemas N] [--seed N] [--suite DIR]

1. N random regular expressions: random strings match here exactly where re.fullmatch(..., re.ASCII) does; random walks
   through the masks match.
2. N random grammars in GBNF: random strings match exactly where a plain recogniser below says so.
3. N random schemas of the supported subset: walks through the masks are valid by jsonschema; random valid values, in
   the form the engine writes, are accepted; values made invalid are refused. N more in which keywords meet (allOf,
   anyOf and $ref beside others, oneOf): what is accepted is valid.
4. DIR, the official JSON-Schema-Test-Suite's tests/draft2020-12 (it lies in jsonschema's source package): what is
   accepted must be valid. Counted: schemas refused by keyword, valid values refused (the engine may be narrower).
Exits 1 on any text accepted that should not be, or refused in 1 to 3."""
import argparse, collections, json, os, random, re, string, subprocess, sys

import jsonschema

VALIDATOR = jsonschema.Draft202012Validator
FORMATS = jsonschema.FormatChecker(["date", "uuid", "ipv4", "ipv6", "email"])


class Engine:
    def __init__(self, program):
        self.p = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")

    def ask(self, kind, grammar, texts=(), walks=0, seed=1):
        line = {"kind": kind, "grammar": grammar, "texts": list(texts), "walks": walks, "seed": seed}
        self.p.stdin.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.p.stdin.flush()
        return json.loads(self.p.stdout.readline())


def fail(what, *more):
    print("FAILED:", what, *(f"\n  {m}" for m in more))
    sys.exit(1)


# 1. Regular expressions.

ALPHABET = "abc01 _-\n\u00e9\u20ac\U0001f600\"\\.<"


def random_class(rng):
    parts = [rng.choice(["a", "b-c", "0-9", r"\d", r"\w", r"\s", r"\W", r"\.", "_", "\u00e9", "\u20ac-\u20af", r"\n", r"\x41", "."])
             for _ in range(rng.randint(1, 3))]
    return "[" + rng.choice(["", "^"]) + "".join(parts) + "]"


def random_regex(rng, depth):
    kind = rng.random()
    if depth == 0 or kind < 0.3:
        return rng.choice(["a", "b", "c", "0", " ", ".", r"\d", r"\w", r"\s", r"\D", r"\n", "\u00e9", "\u20ac", r"\.", "-", random_class(rng)])
    inner = lambda: random_regex(rng, depth - 1)
    if kind < 0.55: return "".join(inner() for _ in range(rng.randint(1, 4)))
    if kind < 0.7: return rng.choice(["(", "(?:", "(?P<n%d>" % rng.randrange(10**9)]) + "|".join(inner() for _ in range(rng.randint(1, 3))) + rng.choice(["", "|"]) + ")"
    low = rng.randint(0, 3)
    count = rng.choice(["*", "+", "?", "*?", "{%d}" % low, "{%d,}" % low, "{%d,%d}" % (low, low + rng.randint(0, 3)), "{,%d}" % low])
    return "(?:" + inner() + ")" + count


def check_regexes(engine, n, rng):
    matched = walks = 0
    for _ in range(n):
        regex = random_regex(rng, rng.randint(1, 4))
        try: compiled = re.compile(regex, re.ASCII)
        except re.error: continue
        texts = ["".join(rng.choice(ALPHABET) for _ in range(rng.randint(0, 6))) for _ in range(30)]
        out = engine.ask("regex", regex, texts, 10, rng.randrange(1 << 30))
        if out.get("error", "").startswith("no text matches"): out = {"accepts": [False] * len(texts), "walks": []}
        if "error" in out: fail(regex, out["error"])
        for text, accepted in zip(texts, out["accepts"]):
            if accepted != bool(compiled.fullmatch(text)): fail(regex, repr(text), f"here {accepted}")
            matched += accepted
        for text in out["walks"]:
            if not compiled.fullmatch(text): fail(regex, "walk " + repr(text))
            walks += 1
    print(f"regular expressions: {n} agree with re on 30 texts each, {matched} of them matching, and {walks} walks")


# 2. Grammars: ("text", t), ("rule", name), ("seq", parts), ("alt", parts), ("repeat", part, low, high).


def random_body(rng, names, depth):
    kind = rng.random()
    if depth == 0 or kind < 0.3: return ("text", rng.choice(["a", "b", "ab", "(", ")", ""]))
    if kind < 0.55: return ("rule", rng.choice(names))
    inner = lambda: random_body(rng, names, depth - 1)
    if kind < 0.75: return ("seq", [inner() for _ in range(rng.randint(1, 3))])
    if kind < 0.9: return ("alt", [inner() for _ in range(rng.randint(1, 3))])
    low = rng.randint(0, 2)
    return ("repeat", inner(), low, rng.choice([None, low, low + 2]))


def in_gbnf(x):
    if x[0] == "text": return '"' + x[1] + '"'
    if x[0] == "rule": return x[1]
    if x[0] == "repeat": return "(" + in_gbnf(x[1]) + ")" + ({0: "*", 1: "+"}.get(x[2], "{%d,}" % x[2]) if x[3] is None else "{%d,%d}" % x[2:])
    return "(" + (" " if x[0] == "seq" else " | ").join(map(in_gbnf, x[1])) + ")"


def ends(rules, x, text, i, memo):
    """Positions of text where x may end that begins at i."""
    if x[0] == "text": return {i + len(x[1])} if text.startswith(x[1], i) else set()
    if x[0] == "alt": return set().union(*(ends(rules, p, text, i, memo) for p in x[1]))
    if x[0] == "rule":
        if (x[1], i) not in memo: memo[x[1], i] = ends(rules, rules[x[1]], text, i, memo)
        return memo[x[1], i]
    at = {i}
    if x[0] == "seq":
        for p in x[1]: at = set().union(*(ends(rules, p, text, k, memo) for k in at))
        return at
    out = set(at) if x[2] == 0 else set()
    for n in range(1, (x[3] if x[3] is not None else x[2] + len(text) + 1) + 1):
        at = set().union(*(ends(rules, x[1], text, k, memo) for k in at))
        if n >= x[2]: out |= at
    return out


def check_grammars(engine, n, rng):
    total = collections.Counter()
    for _ in range(n):
        names = ["root", "x", "y", "z"][:rng.randint(1, 4)]
        rules = {name: random_body(rng, names, 3) for name in names}
        texts = list({"".join(rng.choice("aab()") for _ in range(rng.randint(0, 7))) for _ in range(60)})
        source = "\n".join(f"{name} ::= {in_gbnf(x)}" for name, x in rules.items())
        out = engine.ask("ebnf", source, texts, 6, rng.randrange(1 << 30))
        if "error" in out:
            if "left recursion" not in out["error"] and "no text matches" not in out["error"]: fail(source, out["error"])
            total["refused"] += 1
            continue
        for text, accepted in zip(texts + out["walks"], out["accepts"] + [True] * len(out["walks"])):
            if len(text) > 60: continue
            if accepted != (len(text) in ends(rules, rules["root"], text, 0, {})): fail(source, repr(text), f"here {accepted}")
            total["match" if accepted else "differ"] += 1
    print(f"grammars: {n}, {total['refused']} refused (left recursion, no text); {total['match']} texts match, {total['differ']} do not, as the recogniser says")


# 3. Schemas. Each maker gives a schema and a function that makes valid values.

def text_value(rng, low=0, high=8):
    return "".join(rng.choice(string.ascii_letters + " \"\\\n\t/<>{}[]:,\u00e9\u20ac\U0001f600\x01\x7f") for _ in range(rng.randint(low, high)))


def make_string(rng):
    kind = rng.randrange(5)
    if kind == 0: return {"type": "string"}, lambda: text_value(rng)
    if kind == 1:
        low = rng.randint(0, 5)
        high = low + rng.randint(0, 60)
        return {"type": "string", "minLength": low, "maxLength": high}, lambda: text_value(rng, low, high)
    if kind == 2:
        n = rng.randint(1, 4)
        regex, value = rng.choice([
            ("^[a-z]{%d}$" % n, lambda: "".join(rng.choice("abcz") for _ in range(n))),
            ("^a|b$", lambda: rng.choice(["a" + text_value(rng), text_value(rng) + "b"])),
            ("x+", lambda: text_value(rng) + "xx" + text_value(rng)),
            ("^(foo|ba[rz])+\\d*$", lambda: rng.choice(["foo", "barbaz12", "bar0"])),
            ("[\"\\\\]", lambda: text_value(rng) + rng.choice("\"\\") + text_value(rng)),
        ])
        return {"type": "string", "pattern": regex}, value
    if kind == 3:
        name, values = rng.choice([
            ("date", ["2026-01-31", "2024-02-29", "0001-12-01"]), ("uuid", ["123e4567-e89b-12d3-a456-426614174000"]),
            ("ipv4", ["127.0.0.1", "255.255.255.255"]), ("ipv6", ["::", "::1", "1:2:3:4:5:6:7:8", "fe80::1:2"]), ("email", ["a.b@x.org"]),
        ])
        return {"type": "string", "format": name}, lambda: rng.choice(values)
    return {"type": "string", "maxLength": 3}, lambda: text_value(rng, 0, 3)


def make_integer(rng):
    low, high = sorted(rng.choice([rng.randint(-20, 20), rng.randint(-(10**4), 10**4), rng.randint(-(10**17), 10**17)]) for _ in range(2))
    schema, kind = {"type": "integer"}, rng.randrange(4)
    if kind == 0: return schema, lambda: rng.randint(-(10**18) + 1, 10**18 - 1) if rng.random() < 0.5 else rng.randint(-50, 50)
    if kind == 1: return {**schema, "minimum": low}, lambda: low + rng.choice([0, 1, rng.randint(0, 10**5)])
    if kind == 2: return {**schema, "exclusiveMaximum": high}, lambda: high - 1 - rng.choice([0, 1, rng.randint(0, 10**5)])
    if rng.random() < 0.3:
        m = rng.randint(1, 40)
        return {**schema, "multipleOf": m}, lambda: m * rng.randint(-(10**6), 10**6)
    return {**schema, "minimum": low, "maximum": high}, lambda: rng.choice([low, high, rng.randint(low, high)])


def make_number(rng):
    if rng.random() < 0.3: return {"type": "number"}, lambda: rng.choice([0, -1, 2.5, -0.125, 1e-07, 1.5e20, rng.uniform(-9, 9)])
    places = rng.randint(0, 4)
    low, high = sorted(round(rng.uniform(-1000, 1000), places) for _ in range(2))
    schema, kind = {"type": "number"}, rng.randrange(4)
    def between(a, b): return min(max(round(rng.uniform(a, b), rng.randint(0, 6)), a), b) + 0.0
    if kind == 0: return {**schema, "minimum": low}, lambda: rng.choice([low, between(low, low + 1), between(low, low + 10**6)])
    if kind == 1: return {**schema, "maximum": high}, lambda: rng.choice([high, between(high - 1, high)])
    if kind == 2 and high - low > 1:
        return {**schema, "exclusiveMinimum": low, "exclusiveMaximum": high}, lambda: min(max(between(low, high), low + 0.25), high - 0.25)
    return {**schema, "minimum": low, "maximum": high}, lambda: rng.choice([low, high, between(low, high)])


def make_enum(rng):
    values = rng.sample(["a", "ab", "abc", "", "\"q\"", 1, 2.5, -3, None, True, False, [1, "x"], {"k": [], "z": {}}, "\u20ac"], rng.randint(1, 5))
    return ({"enum": values}, lambda: rng.choice(values)) if rng.random() < 0.8 else ({"const": values[0]}, lambda: values[0])


def make_array(rng, depth):
    item, value = make(rng, depth - 1)
    low, high = rng.randint(0, 2), rng.randint(2, 5)
    if rng.random() < 0.3:
        parts = [make(rng, depth - 1) for _ in range(rng.randint(1, 3))]
        schema = {"type": "array", "prefixItems": [p[0] for p in parts]}
        if rng.random() < 0.5: return {**schema, "items": False}, lambda: [v() for _, v in parts][:rng.randint(0, len(parts))]
        return {**schema, "items": item, "minItems": low}, lambda: [v() for _, v in parts] + [value() for _ in range(low)]
    if rng.random() < 0.3: return {"type": "array", "items": item}, lambda: [value() for _ in range(rng.randint(0, 4))]
    return {"type": "array", "items": item, "minItems": low, "maxItems": high}, lambda: [value() for _ in range(rng.randint(low, high))]


def make_object(rng, depth):
    names = rng.sample(["a", "b", "name", "na", "n\u00e9", "with \"quote\"", "", "x-y", "$id2", "tags"], rng.randint(0, 4))
    parts = {name: make(rng, depth - 1) for name in names}
    required = [n for n in names if rng.random() < 0.5]
    schema = {"type": "object", "properties": {n: s for n, (s, _) in parts.items()}, "required": required}
    more = rng.randrange(4)
    extra = make(rng, depth - 1) if more == 0 else ({}, lambda: rng.choice([1, "x", None, [True]])) if more == 1 else None
    if more == 2: schema["additionalProperties"] = False
    if extra: schema["additionalProperties"] = extra[0] if more == 0 else True
    if rng.random() < 0.1 and extra and more == 0:
        low = rng.randint(0, 1)
        del schema["properties"], schema["required"]
        schema |= {"minProperties": low, "maxProperties": low + 2}
        return schema, lambda: {f"k{i}": extra[1]() for i in range(rng.randint(low, low + 2))}
    def value():
        out = {n: v() for n, (_, v) in parts.items() if n in required or rng.random() < 0.6}
        for key in rng.sample(["zz", "nam", "names", "A", "q\n"], rng.randint(0, 2)) if extra else []:
            if key not in parts: out[key] = extra[1]()
        return out
    return schema, value


def make_choice(rng, depth):
    parts = [make(rng, depth - 1) for _ in range(rng.randint(1, 3))]
    return {"anyOf": [s for s, _ in parts]}, lambda: rng.choice(parts)[1]()


def make_tagged(rng, depth):
    parts = [make(rng, depth - 1) for _ in range(3)]
    schema = {"oneOf": [{"type": "object", "properties": {"kind": {"const": f"k{i}"}, "v": s}, "required": ["kind", "v"]} for i, (s, _) in enumerate(parts)]}
    def value():
        i = rng.randrange(3)
        return {"kind": f"k{i}", "v": parts[i][1]()}
    return schema, value


def make_merged(rng, depth):
    a, value = make_integer(rng)
    return {"allOf": [a, {"title": "t"}, {"type": ["integer", "string"]}], "description": "d"}, value


def make(rng, depth):
    simple = [lambda: make_string(rng), lambda: make_integer(rng), lambda: make_number(rng), lambda: make_enum(rng),
              lambda: ({"type": "boolean"}, lambda: rng.random() < 0.5), lambda: ({"type": ["null", "boolean"]}, lambda: rng.choice([None, True])),
              lambda: make_merged(rng, depth)]
    nested = [lambda: make_array(rng, depth), lambda: make_object(rng, depth), lambda: make_choice(rng, depth), lambda: make_tagged(rng, depth), lambda: make_object(rng, depth)]
    return rng.choice(simple if depth <= 0 or rng.random() < 0.4 else nested)()


def make_combined(rng, depth):
    """Keywords that meet: the engine may refuse these or be narrower, but not wider. At the root only."""
    kind, (a, va), (b, vb) = rng.randrange(5), make_object(rng, depth), make_object(rng, depth)
    def merged(): return {**va(), **vb()} if rng.random() < 0.7 else rng.choice([va, vb])()
    names = ["a", "b", "name", "na", "x-y", "tags"]
    some = lambda: rng.sample(names, rng.randint(1, 2))
    if kind == 0: return {"allOf": [a, b]}, merged
    if kind == 1: return {**a, "anyOf": [{"required": some()} for _ in range(rng.randint(1, 3))]}, merged
    if kind == 2: return {"$ref": "#/$defs/b", **a, "$defs": {"b": b}}, merged
    if kind == 3: return {"oneOf": [a, b, {"type": "string"}]}, merged
    (c, vc), (d, vd) = make(rng, depth - 1), make(rng, depth - 1)
    return {"allOf": [{"anyOf": [a, c]}, rng.choice([b, d, {"anyOf": [b, d]}])]}, lambda: rng.choice([merged, vc, vd])()


def written(value):
    return json.dumps(value, ensure_ascii=False)


def spoil(rng, value):
    """A value that differs somewhere."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        out = dict(value)
        if rng.random() < 0.3: del out[key]
        else: out[key] = spoil(rng, value[key])
        if rng.random() < 0.1: out["surplus"] = 1
        return out
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return value[:i] + [spoil(rng, value[i])] + value[i + 1:] if rng.random() < 0.6 else value + value if rng.random() < 0.5 else value[:i]
    if isinstance(value, str): return rng.choice([value + "x", value[:-1], 5, value + value])
    if isinstance(value, (int, float)) and not isinstance(value, bool): return rng.choice([value + 1, value - 1, value * 1000, value + 0.5, -value, "1"])
    return rng.choice([None, 0, "", [], {}, True, "spoiled"])


def check_combined(engine, n, rng):
    total = collections.Counter()
    for _ in range(n):
        schema, value = make_combined(rng, rng.randint(1, 3))
        validator = VALIDATOR(schema, format_checker=FORMATS)
        values = [ordered(v, schema) for v in [value() for _ in range(8)] + [spoil(rng, value()) for _ in range(8)]]
        out = engine.ask("schema", schema, [written(v) for v in values], 8, rng.randrange(1 << 30))
        if "error" in out:
            total["refused"] += 1
            continue
        for v, accepted in zip(values, out["accepts"]):
            if accepted and not validator.is_valid(v): fail(json.dumps(schema), "accepts " + written(v))
            total["accepted"] += accepted
        for text in out["walks"]:
            if not validator.is_valid(loads(text)): fail(json.dumps(schema), "walk " + text, next(validator.iter_errors(loads(text))).message)
        total["walks"] += len(out["walks"])
    print(f"schemas of keywords that meet: {n}, {total['refused']} refused; {total['accepted']} values accepted and {total['walks']} walks, all valid")


def loads(text):
    value = json.loads(text)
    json.dumps(value, ensure_ascii=False).encode()  # no lone surrogates
    return value


def check_schemas(engine, n, rng):
    total = collections.Counter()
    for _ in range(n):
        schema, value = make(rng, rng.randint(0, 3))
        if rng.random() < 0.2: # a list of itself
            schema, inner = {"$ref": "#/$defs/node", "$defs": {"node": {"type": "object", "properties": {"v": schema, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
                             "required": ["v", "next"], "additionalProperties": False}}}, value
            value = lambda: {"v": inner(), "next": {"v": inner(), "next": None}}
        validator = VALIDATOR(schema, format_checker=FORMATS)
        valid = [value() for _ in range(8)]
        for v in valid:
            if not validator.is_valid(v): fail("the test makes an invalid value", schema, v)
        invalid = [v for v in (spoil(rng, value()) for _ in range(12)) if not validator.is_valid(v)]
        out = engine.ask("schema", schema, [written(v) for v in valid + invalid], 12, rng.randrange(1 << 30))
        if "error" in out: fail(json.dumps(schema), out["error"])
        for v, accepted in zip(valid + invalid, out["accepts"]):
            total["accepted" if accepted else "refused"] += 1
        for v, accepted in zip(valid, out["accepts"]):
            if not accepted: fail(json.dumps(schema), "refuses " + written(v))
        for v, accepted in zip(invalid, out["accepts"][len(valid):]):
            if accepted: fail(json.dumps(schema), "accepts " + written(v))
        for text in out["walks"]:
            try: v = loads(text)
            except (ValueError, UnicodeError) as e: fail(json.dumps(schema), "walk " + text, e)
            if not validator.is_valid(v): fail(json.dumps(schema), "walk " + text, next(validator.iter_errors(v)).message)
        total["walks"] += len(out["walks"])
        total["open"] += out["open"]
    print(f"schemas: {n}; {total['accepted']} valid values accepted, {total['refused']} invalid refused, "
          f"{total['walks']} walks valid by jsonschema ({total['open']} did not end in 400 tokens)")


# 4. The official suite.

def ordered(value, schema):
    """Properties in the schema's order, as the engine writes them."""
    if isinstance(value, dict) and isinstance(schema, dict):
        properties = schema.get("properties", {})
        keys = [k for k in properties if k in value] + [k for k in schema.get("required", []) if k in value and k not in properties]
        return {k: ordered(value[k], properties.get(k)) for k in keys + [k for k in value if k not in keys]}
    return value


def check_suite(engine, folder):
    total, refusals, narrower = collections.Counter(), collections.Counter(), collections.Counter()
    for name in sorted(os.listdir(folder)):
        if not name.endswith(".json"): continue
        for group in json.load(open(os.path.join(folder, name), encoding="utf-8")):
            tests = group["tests"]
            total["tests"] += len(tests)
            total["schemas"] += 1
            texts = [written(ordered(t["data"], group["schema"])) for t in tests]
            out = engine.ask("schema", group["schema"], texts, 10)
            if "error" in out:
                total["refused schemas"] += 1
                total["refused tests"] += len(tests)
                keyword = re.search(r"'([^']*)' ", out["error"])
                refusals[keyword.group(1) if keyword and out["error"].startswith("schema") else out["error"][:60]] += 1
                continue
            for t, accepted in zip(tests, out["accepts"]):
                if accepted and not t["valid"]: fail(f"{name}: {group['description']}: {t['description']}", json.dumps(group["schema"]), t["data"])
                total["same" if accepted == t["valid"] else "narrower"] += 1
                if accepted != t["valid"]: narrower[name[:-5]] += 1
            exact = not isinstance(group["schema"], dict) or group["schema"].get("multipleOf", 1) >= 1  # others: doubles, not decimals, there
            for text in out["walks"] if exact else []:
                if not VALIDATOR(group["schema"]).is_valid(loads(text)): fail(f"{name}: {group['description']}", json.dumps(group["schema"]), "walk " + text)
            total["walks"] += len(out["walks"])
    print(f"JSON-Schema-Test-Suite: {total['schemas']} schemas, {total['refused schemas']} refused with a message; of the others' "
          f"{total['tests'] - total['refused tests']} tests {total['same']} agree, {total['narrower']} valid values are refused, 0 invalid accepted; {total['walks']} walks valid")
    print("  refused for:", ", ".join(f"{k} {v}" for k, v in refusals.most_common()))
    print("  narrower in:", ", ".join(f"{k} {v}" for k, v in narrower.most_common()))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("--regexes", type=int, default=2000)
    parser.add_argument("--grammars", type=int, default=2000)
    parser.add_argument("--schemas", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--suite")
    a = parser.parse_args()
    engine, rng = Engine(a.program), random.Random(a.seed)
    check_regexes(engine, a.regexes, rng)
    check_grammars(engine, a.grammars, rng)
    check_schemas(engine, a.schemas, rng)
    check_combined(engine, a.schemas, rng)
    if a.suite: check_suite(engine, a.suite)
    else: print("SKIP: the JSON-Schema-Test-Suite: no folder given")


if __name__ == "__main__": main()
