/* The program: finds the subcommand and runs it. Only cli/ reads argv and the environment, prints, and exits.
 */
#include "cli/commands.h"
#include "cli/fault.h"
#include <fcntl.h>
#include <stdio.h>
#include <stdbool.h>
#include <string.h>
#include <unistd.h>

static const struct {
    const char *name, *purpose;
    int (*run)(int argc, char **argv);
} commands[] = {
    { "quantize", "write the card's NVFP4 + FP8 checkpoint from a BF16 one", cli_quantize },
    { "perplexity", "score a text, alone or against another checkpoint", cli_perplexity },
    { "generate", "continue a prompt", cli_generate },
    { "chat", "hold a conversation", cli_chat },
    { "serve", "answer many users over the OpenAI API", cli_serve },
    { "eval", "put questions with known answers to a model", cli_eval },
    { "bench", "measure speed against what the memory allows", cli_bench },
    { "doctor", "look for what is wrong with machine, checkpoint or server", cli_doctor },
    { "inspect", "say what a checkpoint holds and what it needs", cli_inspect },
    { "verify", "check a checkpoint, alone or against its source", cli_verify },
    { "merge-mtp", "bring back the MTP head that another tool lost", cli_merge_mtp },
    { "decode-image", NULL, cli_decode_image }, /* not for people */
    { "synth", "write a checkpoint of random values in any shape", cli_synth },
};
enum { N_COMMANDS = sizeof commands / sizeof *commands };

static void usage(FILE *f)
{
    fprintf(f, "%s\n\nusage: quench COMMAND ...   (quench COMMAND --help for its flags)\n\n", cli_version);
    for (int i = 0; i < N_COMMANDS; i++)
        if (commands[i].purpose) fprintf(f, "  %-12s %s\n", commands[i].name, commands[i].purpose);
}

/* A closed standard stream would lend its number to the next file opened, and messages meant for the stream
 * would be written into that file. A number held here for reading only still refuses what is printed. */
static void hold_standard_streams(void)
{
    int fd;
    do fd = open("/dev/null", O_RDONLY);
    while (fd >= 0 && fd <= STDERR_FILENO);
    if (fd >= 0) close(fd);
}

int main(int argc, char **argv)
{
    hold_standard_streams();
    fault_name_files();
    const char *name = argc > 1 ? argv[1] : "";
    for (int i = 0; i < N_COMMANDS; i++)
        if (strcmp(name, commands[i].name) == 0) {
            int status = commands[i].run(argc - 2, argv + 2);
            if (fflush(stdout) == 0 && !ferror(stdout)) return status;
            perror("quench: standard output");
            return 1;
        }
    if (strcmp(name, "--version") == 0 || strcmp(name, "version") == 0) {
        puts(cli_version);
        return 0;
    }
    bool asked = strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0 || strcmp(name, "help") == 0;
    if (!asked && *name) fprintf(stderr, "quench: unknown command '%s'\n", name);
    usage(asked ? stdout : stderr);
    return asked ? 0 : 2;
}
