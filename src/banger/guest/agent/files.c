#define _GNU_SOURCE
#include "files.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "launch.h"

enum { COPY_BYTES = 128 << 10 };

_Noreturn void fail_exit(uint8_t exit_kind, uint32_t value, const char *message) {
    struct report report = {.exit_kind = exit_kind, .value = value};
    size_t size = strlen(message);
    if (size >= sizeof report.message)
        size = sizeof report.message - 1;
    memcpy(report.message, message, size);
    (void)!write(REPORT_FD, &report, sizeof report);
    _exit(1);
}

_Noreturn void fail(int error, const char *format, ...) {
    char message[480];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    fail_exit(EXIT_FAILED, (uint32_t)error, message);
}

_Noreturn void fail_errno(const char *what) {
    int error = errno;
    char shown[256];
    size_t end = 0;
    for (; what[end] != 0 && end < sizeof shown - 1; end++)
        shown[end] = (unsigned char)what[end] < ' ' || what[end] == 127 ? '?' : what[end];
    shown[end] = 0;
    fail(error, "%s: %s", shown, strerror(error));
}

_Noreturn void out_of_memory(void) {
    fail(ENOMEM, "the guest is out of memory");
}

void *must_alloc(size_t size) {
    void *memory = calloc(1, size);
    if (memory == NULL)
        out_of_memory();
    return memory;
}

char *must_copy(const char *text) {
    char *copy = strdup(text);
    if (copy == NULL)
        out_of_memory();
    return copy;
}

/* An image may have a FIFO or a device where a file is expected: that must not block. */
static int open_regular(const char *path) {
    struct stat info;
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd >= 0 && (fstat(fd, &info) < 0 || !S_ISREG(info.st_mode))) {
        close(fd);
        return -1;
    }
    return fd;
}

char *read_small(const char *path, size_t limit) {
    int fd = open_regular(path);
    char *text = fd < 0 ? NULL : malloc(limit + 1);
    if (text != NULL) {
        ssize_t got = read_full(fd, text, limit);
        text[got < 0 ? 0 : got] = 0;
    }
    if (fd >= 0)
        close(fd);
    return text;
}

bool read_line(const char *path, char *line, size_t size) {
    line[0] = 0;
    int fd = open_regular(path);
    if (fd < 0)
        return false;
    ssize_t got = read_full(fd, line, size - 1);
    close(fd);
    line[got < 0 ? 0 : got] = 0;
    line[strcspn(line, "\n")] = 0;
    return got >= 0;
}

bool write_all(int fd, const void *data, size_t size) {
    const char *at = data;
    while (size > 0) {
        ssize_t put = write(fd, at, size);
        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0)
            return false;
        at += put;
        size -= (size_t)put;
    }
    return true;
}

ssize_t read_full(int fd, void *data, size_t size) {
    size_t have = 0;
    while (have < size) {
        ssize_t got = read(fd, (char *)data + have, size - have);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            return -1;
        if (got == 0)
            break;
        have += (size_t)got;
    }
    return (ssize_t)have;
}

static bool write_file(const char *path, int flags, const char *text, mode_t mode) {
    int fd = open(path, flags | O_WRONLY | O_CLOEXEC, mode);
    if (fd < 0)
        return false;
    bool done = write_all(fd, text, strlen(text)) && ((flags & O_CREAT) == 0 || !fchmod(fd, mode));
    return close(fd) == 0 && done;
}

bool write_text(const char *path, const char *text) {
    return write_file(path, 0, text, 0);
}

/* Whether a regular file has this text already. */
static bool has_text(const char *path, const char *text) {
    struct stat info;
    size_t length = strlen(text);
    if (lstat(path, &info) < 0 || !S_ISREG(info.st_mode) || (size_t)info.st_size != length)
        return false;
    char *old = read_small(path, length + 1);
    bool same = old != NULL && strcmp(old, text) == 0;
    free(old);
    return same;
}

/* A directory at `path` goes: what is in it, aside. */
static bool take_place(const char *beside, const char *path) {
    char aside[256];
    if (rename(beside, path) == 0)
        return true;
    if (errno != EISDIR)
        return false;
    snprintf(aside, sizeof aside, "%s.banger-old", path);
    return (rmdir(path) == 0 || rename(path, aside) == 0) && rename(beside, path) == 0;
}

bool replace_text(const char *path, const char *text, mode_t mode) {
    if (has_text(path, text))
        return true; /* a machine that waited for its name has the rest already */
    char beside[256];
    snprintf(beside, sizeof beside, "%s.banger-new", path);
    unlink(beside);
    if (write_file(beside, O_CREAT | O_EXCL, text, mode) && take_place(beside, path))
        return true;
    unlink(beside);
    return write_file(path, O_CREAT | O_TRUNC | O_NOFOLLOW | O_NONBLOCK, text, mode);
}

bool provide_directory(const char *path, bool may_be_link) {
    struct stat info;
    int found = may_be_link ? stat(path, &info) : lstat(path, &info);
    if (found == 0 && S_ISDIR(info.st_mode))
        return true;
    return (unlink(path) == 0 || errno == ENOENT) && mkdir(path, 0755) == 0;
}

bool make_parents(const char *path) {
    char *copy = must_copy(path);
    bool done = true;
    for (char *slash = strchr(copy + 1, '/'); slash && done; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        done = mkdir(copy, 0755) == 0 || errno == EEXIST;
        *slash = '/';
    }
    free(copy);
    return done;
}

static size_t utf8_length(const unsigned char *at) {
    size_t length = at[0] < 0x80 ? 1 : at[0] >= 0xC2 && at[0] < 0xE0 ? 2
                    : at[0] >= 0xE0 && at[0] < 0xF0             ? 3
                    : at[0] >= 0xF0 && at[0] < 0xF5             ? 4
                                                                : 0;
    for (size_t i = 1; i < length; i++)
        if ((at[i] & 0xC0) != 0x80)
            return 0;
    /* Overlong forms, surrogates, and what is above U+10FFFF. */
    if ((at[0] == 0xE0 && at[1] < 0xA0) || (at[0] == 0xED && at[1] > 0x9F) ||
        (at[0] == 0xF0 && at[1] < 0x90) || (at[0] == 0xF4 && at[1] > 0x8F))
        return 0;
    return length;
}

void json_text(FILE *out, const char *text) {
    putc('"', out);
    for (const unsigned char *at = (const unsigned char *)text; *at;) {
        size_t length = utf8_length(at);
        if (length == 0)
            fputs("\\ufffd", out);
        else if (*at == '"' || *at == '\\')
            fprintf(out, "\\%c", *at);
        else if (*at < ' ')
            fprintf(out, "\\u%04x", *at);
        else
            fwrite(at, 1, length, out);
        at += length ? length : 1;
    }
    putc('"', out);
}

static void must_be_absolute(const char *path) {
    if (path[0] != '/')
        fail(EINVAL, "%s: a path in the guest must start with /", path);
}

void job_read(const char *path) {
    must_be_absolute(path);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    struct stat info;
    if (fd < 0 || fstat(fd, &info) < 0)
        fail_errno(path);
    if (S_ISDIR(info.st_mode)) {
        errno = EISDIR;
        fail_errno(path);
    }
    static char buffer[COPY_BYTES];
    for (;;) {
        ssize_t got = read(fd, buffer, sizeof buffer);
        if (got == 0)
            return;
        if (got < 0 && errno != EINTR)
            fail_errno(path);
        if (got > 0 && !write_all(STDOUT_FILENO, buffer, (size_t)got))
            fail_errno("standard output");
    }
}

static void copy_beside(int fd, const char *beside) {
    static char buffer[COPY_BYTES];
    ssize_t got;
    while ((got = read(STDIN_FILENO, buffer, sizeof buffer)) != 0) {
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 || !write_all(fd, buffer, (size_t)got)) {
            int error = errno;
            unlink(beside);
            errno = error;
            fail_errno(beside);
        }
    }
}

static char *unfinished; /* what a job that is ended by a signal removes */

static void remove_unfinished(int number) {
    unlink(unfinished);
    raise(number); /* it ends us as we return: SA_RESETHAND */
}

/* A new file beside `path`, which does not outlive us when the client goes; its name in `beside`. */
static int make_beside(const char *path, char **beside) {
    const char *slash = strrchr(path, '/');
    size_t room = (size_t)(slash - path) + 32;
    sigset_t ends, before;
    struct sigaction action = {.sa_handler = remove_unfinished, .sa_flags = (int)SA_RESETHAND};
    const int numbers[] = {SIGHUP, SIGINT, SIGTERM};
    sigemptyset(&ends);
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        sigaddset(&ends, numbers[i]);
    *beside = must_alloc(room);
    snprintf(*beside, room, "%.*s/.banger-XXXXXX", (int)(slash - path), path);
    sigprocmask(SIG_BLOCK, &ends, &before);
    int fd = mkostemp(*beside, O_CLOEXEC);
    if (fd < 0)
        fail_errno(path);
    unfinished = *beside;
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        sigaction(numbers[i], &action, NULL);
    sigprocmask(SIG_SETMASK, &before, NULL);
    return fd;
}

/* The file that a path stands for: a link stays, and what it leads to is replaced. */
static char *resolve(const char *path) {
    struct stat info;
    if (lstat(path, &info) < 0 || !S_ISLNK(info.st_mode))
        return must_copy(path);
    char *resolved = realpath(path, NULL);
    if (resolved == NULL) {
        int error = errno;
        fail(error, "%s: cannot follow the link: %s", path, strerror(error));
    }
    return resolved;
}

void job_write(const char *named, const uint64_t *mode, const uint64_t *uid, const uint64_t *gid) {
    must_be_absolute(named);
    if (!make_parents(named))
        fail_errno(named);
    char *path = resolve(named), *beside;
    struct stat old;
    bool exists = lstat(path, &old) == 0;
    if (exists && S_ISDIR(old.st_mode)) {
        errno = EISDIR;
        fail_errno(path);
    }
    if (exists && !S_ISREG(old.st_mode))
        fail(EINVAL, "%s: is not a regular file", path);
    int fd = make_beside(path, &beside);
    copy_beside(fd, beside);
    mode_t wanted = mode ? (mode_t)*mode & 07777 : exists ? old.st_mode & 07777 : 0644;
    uid_t owner = uid ? (uid_t)*uid : exists ? old.st_uid : geteuid();
    gid_t group = gid ? (gid_t)*gid : exists ? old.st_gid : getegid();
    /* chown before chmod: it clears the set-user-id bits */
    if (fchown(fd, owner, group) < 0 || fchmod(fd, wanted) < 0 || fsync(fd) < 0 ||
        rename(beside, path) < 0) {
        int error = errno;
        unlink(beside);
        errno = error;
        fail_errno(path);
    }
    free(beside);
    free(path);
}

void job_stat(const char *path) {
    must_be_absolute(path);
    struct stat info;
    if (lstat(path, &info) < 0)
        fail_errno(path);
    uint8_t answer[13];
    answer[0] = S_ISREG(info.st_mode)   ? 'f'
                : S_ISDIR(info.st_mode) ? 'd'
                : S_ISLNK(info.st_mode) ? 'l'
                                        : 'o';
    put_be32(answer + 1, info.st_mode & 07777);
    put_be32(answer + 5, (uint32_t)((uint64_t)info.st_size >> 32));
    put_be32(answer + 9, (uint32_t)info.st_size);
    if (!write_all(STDOUT_FILENO, answer, sizeof answer))
        fail_errno("standard output");
}
