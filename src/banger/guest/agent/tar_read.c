#define _GNU_SOURCE
#include "tar_read.h"

#include <ctype.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "files.h"

#define SIZE_LIMIT ((uint64_t)1 << 62)

uint32_t tar_checksum(const struct tar_header *header) {
    const unsigned char *bytes = (const unsigned char *)header;
    size_t from = offsetof(struct tar_header, checksum);
    uint32_t sum = 0;
    for (size_t i = 0; i < TAR_BLOCK; i++)
        sum += i >= from && i < from + sizeof header->checksum ? ' ' : bytes[i];
    return sum;
}

void tar_reader_init(struct tar_reader *reader, int fd) {
    memset(reader, 0, sizeof *reader);
    reader->fd = fd;
}

/* At least one byte in the buffer; false at the end of the stream. */
static bool fill(struct tar_reader *reader) {
    while (reader->start == reader->end) {
        ssize_t got = read(reader->fd, reader->buffer, sizeof reader->buffer);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            fail_errno("standard input");
        if (got == 0)
            return false;
        reader->start = 0;
        reader->end = (size_t)got;
    }
    return true;
}

static bool read_or_end(struct tar_reader *reader, void *data, size_t size) {
    char *at = data;
    while (size > 0) {
        if (!fill(reader))
            return false;
        size_t part = reader->end - reader->start;
        if (part > size)
            part = size;
        if (at != NULL) {
            memcpy(at, reader->buffer + reader->start, part);
            at += part;
        }
        reader->start += part;
        size -= part;
    }
    return true;
}

void tar_read(struct tar_reader *reader, void *data, size_t size) {
    if (!read_or_end(reader, data, size))
        fail(EINVAL, "the archive ends in the middle of a member");
}

void tar_skip_padding(struct tar_reader *reader, uint64_t size) {
    size_t rest = (size_t)(size % TAR_BLOCK);
    if (rest != 0)
        tar_read(reader, NULL, TAR_BLOCK - rest);
}

void tar_skip(struct tar_reader *reader, uint64_t size) {
    for (uint64_t left = size; left > 0;) {
        size_t part = left < (1 << 20) ? (size_t)left : 1 << 20;
        tar_read(reader, NULL, part);
        left -= part;
    }
    tar_skip_padding(reader, size);
}

static void set_text(char **slot, char *value) {
    free(*slot);
    *slot = value;
}

/* Octal with spaces and NULs around it, or base 256. */
static int64_t get_number(const char *field, size_t width) {
    const unsigned char *bytes = (const unsigned char *)field;
    if (bytes[0] & 0x80) {
        uint64_t value = bytes[0] == 0xFF ? UINT64_MAX : bytes[0] & 0x7F;
        for (size_t i = 1; i < width; i++) {
            if (bytes[0] != 0xFF && value >= SIZE_LIMIT >> 8)
                fail(EINVAL, "the archive has a number that is too large");
            value = value << 8 | bytes[i];
        }
        return (int64_t)value;
    }
    size_t i = 0;
    uint64_t value = 0;
    while (i < width && bytes[i] == ' ')
        i++;
    for (; i < width && bytes[i] >= '0' && bytes[i] <= '7'; i++)
        value = value << 3 | (uint64_t)(bytes[i] - '0');
    if (i < width && bytes[i] != ' ' && bytes[i] != 0)
        fail(EINVAL, "the archive has a malformed number");
    return (int64_t)value;
}

static uint64_t get_size(const char *field, size_t width) {
    int64_t value = get_number(field, width);
    if (value < 0 || (uint64_t)value >= SIZE_LIMIT)
        fail(EINVAL, "the archive has a size that is negative or too large");
    return (uint64_t)value;
}

static char *read_text(struct tar_reader *reader, uint64_t size, size_t limit) {
    if (size >= limit)
        fail(ENAMETOOLONG, "the archive has an extended header that is too long");
    char *text = must_alloc((size_t)size + 1);
    tar_read(reader, text, (size_t)size);
    tar_skip_padding(reader, size);
    return text;
}

static uint64_t pax_number(const char *value) {
    char *end;
    errno = 0;
    unsigned long long number = strtoull(value, &end, 10);
    if (!isdigit((unsigned char)value[0]) || errno != 0 || number >= SIZE_LIMIT ||
        (*end != 0 && *end != '.'))
        fail(EINVAL, "the archive has a malformed pax number");
    return number;
}

static struct timespec pax_time(const char *value) {
    bool negative = value[0] == '-';
    struct timespec time = {.tv_sec = (time_t)pax_number(value + negative)};
    const char *dot = strchr(value, '.');
    long scale = 100000000;
    for (const char *at = dot ? dot + 1 : ""; isdigit((unsigned char)*at) && scale; scale /= 10)
        time.tv_nsec += (*at++ - '0') * scale;
    if (!negative)
        return time;
    time.tv_sec = -time.tv_sec;
    if (time.tv_nsec > 0) {
        time.tv_sec--;
        time.tv_nsec = 1000000000 - time.tv_nsec;
    }
    return time;
}

static void pax_record(struct tar_reader *reader, const char *key, const char *value,
                       size_t value_length) {
    if (strncmp(key, "GNU.sparse.", 11) == 0)
        fail(ENOTSUP, "the archive has a sparse file in pax format; make it with --format=gnu");
    bool is_path = strcmp(key, "path") == 0, is_link = strcmp(key, "linkpath") == 0;
    if (is_path || is_link) {
        if (value_length == 0 || value_length >= TAR_PATH_LIMIT || strlen(value) != value_length)
            fail(EINVAL, "the archive has a malformed pax path");
        set_text(is_path ? &reader->pax_path : &reader->pax_link, must_copy(value));
    } else if (strcmp(key, "size") == 0) {
        reader->size = pax_number(value);
        reader->has_size = true;
    } else if (strcmp(key, "uid") == 0) {
        reader->uid = pax_number(value);
        reader->has_uid = true;
    } else if (strcmp(key, "gid") == 0) {
        reader->gid = pax_number(value);
        reader->has_gid = true;
    } else if (strcmp(key, "mtime") == 0) {
        reader->mtime = pax_time(value);
        reader->has_mtime = true;
    }
}

/* Records of "LENGTH KEY=VALUE\n", the length counting itself. */
static void parse_pax(struct tar_reader *reader, char *text, size_t size) {
    char *at = text, *end = text + size;
    while (at < end && *at != 0) {
        char *space;
        unsigned long length = isdigit((unsigned char)*at) ? strtoul(at, &space, 10) : 0;
        if (length == 0 || length > (size_t)(end - at) || *space != ' ' || space >= at + length ||
            at[length - 1] != '\n')
            fail(EINVAL, "the archive has a malformed pax header");
        char *equals = memchr(space, '=', (size_t)(at + length - space));
        if (equals == NULL)
            fail(EINVAL, "the archive has a malformed pax header");
        *equals = 0;
        at[length - 1] = 0;
        pax_record(reader, space + 1, equals + 1, (size_t)(at + length - 1 - (equals + 1)));
        at += length;
    }
}

static void add_piece(struct tar_reader *reader, const struct tar_piece *from) {
    if (from->offset[0] == 0)
        return; /* an unused slot */
    if (reader->piece_count == reader->piece_room) {
        reader->piece_room = reader->piece_room ? reader->piece_room * 2 : 32;
        if (reader->piece_room > TAR_SPARSE_LIMIT)
            fail(EINVAL, "the archive has a sparse file of too many pieces");
        reader->pieces = realloc(reader->pieces, reader->piece_room * sizeof *reader->pieces);
        if (reader->pieces == NULL)
            out_of_memory();
    }
    reader->pieces[reader->piece_count++] = (struct piece){
        get_size(from->offset, sizeof from->offset), get_size(from->size, sizeof from->size)};
}

static void read_sparse(struct tar_reader *reader, struct tar_member *member) {
    const struct tar_header *header = &reader->header;
    reader->piece_count = 0;
    for (size_t i = 0; i < TAR_HEADER_PIECES; i++)
        add_piece(reader, &header->tail.gnu.pieces[i]);
    for (bool more = header->tail.gnu.is_extended; more;) {
        struct tar_extension extension;
        tar_read(reader, &extension, sizeof extension);
        for (size_t i = 0; i < TAR_EXTENSION_PIECES; i++)
            add_piece(reader, &extension.pieces[i]);
        more = extension.is_extended;
    }
    member->real_size = get_size(header->tail.gnu.real_size, 12);
    member->pieces = reader->pieces;
    member->piece_count = reader->piece_count;
    uint64_t end = 0, total = 0;
    for (size_t i = 0; i < reader->piece_count; i++) {
        const struct piece *piece = &reader->pieces[i];
        if (piece->offset < end || piece->size > member->real_size ||
            piece->offset > member->real_size - piece->size)
            fail(EINVAL, "the archive has a malformed sparse file");
        end = piece->offset + piece->size;
        total += piece->size;
    }
    if (total != member->size)
        fail(EINVAL, "the archive has a malformed sparse file");
}

static char *header_text(const char *field, size_t width) {
    char *text = must_alloc(width + 1);
    memcpy(text, field, width);
    return text;
}

static void choose_path(struct tar_reader *reader) {
    const struct tar_header *header = &reader->header;
    if (reader->pax_path || reader->long_path) {
        set_text(&reader->path, must_copy(reader->pax_path ? reader->pax_path : reader->long_path));
    } else if (memcmp(header->magic, "ustar", 6) == 0 && header->tail.prefix[0] != 0) {
        char *whole = must_alloc(sizeof header->tail.prefix + sizeof header->name + 2);
        snprintf(whole, sizeof header->tail.prefix + sizeof header->name + 2, "%.155s/%.100s",
                 header->tail.prefix, header->name);
        set_text(&reader->path, whole);
    } else {
        set_text(&reader->path, header_text(header->name, sizeof header->name));
    }
    const char *link = reader->pax_link ? reader->pax_link : reader->long_link;
    set_text(&reader->link,
             link ? must_copy(link) : header_text(header->link, sizeof header->link));
}

static unsigned get_id(const char *field, size_t width) {
    int64_t value = get_number(field, width);
    if (value < 0 || value >= UINT32_MAX)
        fail(EINVAL, "the archive has an owner or device number out of range");
    return (unsigned)value;
}

static void fill_member(struct tar_reader *reader, struct tar_member *member) {
    const struct tar_header *header = &reader->header;
    choose_path(reader);
    *member = (struct tar_member){.path = reader->path, .link = reader->link};
    size_t length = strlen(reader->path);
    char type = header->type == 0 || header->type == '7' ? '0' : header->type;
    if (type == '0' && length > 0 && reader->path[length - 1] == '/')
        type = '5'; /* how a directory was written before there was a type for it */
    member->type = type;
    member->size = reader->has_size ? reader->size : get_size(header->size, sizeof header->size);
    if (type == '2' || type == '3' || type == '4' || type == '6')
        member->size = 0; /* some writers put the length of a link's target there */
    if (type == '1' && !reader->has_size)
        member->size = 0; /* as GNU tar reads it: only pax keeps data with a hard link */
    member->mode = (mode_t)get_number(header->mode, sizeof header->mode) & 07777;
    if ((reader->has_uid && reader->uid >= UINT32_MAX) ||
        (reader->has_gid && reader->gid >= UINT32_MAX))
        fail(EINVAL, "the archive has an owner out of range");
    member->uid = reader->has_uid ? (uid_t)reader->uid : get_id(header->uid, sizeof header->uid);
    member->gid = reader->has_gid ? (gid_t)reader->gid : get_id(header->gid, sizeof header->gid);
    member->mtime = reader->mtime;
    if (!reader->has_mtime)
        member->mtime = (struct timespec){.tv_sec = get_number(header->mtime, 12)};
    if (type == '3' || type == '4') {
        member->major = get_id(header->major, sizeof header->major);
        member->minor = get_id(header->minor, sizeof header->minor);
    }
    if (type == 'S')
        read_sparse(reader, member);
}

/* Headers about the next member; true when this was one. */
static bool read_extension(struct tar_reader *reader) {
    const struct tar_header *header = &reader->header;
    uint64_t size;
    switch (header->type) {
    case 'L':
    case 'K':
        size = get_size(header->size, sizeof header->size);
        set_text(header->type == 'L' ? &reader->long_path : &reader->long_link,
                 read_text(reader, size, TAR_PATH_LIMIT));
        return true;
    case 'x': {
        size = get_size(header->size, sizeof header->size);
        char *text = read_text(reader, size, TAR_PAX_LIMIT);
        parse_pax(reader, text, (size_t)size);
        free(text);
        return true;
    }
    case 'g': /* for all members: comments, in practice */
    case 'V': /* a volume's label */
        tar_skip(reader, get_size(header->size, sizeof header->size));
        return true;
    default:
        return false;
    }
}

static void forget_extensions(struct tar_reader *reader) {
    set_text(&reader->long_path, NULL);
    set_text(&reader->long_link, NULL);
    set_text(&reader->pax_path, NULL);
    set_text(&reader->pax_link, NULL);
    reader->has_size = reader->has_uid = reader->has_gid = reader->has_mtime = false;
}

static bool is_zero(const struct tar_header *header) {
    const char *bytes = (const char *)header;
    return bytes[0] == 0 && memcmp(bytes, bytes + 1, TAR_BLOCK - 1) == 0;
}

bool tar_next(struct tar_reader *reader, struct tar_member *member) {
    forget_extensions(reader);
    for (;;) {
        if (!read_or_end(reader, &reader->header, TAR_BLOCK))
            fail(EINVAL, "the archive has no end: it was cut off");
        const struct tar_header *header = &reader->header;
        if (is_zero(header))
            return false;
        if (get_number(header->checksum, sizeof header->checksum) != tar_checksum(header))
            fail(EINVAL, "this is not a tar archive, or it is damaged");
        if (read_extension(reader))
            continue;
        if (header->type != 0 && strchr("01234567S", header->type) == NULL)
            fail(ENOTSUP, "the archive has a member of an unknown type");
        fill_member(reader, member);
        return true;
    }
}

void tar_reader_end(struct tar_reader *reader) {
    forget_extensions(reader);
    set_text(&reader->path, NULL);
    set_text(&reader->link, NULL);
    free(reader->pieces);
    reader->start = reader->end;
    while (fill(reader))
        reader->start = reader->end;
}
