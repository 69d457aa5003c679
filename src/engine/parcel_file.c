#include "engine/parcel_file.h"
#include "base/file.h"
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { VERSION = 1, DIGEST = 32, MAGIC = 8 };
static const char magic[MAGIC] = "quenchKV";

/* Numbers are of the machine's byte order; another's reads as another version. */
struct header {
    char magic[MAGIC];
    uint32_t version, header_bytes;
    struct parcel_file of;
    struct parcel_place place;
};

static struct header make_header(const struct parcel_file *f, const struct parcel_place *place)
{
    struct header h;
    memset(&h, 0, sizeof h); /* padding too: its bytes are written */
    memcpy(h.magic, magic, MAGIC);
    h.version = VERSION;
    h.header_bytes = sizeof h;
    h.of = *f;
    h.place = *place;
    return h;
}

uint64_t parcel_file_bytes(uint64_t parcel_bytes)
{
    return sizeof(struct header) + parcel_bytes + DIGEST;
}

static bool digest(uint8_t out[DIGEST], const struct header *h, const void *data, struct err *e)
{
    EVP_MD_CTX *sha = EVP_MD_CTX_new();
    bool ok = sha && EVP_DigestInit_ex(sha, EVP_sha256(), NULL) == 1 &&
              EVP_DigestUpdate(sha, h, sizeof *h) == 1 && EVP_DigestUpdate(sha, data, h->place.bytes) == 1 &&
              EVP_DigestFinal_ex(sha, out, NULL) == 1;
    EVP_MD_CTX_free(sha);
    return ok || err_set(e, ERR_MEMORY, "no memory for SHA-256");
}

bool parcel_file_write(const char *path, const struct parcel_file *f, const struct parcel *p, struct err *e)
{
    uint8_t sum[DIGEST];
    struct header h = make_header(f, parcel_place(p));
    if (!digest(sum, &h, parcel_data(p), e)) return err_note(e, "%s", path);
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0) return err_errno(e, path);
    bool ok = file_write_all(fd, &h, sizeof h, e) && file_write_all(fd, parcel_data(p), h.place.bytes, e) &&
              file_write_all(fd, sum, sizeof sum, e);
    if (close(fd) != 0 && ok) ok = err_errno(e, "close");
    return ok || err_note(e, "%s", path);
}

static bool read_header(struct header *h, int fd, struct err *e)
{
    struct stat st;
    if (fstat(fd, &st) != 0) return err_errno(e, "size");
    uint64_t size = (uint64_t)st.st_size, rest = size - sizeof *h;
    if (size < sizeof *h + DIGEST)
        return err_set(e, ERR_FORMAT, "%" PRIu64 " bytes are too few, it is cut off", size);
    if (!file_read_at(fd, h, sizeof *h, 0, e)) return false;
    if (memcmp(h->magic, magic, MAGIC) != 0) return err_set(e, ERR_FORMAT, "not a file of the prefix cache");
    if (h->version != VERSION || h->header_bytes != sizeof *h)
        return err_set(e, ERR_FORMAT, "version %u of the format, this program writes %d", h->version,
                       VERSION);
    return h->place.bytes == rest - DIGEST ||
           err_set(e, ERR_FORMAT, "%" PRIu64 " bytes of data, expected %" PRIu64 ", it is damaged",
                   rest - DIGEST, h->place.bytes);
}

static bool read_body(struct parcel **out, const struct header *h, int fd, struct err *e)
{
    uint8_t sum[DIGEST], want[DIGEST];
    if (!parcel_create(out, &h->place, e)) return false;
    bool ok =
        file_read_at(fd, parcel_room(*out), h->place.bytes, sizeof *h, e) &&
        file_read_at(fd, want, DIGEST, sizeof *h + h->place.bytes, e) &&
        digest(sum, h, parcel_data(*out), e) &&
        (memcmp(sum, want, DIGEST) == 0 || err_set(e, ERR_FORMAT, "its checksum is wrong, it is damaged"));
    if (ok) return true;
    parcel_free(*out);
    *out = NULL;
    return false;
}

bool parcel_file_read(struct parcel **out, const char *path, const struct parcel_file *f, struct err *e)
{
    struct header h;
    *out = NULL;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return err_errno(e, path);
    bool ok = read_header(&h, fd, e);
    if (ok && memcmp(&h.of, f, sizeof *f) != 0)
        ok = err_set(e, ERR_UNSUPPORTED, "it is of another model, program, option or prompt");
    ok = ok && read_body(out, &h, fd, e);
    close(fd);
    return ok || err_note(e, "%s", path);
}

bool parcel_file_look(struct parcel_file *out, const char *path, struct err *e)
{
    struct header h;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return err_errno(e, path);
    bool ok = read_header(&h, fd, e);
    close(fd);
    if (ok) *out = h.of;
    return ok || err_note(e, "%s", path);
}
