#include "engine/disk_cache.h"
#include "base/clock.h"
#include "base/file.h"
#include "engine/parcel_file.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <openssl/evp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

enum {
    NAME = 32,       /* bytes of a file's name, of which hexadecimal digits are made */
    WRITES_MOST = 4, /* parcels that wait to be written */
    PATH_ROOM = 80   /* of a name behind the folder's */
};
static const char suffix[] = ".kv", unfinished[] = "unfinished", lock_name[] = "lock";

struct file_entry {
    uint8_t name[NAME]; /* SHA-256 of identity and key */
    uint64_t bytes;     /* of the file */
    int64_t used;       /* the larger the later */
};

struct job {
    uint8_t key[32];
    struct parcel *parcel; /* to be written, or what was read */
    bool stale;            /* all was cleared meanwhile */
    struct job *next;
};

struct jobs {
    struct job *first, **end;
    int n;
};

struct disk_cache {
    struct disk_cache_options o;
    char *folder;
    int lock_fd;
    pthread_t thread;
    bool has_thread, has_mutex, has_news, has_room;

    pthread_mutex_t mutex; /* of all below */
    pthread_cond_t news, room;
    struct file_entry *entries; /* sorted by name */
    size_t n, capacity;
    uint64_t bytes;
    int64_t clock; /* when the last of them was used */
    struct jobs writes, fetches, fetched;
    double seconds_each;     /* of a byte read, of late */
    bool closed, complained; /* that nothing can be written; once until something can */
};

static void push(struct jobs *q, struct job *j)
{
    if (!q->first) q->end = &q->first;
    j->next = NULL;
    *q->end = j;
    q->end = &j->next;
    q->n++;
}

static struct job *pop(struct jobs *q)
{
    struct job *j = q->first;
    if (!j) return NULL;
    q->first = j->next;
    q->n--;
    return j;
}

static void free_jobs(struct jobs *q)
{
    for (struct job *j; (j = pop(q));) {
        parcel_free(j->parcel);
        free(j);
    }
}

static void warn(const struct disk_cache *d, const char *text, const char *what)
{
    char line[sizeof((struct err *)NULL)->text + 128];
    if (!d->o.warn) return;
    snprintf(line, sizeof line, "prefix cache on disk: %s%s", text, what);
    d->o.warn(d->o.ctx, line);
}

/* Names. */

static void name_of(uint8_t out[NAME], const struct disk_cache *d, const uint8_t key[32])
{
    uint8_t both[64];
    memcpy(both, d->o.identity, 32);
    memcpy(both + 32, key, 32);
    if (EVP_Digest(both, sizeof both, out, NULL, EVP_sha256(), NULL) != 1) memset(out, 0, NAME);
}

static void path_of(char *out, size_t size, const struct disk_cache *d, const uint8_t name[NAME])
{
    char digits[2 * NAME + 1];
    for (int i = 0; i < NAME; i++) snprintf(digits + 2 * i, 3, "%02x", name[i]);
    snprintf(out, size, "%s/%s%s", d->folder, digits, suffix);
}

static bool read_name(uint8_t out[NAME], const char *text)
{
    if (strspn(text, "0123456789abcdef") != 2 * NAME || strcmp(text + 2 * NAME, suffix) != 0) return false;
    for (int i = 0; i < NAME; i++) {
        unsigned byte;
        if (sscanf(text + 2 * i, "%2x", &byte) != 1) return false;
        out[i] = (uint8_t)byte;
    }
    return true;
}

static size_t path_size(const struct disk_cache *d)
{
    return strlen(d->folder) + PATH_ROOM;
}

/* The list of files. Callers hold the mutex, or are alone. */

/* Where the name is, or would be. */
static size_t place_of(const struct disk_cache *d, const uint8_t name[NAME])
{
    size_t low = 0, high = d->n;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (memcmp(d->entries[middle].name, name, NAME) < 0)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static struct file_entry *find(const struct disk_cache *d, const uint8_t name[NAME])
{
    size_t at = place_of(d, name);
    return at < d->n && memcmp(d->entries[at].name, name, NAME) == 0 ? &d->entries[at] : NULL;
}

static void forget(struct disk_cache *d, struct file_entry *x)
{
    size_t at = (size_t)(x - d->entries);
    d->bytes -= x->bytes;
    memmove(x, x + 1, (--d->n - at) * sizeof *x);
}

static bool remember(struct disk_cache *d, const uint8_t name[NAME], uint64_t bytes, int64_t used)
{
    struct file_entry *known = find(d, name);
    if (known) forget(d, known);
    if (d->n == d->capacity) {
        size_t capacity = d->capacity ? 2 * d->capacity : 64;
        struct file_entry *grown = realloc(d->entries, capacity * sizeof *grown);
        if (!grown) return false;
        d->entries = grown;
        d->capacity = capacity;
    }
    size_t at = place_of(d, name);
    memmove(&d->entries[at + 1], &d->entries[at], (d->n++ - at) * sizeof *d->entries);
    d->entries[at] = (struct file_entry){ .bytes = bytes, .used = used };
    memcpy(d->entries[at].name, name, NAME);
    d->bytes += bytes;
    return true;
}

/* Removes files used longest ago until `more` bytes fit. */
static void make_room(struct disk_cache *d, uint64_t more, char *path, size_t size)
{
    while (d->n > 0 && (d->bytes > d->o.bytes || more > d->o.bytes - d->bytes)) {
        struct file_entry *oldest = d->entries;
        for (size_t i = 1; i < d->n; i++)
            if (d->entries[i].used < oldest->used) oldest = &d->entries[i];
        path_of(path, size, d, oldest->name);
        unlink(path);
        forget(d, oldest);
    }
}

/* What lies in the folder at the start. */

static int64_t modified(const struct stat *st)
{
    return (int64_t)st->st_mtim.tv_sec * 1000000000 + st->st_mtim.tv_nsec;
}

/* *foreign: whole, but of no use here. */
static bool look(struct disk_cache *d, const char *file, char *path, size_t size, bool *foreign)
{
    uint8_t name[NAME];
    struct parcel_file f;
    struct err e = { 0 };
    struct stat st;
    *foreign = false;
    if (!read_name(name, file)) return true;
    path_of(path, size, d, name);
    if (!parcel_file_look(&f, path, &e)) {
        warn(d, e.text, "; removed");
        unlink(path);
        return true;
    }
    *foreign = memcmp(f.identity, d->o.identity, sizeof f.identity) != 0;
    if (stat(path, &st) != 0) return true;
    if (modified(&st) > d->clock) d->clock = modified(&st);
    return remember(d, name, (uint64_t)st.st_size, modified(&st));
}

static bool scan(struct disk_cache *d, struct err *e)
{
    size_t size = path_size(d);
    char *path = malloc(size), text[64];
    DIR *dir = opendir(d->folder);
    bool ok = (path && dir) || err_errno(e, d->folder);
    int n_foreign = 0;
    for (struct dirent *x; ok && (x = readdir(dir));) {
        bool foreign;
        ok = look(d, x->d_name, path, size, &foreign) ||
             err_memory(e, "list of files", d->n * sizeof *d->entries);
        n_foreign += foreign;
    }
    if (ok) {
        snprintf(path, size, "%s/%s", d->folder, unfinished);
        unlink(path);
        make_room(d, 0, path, size);
    }
    if (dir) closedir(dir);
    free(path);
    snprintf(text, sizeof text, "%d files", n_foreign);
    if (ok && n_foreign) warn(d, text, " are of another model, program or option; they are not used");
    return ok;
}

/* The thread. */

/* When a file was used is its time of modification, so that a later process knows it too. The kernel's own
 * would be the same for several. */
static int64_t touch(const struct disk_cache *d, const char *path)
{
    struct timespec now[2];
    clock_gettime(CLOCK_REALTIME, &now[1]);
    now[0] = now[1];
    utimensat(AT_FDCWD, path, now, 0);
    int64_t used = (int64_t)now[1].tv_sec * 1000000000 + now[1].tv_nsec;
    return used > d->clock ? used : d->clock + 1;
}

/* A file becomes visible when it is complete. No fsync: what a crash of the machine leaves behind is known by
 * its checksum. */
static bool write_file(const struct disk_cache *d, const struct job *j, const char *path, const char *to,
                       struct err *e)
{
    struct parcel_file f;
    memcpy(f.identity, d->o.identity, sizeof f.identity);
    memcpy(f.key, j->key, sizeof f.key);
    if (parcel_file_write(path, &f, j->parcel, e) && (rename(path, to) == 0 || err_errno(e, to))) return true;
    unlink(path);
    return false;
}

static uint64_t file_bytes(const struct parcel *p)
{
    return parcel_file_bytes(parcel_bytes(p));
}

static void do_write(struct disk_cache *d, struct job *j)
{
    uint8_t name[NAME];
    size_t size = path_size(d);
    char *path = malloc(size), *to = malloc(size);
    struct err e = { 0 };
    uint64_t bytes = file_bytes(j->parcel);
    name_of(name, d, j->key);
    if (path && to && bytes <= d->o.bytes) {
        pthread_mutex_lock(&d->mutex);
        make_room(d, bytes, path, size);
        pthread_mutex_unlock(&d->mutex);
        snprintf(path, size, "%s/%s", d->folder, unfinished);
        path_of(to, size, d, name);
        bool ok = write_file(d, j, path, to, &e);
        pthread_mutex_lock(&d->mutex);
        if (ok) d->clock = touch(d, to);
        if (ok && (j->stale || !remember(d, name, bytes, d->clock))) unlink(to);
        pthread_mutex_unlock(&d->mutex);
        if (!ok && !d->complained) warn(d, e.text, "; nothing is kept until that is better");
        d->complained = !ok;
    }
    free(path);
    free(to);
}

static void settle(double *usual, double x)
{
    *usual += (*usual == 0 ? 1 : 0.2) * (x - *usual);
}

static void do_fetch(struct disk_cache *d, struct job *j)
{
    struct parcel_file f;
    uint8_t name[NAME];
    struct err e = { 0 };
    size_t size = path_size(d);
    char *path = malloc(size);
    double begin = clock_seconds();
    if (!path) return;
    memcpy(f.identity, d->o.identity, sizeof f.identity);
    memcpy(f.key, j->key, sizeof f.key);
    name_of(name, d, j->key);
    path_of(path, size, d, name);
    bool ok = parcel_file_read(&j->parcel, path, &f, &e), lost = !ok && e.code != ERR_MEMORY;
    if (lost) {
        warn(d, e.text, "; removed");
        unlink(path);
    }
    pthread_mutex_lock(&d->mutex);
    struct file_entry *x = find(d, name);
    if (x && ok) x->used = d->clock = touch(d, path);
    if (x && lost) forget(d, x);
    if (ok) settle(&d->seconds_each, (clock_seconds() - begin) / (double)(parcel_bytes(j->parcel) + 1));
    pthread_mutex_unlock(&d->mutex);
    free(path);
}

static void drop_parcel(struct job *j)
{
    parcel_free(j->parcel);
    j->parcel = NULL;
}

static void *run(void *ctx)
{
    struct disk_cache *d = ctx;
    pthread_mutex_lock(&d->mutex);
    for (;;) {
        struct job *j = d->fetches.first ? d->fetches.first : d->writes.first;
        if (!j && d->closed) break;
        if (!j) {
            pthread_cond_wait(&d->news, &d->mutex);
            continue;
        }
        bool fetches = j == d->fetches.first;
        pthread_mutex_unlock(&d->mutex);
        if (fetches)
            do_fetch(d, j);
        else
            do_write(d, j);
        pthread_mutex_lock(&d->mutex);
        pop(fetches ? &d->fetches : &d->writes); /* it was seen there until now */
        if (fetches) {
            if (j->stale) drop_parcel(j);
            push(&d->fetched, j);
        } else {
            parcel_free(j->parcel);
            free(j);
            pthread_cond_broadcast(&d->room);
        }
        if (d->o.ring) d->o.ring(d->o.ring_ctx);
    }
    pthread_mutex_unlock(&d->mutex);
    return NULL;
}

/* What others call. */

uint64_t disk_cache_has(struct disk_cache *d, const uint8_t key[32])
{
    uint8_t name[NAME];
    uint64_t bytes = 0;
    name_of(name, d, key);
    pthread_mutex_lock(&d->mutex);
    const struct file_entry *x = find(d, name);
    if (x) bytes = x->bytes;
    for (const struct job *j = d->writes.first; j && !bytes; j = j->next)
        if (!j->stale && memcmp(j->key, key, 32) == 0) bytes = file_bytes(j->parcel);
    pthread_mutex_unlock(&d->mutex);
    return bytes;
}

double disk_cache_seconds(struct disk_cache *d, uint64_t bytes)
{
    pthread_mutex_lock(&d->mutex);
    double each = d->seconds_each;
    pthread_mutex_unlock(&d->mutex);
    return each * (double)bytes;
}

bool disk_cache_has_room(struct disk_cache *d)
{
    pthread_mutex_lock(&d->mutex);
    bool has = d->writes.n < WRITES_MOST;
    pthread_mutex_unlock(&d->mutex);
    return has;
}

void disk_cache_await_room(struct disk_cache *d)
{
    pthread_mutex_lock(&d->mutex);
    while (d->writes.n >= WRITES_MOST) pthread_cond_wait(&d->room, &d->mutex);
    pthread_mutex_unlock(&d->mutex);
}

static struct job *make_job(const uint8_t key[32])
{
    struct job *j = calloc(1, sizeof *j);
    if (j) memcpy(j->key, key, 32);
    return j;
}

static void submit(struct disk_cache *d, struct jobs *to, struct job *j)
{
    push(to, j);
    pthread_cond_signal(&d->news);
}

void disk_cache_put(struct disk_cache *d, const uint8_t key[32], struct parcel *p)
{
    struct job *j = disk_cache_has(d, key) ? NULL : make_job(key);
    if (!j) return;
    pthread_mutex_lock(&d->mutex);
    bool room = d->writes.n < WRITES_MOST;
    if (room) {
        j->parcel = parcel_hold(p);
        submit(d, &d->writes, j);
    }
    pthread_mutex_unlock(&d->mutex);
    if (!room) free(j);
}

/* On its way to a file: taken from there. */
static struct parcel *take_unwritten(const struct disk_cache *d, const uint8_t key[32])
{
    for (const struct job *j = d->writes.first; j; j = j->next)
        if (!j->stale && memcmp(j->key, key, 32) == 0) return parcel_hold(j->parcel);
    return NULL;
}

bool disk_cache_fetch(struct disk_cache *d, const uint8_t key[32])
{
    struct job *j = disk_cache_has(d, key) ? make_job(key) : NULL;
    if (!j) return false;
    pthread_mutex_lock(&d->mutex);
    j->parcel = take_unwritten(d, key);
    if (j->parcel)
        push(&d->fetched, j);
    else
        submit(d, &d->fetches, j);
    pthread_mutex_unlock(&d->mutex);
    return true;
}

bool disk_cache_fetched(struct disk_cache *d, uint8_t key[32], struct parcel **out)
{
    pthread_mutex_lock(&d->mutex);
    struct job *j = pop(&d->fetched);
    pthread_mutex_unlock(&d->mutex);
    if (!j) return false;
    memcpy(key, j->key, 32);
    *out = j->parcel;
    free(j);
    return true;
}

void disk_cache_clear(struct disk_cache *d)
{
    size_t size = path_size(d);
    char *path = malloc(size);
    pthread_mutex_lock(&d->mutex);
    for (; d->n > 0; forget(d, &d->entries[d->n - 1])) {
        if (!path) continue;
        path_of(path, size, d, d->entries[d->n - 1].name);
        unlink(path);
    }
    for (struct job *j = d->writes.first; j; j = j->next) j->stale = true;
    for (struct job *j = d->fetches.first; j; j = j->next) j->stale = true;
    for (struct job *j = d->fetched.first; j; j = j->next) drop_parcel(j);
    pthread_mutex_unlock(&d->mutex);
    free(path);
}

/* Its life. */

static bool take_folder(struct disk_cache *d, struct err *e)
{
    if (mkdir(d->folder, 0700) != 0 && errno != EEXIST) return err_errno(e, d->folder);
    char *path = file_join(d->folder, lock_name);
    if (!path) return err_memory(e, "path", strlen(d->folder));
    d->lock_fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    bool ok = d->lock_fd >= 0 || err_errno(e, path);
    if (ok && flock(d->lock_fd, LOCK_EX | LOCK_NB) != 0)
        ok = errno == EWOULDBLOCK
                 ? err_set(e, ERR_BUSY, "%s: another process has this prefix cache; give each its own folder",
                           d->folder)
                 : err_errno(e, path);
    free(path);
    return ok;
}

static bool start(struct disk_cache *d, struct err *e)
{
    if ((errno = pthread_create(&d->thread, NULL, run, d)) != 0)
        return err_errno(e, "thread of the prefix cache");
    return d->has_thread = true;
}

bool disk_cache_create(struct disk_cache **out, const struct disk_cache_options *o, struct err *e)
{
    struct disk_cache *d = *out = calloc(1, sizeof *d);
    if (!d) return err_memory(e, "prefix cache on disk", sizeof *d);
    d->o = *o;
    d->lock_fd = -1;
    d->folder = strdup(o->folder);
    d->has_mutex = pthread_mutex_init(&d->mutex, NULL) == 0;
    d->has_news = pthread_cond_init(&d->news, NULL) == 0;
    d->has_room = pthread_cond_init(&d->room, NULL) == 0;
    bool ok = (d->folder && d->has_mutex && d->has_news && d->has_room) ||
              err_memory(e, "prefix cache on disk", sizeof *d);
    ok = ok && take_folder(d, e) && scan(d, e);
    if (ok && start(d, e)) return true;
    disk_cache_free(d);
    *out = NULL;
    return false;
}

void disk_cache_free(struct disk_cache *d)
{
    if (!d) return;
    if (d->has_thread) {
        pthread_mutex_lock(&d->mutex);
        d->closed = true;
        pthread_cond_signal(&d->news);
        pthread_mutex_unlock(&d->mutex);
        pthread_join(d->thread, NULL);
    }
    free_jobs(&d->writes);
    free_jobs(&d->fetches);
    free_jobs(&d->fetched);
    if (d->has_room) pthread_cond_destroy(&d->room);
    if (d->has_news) pthread_cond_destroy(&d->news);
    if (d->has_mutex) pthread_mutex_destroy(&d->mutex);
    if (d->lock_fd >= 0) close(d->lock_fd);
    free(d->entries);
    free(d->folder);
    free(d);
}
