/* A deterministic fuzzer for the guest agent's two readers of foreign bytes, to be built with
 * AddressSanitizer and UndefinedBehaviorSanitizer together with the agent's own sources:
 *
 *     agent_fuzz frames SEED ROUNDS FILE...   the session: frames, requests, credit, streams
 *     agent_fuzz tar SEED ROUNDS FILE...      UNPACK, in a directory below the current one
 *
 * Every round takes one file, changes it by SEED, and feeds it. Exit status 0: nothing found. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "files.h"
#include "session.h"
#include "tar.h"

enum { INPUT_LIMIT = 1 << 20, SANITIZER_STATUS = 99, CASE_SECONDS = 20 };

static uint64_t random_state;
static struct session session;

static uint32_t pick(uint32_t limit) {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return (uint32_t)(random_state >> 33) % limit;
}

static _Noreturn void found(const char *what) {
    fprintf(stderr, "agent_fuzz: %s\n", what);
    abort();
}

/* In place of exec.c: pipes whose other ends are gone or full, and no process. */
bool launch(const struct request *request, bool in_guest, struct launched *launched,
            struct failure *why) {
    int in[2], out[2], report[2];
    (void)in_guest;
    if (pick(4) == 0) {
        failure_set(why, EAGAIN, "no processes today");
        return false;
    }
    if (pipe2(in, O_NONBLOCK) < 0 || pipe2(out, O_NONBLOCK) < 0 || pipe2(report, O_NONBLOCK) < 0)
        found("pipe");
    char noise[4096];
    memset(noise, 'n', sizeof noise);
    (void)!write(out[1], noise, 1 + pick(sizeof noise));
    *launched = (struct launched){.pid = 0, .in = in[1], .out = out[0], .err = -1};
    launched->report = report[0];
    launched->detached = request->kind == KIND_EXEC && pick(4) == 0;
    close(in[0]);
    close(out[1]);
    close(report[1]);
    return true;
}

bool loopback_connect(uint16_t port, bool ipv6, int *fd) {
    int ends[2];
    errno = ECONNREFUSED;
    if (ipv6 || port % 2 || pipe2(ends, O_NONBLOCK) < 0)
        return false;
    close(ends[0]);
    *fd = ends[1];
    return true;
}

static void check_stream(const struct stream *stream) {
    size_t held = stream->in_end - stream->in_start;
    if (stream->in_start > stream->in_end || stream->in_end > stream->in_room ||
        held + stream->in_passed + stream->in_credit != WINDOW_BYTES)
        found("the account of a stream does not add up");
    if (stream->out_credit > WINDOW_BYTES || stream->in_room > WINDOW_BYTES)
        found("a stream has more than a window");
}

/* What the poll loop would do, in a random order and not always. */
static void turn_streams(void) {
    for (size_t i = 0; i < STREAM_LIMIT; i++) {
        struct stream *stream = &session.streams[i];
        if (stream->id == 0)
            continue;
        check_stream(stream);
        if (stream->connecting && pick(2))
            stream_connected(&session, stream);
        if (stream->id != 0 && !stream->connecting && pick(2))
            stream_read(&session, stream, false);
        if (stream->id != 0 && stream->child.detached && pick(4) == 0)
            stream_started(&session, stream);
        if (stream->id != 0 && !stream->reaped && !stream->socket && pick(8) == 0)
            stream_reaped(stream, 0);
        if (stream->id != 0)
            stream_write(&session, stream);
        if (stream->id != 0)
            stream_settle(&session, stream);
    }
    if (outbox_queued(&session) > OUTBOX_BYTES)
        found("the outbox is past its end");
}

static void feed(const uint8_t *data, size_t size) {
    while (size > 0) {
        size_t part = 1 + pick(size > 5000 ? 5000 : (uint32_t)size);
        size_t used = session_input(&session, data, part);
        if (used > part)
            found("more input used than there was");
        data += used;
        size -= used;
        turn_streams();
        if (used < part || pick(3) == 0)
            session.out_start = session.out_end = 0;
        session.shutdown = -1;
    }
}

/* Whatever came before, padding and a HELLO make a new session. */
static void check_recovery(void) {
    static const uint8_t padding[FRAME_LIMIT + FRAME_HEADER];
    uint8_t hello[FRAME_HEADER + HELLO_MAGIC_BYTES + NONCE_BYTES] = {FRAME_HELLO};
    put_be32(hello + 5, HELLO_MAGIC_BYTES + NONCE_BYTES);
    memcpy(hello + FRAME_HEADER, HELLO_MAGIC, HELLO_MAGIC_BYTES);
    for (size_t i = 0; i < NONCE_BYTES; i++)
        hello[FRAME_HEADER + HELLO_MAGIC_BYTES + i] = (uint8_t)pick(256);
    feed(padding, sizeof padding);
    session.out_start = session.out_end = 0;
    if (session_input(&session, hello, sizeof hello) != sizeof hello ||
        outbox_queued(&session) < sizeof hello ||
        memcmp(session.out + session.out_start + FRAME_HEADER, hello + FRAME_HEADER,
               HELLO_MAGIC_BYTES + NONCE_BYTES) != 0)
        found("a HELLO was not answered");
    for (size_t i = 0; i < STREAM_LIMIT; i++)
        if (session.streams[i].id != 0)
            found("a stream outlived its session");
    session.out_start = session.out_end = 0;
}

static size_t mutate(uint8_t *data, size_t size) {
    for (uint32_t changes = pick(8); changes > 0 && size > 0; changes--) {
        uint32_t at = pick((uint32_t)size);
        switch (pick(5)) {
        case 0:
            data[at] ^= (uint8_t)(1 << pick(8));
            break;
        case 1:
            data[at] = (uint8_t)pick(256);
            break;
        case 2:
            data[at] = pick(2) ? 0xFF : 0;
            break;
        case 3: /* cut */
            if (pick(4) == 0)
                size = at;
            break;
        default: { /* repeat a part */
            uint32_t length = pick((uint32_t)size - at) + 1;
            if (size + length <= INPUT_LIMIT) {
                memmove(data + at + length, data + at, size - at);
                size += length;
            }
        }
        }
    }
    return size;
}

static void fuzz_frames(uint8_t *data, size_t size) {
    feed(data, mutate(data, size));
    check_recovery();
}

/* Most changes of a header would stop at its checksum. */
static void mend_checksums(uint8_t *data, size_t size) {
    for (size_t at = 0; at + TAR_BLOCK <= size; at += TAR_BLOCK) {
        struct tar_header *header = (struct tar_header *)(data + at);
        if (memcmp(header->magic, "ustar", 5) != 0 && at != 0)
            continue;
        char text[8];
        snprintf(text, sizeof text, "%06o", tar_checksum(header) & 0777777);
        memcpy(header->checksum, text, 7);
        header->checksum[7] = ' ';
    }
}

static _Noreturn void unpack_child(const uint8_t *data, size_t size, bool rename_first) {
    char directory[4096];
    struct rlimit file_size = {64 << 20, 64 << 20};
    int input = memfd_create("archive", 0), report = open("/dev/null", O_WRONLY);
    if (input < 0 || !write_all(input, data, size) || getcwd(directory, 4000) == NULL)
        _exit(2);
    lseek(input, 0, SEEK_SET);
    strcat(directory, "/case/inside");
    dup2(input, STDIN_FILENO);
    dup2(report, 3);
    setrlimit(RLIMIT_FSIZE, &file_size);
    signal(SIGXFSZ, SIG_IGN);
    alarm(CASE_SECONDS);
    tar_unpack(STDIN_FILENO, directory, rename_first ? "renamed" : NULL);
    exit(0);
}

static int remove_entry(const char *path, const struct stat *info, int kind, struct FTW *where) {
    (void)info, (void)kind, (void)where;
    return remove(path);
}

static void fuzz_tar(uint8_t *data, size_t size) {
    size = mutate(data, size);
    if (pick(8) != 0)
        mend_checksums(data, size);
    if (mkdir("case", 0700) < 0 || mkdir("case/inside", 0700) < 0)
        found("cannot make the directory of a case");
    bool rename_first = pick(2);
    int status;
    pid_t pid = fork();
    if (pid == 0)
        unpack_child(data, size, rename_first);
    waitpid(pid, &status, 0);
    if (!WIFEXITED(status) || (WEXITSTATUS(status) != 0 && WEXITSTATUS(status) != 1))
        found("unpacking crashed, hung or tripped a sanitizer");
    if (chmod("case/inside", 0700) < 0 || nftw("case/inside", remove_entry, 16, FTW_DEPTH | FTW_PHYS))
        found("cannot clean up after a case");
    if (rmdir("case") < 0)
        found("something was written outside the directory");
}

int main(int count, char **arguments) {
    static uint8_t data[INPUT_LIMIT];
    if (count < 5)
        return 2;
    bool frames = strcmp(arguments[1], "frames") == 0;
    random_state = strtoull(arguments[2], NULL, 10) * 2 + 0x9E3779B97F4A7C15u;
    signal(SIGPIPE, SIG_IGN);
    session_init(&session, -1, false);
    for (long round = strtol(arguments[3], NULL, 10); round > 0; round--) {
        const char *path = arguments[4 + pick((uint32_t)count - 4)];
        int fd = open(path, O_RDONLY);
        ssize_t size = fd < 0 ? -1 : read_full(fd, data, INPUT_LIMIT);
        if (size < 0)
            found("cannot read the corpus");
        close(fd);
        if (frames)
            fuzz_frames(data, (size_t)size);
        else
            fuzz_tar(data, (size_t)size);
    }
    return 0;
}
