#include "support/videos.h"
#include "base/file.h"
#include "image/data_url.h"
#include "support/models.h"
#include <stdlib.h>
#include <string.h>

char *video_url(const char *const *files, int n)
{
    struct err e = { 0 };
    char *all = strdup("data:video/jpeg;base64");
    for (int i = 0; i < n; i++) {
        char *data, *one;
        size_t bytes;
        must(file_read(&data, &bytes, files[i], 1 << 24, &e), &e);
        must(data_url_encode(&one, (const uint8_t *)data, bytes, &e), &e);
        const char *digits = strchr(one, ',');
        all = realloc(all, strlen(all) + strlen(digits) + 1);
        strcat(all, digits);
        free(data);
        free(one);
    }
    return all;
}
