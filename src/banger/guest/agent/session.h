/* The session with the daemon: frames in and out, streams with credit, one poll loop. */
#ifndef BANGER_SESSION_H
#define BANGER_SESSION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "frame.h"
#include "launch.h"

enum {
    OUTBOX_BYTES = 1 << 20,
    /* Child output is read only while less than this is queued, so one frame always fits. */
    OUTBOX_DATA_LIMIT = 512 << 10,
    /* Frames are taken in only while less than this is queued: answers always fit. */
    OUTBOX_INPUT_LIMIT = 896 << 10,
    INPUT_BYTES = 64 << 10,
};

struct stream {
    uint32_t id; /* 0: free */
    char op_id[OP_ID_ROOM]; /* empty when failures are not to be logged */
    struct launched child;
    bool reaped; /* the child has ended with `status` */
    int status;
    bool drain_limited;     /* the grace after its end is over: send `drain_left` more bytes */
    int64_t drain_deadline; /* when that begins, in ms of CLOCK_MONOTONIC */
    size_t drain_out, drain_err;
    int64_t quiet_until;    /* a PTY that nobody has open: look again then, in ms */
    uint8_t *in; /* bytes for the child's stdin, at most one window */
    size_t in_start, in_end, in_room;
    bool in_eof;          /* the client has sent its EOF */
    uint8_t in_last;      /* the last byte written to the child */
    uint8_t eofs_typed;   /* to a PTY, after all of its input */
    uint32_t in_credit;   /* what the client may still send */
    uint32_t in_passed;   /* passed on, and not yet given back as credit */
    uint32_t out_credit;  /* what we may still send */
    bool out_eof_sent;    /* sockets only */
    bool socket;
    bool connecting;
    uint16_t port;
    bool second_try; /* 127.0.0.1 refused; this is ::1 */
};

struct session {
    int port;     /* -1: nobody is connected */
    int listener; /* -1, or where the host connects: its last connection is the port */
    bool in_guest; /* SETUP and SHUTDOWN are for a guest only */
    bool greeted;
    int shutdown; /* -1, or the flags of a SHUTDOWN that was asked for */
    unsigned turn;
    struct parser parser;
    size_t input_start, input_end;
    uint8_t input[INPUT_BYTES];
    size_t out_start, out_end;
    uint8_t out[OUTBOX_BYTES];
    struct stream streams[STREAM_LIMIT];
};

void session_init(struct session *session, int port, bool in_guest);

/* Take in bytes from the daemon; returns how many were used (less than all when the outbox is
 * full). Never blocks. */
size_t session_input(struct session *session, const uint8_t *data, size_t size);

/* End every stream as if it had been RESET, and drop what was not sent. */
void session_drop(struct session *session);

/* Serve until the port's peer is gone for good (false) or a SHUTDOWN was answered (true). */
bool session_run(struct session *session, int signal_fd);

size_t outbox_queued(const struct session *session);
/* Room for a frame with this payload, or NULL; fill the payload in, then outbox_add. */
uint8_t *outbox_room(struct session *session, size_t length);
void outbox_add(struct session *session, uint8_t type, uint32_t stream, size_t length);
bool outbox_exit(struct session *session, uint32_t stream, uint8_t kind, uint32_t value,
                 const char *message);

int64_t now_ms(void);

/* stream.c */
struct stream *stream_find(struct session *session, uint32_t id);
void stream_open(struct session *session, const struct frame *frame);
/* False when the daemon broke the protocol (sent more than its credit). */
bool stream_data(struct session *session, struct stream *stream, const uint8_t *data,
                 uint32_t size);
void stream_signal(struct stream *stream, uint32_t number);
void stream_resize(struct stream *stream, uint16_t rows, uint16_t columns);
void stream_reset(struct stream *stream);
/* Pass on what can be passed on; called after every poll. */
void stream_write(struct session *session, struct stream *stream);
void stream_read(struct session *session, struct stream *stream, bool is_err);
void stream_connected(struct session *session, struct stream *stream);
/* A detached program runs, or could not be started. */
void stream_started(struct session *session, struct stream *stream);
/* Send the EXIT when it is due. */
void stream_settle(struct session *session, struct stream *stream);
void stream_reaped(struct stream *stream, int status);

/* connect.c: a nonblocking socket to a port of the loopback; false with errno. */
bool loopback_connect(uint16_t port, bool ipv6, int *fd);

#endif
