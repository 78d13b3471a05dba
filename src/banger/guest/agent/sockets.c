/* SOCKETS and LISTENERS: the TCP sockets that listen, as JSON. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <dirent.h>
#include <inttypes.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "files.h"
#include "session.h"

enum { PROC_LIMIT = 1 << 20, TCP_LISTEN = 0x0A };

/* How often LISTENERS looks, in ms: nothing tells when a socket begins to listen. Often while
 * something has just happened, for it is then that people wait for a server. */
enum { LOOK_QUICK_MS = 250, LOOK_MS = 2000, QUICK_FOR_MS = 5000 };

struct listener {
    char address[INET6_ADDRSTRLEN];
    unsigned port;
    uint64_t inode;
    long pid;
    char command[64];
};

/* The kernel prints an address as 32-bit words in the machine's byte order. */
static bool parse_listener(const char *line, bool ipv6, struct listener *listener) {
    char local[40];
    unsigned state;
    if (sscanf(line, " %*u: %39[0-9A-F]:%x %*[0-9A-F]:%*x %x %*s %*s %*s %*u %*u %" SCNu64, local,
               &listener->port, &state, &listener->inode) != 4 ||
        state != TCP_LISTEN || strlen(local) != (ipv6 ? 32u : 8u))
        return false;
    uint32_t words[4] = {0};
    for (size_t i = 0; i < (ipv6 ? 4u : 1u); i++) {
        char word[9] = {0};
        memcpy(word, local + 8 * i, 8);
        words[i] = (uint32_t)strtoul(word, NULL, 16);
    }
    inet_ntop(ipv6 ? AF_INET6 : AF_INET, words, listener->address, sizeof listener->address);
    return true;
}

static size_t read_listeners(const char *path, bool ipv6, struct listener **all, size_t count) {
    char *text = read_small(path, PROC_LIMIT);
    for (char *line = text ? strchr(text, '\n') : NULL; line; line = strchr(line + 1, '\n')) {
        struct listener one = {.pid = 0};
        if (!parse_listener(line + 1, ipv6, &one))
            continue;
        *all = realloc(*all, (count + 1) * sizeof **all);
        if (*all == NULL)
            out_of_memory();
        (*all)[count++] = one;
    }
    free(text);
    return count;
}

static void match_process(const char *pid, struct listener *all, size_t count) {
    char path[300], target[64];
    snprintf(path, sizeof path, "/proc/%s/fd", pid);
    DIR *fds = opendir(path);
    for (struct dirent *entry; fds && (entry = readdir(fds)) != NULL;) {
        uint64_t inode;
        ssize_t length = readlinkat(dirfd(fds), entry->d_name, target, sizeof target - 1);
        if (length <= 0)
            continue;
        target[length] = 0;
        if (sscanf(target, "socket:[%" SCNu64 "]", &inode) != 1)
            continue;
        for (size_t i = 0; i < count; i++)
            if (all[i].inode == inode && all[i].pid == 0) {
                all[i].pid = strtol(pid, NULL, 10);
                snprintf(path, sizeof path, "/proc/%s/comm", pid);
                read_line(path, all[i].command, sizeof all[i].command);
            }
    }
    if (fds)
        closedir(fds);
}

static size_t find_listeners(struct listener **all) {
    size_t count = read_listeners("/proc/net/tcp", false, all, 0);
    return read_listeners("/proc/net/tcp6", true, all, count);
}

static void put_listeners(FILE *out, const struct listener *all, size_t count) {
    putc('[', out);
    for (size_t i = 0; i < count; i++) {
        fprintf(out,
                "%s{\"protocol\":\"tcp\",\"address\":\"%s\",\"port\":%u,\"pid\":%ld,\"command\":",
                i ? "," : "", all[i].address, all[i].port, all[i].pid);
        json_text(out, all[i].command);
        putc('}', out);
    }
    putc(']', out);
}

void job_sockets(void) {
    struct listener *all = NULL;
    size_t count = find_listeners(&all);
    DIR *proc = opendir("/proc");
    for (struct dirent *entry; proc && (entry = readdir(proc)) != NULL;)
        if (isdigit((unsigned char)entry->d_name[0]))
            match_process(entry->d_name, all, count);
    if (proc)
        closedir(proc);
    put_listeners(stdout, all, count);
    free(all);
    if (fflush(stdout) != 0)
        fail_errno("standard output");
}

/* A line of what listens now, without whose it is: to know that takes a look at every process. */
static char *listeners_line(void) {
    struct listener *all = NULL;
    size_t count = find_listeners(&all), size = 0;
    char *line = NULL;
    FILE *out = open_memstream(&line, &size);
    if (out == NULL)
        out_of_memory();
    put_listeners(out, all, count);
    putc('\n', out);
    if (fclose(out) != 0)
        out_of_memory();
    free(all);
    return line;
}

void job_listeners(void) {
    char *told = must_copy("");
    int64_t quick_until = now_ms() + QUICK_FOR_MS;
    for (;;) {
        char *line = listeners_line();
        if (strcmp(line, told) != 0) {
            if (!write_all(STDOUT_FILENO, line, strlen(line)))
                fail_errno("standard output");
            quick_until = now_ms() + QUICK_FOR_MS;
        }
        free(told);
        told = line;
        struct pollfd in = {.fd = STDIN_FILENO, .events = POLLIN};
        if (poll(&in, 1, now_ms() < quick_until ? LOOK_QUICK_MS : LOOK_MS) > 0) {
            char asked[256]; /* to look now */
            if (read(STDIN_FILENO, asked, sizeof asked) <= 0)
                return;
            quick_until = now_ms() + QUICK_FOR_MS;
        }
    }
}
