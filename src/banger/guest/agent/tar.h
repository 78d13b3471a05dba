/* The tar header block, and what reader and writer share. */
#ifndef BANGER_TAR_H
#define BANGER_TAR_H

#include <stddef.h>
#include <stdint.h>

enum {
    TAR_BLOCK = 512,
    TAR_PATH_LIMIT = 65536,   /* longest member name or link target, with its NUL */
    TAR_PAX_LIMIT = 1 << 20,  /* largest extended header */
    TAR_SPARSE_LIMIT = 1 << 20, /* most pieces of a sparse file */
    TAR_DEPTH_LIMIT = 1000,
    TAR_HEADER_PIECES = 4,
    TAR_EXTENSION_PIECES = 21,
};

struct tar_piece {
    char offset[12];
    char size[12];
};

struct tar_header {
    char name[100];
    char mode[8];
    char uid[8];
    char gid[8];
    char size[12];
    char mtime[12];
    char checksum[8];
    char type;
    char link[100];
    char magic[8];
    char user[32];
    char group[32];
    char major[8];
    char minor[8];
    union {
        char prefix[155]; /* ustar */
        struct {          /* GNU */
            char atime[12];
            char ctime[12];
            char multivolume[12];
            char unused[5];
            struct tar_piece pieces[TAR_HEADER_PIECES];
            char is_extended;
            char real_size[12];
        } gnu;
    } tail;
    char padding[12];
};

struct tar_extension {
    struct tar_piece pieces[TAR_EXTENSION_PIECES];
    char is_extended;
    char padding[7];
};

_Static_assert(sizeof(struct tar_header) == TAR_BLOCK, "a header is a block");
_Static_assert(sizeof(struct tar_extension) == TAR_BLOCK, "an extension is a block");

struct piece {
    uint64_t offset;
    uint64_t size;
};

uint32_t tar_checksum(const struct tar_header *header);

#endif
