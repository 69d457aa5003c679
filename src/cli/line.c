/* libedit on a terminal. The history lies in $XDG_STATE_HOME/quench, else ~/.local/state/quench; where that
 * cannot be written there is none beyond the session. */
#include "cli/line.h"
#include <histedit.h>
#include <locale.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { HISTORY_MAX = 1000 };

struct line {
    const char *prompt;
    EditLine *edit; /* NULL: not a terminal */
    History *history;
    char *history_path, *text;
    size_t size;
};

static char *show_prompt(EditLine *edit)
{
    struct line *l;
    el_get(edit, EL_CLIENTDATA, &l);
    return (char *)l->prompt;
}

/* The folders on the way to a file, for this user only where they are made. */
static void make_folders(char *path)
{
    for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        mkdir(path, 0700);
        *slash = '/';
    }
}

static char *history_path(void)
{
    const char *state = getenv("XDG_STATE_HOME"), *home = getenv("HOME");
    char *path = NULL;
    int n = -1;
    if (state && *state == '/')
        n = asprintf(&path, "%s/quench/chat_history", state);
    else if (home && *home == '/')
        n = asprintf(&path, "%s/.local/state/quench/chat_history", home);
    if (n < 0) return NULL;
    make_folders(path);
    return path;
}

static bool open_editor(struct line *l)
{
    HistEvent event;
    setlocale(LC_CTYPE, ""); /* libedit counts columns */
    l->edit = el_init("quench", stdin, stdout, stderr);
    l->history = history_init();
    if (!l->edit || !l->history) return false;
    history(l->history, &event, H_SETSIZE, HISTORY_MAX);
    history(l->history, &event, H_SETUNIQUE, 1);
    l->history_path = history_path();
    if (l->history_path) history(l->history, &event, H_LOAD, l->history_path);
    el_set(l->edit, EL_CLIENTDATA, l);
    el_set(l->edit, EL_PROMPT, show_prompt);
    el_set(l->edit, EL_EDITOR, "emacs");
    el_set(l->edit, EL_HIST, history, l->history);
    el_set(l->edit, EL_BIND, "^R", "em-inc-search-prev", NULL);
    return true;
}

bool line_open(struct line **out, const char *prompt, struct err *e)
{
    struct line *l = *out = calloc(1, sizeof *l);
    if (!l) return err_memory(e, "a line editor", sizeof *l);
    l->prompt = prompt;
    if (!isatty(STDIN_FILENO) || !isatty(STDOUT_FILENO) || open_editor(l)) return true;
    line_close(l);
    *out = NULL;
    return err_set(e, ERR_IO, "the line editor cannot use this terminal");
}

void line_close(struct line *l)
{
    HistEvent event;
    if (!l) return;
    if (l->history_path) history(l->history, &event, H_SAVE, l->history_path);
    if (l->edit) el_end(l->edit);
    if (l->history) history_end(l->history);
    free(l->history_path);
    free(l->text);
    free(l);
}

bool line_is_interactive(const struct line *l)
{
    return l->edit != NULL;
}

static const char *edited(struct line *l)
{
    HistEvent event;
    int n = 0;
    const char *got = el_gets(l->edit, &n);
    if (!got || n <= 0) return NULL;
    free(l->text);
    l->text = strndup(got, (size_t)n);
    if (!l->text) return NULL;
    l->text[strcspn(l->text, "\r\n")] = 0;
    if (*l->text) history(l->history, &event, H_ENTER, l->text);
    return l->text;
}

const char *line_next(struct line *l)
{
    if (l->edit) return edited(l);
    ssize_t n = getline(&l->text, &l->size, stdin);
    if (n <= 0) return NULL;
    l->text[strcspn(l->text, "\r\n")] = 0;
    return l->text;
}
