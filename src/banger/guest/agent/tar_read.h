/* Reading tar members (ustar, GNU, pax) from a stream. Whatever is wrong ends the job by fail(). */
#ifndef BANGER_TAR_READ_H
#define BANGER_TAR_READ_H

#include <stdbool.h>
#include <sys/types.h>
#include <time.h>

#include "tar.h"

/* A member; its data follows in the stream. Pointers are valid until the next tar_next. */
struct tar_member {
    const char *path;
    const char *link;
    char type; /* '0' file, '1' hard link, '2' link, '3' '4' device, '5' directory, '6' fifo, 'S' */
    mode_t mode;
    uid_t uid;
    gid_t gid;
    struct timespec mtime;
    uint64_t size; /* bytes of data in the archive */
    uint64_t real_size;
    unsigned major, minor;
    const struct piece *pieces; /* of 'S' */
    size_t piece_count;
};

struct tar_reader {
    int fd;
    char buffer[64 << 10];
    size_t start, end;
    struct tar_header header;
    char *path, *link; /* of the member */
    char *long_path, *long_link, *pax_path, *pax_link;
    bool has_size, has_uid, has_gid, has_mtime; /* what a pax header said */
    uint64_t size, uid, gid;
    struct timespec mtime;
    struct piece *pieces;
    size_t piece_count, piece_room;
};

void tar_reader_init(struct tar_reader *reader, int fd);
/* False at the end of the archive. */
bool tar_next(struct tar_reader *reader, struct tar_member *member);
/* Read exactly so many bytes of the member's data. */
void tar_read(struct tar_reader *reader, void *data, size_t size);
/* Skip data and its padding; or the padding after data of this size. */
void tar_skip(struct tar_reader *reader, uint64_t size);
void tar_skip_padding(struct tar_reader *reader, uint64_t size);
/* Free everything, and read the stream to its end, so that its writer is not left hanging. */
void tar_reader_end(struct tar_reader *reader);

#endif
