#include "cli/commands.h"
#ifndef QUENCH_COMMIT
#define QUENCH_COMMIT "unknown"
#endif
const char cli_version[] = "quench 0.1 (" QUENCH_COMMIT ")";
