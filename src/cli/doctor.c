/* quench doctor [MODEL] [--url URL]: what is fine, what is not, what to do */
#include "cli/doctor.h"
#include "cli/commands.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct command command = {
    "doctor",
    "[MODEL]",
    "Looks at the machine, at a checkpoint and at a running server, and says in one line each what is fine, "
    "what "
    "is not and\n"
    "what to do about it. Exit status 1 when something failed; warnings do not count.",
    -1,
};

static void finish(struct doctor *d)
{
    if (d->lines) {
        json_t *o =
            json_pack("{s:s, s:i, s:i, s:i, s:o}", "version", cli_version, "ok", d->counts[DOCTOR_OK], "warn",
                      d->counts[DOCTOR_WARN], "fail", d->counts[DOCTOR_FAIL], "lines", d->lines);
        json_dumpf(o, stdout, JSON_COMPACT);
        putchar('\n');
        json_decref(o);
    } else
        printf("\n%d fine, %d to look at, %d failed\n", d->counts[DOCTOR_OK], d->counts[DOCTOR_WARN],
               d->counts[DOCTOR_FAIL]);
}

int cli_doctor(int argc, char **argv)
{
    struct common common = { .inputs = 1, .quiet = true };
    struct doctor d = { .common = &common, .port = 8000, .root = "" };
    const struct flag flags[] = {
        { "--url", 0, FLAG_TEXT, &d.url, "URL", "a running server too; its key is read from OPENAI_API_KEY",
          NULL },
        { "--port", 0, FLAG_INT, &d.port, "N", "that `quench serve` would listen at (default 8000)", NULL },
        COMMON_KV_FLAG(common),
        COMMON_FLAGS(common),
        FLAGS_END,
    };
    int status;
    if (!common_parse(&command, flags, argc, argv, &d.model, &status)) return status;
    if (d.port < 1 || d.port > 65535) {
        struct err e = { 0 };
        err_set(&e, ERR_ARGUMENT, "--port: expected 1 to 65535, found %lld", (long long)d.port);
        return common_fail(&command, &e);
    }
    if (common.json)
        d.lines = json_array();
    else
        printf("%s\n\n", cli_version);
    doctor_machine(&d);
    if (d.model) doctor_model(&d);
    if (d.url) doctor_server(&d);
    finish(&d);
    backend_destroy(&d.backend);
    return d.counts[DOCTOR_FAIL] ? 1 : 0;
}
