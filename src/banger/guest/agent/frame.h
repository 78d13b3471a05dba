/* The incremental frame parser of the agent's side. Its input is hostile: nothing is trusted. */
#ifndef BANGER_FRAME_H
#define BANGER_FRAME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto.h"

struct frame {
    uint8_t type;
    uint32_t stream;
    uint32_t length;
    const uint8_t *payload; /* valid until the next call of parser_feed */
};

enum parse_result {
    PARSE_MORE,  /* all input used, no frame yet */
    PARSE_FRAME, /* one frame is ready */
    PARSE_BAD,   /* a bad frame: from here on everything is skipped until a HELLO */
};

struct parser {
    bool hunting; /* skipping everything until the start of a HELLO */
    size_t have;
    uint8_t bytes[FRAME_HEADER + FRAME_LIMIT];
};

/* A new parser hunts: nothing is accepted before a HELLO. */
void parser_init(struct parser *parser);

/* Skip everything until the next HELLO. */
void parser_hunt(struct parser *parser);

/* Use input up to the end of one frame; returns how many bytes were used. */
size_t parser_feed(struct parser *parser, const uint8_t *data, size_t size,
                   enum parse_result *result, struct frame *frame);

#endif
