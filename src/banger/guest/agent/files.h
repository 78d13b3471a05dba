/* Small file work, and how a forked helper of the agent (a "child job") fails. */
#ifndef BANGER_FILES_H
#define BANGER_FILES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/types.h>

/* In a child job: report EXIT kind 2 with this errno and message, and end. */
_Noreturn void fail(int error, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* The same with a kind of exit and its value. */
_Noreturn void fail_exit(uint8_t exit_kind, uint32_t value, const char *message);
/* "what: strerror(errno)". `what` is made printable. */
_Noreturn void fail_errno(const char *what);
_Noreturn void out_of_memory(void);
void *must_alloc(size_t size);
char *must_copy(const char *text);

/* The first line of a file without its newline; false (and "") when it cannot be read. */
bool read_line(const char *path, char *line, size_t size);
/* All of a small file with a NUL after it, for the caller to free; NULL when it cannot be read. */
char *read_small(const char *path, size_t limit);
bool write_text(const char *path, const char *text);
/* Write beside and rename; in place where a rename is refused (a bind mount). A link is replaced,
 * and so is a directory. */
bool replace_text(const char *path, const char *text, mode_t mode);
/* A directory that the guest needs, in place of whatever the image has there that is none: a file, a
 * link that leads nowhere, or any link where that may not be. False with errno. */
bool provide_directory(const char *path, bool may_be_link);
/* mkdir -p of the directory part of a path. */
bool make_parents(const char *path);

bool write_all(int fd, const void *data, size_t size);
/* Read until `size` bytes or the end; -1 on error. */
ssize_t read_full(int fd, void *data, size_t size);

/* A JSON string with its quotes; what is not UTF-8 becomes U+FFFD. */
void json_text(FILE *out, const char *text);

/* The child jobs. */
void job_read(const char *path);
void job_write(const char *path, const uint64_t *mode, const uint64_t *uid, const uint64_t *gid);
void job_stat(const char *path);
void job_stats(void);
void job_sockets(void);
void job_listeners(void);
void tar_pack(int out, const char *path, const char *name, uint64_t flags);
void tar_unpack(int in, const char *directory, const char *name);

#endif
