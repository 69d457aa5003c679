#!/usr/bin/env python3
"""Checks the template interpreter (src/tokenizer/jinja) against Jinja2, set up as Hugging Face sets it up.

  test_chat_template.py BUILD/tests/tokenizer/render_lines [--conversations N] [--expressions N] [--seed N]
  test_chat_template.py --write-golden     writes tests/golden/jinja_cases.json from the cases below

1. models/demo/chat_template.jinja in Jinja2 against tests/golden/model_vectors.json.
2. The cases of constructs, N random conversations through two templates, and N random expressions: both
   implementations give the same text, or both fail; what raise_exception says is the same. A construct that is refused
   where Jinja2 renders it is counted and shown, not an error, in the random expressions only.
Needs jinja2; run from the repository root."""
import argparse
import json
import random
import subprocess
import sys
import warnings

from jinja2.exceptions import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

DEMO = "models/demo/chat_template.jinja"

# Another template of the kind that checkpoints bring: line breaks instead of signs, set blocks, loops with
# conditions, get, selectattr, tojson with an indent, break.
OTHER = """\
{% macro show(value, depth=0) %}
  {% if value is mapping %}
{{ ' ' * depth }}{% for k, v in value.items() %}{{ k }}={{ show(v, depth + 1) }}{{ ', ' if not loop.last }}{% endfor %}

  {% elif value is string or value is number %}{{ value }}
  {% elif value is sequence %}[{{ value | map('string') | join('|') }}]
  {% else %}{{ value }}{% endif %}
{% endmacro %}
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{% set ns = namespace(found=false, users=0) %}
{# the first
   user #}
{% for m in messages if m.role == 'user' %}
    {%- if loop.index > 2 %}{% break %}{% endif %}
    {%- set ns.users = ns.users + 1 %}
<u{{ loop.index }}/{{ loop.length }}:{{ loop.revindex0 }}>{{ m.content | string | trim | length }}
{% else %}
no users
{% endfor %}
{% set head %}
roles: {{ messages | map(attribute='role') | list }}
{%- endset %}
{{ head | upper if head is string }}{{ '\\n' }}
{%- for m in messages[::-1] %}
    {%- set content = m.get('content', none) %}
    {%- if content is none %}{% continue %}{% endif %}
    {%- if content is string %}
        {%- set parts = content.split('</think>') %}
        {%- if parts | length > 1 %}{{ '(' ~ parts[0].split('<think>')[-1].strip() ~ ')' }}{% endif %}
{{ m['role'] + ': ' + parts[-1].lstrip('\\n') }}
    {%- else %}
{{ m.role }}: {{ content | tojson(indent=2) }}
    {%- endif %}
    {%- if m.tool_calls is defined and m.tool_calls %}
        {%- for call in m.tool_calls | selectattr('function', 'defined') %}
{{ '\\n' ~ loop.index0 ~ call.function.name ~ show(call.function.arguments) }}
        {%- endfor %}
    {%- endif %}
    {%- if loop.previtem is defined and loop.previtem.role == m.role %} again{% endif %}
{% endfor %}
{{ bos_token }}{{ tools | tojson if tools else 'no tools' }}
{%- if add_generation_prompt %}
{% generation %}
<a>
{% endgeneration %}
{%- endif %}
"""

VALUES = {
    "s": " Ünï </x> 'q' \"d\"\n", "e": "", "a": "abcabc", "n": None, "t": True, "f": False, "i": 7, "z": 0, "m": -3,
    "r": 2.5, "big": 1e16, "small": 1e-05, "l": [1, "two", None, [3.0, True]], "el": [],
    "d": {"k": "v", "n": {"x": [1, {"y": "\u2028\x7f"}]}, "": 0}, "ed": {},
    "ms": [{"role": "user", "content": "hi", "v": 1}, {"role": "tool", "content": None, "v": 2}, {"role": "user", "v": 3}],
}

# Constructs one by one; the variables are VALUES.
CASES = [
    "{{ (nothing, 'v') in d }}{{ (1, (2, 'k')) not in d }}", "{{ (1, [2]) in d }}", "{{ (1, ({},)) in d }}",
    "{{ a.startswith(('x', 'ab')) }}{{ a.endswith(('x',)) }}{{ a.endswith(()) }}", "{{ a.startswith((1, 'ab')) }}", "{{ a.endswith(('bc', 1)) }}",
    "{{ 'x' is odd }}", "{{ n is even }}",
    "{{ s }}|{{ e }}|{{ n }}|{{ t }}|{{ i }}|{{ r }}|{{ big }}|{{ small }}|{{ l }}|{{ d }}|{{ nothing }}|",
    "{{ s | tojson }} {{ d | tojson }} {{ l | tojson }} {{ n | tojson }} {{ ed | tojson }} {{ el | tojson }}",
    "{{ d | tojson(indent=2) }}\n{{ l | tojson(indent=0) }}\n{{ ed | tojson(indent=4) }}{{ [[], {}] | tojson(indent=1) }}",
    "{{ nothing | tojson }}", "{{ nothing.x }}", "{{ d.nothing.x }}", "{{ n.x.y }}", "{{ n.x }}|{{ s.x }}|{{ l.x }}|{{ i.x }}",
    "{{ l[0] }}{{ l[-1] }}{{ l[9] }}{{ l['x'] }}{{ d['k'] }}{{ d['q'] }}{{ s[1] }}{{ s[-2] }}{{ s[99] }}{{ l.1 }}{{ d[0] }}",
    "{{ a[::-1] }}|{{ a[1:] }}|{{ a[:-1] }}|{{ a[1:5:2] }}|{{ a[5:1:-2] }}|{{ a[9:] }}|{{ a[-99:2] }}|{{ l[::-1] }}|{{ l[1:3] }}|{{ s[1:4] }}",
    "{{ a[::0] }}", "{{ a[:'x'] }}", "{{ (1, 2)[::-1] }}{{ (1,) }}{{ () }}{{ 1, 2 }}",
    "{% if t %}1{% elif f %}2{% else %}3{% endif %}{% if f %}1{% elif t %}2{% else %}3{% endif %}{% if z %}1{% elif n %}2{% else %}3{% endif %}",
    "{% if f %}{% else %}{% if t %}x{% endif %}{% endif %}{% if f %}a{% else %}{% if f %}b{% endif %}c{% endif %}",
    "{% for x in l %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.previtem }}>{{ loop.nextitem }};{% endfor %}",
    "{% for x in el %}{{ x }}{% else %}none{% endfor %}{% for x in a %}{{ x }}.{% endfor %}{% for k in d %}{{ k }},{% endfor %}",
    "{% for k, v in d.items() %}{{ k }}:{{ v }};{% endfor %}{% for k, v in d | items %}{{ k }};{% endfor %}{% for (a, b) in [[1, 2], (3, 4)] %}{{ a + b }}{% endfor %}",
    "{% for a, b in [[1]] %}{{ a }}{% endfor %}", "{% for x in i %}{% endfor %}", "{% for x in n %}{% endfor %}",
    "{% for x in nothing %}{{ x }}{% else %}empty{% endfor %}{% for x in nothing | items %}{% endfor %}",
    "{% for x in range(5) if x % 2 == 0 %}{{ x }}/{{ loop.length }} {% else %}no{% endfor %}{% for x in l if false %}{{ x }}{% else %}no{% endfor %}",
    "{% for x in range(9) %}{% if x == 1 %}{% continue %}{% endif %}{% if x > 3 %}{% break %}{% endif %}{{ x }}{% endfor %}",
    "{% for x in range(3) %}{% for y in range(3) %}{% if y == x %}{% break %}{% endif %}{{ x }}{{ y }} {% endfor %}{{ loop.index }}{% endfor %}",
    "{% set x = 1 %}{% for y in l %}{{ x }}{% set x = x + 1 %}{{ x }}{% endfor %}{{ x }}",
    "{% set ns = namespace(x=1, y='q') %}{% for y in l %}{% set ns.x = ns.x + loop.index %}{% endfor %}{{ ns.x }}{{ ns.y }}{{ ns.z }}",
    "{% set d.k = 1 %}", "{% set nothing.k = 1 %}", "{% set x, y = (1, [2]) %}{{ x }}{{ y }}{% set x = 1, 2 %}{{ x }}", "{% set x, y = 1 %}",
    "{% set x %}  a {{ i }}\n{% set y = 5 %}{% endset %}[{{ x }}]{{ y }}{{ x | trim }}",
    "{% set y = 1 %}{% macro m(a, b=2, c=a) %}{{ a }}{{ b }}{{ c }}{{ y }}{{ z }}{% set y = 9 %}{{ y }}{% endmacro %}{{ m(1) }}|{{ m(1, 3) }}|{{ m(b=4, a=5) }}|{{ m() }}|{{ y }}{% set y = 7 %}{{ m('x') | upper }}",
    "{% macro m(a) %}{{ a }}{% endmacro %}{{ m(1, 2) }}", "{% macro m(a) %}{{ a }}{% endmacro %}{{ m(b=2) }}",
    "{% macro m(a) %}{{ a }}{% endmacro %}{{ m(1, a=2) }}", "{% macro m(n) %}{% if n > 0 %}{{ n }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(5) }}",
    "{% macro m() %}{{ loop is defined }}{{ x is defined }}{% endmacro %}{% for x in [1] %}{{ m() }}{% endfor %}",
    "{% if t %}{% macro m() %}in{% endmacro %}{% endif %}{{ m() }}{{ m is defined }}",
    "{{ nothing() }}", "{{ i() }}", "{{ strftime_now is defined }}{{ strftime_now('%Y') if strftime_now is defined else 'none' }}",
    "{{ raise_exception('Own words: ' ~ i) }}", "{% if f %}{{ raise_exception('x') }}{% endif %}fine",
    "{{ s is string }}{{ s is sequence }}{{ s is iterable }}{{ s is mapping }}{{ d is sequence }}{{ d is iterable }}{{ d is mapping }}{{ l is mapping }}{{ l is sequence }}{{ n is iterable }}{{ i is sequence }}{{ nothing is iterable }}{{ nothing is sequence }}",
    "{{ n is none }}{{ nothing is none }}{{ nothing is defined }}{{ d.x is defined }}{{ d.k is defined }}{{ nothing is undefined }}{{ n is not none }}{{ i is not defined }}",
    "{{ t is true }}{{ i is true }}{{ f is false }}{{ z is false }}{{ t is boolean }}{{ i is number }}{{ t is number }}{{ t is integer }}{{ i is integer }}{{ r is float }}",
    "{{ i is odd }}{{ i is even }}{{ i is divisibleby 7 }}{{ i is divisibleby(2) }}{{ i is eq 7 }}{{ i is equalto(7) }}{{ i is ne 7 }}{{ i is in [7] }}{{ 'b' is in a }}",
    "{{ 'x' if s is string else 'y' }}{{ 'x' if n is string }}{{ 'a' if f else 'b' if f else 'c' }}{{ ('x' if f) is defined }}",
    "{{ 1 + 2 * 3 - 4 }}{{ 7 / 2 }}{{ 7 // 2 }}{{ -7 // 2 }}{{ 7 % 3 }}{{ -7 % 3 }}{{ 7 % -3 }}{{ 2.5 * 2 }}{{ -7.5 // 2 }}{{ -7.5 % 2 }}{{ 1 / 3 }}{{ t + 1 }}",
    "{{ 1 / 0 }}", "{{ 1 // 0 }}", "{{ 1 % 0 }}", "{{ a + a }}{{ [1] + [2] }}{{ 'ab' * 3 }}{{ (1,) + (2,) }}{{ 'ab' * -1 }}",
    "{{ 'a' + 1 }}", "{{ 1 + 'a' }}", "{{ n + 1 }}", "{{ nothing + 1 }}", "{{ 'a' ~ 1 ~ n ~ t ~ l ~ nothing ~ r }}", "{{ -i }}{{ -r }}{{ -t }}{{ - 2 | abs }}", "{{ -a }}",
    "{{ 1 < 2 }}{{ 1 < 2 < 3 }}{{ 1 < 3 < 2 }}{{ 'a' < 'b' }}{{ 1 == 1.0 }}{{ t == 1 }}{{ '1' == 1 }}{{ l == l }}{{ d == d }}{{ n == none }}{{ 2 >= 2 }}{{ 2 != 2 }}{{ (1,) == [1] }}{{ nothing == nothing }}",
    "{{ 'a' < 1 }}", "{{ nothing < 1 }}", "{{ n < 1 }}", "{{ 'b' in a }}{{ 'x' not in a }}{{ 'k' in d }}{{ 'v' in d }}{{ 1 in l }}{{ 'x' in nothing }}{{ '' in a }}{{ none in l }}{{ 1.0 in l }}",
    "{{ 1 in a }}", "{{ 'x' in i }}", "{{ 'x' in n }}", "{{ not t }}{{ not n }}{{ not not i }}{{ t and i }}{{ z or e or 'last' }}{{ f and nothing.x.y }}{{ t or nothing.x.y }}{{ not f and t }}",
    "{{ s | trim }}|{{ s.strip() }}|{{ 'xxaxx'.strip('x') }}|{{ 'xyaxy'.lstrip('yx') }}|{{ 'xyaxy'.rstrip('yx') }}|{{ ' a '.lstrip() }}|{{ 'éaé'.strip('é') }}|{{ n | trim }}|{{ nothing | trim }}|{{ '..a.' | trim('.') }}",
    "{{ 'a,b,,c'.split(',') }}{{ ' a  b '.split() }}{{ 'a,b,c'.split(',', 1) }}{{ ' a b  c '.split(none, 1) }}{{ ''.split() }}{{ ''.split(',') }}{{ 'abc'.split('abc') }}", "{{ 'a'.split('') }}",
    "{{ a.startswith('ab') }}{{ a.endswith('bc') }}{{ a.startswith('') }}{{ e.startswith('x') }}{{ a.find('c') }}{{ a.find('x') }}{{ 'äöü'.find('ü') }}{{ a.replace('b', 'XX') }}{{ a.replace('b', '', 1) }}{{ a.replace('', '-') }}{{ 'äb' | replace('', '.') }}{{ a | replace('a', 'b') }}{{ a.upper() }}{{ 'ABC'.lower() }}{{ 'hELLO'.capitalize() }}{{ a.removeprefix('ab') }}{{ a.removesuffix('bc') }}{{ ','.join(['a', 'b']) }}",
    "{{ n.strip() }}", "{{ i.strip() }}", "{{ nothing.strip() }}", "{{ l.startswith('x') }}", "{{ a.startswith(1) }}", "{{ i.items() }}",
    "{{ d.get('k') }}{{ d.get('x') }}{{ d.get('x', 5) }}{{ d.keys() | list }}{{ d.values() | list }}{{ d | length }}{{ l | length }}{{ s | length }}{{ nothing | length }}", "{{ i | length }}", "{{ n | length }}",
    "{{ nothing | default('x') }}{{ n | default('x') }}{{ n | default('x', true) }}{{ e | default('x', boolean=true) }}{{ nothing | default }}{{ nothing | d(1) }}{{ d.q | default(d.k) }}",
    "{{ l | first }}{{ l | last }}{{ el | first }}{{ a | first }}{{ a | last }}{{ el | last is defined }}{{ l | list }}{{ a | list }}{{ d | list }}{{ l | reverse | list }}{{ a | reverse }}",
    "{{ '12' | int }}{{ ' 12 ' | int }}{{ 'x' | int }}{{ 'x' | int(5) }}{{ '2.7' | int }}{{ r | int }}{{ n | int }}{{ t | int }}{{ '2.5' | float }}{{ i | float }}{{ 'x' | float }}{{ m | abs }}{{ -2.5 | abs }}",
    "{{ l | join(',') }}|{{ ms | join('-', attribute='role') }}|{{ a | join('.') }}|{{ el | join }}|{{ [1, 2] | join }}|{{ ms | map(attribute='v') | list }}|{{ ['a'] | map('upper') | list }}|{{ ms | map(attribute='content') | list }}",
    "{{ ms | selectattr('role', 'equalto', 'user') | list | length }}{{ ms | rejectattr('role', 'eq', 'user') | map(attribute='v') | join }}{{ ms | selectattr('content') | list | length }}{{ ms | selectattr('content', 'defined') | list | length }}{{ [0, 1, '', 'a'] | select | list }}{{ [1, 2, 3] | reject('odd') | list }}{{ [1, 'a'] | select('string') | list }}",
    "{{ n | items | list }}", "{% for k, v in 'str' | items %}{% endfor %}", "{{ [1, 2] | string }}{{ n | string }}{{ 'a' | safe }}{{ d | items | list }}",
    "{{ {'a': 1, 'b': [2]} }}{{ {} }}{{ {'a': 1}.a }}{{ {'a': {'b': 2}}['a']['b'] }}{{ dict(a=1, b='x') }}{{ [1, 2,] }}{{ {'a': 1,} }}",
    "{{ 'a' 'b' \"c\" }}{{ '\\n\\t\\\\\\'\\x41\\u00e9\\U0001F600\\q' }}{{ \"it's\" }}{{ 'x\\\ny' }}",
    "{{ range(3) | list }}{{ range(1, 4) | list }}{{ range(5, 0, -2) | list }}{{ range(0) | list }}", "{{ range(1000000) }}", "{{ range(1, 2, 0) }}",
    "  {% if t %}  \n  x\n  {% endif %}  \n  y {{ i }}  \n", "a\n  {%- if t -%}  \n  b  \n  {%- endif -%}  \n c", "a\n  {%+ if t +%}  \n  b\n  {%+ endif %}\nc", "a {#- c -#} b{# d #}\n e\n  {# f #}\n  {#+ g +#}\n h",
    "x {{- i -}} y {{+ i }} z\n\n{{ i }}\n\n", "a\r\n{% if t %}\r\nb\rc{% endif %}\r\n", "\n", "\n\n", "", "{% set x = 1 %}\n\n  {% set y = 2 %}\n{{ x }}\n{{ y }}\n",
    "{% if t %}\n{% set x = 1 %}\n   {% set x = 2 %}{{ x }}\n{% endif %}", "{ { } } {{ '}}' }} {{ '{%' }} %} }} #}", "{{ {'a': {'b': 1}}}}", "{{ d.n.x[1].y | tojson }}",
    "{{ '\u00a0\u2003x\u3000' | trim }}|{{ '\\x1c\\x85x' | trim }}|{{ '\u200bx' | trim }}", "\u00a0{%- if t %}\u3000{%- endif -%}\u2003x",
    "{{ \"a'b\" ~ ['a\\'b', 'a\"b', 'a\\'\"b', 'a\\\\b', '\\n\\t\\r\\x00\\x7f\u00ad\u200b\u3000é'] }}", "{{ none_ }}{{ true }}{{ True }}{{ none }}{{ None }}{{ false }}",
    "{% generation %}x{% endgeneration %}\n{% generation %}\n y\n{% endgeneration %}\n", "{{ loop }}", "{% for x in [1] %}{{ loop.nothing_here }}{% endfor %}" if False else "{{ ns is defined }}",
    "{{ 3 is divisibleby 3 and true }}{{ 'a' is in 'abc' and t }}{{ not s is string }}{{ 1 if t is true else 2 }}", "{{ 1.5e3 }}{{ 1e3 }}{{ 0.1 + 0.2 }}{{ 100000000000000000000.0 }}{{ 5 // 2.0 }}",
    # refused by both
    "{% if %}x{% endif %}", "{{ }}", "{{ 1 + }}", "{% for x %}{% endfor %}", "{% if t %}", "{% endif %}", "{{ 'open }}", "{{ s | nofilter }}", "{{ s is notest }}", "{% nothing %}", "{{ (1 }}", "{{ [1 }}", "{# open", "{% break %}", "{% macro x %}{% endmacro %}",
    "{{ a.}}", "{% set = 1 %}", "{% set x 1 %}", "{{ a | }}", "{{ f(a=1, 2) }}", "{{ $ }}", "{{ s | trim(1, 2, 3) }}", "{{ s | replace('a') }}", "{% set loop = 1 %}{% for x in [1] %}{% set loop = 2 %}{% endfor %}",
]


def raise_exception(message):
    raise TemplateError(message)


class Generation(__import__("jinja2.ext", fromlist=["Extension"]).Extension):
    """Hugging Face marks the assistant's tokens with it; the text is that of its body."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def environment():
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    return env


ENV = environment()


def by_jinja(case):
    """{"text": ...} or {"error": ..., "own": words of raise_exception}."""
    try:
        return {"text": ENV.from_string(case["template"]).render(**case["variables"])}
    except TemplateError as error:
        own = type(error) is TemplateError
        return {"error": f"{type(error).__name__}: {error}", **({"own": str(error)} if own else {})}
    except Exception as error:  # whatever Python says about operands: the types are enough
        return {"error": f"{type(error).__name__}: {error}"}


def check_vectors():
    with open(DEMO, encoding="utf-8") as f:
        template = ENV.from_string(f.read())
    with open("tests/golden/model_vectors.json", encoding="utf-8") as f:
        cases = json.load(f)["chat_rendering"]["cases"]
    failed = 0
    for case in cases:
        inputs = {"messages": case["messages"], "add_generation_prompt": True, **case["kwargs"]}
        try:
            found = template.render(**inputs), None, None
        except (TemplateError, TypeError) as error:
            found = None, str(error), type(error).__name__
        if found != (case.get("rendered"), case.get("error"), case.get("error_type")):
            failed += 1
            print(f"{case['name']}: found {found}")
    print(f"vectors: {len(cases)} cases, {failed} failed")
    return failed


TEXTS = ["", " ", "hello", "  a\n b ", "Köln \u2028 \u00a0", "<think>\nwhy\n</think>\n\nbecause", "</think>", "<think>", "a</think>b<think>c</think>d",
         "<tool_response>\nx\n</tool_response>", "<|im_end|>", "{{ x }} {% y %}", "\u3000全角\u3000", "😀 \x00 \x1f\x7f", "'\"\\", "\r\n", "an image", "my video", "text"]


def text(r):
    return "".join(r.choice(TEXTS) for _ in range(r.choice([1, 1, 1, 2, 3])))


def value(r, depth=0):
    kind = r.randrange(9 if depth < 4 else 6)
    if kind < 2:
        return text(r)
    if kind < 6:
        return [None, r.random() < .5, r.randint(-10**9, 10**18), r.choice([1.0, -0.0, 1e16, 1e-5, 2.5, 1 / 3, 1e300, 123456.789])][kind - 2]
    if kind == 6:
        return [value(r, depth + 1) for _ in range(r.randrange(4))]
    return {r.choice(["a", "b", "k ey", "ü", "n", "type", "text"]): value(r, depth + 1) for _ in range(r.randrange(4))}


def part(r):
    return r.choice([
        lambda: {"type": "text", "text": text(r)}, lambda: {"type": "text", "text": text(r)}, lambda: {"text": text(r)},
        lambda: {"type": "image"}, lambda: {"type": "image_url", "image_url": {"url": "x"}}, lambda: {"image": "x"},
        lambda: {"type": "video", "video": "v"}, lambda: {"type": "audio"}, lambda: text(r), lambda: {"text": value(r)},
    ])() if r.random() < .98 else value(r)


def content(r):
    kind = r.random()
    if kind < .7:
        return text(r)
    if kind < .78:
        return None
    if kind < .97:
        return [part(r) for _ in range(r.randrange(4))]
    return value(r)


def call(r):
    f = {"name": r.choice(["f", "get_weather", "ü"])}
    if r.random() < .9:
        f["arguments"] = {r.choice(["a", "b", "c d"]): value(r) for _ in range(r.randrange(4))} if r.random() < .97 else value(r)
    return {"type": "function", "function": f} if r.random() < .8 else f


def message(r, i):
    role = r.choice(["user"] * 6 + ["assistant"] * 5 + ["tool"] * 3 + (["system"] * 6 if i == 0 else [])) if r.random() < .99 else r.choice(["system", "developer", None])
    m = {"role": role, "content": content(r)}
    if role == "system" and r.random() < .8:
        m["content"] = text(r)
    if r.random() < .03:
        del m["content"]
    if role == "assistant":
        if r.random() < .4:
            m["reasoning_content"] = r.choice([text(r), None])
        if r.random() < .4:
            m["tool_calls"] = [call(r) for _ in range(r.randrange(3))] if r.random() < .95 else r.choice([None, {}, {"a": 1}])
    return m


def tool(r):
    return {"type": "function", "function": {"name": "f", "description": text(r), "parameters": {"type": "object", "properties": value(r), "required": ["a"]}}}


def conversation(r, template):
    v = {"messages": [message(r, i) for i in range(r.randrange(7))]}
    if r.random() < .5:
        v["add_generation_prompt"] = r.random() < .8
    if r.random() < .5:
        v["tools"] = r.choice([None, [], [tool(r)], [tool(r), value(r)]])
    for key in ("enable_thinking", "preserve_thinking", "add_vision_id"):
        if r.random() < .3:
            v[key] = r.choice([True, False, 1, None])
    if r.random() < .5:
        v["bos_token"] = "<s>"
    return {"template": template, "variables": v}


def expression(r, depth=0):
    """Mostly sensible, now and then not."""
    if depth > 2 or r.random() < .3:
        return r.choice(list(VALUES) + ["nothing", "1", "2", "0", "-1", "1.5", "'a'", "'b c'", "''", "none", "true", "[]", "{}", "d.k", "d.n.x", "ms[0]", "l[1]"])
    x, y = expression(r, depth + 1), expression(r, depth + 1)
    return r.choice([
        lambda: f"({x} {r.choice(['+', '-', '*', '/', '//', '%', '~', '==', '!=', '<', '<=', '>', '>=', 'in', 'not in', 'and', 'or'])} {y})",
        lambda: f"{x} ~ {y}", lambda: f"not {x}", lambda: f"(-{x})", lambda: f"({x} if {y} else {expression(r, depth + 1)})", lambda: f"({x} if {y})",
        lambda: f"(({x}) is {r.choice(['', 'not '])}{r.choice(['defined', 'undefined', 'none', 'string', 'mapping', 'sequence', 'iterable', 'number', 'integer', 'float', 'boolean', 'true', 'false', 'odd', 'even'])})",
        lambda: f"({x}) | {r.choice(['tojson', 'trim', 'string', 'length', 'first', 'last', 'list', 'upper', 'lower', 'capitalize', 'int', 'float', 'abs', 'join', 'items | list', 'reverse | list', 'default(1)', 'default(2, true)', 'tojson(indent=2)', 'select | list'])}",
        lambda: f"({x}) | join({y})", lambda: f"({x}) | replace({y}, 'z')", lambda: f"({x}) | default({y})",
        lambda: f"{r.choice(list(VALUES))}[{r.choice(['0', '-1', '1:', ':-1', '::-1', '1:3', '::2', '3:0:-1', chr(39) + 'k' + chr(39), y])}]",
        lambda: f"({x}).{r.choice(['k', 'n', 'role', 'content', 'x'])}",
        lambda: f"({x}).{r.choice(['strip()', 'split()', 'split(' + chr(39) + 'b' + chr(39) + ')', 'upper()', 'lower()', 'get(' + chr(39) + 'k' + chr(39) + ')', 'keys() | list', 'values() | list', 'items() | list', 'startswith(' + y + ')', 'endswith(' + y + ')', 'lstrip(' + y + ')', 'find(' + y + ')', 'replace(' + y + ', ' + chr(39) + 'q' + chr(39) + ')', 'join(' + y + ')'])}",
        lambda: f"[{x}, {y}]", lambda: f"({x}, {y})", lambda: f"{{'k': {x}, 'j': {y}}}",
    ])()


def random_template(r):
    lines = []
    for _ in range(r.choice([1, 1, 1, 2])):
        e = expression(r)
        lines.append(r.choice([
            "{{ %s }}", "{%% if %s %%}\n  yes\n{%%- else %%}\n no\n  {%% endif %%}", "{%% for x in %s %%}{{ loop.index }}{{ x }}\n {%% else %%}-\n{%% endfor %%}",
            "  {%% set v = %s %%}\n{{ v }}", "{%% set v %%}{{ %s }}{%% endset %%}{{ v | length }}",
        ]) % e)
    return {"template": "\n".join(lines), "variables": VALUES}


def ours(program, cases):
    lines = "".join(json.dumps(c) + "\n" for c in cases)
    out = subprocess.run([program], input=lines.encode(), stdout=subprocess.PIPE, check=True).stdout.decode()
    return [json.loads(line) for line in out.split("\n") if line]


def compare(name, program, cases, may_refuse=False):
    failed, refused, errors = 0, {}, 0
    got_all = ours(program, cases)
    assert len(got_all) == len(cases)
    for case, got in zip(cases, got_all):
        want = by_jinja(case)
        same = got.get("text") == want.get("text") and ("error" in got) == ("error" in want)
        if same and "own" in want:
            same = got["error"] == want["own"]
        errors += "error" in want
        if not same and may_refuse and "not supported" in got.get("error", ""):
            refused[got["error"].split(": ", 1)[1]] = refused.get(got["error"].split(": ", 1)[1], 0) + 1
        elif not same:
            failed += 1
            if failed <= 10:
                print(f"{name}: {json.dumps(case['template'] if case['variables'] is VALUES else case, ensure_ascii=False)[:1500]}\n  got  {got}\n  want {want}")
    print(f"{name}: {len(cases)} cases, {errors} of them errors in both, {failed} failed" + (f", refused: {refused}" if refused else ""))
    return failed


def write_golden(path):
    out = []
    for template in CASES:
        want = by_jinja({"template": template, "variables": VALUES})
        out.append({"template": template, **({"text": want["text"]} if "text" in want else {"error": want.get("own")})})
    with open(path, "w", encoding="utf-8") as f:
        f.write('{"variables": ' + json.dumps(VALUES) + ',\n"cases": [\n' + ",\n".join(json.dumps(c) for c in out) + "\n]}\n")


def main():
    warnings.simplefilter("ignore", SyntaxWarning)  # of code that Jinja2 makes from random expressions
    parser = argparse.ArgumentParser()
    parser.add_argument("program", nargs="?")
    parser.add_argument("--conversations", type=int, default=1000)
    parser.add_argument("--expressions", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write-golden", action="store_true")
    o = parser.parse_args()
    if o.write_golden:
        write_golden("tests/golden/jinja_cases.json")
        return 0
    failed = check_vectors()
    if o.program:
        with open(DEMO, encoding="utf-8") as f:
            demo = f.read()
        r = random.Random(o.seed)
        failed += compare("constructs", o.program, [{"template": t, "variables": VALUES} for t in CASES])
        failed += compare("conversations, demo template", o.program, [conversation(r, demo) for _ in range(o.conversations)])
        failed += compare("conversations, another template", o.program, [conversation(r, OTHER) for _ in range(o.conversations)], True)
        failed += compare("random expressions", o.program, [random_template(r) for _ in range(o.expressions)], True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
