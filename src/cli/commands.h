/* The subcommands. Each takes the words after its name and returns the exit status: 0 done, 1 failed, 2
 * misused. */
#ifndef CLI_COMMANDS_H
#define CLI_COMMANDS_H
int cli_quantize(int argc, char **argv);
int cli_perplexity(int argc, char **argv);
int cli_generate(int argc, char **argv);
int cli_inspect(int argc, char **argv);
int cli_verify(int argc, char **argv);
int cli_merge_mtp(int argc, char **argv);
int cli_synth(int argc, char **argv);
int cli_bench(int argc, char **argv);
int cli_chat(int argc, char **argv);
int cli_eval(int argc, char **argv);
int cli_serve(int argc, char **argv);
int cli_doctor(int argc, char **argv);
int cli_decode_image(int argc, char **argv);
extern const char cli_version[];
#endif
