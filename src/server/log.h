/* A line of JSON for each request answered: who, what, how long, how many tokens. Never text of prompts or
 * answers, keys, or what a client put into its path. */
#ifndef SERVER_LOG_H
#define SERVER_LOG_H
#include "base/err.h"
#include <jansson.h>
#include <stdint.h>

struct request_log;
/* path "-": standard output. Appends. */
bool request_log_open(struct request_log **out, const char *path, struct err *e);
/* After the file was moved away. On failure the old one stays. */
bool request_log_reopen(struct request_log *l, struct err *e);
void request_log_close(struct request_log *l); /* NULL is fine */
/* Takes the reference over. A line that cannot be written is lost and counted. */
void request_log_write(struct request_log *l, json_t *line);
uint64_t request_log_lost(const struct request_log *l);
#endif
