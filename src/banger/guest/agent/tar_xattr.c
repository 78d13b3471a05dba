#define _GNU_SOURCE
#include "tar_xattr.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "files.h"
#include "tar.h"

enum { NAMES_ROOM = 64 << 10, VALUE_ROOM = 64 << 10 }; /* the kernel's own limits */

/* What an image needs: not labels of a security policy, nor what only a kernel's driver reads. */
static bool is_wanted(const char *name) {
    return strncmp(name, "user.", 5) == 0 || strcmp(name, "security.capability") == 0 ||
           strcmp(name, "system.posix_acl_access") == 0 ||
           strcmp(name, "system.posix_acl_default") == 0;
}

/* "LENGTH SCHILY.xattr.NAME=VALUE\n", the length counting itself. Values are bytes as they are. */
static void append(struct pax_records *records, const char *name, const char *value,
                   size_t value_size) {
    size_t rest = strlen(" SCHILY.xattr.=\n") + strlen(name) + value_size, digits = 1;
    for (size_t power = 10; rest + digits >= power; power *= 10)
        digits++;
    size_t size = rest + digits;
    if (records->size + size > TAR_PAX_LIMIT)
        fail(E2BIG, "a file has extended attributes of more than %d bytes", TAR_PAX_LIMIT);
    records->text = realloc(records->text, records->size + size + 1);
    if (records->text == NULL)
        out_of_memory();
    char *at = records->text + records->size;
    int head = snprintf(at, size + 1, "%zu SCHILY.xattr.%s=", size, name);
    memcpy(at + head, value, value_size);
    at[size - 1] = '\n';
    records->size += size;
}

/* By way of /proc: there is no lgetxattr() relative to a directory, and who opens a device does
 * something to it. */
void xattr_records(int parent, const char *base, const char *shown, struct pax_records *records) {
    static char names[NAMES_ROOM], value[VALUE_ROOM];
    size_t room = strlen(base) + 40;
    char *path = must_alloc(room);
    if (parent == AT_FDCWD)
        snprintf(path, room, "%s", base);
    else
        snprintf(path, room, "/proc/self/fd/%d/%s", parent, base);
    ssize_t length = llistxattr(path, names, sizeof names);
    if (length < 0 && errno != ENOTSUP && errno != ENOENT)
        fail_errno(shown);
    for (ssize_t at = 0; at < length; at += (ssize_t)strlen(names + at) + 1) {
        const char *name = names + at;
        if (!is_wanted(name))
            continue;
        if (strchr(name, '=') != NULL) {
            dprintf(STDERR_FILENO, "%s: the attribute %s was left out\n", shown, name);
            continue;
        }
        ssize_t got = lgetxattr(path, name, value, sizeof value);
        if (got >= 0)
            append(records, name, value, (size_t)got);
        else if (errno != ENODATA && errno != ENOENT)
            fail_errno(shown);
    }
    free(path);
}
