#!/bin/sh
# Runs each test program, one line a program; the output of those that fail or skip is shown.
log=${BUILD:-build}/test.log; failed=0; n=0
for t; do
    n=$((n + 1)); begin=$(date +%s)
    if "$t" >"$log" 2>&1; then word=ok; else word=FAILED; failed=$((failed + 1)); fi
    printf '%-44s %-6s %4d s\n' "${t#"${BUILD:-build}"/}" "$word" $(($(date +%s) - begin))
    if [ "$word" = FAILED ]; then tail -n 60 "$log"; else grep -E 'SKIP|^note:' "$log"; fi
done
echo "$n test programs, $failed failed"
[ "$failed" = 0 ]
