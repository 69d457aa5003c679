#!/usr/bin/env python3
"""Checks models/demo/chat_template.jinja against the section chat_rendering of tests/golden/model_vectors.json.

Needs jinja2, set up as Hugging Face sets it up. Run from the repository root. Another template: first argument."""
import json
import sys

from jinja2.exceptions import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment


def raise_exception(message):
    raise TemplateError(message)


def environment():
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    env.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    env.globals["raise_exception"] = raise_exception
    return env


def check(template, case):
    """Says what is wrong; None when nothing is."""
    inputs = {"messages": case["messages"], "add_generation_prompt": True, **case["kwargs"]}
    try:
        got = template.render(**inputs)
    except (TemplateError, TypeError) as error:
        found = [type(error).__name__, str(error)]
        expected = [case.get("error_type"), case.get("error")]
        return None if found == expected else f"error {found}, expected {expected}"
    if "rendered" not in case:
        return f"rendered {got!r}, expected the error {case['error']!r}"
    return None if got == case["rendered"] else f"\n  got      {got!r}\n  expected {case['rendered']!r}"


def main():
    path = sys.argv[1] if len(sys.argv) > 1 else "models/demo/chat_template.jinja"
    with open(path, encoding="utf-8") as f:
        template = environment().from_string(f.read())
    with open("tests/golden/model_vectors.json", encoding="utf-8") as f:
        cases = json.load(f)["chat_rendering"]["cases"]
    failed = 0
    for case in cases:
        wrong = check(template, case)
        if wrong:
            failed += 1
            print(f"{case['name']}: {wrong}")
    print(f"{len(cases)} cases, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
