/* The payload of an OPEN: its kind and its fields, checked against what the kind allows. */
#ifndef BANGER_REQUEST_H
#define BANGER_REQUEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "proto.h"

/* Why something failed: an errno or 0, and a message for a person. */
struct failure {
    int error;
    char message[480];
};

struct text_list {
    char **items; /* ends with NULL */
    size_t count;
};

/* Values by tag. A text is NUL-terminated and holds no NUL itself. */
struct request {
    uint8_t kind;
    char *text[TAG_LIMIT];
    uint64_t number[TAG_LIMIT];
    bool has[TAG_LIMIT];
    struct text_list arguments;
    struct text_list environment;
    const uint8_t *bytes; /* the one binary field: entropy */
    uint32_t byte_count;
    uint8_t *memory; /* what the rest points into */
};

/* False, with the reason, when the payload is not a valid OPEN; then there is nothing to free. */
bool request_parse(struct request *request, const uint8_t *payload, uint32_t length,
                   struct failure *why);
void request_free(struct request *request);

void failure_set(struct failure *why, int error, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

#endif
