/* The numbers of docs/agent-protocol.md, and big-endian integers. */
#ifndef BANGER_PROTO_H
#define BANGER_PROTO_H

#include <stdint.h>

#define AGENT_VERSION "0.1.0"
#define HELLO_MAGIC "BANGERv1"

enum {
    FRAME_HEADER = 9,
    FRAME_LIMIT = 262144,
    WINDOW_BYTES = 262144,
    STREAM_LIMIT = 256,
    HELLO_MAGIC_BYTES = 8,
    NONCE_BYTES = 16,
};

enum frame_type {
    FRAME_HELLO = 1,
    FRAME_OPEN = 2,
    FRAME_DATA = 3,
    FRAME_STDERR = 4,
    FRAME_EOF = 5,
    FRAME_WINDOW = 6,
    FRAME_SIGNAL = 7,
    FRAME_RESIZE = 8,
    FRAME_EXIT = 9,
    FRAME_RESET = 10,
};

enum open_kind {
    KIND_EXEC = 1,
    KIND_READ = 2,
    KIND_WRITE = 3,
    KIND_PACK = 4,
    KIND_UNPACK = 5,
    KIND_STAT = 6,
    KIND_CONNECT = 7,
    KIND_STATS = 8,
    KIND_SOCKETS = 9,
    KIND_SETUP = 10,
    KIND_SHUTDOWN = 11,
    KIND_PING = 12,
    KIND_LISTENERS = 13,
};

enum exit_kind { EXIT_EXITED = 0, EXIT_KILLED = 1, EXIT_FAILED = 2 };

enum {
    EXEC_PTY = 1,
    EXEC_LOGIN = 2,
    EXEC_DETACHED = 4,
    EXEC_MAKE_DIRECTORY = 8,
    EXEC_ANY_LOGIN = 16, /* /bin/sh for a user who has a shell that lets nobody in */
};
enum { PACK_XATTRS = 1, PACK_ONE_FILE_SYSTEM = 2 };
enum { SHUTDOWN_REBOOT = 1 };

/* Tags of the fields of each kind. */
enum { EXEC_ARGUMENT = 1, EXEC_ENVIRONMENT, EXEC_DIRECTORY, EXEC_USER, EXEC_FLAGS, EXEC_SIZE };
enum { FILE_PATH = 1, FILE_MODE, FILE_UID, FILE_GID };
enum { TREE_PATH = 1, TREE_NAME, TREE_FLAGS };
enum { CONNECT_PORT = 1 };
enum {
    SETUP_HOSTNAME = 1,
    SETUP_MACHINE_ID,
    SETUP_ADDRESS,
    SETUP_GATEWAY,
    SETUP_DNS,
    SETUP_MAC,
    SETUP_ENTROPY,
    SETUP_TIME,
    SETUP_WORK_SIZE = 10, /* after the tag that every kind has */
    SETUP_COPIED,
};
enum { SHUTDOWN_FLAGS = 1 };
enum { HELLO_VERSION = 1, HELLO_KERNEL };
/* Of every kind: the operation that the request is part of, for what the console says of it. */
enum { OPEN_OP_ID = 9, OP_ID_ROOM = 24 };
enum { TAG_LIMIT = 12 }; /* tags are below this */

static inline uint32_t get_be32(const uint8_t *at) {
    return (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
}

static inline void put_be32(uint8_t *at, uint32_t value) {
    at[0] = (uint8_t)(value >> 24);
    at[1] = (uint8_t)(value >> 16);
    at[2] = (uint8_t)(value >> 8);
    at[3] = (uint8_t)value;
}

#endif
