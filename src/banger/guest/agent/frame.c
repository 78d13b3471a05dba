#define _GNU_SOURCE
#include "frame.h"

#include <string.h>

enum { HELLO_BYTES = HELLO_MAGIC_BYTES + NONCE_BYTES };

static const uint8_t hello_start[] = {FRAME_HELLO, 0, 0, 0, 0,   0,   0,   0,  HELLO_BYTES,
                                      'B',         'A', 'N', 'G', 'E', 'R', 'v', '1'};

void parser_init(struct parser *parser) {
    parser->hunting = true;
    parser->have = 0;
}

void parser_hunt(struct parser *parser) {
    parser_init(parser);
}

/* Whether the header announces a frame that the daemon may send. */
static bool header_ok(uint8_t type, uint32_t stream, uint32_t length) {
    if (type == FRAME_HELLO)
        return stream == 0 && length == HELLO_BYTES;
    if (stream == 0 || length > FRAME_LIMIT)
        return false;
    switch (type) {
    case FRAME_OPEN:
    case FRAME_DATA:
        return length >= 1;
    case FRAME_EOF:
    case FRAME_RESET:
        return length == 0;
    case FRAME_WINDOW:
    case FRAME_SIGNAL:
    case FRAME_RESIZE:
        return length == 4;
    default:
        return false;
    }
}

/* Look for hello_start. Its first byte occurs in it once, so a mismatch restarts simply. */
static size_t hunt(struct parser *parser, const uint8_t *data, size_t size) {
    size_t used = 0;
    while (used < size && parser->have < sizeof hello_start) {
        if (parser->have == 0) {
            const uint8_t *start = memchr(data + used, FRAME_HELLO, size - used);
            if (start == NULL)
                return size;
            used = (size_t)(start - data);
        }
        uint8_t byte = data[used];
        if (byte == hello_start[parser->have]) {
            parser->bytes[parser->have++] = byte;
            used++;
        } else if (parser->have > 0) {
            parser->have = 0; /* look at the same byte again as a first one */
        }
    }
    if (parser->have == sizeof hello_start)
        parser->hunting = false;
    return used;
}

static size_t take(struct parser *parser, size_t want, const uint8_t *data, size_t size) {
    size_t more = want - parser->have;
    if (more > size)
        more = size;
    memcpy(parser->bytes + parser->have, data, more);
    parser->have += more;
    return more;
}

size_t parser_feed(struct parser *parser, const uint8_t *data, size_t size,
                   enum parse_result *result, struct frame *frame) {
    size_t used = 0;
    *result = PARSE_MORE;
    if (parser->hunting)
        used = hunt(parser, data, size);
    else if (parser->have == 0)
        while (used < size && data[used] == 0)
            used++;
    if (used == size || parser->hunting)
        return used;
    if (parser->have < FRAME_HEADER) {
        used += take(parser, FRAME_HEADER, data + used, size - used);
        if (parser->have < FRAME_HEADER)
            return used;
    }
    uint8_t type = parser->bytes[0];
    uint32_t stream = get_be32(parser->bytes + 1);
    uint32_t length = get_be32(parser->bytes + 5);
    if (!header_ok(type, stream, length)) {
        parser_hunt(parser);
        *result = PARSE_BAD;
        return used;
    }
    used += take(parser, FRAME_HEADER + (size_t)length, data + used, size - used);
    if (parser->have < FRAME_HEADER + (size_t)length)
        return used;
    parser->have = 0;
    if (type == FRAME_HELLO && memcmp(parser->bytes + FRAME_HEADER, HELLO_MAGIC, HELLO_MAGIC_BYTES)) {
        parser_hunt(parser);
        *result = PARSE_BAD;
        return used;
    }
    *frame = (struct frame){type, stream, length, parser->bytes + FRAME_HEADER};
    *result = PARSE_FRAME;
    return used;
}
