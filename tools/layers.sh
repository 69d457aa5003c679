#!/bin/sh
# Proves the include rule: a folder includes itself and folders of lower rows only (docs/tour.md, "Layers").
# Two openings: cli may include server and eval; backend/select.c may include every backend.
cd "$(dirname "$0")/.." || exit 1
grep -rnE '^[ \t]*#[ \t]*include[ \t]+"' src | awk -F: '
BEGIN {
    split("base:0 num:0 checkpoint:1 tokenizer:1 image:1 grammar:1 backend:1 model:2 engine:3 quantize:3 eval:4 server:4 cli:4", rows, " ")
    for (i in rows) { split(rows[i], p, ":"); row[p[1]] = p[2] }
}
{
    split($1, path, "/"); from = path[2]
    split($3, quoted, "\""); target = quoted[2]; split(target, part, "/"); to = part[1]
    ok = to == from || row[to] < row[from] || (from == "cli" && (to == "server" || to == "eval"))
    if (from == "num" && to == "base") ok = 1
    if (!(to in row) || !(from in row)) ok = 0
    # inside backend/: a backend includes itself and backend/*.h, never another backend
    if (from == "backend" && to == "backend" && $1 != "src/backend/select.c" && split(target, t, "/") == 3 && t[2] != path[3]) ok = 0
    if (!ok) { print "layers: " $1 ":" $2 ": includes " target; bad = 1 }
}
END { if (!bad) print "layers: clean"; exit bad }'
