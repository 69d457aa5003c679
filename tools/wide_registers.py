"""Finds wide tensor-core instructions whose register operand is overwritten before they are waited for.

usage: cuobjdump -sass build/src/backend/cuda/batch.cu.o | python3 tools/wide_registers.py
Reads a disassembly in the order of its lines, so it sees what follows an instruction up to the next wait, not around loops.
Exit status 1: found some."""
import re
import sys

IGNORED = ('ST', 'RED', 'ATOM', 'BAR', 'BRA', 'SYNC', 'LDGSTS', 'HGMMA', 'WARP', 'UMOV', 'R2UR', 'ISETP', 'FSETP', 'BSSY', 'DEPBAR')


def written(text):
    """Registers an instruction writes."""
    text = re.sub(r'^@!?U?P\w+\s+', '', text)
    name = text.split()[0] if text.split() else ''
    first = re.match(r'\S+\s+(?:P\d,\s*)?R(\d+)\b', text)
    if name.startswith(IGNORED) or not first:
        return range(0)
    n = 4 if '.128' in name else 2 if '.64' in name or 'WIDE' in name else 1
    return range(int(first.group(1)), int(first.group(1)) + n)


def main():
    function, in_flight, n, found = '', {}, 0, 0
    for line in sys.stdin:
        begin = re.search(r'Function : (\S+)', line)
        if begin:
            function, in_flight = begin.group(1), {}
        code = re.match(r'\s+/\*([0-9a-f]+)\*/\s+(.*?);', line)
        if not code:
            continue
        at, text = code.groups()
        wide = re.search(r'HGMMA\S* R\d+, R(\d+), gdesc', text)
        if wide:
            n += 1
            in_flight.update((int(wide.group(1)) + i, at) for i in range(4))
        elif 'WARPGROUP.DEPBAR' in text:
            in_flight = {}
        for r in written(text):
            if r in in_flight:
                found += 1
                print(f'{function} {at}: {text}: R{r} is in use since {in_flight[r]}')
    print(f'{n} instructions with a register operand, {found} registers overwritten too early')
    return found > 0


sys.exit(main())
