/* UNPACK: a tar into a directory. The archive is hostile input: sizes and names are bounded, and
 * below the directory no symbolic link is ever followed. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "files.h"
#include "tar.h"
#include "tar_read.h"

enum { COPY_BYTES = 128 << 10 };

/* A directory whose mode and times are set at the end: what is made in it would change them. */
struct later {
    char *path;
    mode_t mode;
    uid_t uid;
    gid_t gid;
    struct timespec mtime;
    size_t order;  /* in the archive: the last word on a path holds */
    bool removed;  /* something else took its place */
};

struct unpacker {
    struct tar_reader reader;
    int root;
    const char *name; /* replaces the first component, or NULL */
    char *first;      /* which it replaces: all members must have the same */
    int parent;       /* the directory of the last member, and its path */
    char *parent_path;
    struct later *later;
    size_t later_count, later_room;
    char copy[COPY_BYTES];
};

/* The archive's only top: with a new name for it, a second one would come to lie over the first. */
static void must_be_first(struct unpacker *unpacker, const char *part, size_t size) {
    if (unpacker->first == NULL) {
        unpacker->first = must_alloc(size + 1);
        memcpy(unpacker->first, part, size);
    } else if (strlen(unpacker->first) != size || memcmp(unpacker->first, part, size) != 0) {
        fail(EINVAL, "the archive has more than one file or directory at its top: %.255s and %.*s",
             unpacker->first, (int)size, part);
    }
}

/* Clean a member's name: no absolute path, no "..", no empty or "." component, and its first
 * component replaced. Empty for the top itself, which cannot be when it gets a name. */
static char *clean_path(struct unpacker *unpacker, const char *path) {
    if (path[0] == '/')
        fail(EINVAL, "the archive has an absolute path: %.200s", path);
    const char *name = unpacker->name ? unpacker->name : "";
    char *clean = must_alloc(strlen(path) + strlen(name) + 2);
    size_t length = 0;
    bool first = true;
    for (const char *at = path; *at;) {
        size_t part = strcspn(at, "/");
        if (part == 2 && at[0] == '.' && at[1] == '.')
            fail(EINVAL, "the archive has a path with ..: %.200s", path);
        if (part > 255)
            fail(ENAMETOOLONG, "the archive has a name of more than 255 bytes: %.200s", path);
        if (part > 0 && !(part == 1 && at[0] == '.')) {
            bool replace = first && unpacker->name != NULL;
            if (replace)
                must_be_first(unpacker, at, part);
            const char *from = replace ? name : at;
            size_t size = replace ? strlen(name) : part;
            if (length > 0)
                clean[length++] = '/';
            memcpy(clean + length, from, size);
            length += size;
            first = false;
        }
        at += part;
        at += strspn(at, "/");
    }
    clean[length] = 0;
    if (first && unpacker->name != NULL)
        fail(EINVAL, "the archive's top has no name that could be replaced: %.200s", path);
    return clean;
}

static int open_directory(int parent, const char *name) {
    return openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
}

/* A descriptor of the directory `path` below the root; made when missing and `make` is set. */
static int walk(const struct unpacker *unpacker, const char *path, bool make) {
    int at = fcntl(unpacker->root, F_DUPFD_CLOEXEC, 0);
    char *copy = must_copy(path);
    for (char *part = strtok(copy, "/"); part && at >= 0; part = strtok(NULL, "/")) {
        int next = open_directory(at, part);
        if (next < 0 && errno == ENOENT && make && mkdirat(at, part, 0755) == 0)
            next = open_directory(at, part);
        int error = errno;
        close(at);
        errno = error;
        at = next;
    }
    if (at < 0) {
        int error = errno == ELOOP || errno == ENOTDIR ? ENOTDIR : errno;
        fail(error, "%.200s: %s", path,
             error == ENOTDIR ? "a part of the path is a link or a file, not a directory"
                              : strerror(error));
    }
    free(copy);
    return at;
}

/* The directory that holds `path`, kept open for the next member; `base` is the last component. */
static int enter_parent(struct unpacker *unpacker, char *path, const char **base) {
    char *slash = strrchr(path, '/');
    const char *directory = slash ? path : "";
    *base = slash ? slash + 1 : path;
    if (slash)
        *slash = 0;
    if (unpacker->parent < 0 || strcmp(unpacker->parent_path, directory) != 0) {
        if (unpacker->parent >= 0)
            close(unpacker->parent);
        free(unpacker->parent_path);
        unpacker->parent = walk(unpacker, directory, true);
        unpacker->parent_path = must_copy(directory);
    }
    if (slash)
        *slash = '/';
    return unpacker->parent;
}

static void add_later(struct unpacker *unpacker, struct later later) {
    if (unpacker->later_count == unpacker->later_room) {
        unpacker->later_room = unpacker->later_room ? unpacker->later_room * 2 : 64;
        unpacker->later =
            realloc(unpacker->later, unpacker->later_room * sizeof *unpacker->later);
        if (unpacker->later == NULL)
            out_of_memory();
    }
    later.order = unpacker->later_count;
    unpacker->later[unpacker->later_count++] = later;
}

/* Remove what a member that is not a directory is about to replace, if it is there: of
 * directories, empty ones. */
static void clear_way(struct unpacker *unpacker, int parent, const char *base, const char *path) {
    if (unlinkat(parent, base, 0) == 0 || errno == ENOENT)
        return;
    if (errno != EISDIR || unlinkat(parent, base, AT_REMOVEDIR) < 0)
        fail_errno(path);
    add_later(unpacker, (struct later){.path = must_copy(path), .removed = true});
}

static void set_attributes(int fd, const struct tar_member *member) {
    struct timespec times[2] = {{.tv_nsec = UTIME_NOW}, member->mtime};
    /* chown before chmod: it clears the set-user-id bits */
    if ((geteuid() == 0 && fchown(fd, member->uid, member->gid) < 0) ||
        fchmod(fd, member->mode) < 0 || futimens(fd, times) < 0)
        fail_errno(member->path);
}

static void write_piece(struct unpacker *unpacker, int fd, const char *path, uint64_t offset,
                        uint64_t size) {
    while (size > 0) {
        size_t want = size < COPY_BYTES ? (size_t)size : COPY_BYTES;
        tar_read(&unpacker->reader, unpacker->copy, want);
        for (size_t done = 0; done < want;) {
            ssize_t put = pwrite(fd, unpacker->copy + done, want - done, (off_t)offset);
            if (put < 0 && errno == EINTR)
                continue;
            if (put < 0)
                fail_errno(path);
            done += (size_t)put;
            offset += (uint64_t)put;
        }
        size -= want;
    }
}

static void make_file(struct unpacker *unpacker, int parent, const char *base, const char *path,
                      const struct tar_member *member) {
    clear_way(unpacker, parent, base, path);
    int fd = openat(parent, base, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0)
        fail_errno(member->path);
    if (member->type == 'S') {
        for (size_t i = 0; i < member->piece_count; i++)
            write_piece(unpacker, fd, member->path, member->pieces[i].offset,
                        member->pieces[i].size);
        if (ftruncate(fd, (off_t)member->real_size) < 0)
            fail_errno(member->path);
    } else {
        write_piece(unpacker, fd, member->path, 0, member->size);
    }
    tar_skip_padding(&unpacker->reader, member->size);
    set_attributes(fd, member);
    if (close(fd) < 0)
        fail_errno(member->path);
}

static void make_directory(struct unpacker *unpacker, char *path,
                           const struct tar_member *member) {
    if (path[0] != 0) {
        const char *base;
        int parent = enter_parent(unpacker, path, &base);
        struct stat info;
        bool exists = fstatat(parent, base, &info, AT_SYMLINK_NOFOLLOW) == 0;
        if (exists && !S_ISDIR(info.st_mode)) {
            clear_way(unpacker, parent, base, path);
            exists = false;
        }
        if (!exists && mkdirat(parent, base, 0700) < 0)
            fail_errno(member->path);
    }
    add_later(unpacker, (struct later){.path = must_copy(path),
                                       .mode = member->mode,
                                       .uid = member->uid,
                                       .gid = member->gid,
                                       .mtime = member->mtime});
}

static void make_hard_link(struct unpacker *unpacker, int parent, const char *base,
                           const char *path, const struct tar_member *member) {
    char *target = clean_path(unpacker, member->link);
    char *slash = strrchr(target, '/');
    if (slash)
        *slash = 0;
    int from = walk(unpacker, slash ? target : "", false);
    const char *from_base = slash ? slash + 1 : target;
    struct stat old, new;
    bool same = fstatat(from, from_base, &old, AT_SYMLINK_NOFOLLOW) == 0 &&
                fstatat(parent, base, &new, AT_SYMLINK_NOFOLLOW) == 0 &&
                old.st_dev == new.st_dev && old.st_ino == new.st_ino;
    if (!same) {
        clear_way(unpacker, parent, base, path);
        if (linkat(from, from_base, parent, base, 0) < 0)
            fail_errno(member->path);
    }
    close(from);
    free(target);
}

/* A link, fifo or device: not opened, so all is done by its name, and its mode comes with it, since
 * chmod would follow a link put in its place. */
static void make_special(struct unpacker *unpacker, int parent, const char *base,
                         const char *path, const struct tar_member *member) {
    clear_way(unpacker, parent, base, path);
    mode_t kind = member->type == '3' ? S_IFCHR : member->type == '4' ? S_IFBLK : S_IFIFO;
    dev_t device = makedev(member->major, member->minor);
    struct timespec times[2] = {{.tv_nsec = UTIME_NOW}, member->mtime};
    int failed = member->type == '2' ? symlinkat(member->link, parent, base)
                                     : mknodat(parent, base, kind | member->mode, device);
    if (!failed && geteuid() == 0)
        failed = fchownat(parent, base, member->uid, member->gid, AT_SYMLINK_NOFOLLOW);
    if (failed || utimensat(parent, base, times, AT_SYMLINK_NOFOLLOW) < 0)
        fail_errno(member->path);
}

static void unpack_member(struct unpacker *unpacker, const struct tar_member *member) {
    char *path = clean_path(unpacker, member->path);
    if (member->type == '5') {
        make_directory(unpacker, path, member);
        tar_skip(&unpacker->reader, member->size);
        free(path);
        return;
    }
    if (path[0] == 0)
        fail(EINVAL, "the archive has a member without a name");
    const char *base;
    int parent = enter_parent(unpacker, path, &base);
    if (member->type == '0' || member->type == 'S') {
        make_file(unpacker, parent, base, path, member);
    } else {
        if (member->type == '1')
            make_hard_link(unpacker, parent, base, path, member);
        else
            make_special(unpacker, parent, base, path, member);
        tar_skip(&unpacker->reader, member->size);
    }
    free(path);
}

/* What lies deeper sorts after its parents, and a later word on a path after an earlier one. */
static int by_path(const void *left, const void *right) {
    const struct later *a = left, *b = right;
    int order = strcmp(a->path, b->path);
    return order != 0 ? order : a->order < b->order ? -1 : 1;
}

/* Deepest first, so that a directory without permissions does not bar the way; once for each. */
static void finish_directories(struct unpacker *unpacker) {
    if (unpacker->later_count > 0)
        qsort(unpacker->later, unpacker->later_count, sizeof *unpacker->later, by_path);
    const char *done = NULL; /* an entry's path, freed with all others at the end */
    for (size_t i = unpacker->later_count; i > 0; i--) {
        struct later *later = &unpacker->later[i - 1];
        bool is_old = done != NULL && strcmp(done, later->path) == 0;
        done = later->path;
        if (is_old || later->removed)
            continue;
        int fd = walk(unpacker, later->path, false);
        struct timespec times[2] = {{.tv_nsec = UTIME_NOW}, later->mtime};
        if ((geteuid() == 0 && fchown(fd, later->uid, later->gid) < 0) ||
            fchmod(fd, later->mode) < 0 || futimens(fd, times) < 0)
            fail_errno(later->path);
        close(fd);
    }
    for (size_t i = 0; i < unpacker->later_count; i++)
        free(unpacker->later[i].path);
    free(unpacker->later);
}

void tar_unpack(int in, const char *directory, const char *name) {
    struct unpacker *unpacker = must_alloc(sizeof *unpacker);
    if (directory[0] != '/')
        fail(EINVAL, "%.200s: a path in the guest must start with /", directory);
    if (name && (strlen(name) > 255 || strchr(name, '/') || !strcmp(name, ".") ||
                 !strcmp(name, "..")))
        fail(EINVAL, "%.255s cannot be the name of a file", name);
    if (!make_parents(directory) || (mkdir(directory, 0755) < 0 && errno != EEXIST))
        fail_errno(directory);
    unpacker->root = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (unpacker->root < 0)
        fail_errno(directory);
    unpacker->name = name;
    unpacker->parent = -1;
    umask(0); /* modes are as the archive says */
    tar_reader_init(&unpacker->reader, in);
    struct tar_member member;
    while (tar_next(&unpacker->reader, &member))
        unpack_member(unpacker, &member);
    finish_directories(unpacker);
    tar_reader_end(&unpacker->reader);
    if (unpacker->parent >= 0)
        close(unpacker->parent);
    free(unpacker->parent_path);
    free(unpacker->first);
    close(unpacker->root);
    free(unpacker);
}
