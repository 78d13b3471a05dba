/* PACK: a GNU tar of a file or tree. Sparse files become type S, hard links stay links, and extended
 * attributes, where they are asked for, are in pax headers, which GNU tar reads as well. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "files.h"
#include "proto.h"
#include "tar.h"
#include "tar_xattr.h"

/* linux/mount.h, since 5.2; C libraries are later. */
#ifndef SYS_open_tree
#define SYS_open_tree 428
#endif
#ifndef OPEN_TREE_CLONE
#define OPEN_TREE_CLONE 1
#endif

enum { LINK_BUCKETS = 4096, COPY_BYTES = 128 << 10 };

struct seen {
    dev_t device;
    ino_t inode;
    char *name;
    struct seen *next;
};

struct packer {
    int out;
    uint64_t flags;
    dev_t device; /* of the top */
    int below;    /* its file system without what is mounted over it, or -1 */
    size_t top_length; /* of the first component of names */
    char name[TAR_PATH_LIMIT]; /* the member's name in the archive */
    size_t name_length;
    struct seen *links[LINK_BUCKETS];
    char copy[COPY_BYTES];
};

static const char zeros[TAR_BLOCK];

static void put(struct packer *packer, const void *data, size_t size) {
    if (!write_all(packer->out, data, size))
        fail_errno("standard output");
}

static void pad(struct packer *packer, uint64_t size) {
    size_t rest = (size_t)(size % TAR_BLOCK);
    if (rest != 0)
        put(packer, zeros, TAR_BLOCK - rest);
}

/* Octal when it fits, else GNU's base 256 (the first byte has its top bit set). */
static void put_number(char *field, size_t width, int64_t value) {
    if (value >= 0 && (uint64_t)value < (uint64_t)1 << (3 * (width - 1))) {
        field[width - 1] = 0;
        for (size_t i = width - 1; i-- > 0; value >>= 3)
            field[i] = (char)('0' + (value & 7));
        return;
    }
    for (size_t i = width; i-- > 1; value >>= 8)
        field[i] = (char)(value & 0xFF);
    field[0] = (char)(value < 0 ? 0xFF : 0x80);
}

static void finish_header(struct packer *packer, struct tar_header *header) {
    memcpy(header->magic, "ustar  ", 8);
    uint32_t sum = tar_checksum(header);
    for (int i = 5; i >= 0; i--, sum >>= 3)
        header->checksum[i] = (char)('0' + (sum & 7));
    header->checksum[6] = 0;
    header->checksum[7] = ' ';
    put(packer, header, sizeof *header);
}

/* Something about the member whose header comes next. */
static void put_extension(struct packer *packer, char type, const char *name, const char *text,
                          size_t size) {
    struct tar_header header = {.type = type};
    memcpy(header.name, name, strlen(name));
    put_number(header.mode, sizeof header.mode, 0644);
    put_number(header.uid, sizeof header.uid, 0);
    put_number(header.gid, sizeof header.gid, 0);
    put_number(header.mtime, sizeof header.mtime, 0);
    put_number(header.size, sizeof header.size, (int64_t)size);
    finish_header(packer, &header);
    put(packer, text, size);
    pad(packer, size);
}

static void put_long(struct packer *packer, char type, const char *text) {
    put_extension(packer, type, "././@LongLink", text, strlen(text) + 1);
}

/* Extended attributes of the member whose header comes next. */
static void put_xattrs(struct packer *packer, int parent, const char *base) {
    struct pax_records records = {0};
    if (!(packer->flags & PACK_XATTRS))
        return;
    xattr_records(parent, base, packer->name, &records);
    if (records.size > 0)
        put_extension(packer, 'x', "././@PaxHeader", records.text, records.size);
    free(records.text);
}

/* A header for the current name; long names and links go before it. */
static struct tar_header start_header(struct packer *packer, const struct stat *info, char type,
                                      const char *link) {
    struct tar_header header = {.type = type};
    if (link != NULL && strlen(link) > sizeof header.link)
        put_long(packer, 'K', link);
    if (packer->name_length > sizeof header.name)
        put_long(packer, 'L', packer->name);
    memcpy(header.name, packer->name,
           packer->name_length < sizeof header.name ? packer->name_length : sizeof header.name);
    if (link != NULL)
        memcpy(header.link, link,
               strlen(link) < sizeof header.link ? strlen(link) : sizeof header.link);
    put_number(header.mode, sizeof header.mode, info->st_mode & 07777);
    put_number(header.uid, sizeof header.uid, info->st_uid);
    put_number(header.gid, sizeof header.gid, info->st_gid);
    put_number(header.mtime, sizeof header.mtime, info->st_mtim.tv_sec);
    put_number(header.size, sizeof header.size, 0);
    if (S_ISCHR(info->st_mode) || S_ISBLK(info->st_mode)) {
        put_number(header.major, sizeof header.major, major(info->st_rdev));
        put_number(header.minor, sizeof header.minor, minor(info->st_rdev));
    }
    return header;
}

/* The name under which this inode is in the archive already, or NULL after noting it. */
static const char *linked_name(struct packer *packer, const struct stat *info) {
    struct seen **bucket = &packer->links[info->st_ino % LINK_BUCKETS];
    for (struct seen *seen = *bucket; seen; seen = seen->next)
        if (seen->inode == info->st_ino && seen->device == info->st_dev)
            return seen->name;
    struct seen *seen = must_alloc(sizeof *seen);
    *seen = (struct seen){info->st_dev, info->st_ino, must_copy(packer->name), *bucket};
    *bucket = seen;
    return NULL;
}

/* Copy a piece of a file. What it lost since we looked at its size becomes zeros, as with tar. */
static void copy_piece(struct packer *packer, int fd, uint64_t offset, uint64_t size) {
    while (size > 0) {
        size_t want = size < COPY_BYTES ? (size_t)size : COPY_BYTES;
        ssize_t got = pread(fd, packer->copy, want, (off_t)offset);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            fail_errno(packer->name);
        if (got == 0) {
            memset(packer->copy, 0, want);
            got = (ssize_t)want;
        }
        put(packer, packer->copy, (size_t)got);
        offset += (uint64_t)got;
        size -= (uint64_t)got;
    }
}

/* The pieces of a file that hold data, ending with an empty one at its size; 0 when it is not
 * worth it or the file system cannot tell. */
static size_t find_pieces(int fd, const struct stat *info, struct piece **pieces) {
    size_t count = 0, room = 0;
    off_t size = info->st_size, at = 0;
    *pieces = NULL;
    if (info->st_blocks >= (size + TAR_BLOCK - 1) / TAR_BLOCK)
        return 0;
    while (at < size && count < TAR_SPARSE_LIMIT - 1) {
        off_t data = lseek(fd, at, SEEK_DATA);
        if (data < 0 && errno != ENXIO)
            return 0;
        if (data < 0 || data >= size)
            break;
        off_t hole = lseek(fd, data, SEEK_HOLE);
        if (hole < 0)
            return 0;
        at = hole > size ? size : hole;
        if (count + 2 > room) {
            room = room ? room * 2 : 16;
            *pieces = realloc(*pieces, room * sizeof **pieces);
            if (*pieces == NULL)
                out_of_memory();
        }
        (*pieces)[count++] = (struct piece){(uint64_t)data, (uint64_t)(at - data)};
    }
    if (count == TAR_SPARSE_LIMIT - 1 || (count == 1 && (*pieces)[0].size == (uint64_t)size))
        return 0;
    if (*pieces == NULL)
        *pieces = must_alloc(sizeof **pieces);
    (*pieces)[count++] = (struct piece){(uint64_t)size, 0};
    return count;
}

static void put_piece(struct tar_piece *slot, const struct piece *piece) {
    put_number(slot->offset, sizeof slot->offset, (int64_t)piece->offset);
    put_number(slot->size, sizeof slot->size, (int64_t)piece->size);
}

static void put_sparse(struct packer *packer, int fd, const struct stat *info,
                       const struct piece *pieces, size_t count) {
    struct tar_header header = start_header(packer, info, 'S', NULL);
    uint64_t total = 0;
    size_t done = 0;
    for (size_t i = 0; i < count; i++)
        total += pieces[i].size;
    put_number(header.size, sizeof header.size, (int64_t)total);
    put_number(header.tail.gnu.real_size, 12, info->st_size);
    for (; done < count && done < TAR_HEADER_PIECES; done++)
        put_piece(&header.tail.gnu.pieces[done], &pieces[done]);
    header.tail.gnu.is_extended = done < count;
    finish_header(packer, &header);
    while (done < count) {
        struct tar_extension extension = {0};
        for (size_t i = 0; done < count && i < TAR_EXTENSION_PIECES; i++, done++)
            put_piece(&extension.pieces[i], &pieces[done]);
        extension.is_extended = done < count;
        put(packer, &extension, sizeof extension);
    }
    for (size_t i = 0; i < count; i++)
        copy_piece(packer, fd, pieces[i].offset, pieces[i].size);
    pad(packer, total);
}

static void pack_file(struct packer *packer, int parent, const char *base, struct stat *info) {
    int fd = openat(parent, base, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0 || fstat(fd, info) < 0)
        fail_errno(packer->name);
    if (!S_ISREG(info->st_mode))
        fail(EAGAIN, "%s changed while it was read", packer->name);
    struct piece *pieces;
    size_t count = find_pieces(fd, info, &pieces);
    if (count > 0) {
        put_sparse(packer, fd, info, pieces, count);
    } else {
        struct tar_header header = start_header(packer, info, '0', NULL);
        put_number(header.size, sizeof header.size, info->st_size);
        finish_header(packer, &header);
        copy_piece(packer, fd, 0, (uint64_t)info->st_size);
        pad(packer, (uint64_t)info->st_size);
    }
    free(pieces);
    close(fd);
}

static void pack_link(struct packer *packer, int parent, const char *base,
                      const struct stat *info) {
    char target[4097];
    ssize_t length = readlinkat(parent, base, target, sizeof target - 1);
    if (length < 0)
        fail_errno(packer->name);
    target[length] = 0;
    struct tar_header header = start_header(packer, info, '2', target);
    finish_header(packer, &header);
}

/* The header of a directory, whose name gets its slash; where that is, for what follows. */
static size_t put_directory(struct packer *packer, const struct stat *info) {
    size_t length = packer->name_length;
    if (length + 258 > sizeof packer->name)
        fail(ENAMETOOLONG, "a path below %.200s is too long", packer->name);
    packer->name[length] = '/';
    packer->name[length + 1] = 0;
    packer->name_length = length + 1;
    struct tar_header header = start_header(packer, info, '5', NULL);
    finish_header(packer, &header);
    return length;
}

static void leave_directory(struct packer *packer, size_t length) {
    packer->name[length] = 0;
    packer->name_length = length;
}

/* Something is mounted here that is not asked for: the directory below it, empty. */
static void pack_mount_point(struct packer *packer, int parent, const char *base,
                             struct stat *info) {
    const char *path = packer->name + packer->top_length + 1;
    struct stat below;
    if (packer->below >= 0 && fstatat(packer->below, path, &below, AT_SYMLINK_NOFOLLOW) == 0 &&
        S_ISDIR(below.st_mode)) {
        *info = below;
        parent = packer->below;
        base = path;
    }
    put_xattrs(packer, parent, base);
    leave_directory(packer, put_directory(packer, info));
}

static void pack_entry(struct packer *packer, int parent, const char *base, int depth);

static void pack_directory(struct packer *packer, int parent, const char *base,
                           const struct stat *info, int depth) {
    int fd = openat(parent, base, O_RDONLY | O_NOFOLLOW | O_DIRECTORY | O_CLOEXEC);
    DIR *directory = fd < 0 ? NULL : fdopendir(fd);
    if (directory == NULL)
        fail_errno(packer->name);
    if (depth >= TAR_DEPTH_LIMIT)
        fail(ELOOP, "directories are nested more than %d deep", TAR_DEPTH_LIMIT);
    put_xattrs(packer, parent, base);
    size_t length = put_directory(packer, info);
    struct dirent *entry;
    while (errno = 0, (entry = readdir(directory)) != NULL) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        packer->name_length = length + 1 + strlen(entry->d_name);
        memcpy(packer->name + length + 1, entry->d_name, strlen(entry->d_name) + 1);
        pack_entry(packer, fd, entry->d_name, depth + 1);
    }
    if (errno != 0)
        fail_errno(packer->name);
    leave_directory(packer, length);
    closedir(directory);
}

static void pack_entry(struct packer *packer, int parent, const char *base, int depth) {
    struct stat info;
    if (fstatat(parent, base, &info, AT_SYMLINK_NOFOLLOW) < 0) {
        if (errno == ENOENT && depth > 0)
            return; /* removed since the directory was read */
        fail_errno(packer->name);
    }
    bool elsewhere = (packer->flags & PACK_ONE_FILE_SYSTEM) && info.st_dev != packer->device;
    if (S_ISDIR(info.st_mode)) {
        if (elsewhere)
            pack_mount_point(packer, parent, base, &info);
        else
            pack_directory(packer, parent, base, &info, depth);
        return;
    }
    if (elsewhere) {
        dprintf(STDERR_FILENO, "%s: a file that is mounted here was left out\n", packer->name);
        return;
    }
    if (S_ISSOCK(info.st_mode)) {
        dprintf(STDERR_FILENO, "%s: a socket was left out\n", packer->name);
        return;
    }
    const char *earlier = info.st_nlink > 1 ? linked_name(packer, &info) : NULL;
    if (earlier != NULL) {
        struct tar_header header = start_header(packer, &info, '1', earlier);
        finish_header(packer, &header);
        return;
    }
    put_xattrs(packer, parent, base);
    if (S_ISREG(info.st_mode)) {
        pack_file(packer, parent, base, &info);
    } else if (S_ISLNK(info.st_mode)) {
        pack_link(packer, parent, base, &info);
    } else {
        char type = S_ISCHR(info.st_mode) ? '3' : S_ISBLK(info.st_mode) ? '4' : '6';
        struct tar_header header = start_header(packer, &info, type, NULL);
        finish_header(packer, &header);
    }
}

/* The file system to stay on. Without the right to look below its mounts nobody does. */
static void find_file_system(struct packer *packer, const char *path) {
    struct stat info;
    packer->below = -1;
    if (!(packer->flags & PACK_ONE_FILE_SYSTEM))
        return;
    if (lstat(path, &info) < 0)
        fail_errno(path);
    packer->device = info.st_dev;
    packer->below = (int)syscall(SYS_open_tree, AT_FDCWD, path, OPEN_TREE_CLONE | O_CLOEXEC);
}

void tar_pack(int out, const char *path, const char *name, uint64_t flags) {
    struct packer *packer = must_alloc(sizeof *packer);
    packer->out = out;
    packer->flags = flags;
    if (path[0] != '/')
        fail(EINVAL, "%s: a path in the guest must start with /", path);
    char *copy = must_copy(path);
    size_t end = strlen(copy);
    while (end > 1 && copy[end - 1] == '/')
        copy[--end] = 0;
    if (name == NULL)
        name = end > 1 ? strrchr(copy, '/') + 1 : "root";
    if (flags > (PACK_XATTRS | PACK_ONE_FILE_SYSTEM))
        fail(EINVAL, "unknown flags: %llu", (unsigned long long)flags);
    if (strlen(name) > 255 || strchr(name, '/') || !strcmp(name, ".."))
        fail(EINVAL, "%.255s cannot be the name of a file", name);
    find_file_system(packer, copy);
    packer->name_length = packer->top_length = strlen(name);
    memcpy(packer->name, name, packer->name_length + 1);
    pack_entry(packer, AT_FDCWD, copy, 0);
    put(packer, zeros, TAR_BLOCK);
    put(packer, zeros, TAR_BLOCK);
    if (packer->below >= 0)
        close(packer->below);
    free(copy);
    free(packer);
}
