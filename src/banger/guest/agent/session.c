#define _GNU_SOURCE
#include "session.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

#include "files.h"

enum { POLL_LIMIT = 4 + 3 * STREAM_LIMIT, SHUTDOWN_FLUSH_MS = 1000 };

int64_t now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

void session_init(struct session *session, int port, bool in_guest) {
    memset(session, 0, sizeof *session);
    session->port = port;
    session->listener = -1;
    session->in_guest = in_guest;
    session->shutdown = -1;
    parser_init(&session->parser);
}

size_t outbox_queued(const struct session *session) {
    return session->out_end - session->out_start;
}

uint8_t *outbox_room(struct session *session, size_t length) {
    if (session->out_end + FRAME_HEADER + length > OUTBOX_BYTES) {
        size_t queued = outbox_queued(session);
        if (queued + FRAME_HEADER + length > OUTBOX_BYTES)
            return NULL;
        memmove(session->out, session->out + session->out_start, queued);
        session->out_start = 0;
        session->out_end = queued;
    }
    return session->out + session->out_end + FRAME_HEADER;
}

void outbox_add(struct session *session, uint8_t type, uint32_t stream, size_t length) {
    uint8_t *header = session->out + session->out_end;
    header[0] = type;
    put_be32(header + 1, stream);
    put_be32(header + 5, (uint32_t)length);
    session->out_end += FRAME_HEADER + length;
}

bool outbox_exit(struct session *session, uint32_t stream, uint8_t kind, uint32_t value,
                 const char *message) {
    size_t length = 5 + strlen(message);
    uint8_t *payload = outbox_room(session, length);
    if (payload == NULL)
        return false;
    payload[0] = kind;
    put_be32(payload + 1, value);
    memcpy(payload + 5, message, length - 5);
    outbox_add(session, FRAME_EXIT, stream, length);
    return true;
}

void session_drop(struct session *session) {
    for (size_t i = 0; i < STREAM_LIMIT; i++)
        if (session->streams[i].id != 0)
            stream_reset(&session->streams[i]);
    session->out_start = session->out_end = 0;
    session->greeted = false;
}

static uint8_t *put_field(uint8_t *at, uint8_t tag, const char *text) {
    uint32_t length = (uint32_t)strlen(text);
    *at = tag;
    put_be32(at + 1, length);
    memcpy(at + 5, text, length);
    return at + 5 + length;
}

static void greet(struct session *session, const uint8_t *nonce) {
    session_drop(session);
    struct utsname kernel;
    uname(&kernel);
    uint8_t *payload = outbox_room(session, 512); /* the outbox is empty: there is room */
    memcpy(payload, HELLO_MAGIC, HELLO_MAGIC_BYTES);
    memcpy(payload + HELLO_MAGIC_BYTES, nonce, NONCE_BYTES);
    uint8_t *end = payload + HELLO_MAGIC_BYTES + NONCE_BYTES;
    end = put_field(end, HELLO_VERSION, AGENT_VERSION);
    end = put_field(end, HELLO_KERNEL, kernel.release);
    outbox_add(session, FRAME_HELLO, 0, (size_t)(end - payload));
    session->greeted = true;
}

/* False when the frame breaks the protocol. */
static bool handle(struct session *session, const struct frame *frame) {
    if (frame->type == FRAME_HELLO) {
        greet(session, frame->payload + HELLO_MAGIC_BYTES);
        return true;
    }
    struct stream *stream = stream_find(session, frame->stream);
    if (frame->type == FRAME_OPEN) {
        if (stream != NULL)
            return false;
        stream_open(session, frame);
        return true;
    }
    if (stream == NULL) /* its EXIT and this frame met on the way */
        return true;
    uint32_t value = frame->length == 4 ? get_be32(frame->payload) : 0;
    switch (frame->type) {
    case FRAME_DATA:
        return stream_data(session, stream, frame->payload, frame->length);
    case FRAME_EOF:
        stream->in_eof = true;
        return true;
    case FRAME_WINDOW:
        if (value > WINDOW_BYTES - stream->out_credit)
            return false;
        stream->out_credit += value;
        return true;
    case FRAME_SIGNAL:
        stream_signal(stream, value);
        return true;
    case FRAME_RESIZE:
        stream_resize(stream, (uint16_t)(value >> 16), (uint16_t)value);
        return true;
    default:
        stream_reset(stream);
        return true;
    }
}

size_t session_input(struct session *session, const uint8_t *data, size_t size) {
    size_t used = 0;
    while (used < size && outbox_queued(session) < OUTBOX_INPUT_LIMIT && session->shutdown < 0) {
        struct frame frame;
        enum parse_result result;
        used += parser_feed(&session->parser, data + used, size - used, &result, &frame);
        if (result == PARSE_FRAME && !handle(session, &frame)) {
            parser_hunt(&session->parser);
            session_drop(session);
        } else if (result == PARSE_BAD) {
            session_drop(session);
        }
    }
    return used;
}

static void reap(struct session *session) {
    for (;;) {
        int status;
        pid_t pid = waitpid(-1, &status, WNOHANG);
        if (pid <= 0)
            return;
        for (size_t i = 0; i < STREAM_LIMIT; i++) {
            struct stream *stream = &session->streams[i];
            /* One that has ended already may still be sending, and its number be another's. */
            if (stream->id != 0 && stream->child.pid == pid && !stream->reaped)
                stream_reaped(stream, status);
        }
    }
}

/* Take in what the outbox has room for to answer; true when all of it was. */
static bool take_input(struct session *session) {
    session->input_start += session_input(session, session->input + session->input_start,
                                          session->input_end - session->input_start);
    return session->input_start == session->input_end;
}

/* False when the peer is gone. Bounded, so that the streams get their turn; a virtio-serial port
 * gives at most a page for each read. */
static bool read_port(struct session *session) {
    for (int turns = 0; turns < 64 && take_input(session); turns++) {
        ssize_t got = read(session->port, session->input, INPUT_BYTES);
        if (got <= 0)
            return got < 0 && (errno == EAGAIN || errno == EINTR);
        session->input_start = 0;
        session->input_end = (size_t)got;
    }
    take_input(session);
    return true;
}

static bool write_port(struct session *session) {
    while (outbox_queued(session) > 0) {
        ssize_t put = write(session->port, session->out + session->out_start,
                            outbox_queued(session));
        if (put < 0)
            return errno == EAGAIN || errno == EINTR;
        session->out_start += (size_t)put;
    }
    session->out_start = session->out_end = 0;
    return true;
}

struct watch {
    struct pollfd fds[POLL_LIMIT];
    struct {
        struct stream *stream;
        char what; /* i, o, e: stdin, stdout, stderr; r: report */
    } who[POLL_LIMIT];
    nfds_t count;
};

static void watch_add(struct watch *watch, int fd, short events, struct stream *stream, char what) {
    watch->fds[watch->count] = (struct pollfd){fd, events, 0};
    watch->who[watch->count].stream = stream;
    watch->who[watch->count].what = what;
    watch->count++;
}

static void watch_stream(struct session *session, struct stream *stream, struct watch *watch) {
    const struct launched *child = &stream->child;
    bool can_send = stream->out_credit > 0 && outbox_queued(session) < OUTBOX_DATA_LIMIT;
    bool pending = stream->in_start < stream->in_end || stream->in_eof;
    if (stream->connecting || (child->in >= 0 && pending))
        watch_add(watch, child->in, POLLOUT, stream, 'i');
    if (stream->connecting)
        return;
    if (child->out >= 0 && can_send &&
        (stream->quiet_until == 0 || stream->quiet_until <= now_ms()))
        watch_add(watch, child->out, POLLIN, stream, 'o');
    if (child->err >= 0 && can_send)
        watch_add(watch, child->err, POLLIN, stream, 'e');
    if (child->detached && child->report >= 0)
        watch_add(watch, child->report, POLLIN, stream, 'r');
}

/* When a stream wants to be looked at although nothing happens, or -1. */
static int64_t deadline_of(const struct stream *stream) {
    if (stream->id == 0 || stream->child.detached)
        return -1;
    if (stream->reaped)
        return stream->drain_limited ? -1 : stream->drain_deadline;
    return stream->quiet_until > 0 && stream->quiet_until > now_ms() ? stream->quiet_until : -1;
}

/* The next time-out in ms for poll, or -1. */
static int next_deadline(const struct session *session) {
    int64_t first = -1;
    for (size_t i = 0; i < STREAM_LIMIT; i++) {
        int64_t deadline = deadline_of(&session->streams[i]);
        if (deadline >= 0 && (first < 0 || deadline < first))
            first = deadline;
    }
    if (first < 0)
        return -1;
    int64_t left = first - now_ms();
    return left < 0 ? 0 : (int)left;
}

static void serve_streams(struct session *session, const struct watch *watch, nfds_t first) {
    nfds_t count = watch->count - first;
    for (nfds_t i = 0; i < count; i++) {
        /* A new first one each time, so that nobody is always last when the outbox fills up. */
        nfds_t at = first + (i + session->turn) % count;
        struct stream *stream = watch->who[at].stream;
        if (watch->fds[at].revents == 0 || stream->id == 0)
            continue;
        char what = watch->who[at].what;
        if (what == 'o' || what == 'e')
            stream_read(session, stream, what == 'e');
        else if (what == 'r')
            stream_started(session, stream);
        else if (stream->connecting)
            stream_connected(session, stream);
    }
    session->turn++;
    for (size_t i = 0; i < STREAM_LIMIT; i++) {
        struct stream *stream = &session->streams[i];
        if (stream->id != 0)
            stream_write(session, stream);
        if (stream->id != 0)
            stream_settle(session, stream);
    }
}

/* A virtio-serial port whose host side is closed polls as POLLHUP for ever. An edge-triggered
 * epoll descriptor wakes when that changes, since the driver wakes its queue then. */
static int watch_for_host(int port) {
    int watcher = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET};
    epoll_ctl(watcher, EPOLL_CTL_ADD, port, &event);
    return watcher;
}

static bool host_is_there(int port, int watcher) {
    struct epoll_event event;
    epoll_wait(watcher, &event, 1, 0);
    struct pollfd state = {port, POLLIN | POLLOUT, 0};
    poll(&state, 1, 0);
    return (state.revents & POLLHUP) == 0;
}

/* Answered, or nobody listens any more: true when it is time to go down. */
static bool flushed(struct session *session, int64_t *since) {
    if (session->shutdown < 0)
        return false;
    if (*since == 0)
        *since = now_ms();
    return outbox_queued(session) == 0 || now_ms() - *since > SHUTDOWN_FLUSH_MS;
}

/* What was begun with a host that is gone is of no use to the next one. */
static void lose_host(struct session *session) {
    session_drop(session);
    session->input_start = session->input_end = 0;
    parser_hunt(&session->parser);
}

static void watch_port(struct session *session, struct watch *watch, int watcher, bool host) {
    bool can_take = outbox_queued(session) < OUTBOX_INPUT_LIMIT && session->shutdown < 0;
    short events = (short)((can_take ? POLLIN : 0) | (outbox_queued(session) > 0 ? POLLOUT : 0));
    /* poll takes no notice of -1, which stands for what there is not. */
    watch_add(watch, host ? session->port : watcher, host ? events : POLLIN, NULL, 'p');
    watch_add(watch, session->listener, POLLIN, NULL, 'l');
}

/* Nobody but the host: a process of the guest's could connect, too, by the loopback's CID. */
static int accept_host(int listener) {
    struct sockaddr_vm peer;
    socklen_t size = sizeof peer;
    int fd = accept4(listener, (struct sockaddr *)&peer, &size, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd >= 0 && (peer.svm_family != AF_VSOCK || peer.svm_cid != VMADDR_CID_HOST)) {
        close(fd);
        return -1;
    }
    return fd;
}

/* The host has connected: the new connection takes the place of an earlier one, whose host may be
 * gone without a word. */
static bool take_connection(struct session *session, bool host) {
    int fd = accept_host(session->listener);
    if (fd < 0)
        return host;
    if (session->port >= 0)
        close(session->port);
    session->port = fd;
    lose_host(session);
    return true;
}

bool session_run(struct session *session, int signal_fd) {
    static struct watch watch;
    bool by_port = session->in_guest && session->listener < 0;
    int watcher = by_port ? watch_for_host(session->port) : -1;
    bool host = session->port >= 0;
    int64_t shutdown_since = 0;
    for (;;) {
        watch.count = 0;
        watch_add(&watch, signal_fd, POLLIN, NULL, 's');
        watch_port(session, &watch, watcher, host);
        nfds_t first = watch.count;
        for (size_t i = 0; i < STREAM_LIMIT; i++)
            if (session->streams[i].id != 0)
                watch_stream(session, &session->streams[i], &watch);
        poll(watch.fds, watch.count, session->shutdown >= 0 ? 100 : next_deadline(session));
        if (watch.fds[0].revents) {
            struct signalfd_siginfo info;
            (void)!read(signal_fd, &info, sizeof info);
            reap(session);
        }
        serve_streams(session, &watch, first);
        if (watch.fds[2].revents) {
            host = take_connection(session, host);
            continue;
        }
        if (by_port && !host && watch.fds[1].revents)
            host = host_is_there(session->port, watcher);
        if (host && (watch.fds[1].revents || session->input_start < session->input_end))
            host = (watch.fds[1].revents & POLLHUP) == 0 ? read_port(session) : false;
        if (host && outbox_queued(session) > 0)
            host = write_port(session);
        if (flushed(session, &shutdown_since))
            return true;
        if (!host) {
            lose_host(session);
            if (!session->in_guest)
                return false;
            if (by_port) {
                host = host_is_there(session->port, watcher);
            } else if (session->port >= 0) {
                close(session->port);
                session->port = -1;
            }
        }
    }
}
