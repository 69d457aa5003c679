/* A picture that takes a while to decode, and few bytes: to look at the decoder meanwhile, and to hurt it. */
#ifndef TESTS_IMAGE_BIG_PNG_H
#define TESTS_IMAGE_BIG_PNG_H
#include <dirent.h>
#include <png.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static inline void big_png(const char *path, unsigned side)
{
    FILE *f = fopen(path, "wb");
    png_structp p = png_create_write_struct(PNG_LIBPNG_VER_STRING, NULL, NULL, NULL);
    png_infop i = png_create_info_struct(p);
    unsigned char *row = calloc(side, 3);
    png_init_io(p, f);
    png_set_IHDR(p, i, side, side, 8, PNG_COLOR_TYPE_RGB, PNG_INTERLACE_ADAM7, 0, 0);
    png_set_compression_level(p, 1);
    png_write_info(p, i);
    for (int passes = png_set_interlace_handling(p); passes > 0; passes--)
        for (unsigned y = 0; y < side; y++) png_write_row(p, row);
    png_write_end(p, NULL);
    png_destroy_write_struct(&p, &i);
    free(row);
    fclose(f);
}

/* Content of /proc/PID/NAME, NULs as blanks; what is there. */
static inline ssize_t proc_text(char *out, size_t room, pid_t pid, const char *name)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/%s", (int)pid, name);
    FILE *f = fopen(path, "r");
    size_t n = f ? fread(out, 1, room - 1, f) : 0;
    if (f) fclose(f);
    out[n] = 0;
    return f ? (ssize_t)n : -1;
}

/* A decoder that process `parent` has started, which has no rights any more; 0: none yet. */
static inline pid_t restricted_child(pid_t parent)
{
    char text[8192], want[64];
    pid_t found = 0;
    DIR *d = opendir("/proc");
    snprintf(want, sizeof want, "\nPPid:\t%d\n", (int)parent);
    for (struct dirent *x; d && !found && (x = readdir(d));) {
        pid_t pid = atoi(x->d_name);
        if (pid <= 0 || proc_text(text, sizeof text, pid, "status") <= 0 || !strstr(text, want)) continue;
        if (strstr(text, "\nSeccomp:\t2\n")) found = pid;
    }
    if (d) closedir(d);
    return found;
}
#endif
