/* One stream: what the client sends goes to the child, what the child says goes to the client,
 * each within its credit, and then the EXIT. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include "session.h"

enum {
    /* A child has ended but its pipe is still open: somebody it left behind holds it. What they
     * write in this time (a `tee` that is about to finish) still goes out; then the stream ends.
     * ssh would wait for them for ever. */
    DRAIN_MS = 250,
    FRAME_DATA_BYTES = 128 << 10,
    CREDIT_BATCH = WINDOW_BYTES / 4,
    PTY_DRAIN_BYTES = 64 << 10,
    PTY_QUIET_MS = 50,
    EXIT_ROOM = 5 + sizeof((struct report){0}.message),
};

struct stream *stream_find(struct session *session, uint32_t id) {
    for (size_t i = 0; i < STREAM_LIMIT; i++)
        if (session->streams[i].id == id)
            return &session->streams[i];
    return NULL;
}

static void close_fd(int *fd) {
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static void stream_free(struct stream *stream) {
    close_fd(&stream->child.in);
    close_fd(&stream->child.out);
    close_fd(&stream->child.err);
    close_fd(&stream->child.report);
    free(stream->in);
    memset(stream, 0, sizeof *stream);
}

/* Failures of ours go to the kernel's log, and so to the console, under the operation's id. */
static void log_failure(const struct session *session, const char *op_id, const char *message) {
    if (!session->in_guest || op_id[0] == 0)
        return;
    char line[600];
    int length = snprintf(line, sizeof line, "<4>banger: %s: %s\n", op_id, message);
    int fd = open("/dev/kmsg", O_WRONLY | O_CLOEXEC | O_NONBLOCK);
    /* Nothing depends on it: a log that cannot be written is done without. */
    if (fd >= 0 && write(fd, line, (size_t)length < sizeof line ? (size_t)length : sizeof line) < 0)
        errno = 0;
    close_fd(&fd);
}

static bool start_socket(struct stream *stream, uint16_t port, struct failure *why) {
    stream->socket = true;
    stream->port = port;
    stream->child = (struct launched){.pid = 0, .in = -1, .out = -1, .err = -1, .report = -1};
    int fd = -1;
    if (!loopback_connect(port, false, &fd)) {
        stream->second_try = true;
        if (!loopback_connect(port, true, &fd)) {
            failure_set(why, errno, "port %u: %s", port, strerror(errno));
            return false;
        }
    }
    stream->child.in = fd;
    stream->connecting = true;
    return true;
}

void stream_open(struct session *session, const struct frame *frame) {
    struct failure why = {0};
    struct request request;
    if (!request_parse(&request, frame->payload, frame->length, &why)) {
        outbox_exit(session, frame->stream, EXIT_FAILED, (uint32_t)why.error, why.message);
        return;
    }
    struct stream *stream = stream_find(session, 0);
    bool started = false;
    if (request.kind == KIND_PING || request.kind == KIND_SHUTDOWN) {
        bool refused = request.kind == KIND_SHUTDOWN && !session->in_guest;
        if (request.kind == KIND_SHUTDOWN && !refused)
            session->shutdown = (int)(request.number[SHUTDOWN_FLAGS] & SHUTDOWN_REBOOT);
        outbox_exit(session, frame->stream, refused ? EXIT_FAILED : EXIT_EXITED,
                    refused ? EPERM : 0, refused ? "this agent does not run a machine" : "");
        request_free(&request);
        return;
    }
    if (stream == NULL)
        failure_set(&why, EAGAIN, "too many streams are open in the guest");
    else if (request.kind == KIND_CONNECT)
        started = start_socket(stream, (uint16_t)request.number[CONNECT_PORT], &why);
    else
        started = launch(&request, session->in_guest, &stream->child, &why);
    /* That a STAT finds nothing is an answer, not a failure. */
    bool told = request.text[OPEN_OP_ID] != NULL && request.kind != KIND_STAT;
    const char *op_id = told ? request.text[OPEN_OP_ID] : "";
    if (started) {
        stream->id = frame->stream;
        snprintf(stream->op_id, sizeof stream->op_id, "%s", op_id);
        stream->in_credit = stream->out_credit = WINDOW_BYTES;
        stream->in_last = '\n'; /* a terminal begins at the start of a line */
    } else {
        if (stream != NULL)
            memset(stream, 0, sizeof *stream);
        log_failure(session, op_id, why.message);
        outbox_exit(session, frame->stream, EXIT_FAILED, (uint32_t)why.error, why.message);
    }
    request_free(&request);
}

/* Make room for `size` bytes at the end of the stdin buffer, whose size never passes a window. */
static bool make_room(struct stream *stream, size_t size) {
    size_t held = stream->in_end - stream->in_start;
    if (stream->in_end + size <= stream->in_room)
        return true;
    if (held > 0 && stream->in_start > 0)
        memmove(stream->in, stream->in + stream->in_start, held);
    stream->in_start = 0;
    stream->in_end = held;
    if (held + size <= stream->in_room)
        return true;
    size_t room = stream->in_room ? stream->in_room : 4096;
    while (room < held + size)
        room *= 2;
    uint8_t *bigger = realloc(stream->in, room);
    if (bigger == NULL)
        return false;
    stream->in = bigger;
    stream->in_room = room;
    return true;
}

/* No memory for the input: better without one stream than without the agent. */
static void give_up(struct session *session, struct stream *stream) {
    const char *message = "the guest is out of memory";
    log_failure(session, stream->op_id, message);
    outbox_exit(session, stream->id, EXIT_FAILED, ENOMEM, message); /* answers always fit */
    stream_reset(stream);
}

bool stream_data(struct session *session, struct stream *stream, const uint8_t *data,
                 uint32_t size) {
    if (size > stream->in_credit || stream->in_eof)
        return false;
    stream->in_credit -= size;
    if (stream->child.in < 0) { /* nobody reads it: a closed stdin, a detached program */
        stream->in_passed += size;
        return true;
    }
    if (!make_room(stream, size)) {
        give_up(session, stream);
        return true;
    }
    memcpy(stream->in + stream->in_end, data, size);
    stream->in_end += size;
    return true;
}

/* To the process group; a child that has not made its session yet is alone and gets it itself.
 * The group may outlive its leader. While it has a member its number is not given to a new process:
 * so one of that number after the leader's end means that the group was gone before. */
static void signal_group(const struct stream *stream, int number) {
    pid_t pid = stream->child.pid;
    if (pid <= 0)
        return;
    if (!stream->reaped) {
        if (kill(-pid, number) < 0)
            kill(pid, number);
    } else if (kill(pid, 0) < 0 && errno == ESRCH) {
        kill(-pid, number);
    }
}

void stream_signal(struct stream *stream, uint32_t number) {
    if (number > 0 && number <= 64)
        signal_group(stream, (int)number);
}

void stream_resize(struct stream *stream, uint16_t rows, uint16_t columns) {
    struct winsize size = {.ws_row = rows, .ws_col = columns};
    if (stream->child.pty && stream->child.out >= 0)
        ioctl(stream->child.out, TIOCSWINSZ, &size);
}

void stream_reset(struct stream *stream) {
    if (!stream->child.detached) {
        signal_group(stream, SIGHUP);
        signal_group(stream, SIGCONT); /* a stopped one could not act on it */
    }
    stream_free(stream);
}

void stream_reaped(struct stream *stream, int status) {
    stream->reaped = true;
    stream->quiet_until = 0;
    stream->status = status;
    stream->drain_deadline = now_ms() + DRAIN_MS;
}

static void close_stdin(struct stream *stream) {
    stream->in_passed += (uint32_t)(stream->in_end - stream->in_start);
    stream->in_start = stream->in_end = 0;
    if (stream->socket && stream->child.in >= 0)
        shutdown(stream->child.in, SHUT_WR);
    close_fd(&stream->child.in);
}

static void give_credit(struct session *session, struct stream *stream) {
    if (stream->in_passed < CREDIT_BATCH || stream->in_eof)
        return;
    uint8_t *payload = outbox_room(session, 4);
    if (payload == NULL)
        return;
    put_be32(payload, stream->in_passed);
    outbox_add(session, FRAME_WINDOW, stream->id, 4);
    stream->in_credit += stream->in_passed;
    stream->in_passed = 0;
}

/* A terminal has no end of file of its own: its line discipline makes one of the character VEOF
 * at the start of a line. After a part of a line the first only hands that part over. False when
 * the terminal is full. */
static bool type_eof(struct stream *stream) {
    struct termios mode;
    uint8_t character = 'D' - '@';
    int count = 1;
    if (tcgetattr(stream->child.in, &mode) == 0 && (mode.c_lflag & ICANON)) {
        bool at_start = stream->in_last == '\n' ||
                        (stream->in_last == '\r' && (mode.c_iflag & ICRNL));
        character = mode.c_cc[VEOF];
        count = at_start ? 1 : 2;
    }
    for (; stream->eofs_typed < count; stream->eofs_typed++)
        if (write(stream->child.in, &character, 1) < 0)
            return errno != EAGAIN;
    return true;
}

void stream_write(struct session *session, struct stream *stream) {
    if (stream->connecting)
        return;
    while (stream->child.in >= 0 && stream->in_start < stream->in_end) {
        ssize_t put = write(stream->child.in, stream->in + stream->in_start,
                            stream->in_end - stream->in_start);
        if (put < 0 && (errno == EAGAIN || errno == EINTR))
            break;
        if (put < 0) { /* the child closed its stdin; what more comes is thrown away */
            close_stdin(stream);
            break;
        }
        stream->in_start += (size_t)put;
        stream->in_passed += (uint32_t)put;
        if (put > 0)
            stream->in_last = stream->in[stream->in_start - 1];
    }
    if (stream->in_eof && stream->child.in >= 0 && stream->in_start == stream->in_end) {
        if (stream->child.pty && !type_eof(stream))
            return;
        close_stdin(stream);
    }
    give_credit(session, stream);
}

static void report_connected(struct session *session, struct stream *stream, int error) {
    if (error == 0) {
        stream->child.out = fcntl(stream->child.in, F_DUPFD_CLOEXEC, 0);
        stream->connecting = false;
        if (stream->child.out >= 0)
            return;
        error = errno;
    }
    char message[96];
    snprintf(message, sizeof message, "port %u: %s", stream->port, strerror(error));
    if (outbox_exit(session, stream->id, EXIT_FAILED, (uint32_t)error, message))
        stream_free(stream);
}

void stream_connected(struct session *session, struct stream *stream) {
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(stream->child.in, SOL_SOCKET, SO_ERROR, &error, &size);
    int fd;
    if (error != 0 && !stream->second_try && loopback_connect(stream->port, true, &fd)) {
        close_fd(&stream->child.in);
        stream->child.in = fd;
        stream->second_try = true;
        return;
    }
    report_connected(session, stream, error);
}

/* A PTY at its end is kept while its program lives: one that closes its standard streams just
 * before it exits would be killed by the hang-up, and another may open /dev/tty again. */
static void end_of_output(struct stream *stream, int *fd) {
    if (stream->child.pty && !stream->reaped)
        stream->quiet_until = now_ms() + PTY_QUIET_MS;
    else
        close_fd(fd);
}

void stream_read(struct session *session, struct stream *stream, bool is_err) {
    int *fd = is_err ? &stream->child.err : &stream->child.out;
    size_t *left = is_err ? &stream->drain_err : &stream->drain_out;
    size_t want = stream->out_credit < FRAME_DATA_BYTES ? stream->out_credit : FRAME_DATA_BYTES;
    if (stream->drain_limited && *left < want)
        want = *left;
    if (*fd < 0 || outbox_queued(session) >= OUTBOX_DATA_LIMIT)
        return;
    if (want == 0) {
        if (stream->drain_limited && *left == 0)
            close_fd(fd);
        return;
    }
    uint8_t *payload = outbox_room(session, want);
    if (payload == NULL)
        return;
    ssize_t got = read(*fd, payload, want);
    if (got < 0 && errno == EINTR)
        return;
    if (got < 0 && errno == EAGAIN) {
        if (stream->drain_limited)
            close_fd(fd);
        return;
    }
    if (got <= 0) { /* the end; EIO is how a PTY says it */
        end_of_output(stream, fd);
        return;
    }
    outbox_add(session, is_err ? FRAME_STDERR : FRAME_DATA, stream->id, (size_t)got);
    stream->out_credit -= (uint32_t)got;
    if (stream->drain_limited)
        *left -= (size_t)got;
}

static size_t readable_bytes(const struct stream *stream, int fd) {
    int count = 0;
    if (fd < 0 || stream->child.pty) /* a PTY does not tell */
        return fd < 0 ? 0 : PTY_DRAIN_BYTES;
    return ioctl(fd, FIONREAD, &count) == 0 && count > 0 ? (size_t)count : 0;
}

/* A PTY does not hang up while somebody the child left behind holds it, and says nothing then. */
static bool has_gone_quiet(const struct stream *stream) {
    struct pollfd state = {stream->child.out, POLLIN, 0};
    return stream->child.pty && stream->child.out >= 0 && poll(&state, 1, 0) >= 0 &&
           (state.revents & POLLIN) == 0;
}

/* Send the EXIT that the report pipe or else the status calls for; there must be room. */
static void send_exit(struct session *session, struct stream *stream) {
    struct report report = {.exit_kind = EXIT_EXITED};
    ssize_t got = stream->child.report < 0
                      ? 0
                      : read(stream->child.report, &report, sizeof report);
    if (got == (ssize_t)sizeof report) {
        report.message[sizeof report.message - 1] = 0;
    } else if (stream->reaped && WIFSIGNALED(stream->status)) {
        report.exit_kind = EXIT_KILLED;
        report.value = (uint32_t)WTERMSIG(stream->status);
    } else if (stream->reaped) {
        report.value = (uint32_t)WEXITSTATUS(stream->status);
    }
    if (report.exit_kind == EXIT_FAILED)
        log_failure(session, stream->op_id, report.message);
    outbox_exit(session, stream->id, report.exit_kind, report.value, report.message);
    stream_free(stream);
}

void stream_started(struct session *session, struct stream *stream) {
    if (outbox_room(session, EXIT_ROOM) != NULL)
        send_exit(session, stream);
}

/* A socket has no process: its stream is over when both directions are. */
static void settle_socket(struct session *session, struct stream *stream) {
    if (stream->child.out >= 0 || stream->connecting)
        return;
    if (!stream->out_eof_sent) {
        if (outbox_room(session, 0) == NULL)
            return;
        outbox_add(session, FRAME_EOF, stream->id, 0);
        stream->out_eof_sent = true;
    }
    if (stream->child.in < 0 && outbox_exit(session, stream->id, EXIT_EXITED, 0, ""))
        stream_free(stream);
}

void stream_settle(struct session *session, struct stream *stream) {
    struct launched *child = &stream->child;
    if (stream->socket) {
        settle_socket(session, stream);
        return;
    }
    if (!stream->reaped || child->detached)
        return;
    if (!stream->drain_limited && now_ms() >= stream->drain_deadline) {
        stream->drain_limited = true;
        stream->drain_out = readable_bytes(stream, child->out);
        stream->drain_err = readable_bytes(stream, child->err);
    }
    if (stream->drain_limited) {
        if (stream->drain_out == 0 || has_gone_quiet(stream))
            close_fd(&child->out);
        if (stream->drain_err == 0)
            close_fd(&child->err);
    }
    if (child->out < 0 && child->err < 0 && outbox_room(session, EXIT_ROOM) != NULL)
        send_exit(session, stream);
}
