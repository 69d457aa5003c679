#!/bin/sh
# usage: run_tests.sh PROGRAM...   Runs test programs, as many at a time as there are processors; one line a program,
# then what failed or skipped in it. Logs lie beside the programs.
if [ "$1" = --one ]; then
    t=$2; begin=$(date +%s)
    if "$t" >"$t.log" 2>&1; then word=ok; else word=FAILED; fi
    # one write a program: others are at it too
    printf '%s\n' "$(
        printf '%-44s %-6s %4d s\n' "${t#"${BUILD:-build}"/}" "$word" $(($(date +%s) - begin))
        if [ "$word" = FAILED ]; then tail -n 60 "$t.log"; else grep -E 'SKIP|^note:' "$t.log"; fi
    )"
    [ "$word" = ok ]
    exit
fi
failed=0
printf '%s\n' "$@" | xargs -n 1 -P "$(nproc)" "$0" --one || failed=1
echo "$# test programs, $([ $failed = 0 ] && echo all passed || echo some failed)"
exit $failed
