/* banger's agent inside a guest: /init of the initramfs, then PID 1 or a daemon beside the image's
 * own init, and the guest's end of docs/agent-protocol.md all along. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "host.h"
#include "init.h"
#include "session.h"

static struct session session; /* 1.4 MiB: not for the stack */

static int watch_children(void) {
    sigset_t children;
    sigemptyset(&children);
    sigaddset(&children, SIGCHLD);
    sigprocmask(SIG_BLOCK, &children, NULL);
    signal(SIGPIPE, SIG_IGN);
    return signalfd(-1, &children, SFD_NONBLOCK | SFD_CLOEXEC);
}

/* A session over an inherited descriptor, without a machine of its own: for tests. */
static int serve_fd(const char *text) {
    char *end;
    long fd = strtol(text, &end, 10);
    if (*text == 0 || *end != 0 || fd < 0 || fcntl((int)fd, F_SETFD, FD_CLOEXEC) < 0 ||
        fcntl((int)fd, F_SETFL, fcntl((int)fd, F_GETFL) | O_NONBLOCK) < 0) {
        fprintf(stderr, "banger-agent: %s is not an open descriptor\n", text);
        return 2;
    }
    session_init(&session, (int)fd, false);
    session_run(&session, watch_children());
    return 0;
}

int main(int count, char **arguments) {
    if (count == 3 && strcmp(arguments[1], "--serve-fd") == 0)
        return serve_fd(arguments[2]);
    if (getpid() != 1) {
        fprintf(stderr, "banger-agent " AGENT_VERSION ": runs as the init of a banger guest\n");
        return 2;
    }
    init_boot();
    session_init(&session, -1, true);
    host_open(&session);
    session_run(&session, watch_children());
    power_off(session.shutdown & SHUTDOWN_REBOOT);
}
