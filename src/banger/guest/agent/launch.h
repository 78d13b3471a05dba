/* Starting what an OPEN asks for: always a child with pipes (or a PTY), or a socket. The
 * multiplexer in session.c sees nothing else; the fuzz harness puts another launch() in place. */
#ifndef BANGER_LAUNCH_H
#define BANGER_LAUNCH_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#include "request.h"

/* The agent's ends, nonblocking and close-on-exec; -1 where there is none. */
struct launched {
    pid_t pid;  /* 0 for a socket */
    int in;     /* write the client's DATA here */
    int out;    /* becomes DATA */
    int err;    /* becomes STDERR */
    int report; /* a struct report, or nothing; ends when the program runs */
    bool pty;
    bool detached;
};

/* What a child that failed sends over its report pipe: one write below PIPE_BUF. */
struct report {
    uint8_t exit_kind;
    uint32_t value;
    char message[480];
};

enum { REPORT_FD = 3 };

/* False, with the reason, when nothing was started. `in_guest` allows what changes the machine. */
bool launch(const struct request *request, bool in_guest, struct launched *launched,
            struct failure *why);

#endif
