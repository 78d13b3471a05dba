#define _GNU_SOURCE
#include "request.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum value_type { TEXT, ARGUMENTS, ENVIRONMENT, U16, U32, U64, BYTES };

struct rule {
    uint8_t kind;
    uint8_t tag;
    uint8_t type;
    bool required;
};

static const struct rule rules[] = {
    {KIND_EXEC, EXEC_ARGUMENT, ARGUMENTS, false},
    {KIND_EXEC, EXEC_ENVIRONMENT, ENVIRONMENT, false},
    {KIND_EXEC, EXEC_DIRECTORY, TEXT, false},
    {KIND_EXEC, EXEC_USER, TEXT, false},
    {KIND_EXEC, EXEC_FLAGS, U32, false},
    {KIND_EXEC, EXEC_SIZE, U32, false},
    {KIND_READ, FILE_PATH, TEXT, true},
    {KIND_WRITE, FILE_PATH, TEXT, true},
    {KIND_WRITE, FILE_MODE, U32, false},
    {KIND_WRITE, FILE_UID, U32, false},
    {KIND_WRITE, FILE_GID, U32, false},
    {KIND_PACK, TREE_PATH, TEXT, true},
    {KIND_PACK, TREE_NAME, TEXT, false},
    {KIND_PACK, TREE_FLAGS, U32, false},
    {KIND_UNPACK, TREE_PATH, TEXT, true},
    {KIND_UNPACK, TREE_NAME, TEXT, false},
    {KIND_STAT, FILE_PATH, TEXT, true},
    {KIND_CONNECT, CONNECT_PORT, U16, true},
    {KIND_SETUP, SETUP_HOSTNAME, TEXT, false},
    {KIND_SETUP, SETUP_MACHINE_ID, TEXT, false},
    {KIND_SETUP, SETUP_ADDRESS, TEXT, false},
    {KIND_SETUP, SETUP_GATEWAY, TEXT, false},
    {KIND_SETUP, SETUP_DNS, TEXT, false},
    {KIND_SETUP, SETUP_MAC, TEXT, false},
    {KIND_SETUP, SETUP_ENTROPY, BYTES, false},
    {KIND_SETUP, SETUP_TIME, U64, false},
    {KIND_SETUP, SETUP_WORK_SIZE, U64, false},
    {KIND_SETUP, SETUP_COPIED, U32, false},
    {KIND_SHUTDOWN, SHUTDOWN_FLAGS, U32, false},
};

enum { RULE_COUNT = sizeof rules / sizeof rules[0], ENTROPY_LIMIT = 512 };

void failure_set(struct failure *why, int error, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(why->message, sizeof why->message, format, arguments);
    va_end(arguments);
    why->error = error;
}

static bool is_repeated(uint8_t type) {
    return type == ARGUMENTS || type == ENVIRONMENT;
}

static const struct rule *rule_for(uint8_t kind, uint8_t tag) {
    static const struct rule op_id = {0, OPEN_OP_ID, TEXT, false};
    if (tag == OPEN_OP_ID)
        return &op_id;
    for (size_t i = 0; i < RULE_COUNT; i++)
        if (rules[i].kind == kind && rules[i].tag == tag)
            return &rules[i];
    return NULL;
}

static void append(struct text_list *list, char *text) {
    list->items[list->count++] = text;
    list->items[list->count] = NULL;
}

/* Store one field; `room` is where its text goes, with a NUL after it. */
static bool store(struct request *request, const struct rule *rule, const uint8_t *value,
                  uint32_t length, char *room) {
    switch (rule->type) {
    case U16:
    case U32:
    case U64:
        if (length != (rule->type == U16 ? 2u : rule->type == U32 ? 4u : 8u))
            return false;
        request->number[rule->tag] = 0;
        for (uint32_t i = 0; i < length; i++)
            request->number[rule->tag] = request->number[rule->tag] << 8 | value[i];
        return true;
    case BYTES:
        memcpy(room, value, length);
        request->bytes = (uint8_t *)room;
        request->byte_count = length;
        return length <= ENTROPY_LIMIT;
    default:
        /* A NUL would cut the text short; it is also what a frame cut off by a dying daemon and
         * completed by padding looks like, and that must not run. */
        if (memchr(value, 0, length) != NULL)
            return false;
        memcpy(room, value, length);
        room[length] = 0;
    }
    if (rule->type == ARGUMENTS)
        append(&request->arguments, room);
    else if (rule->type == ENVIRONMENT)
        append(&request->environment, room);
    else if (length == 0)
        return false;
    else
        request->text[rule->tag] = room;
    return rule->type != ENVIRONMENT || (strchr(room, '=') != NULL && room[0] != '=');
}

static bool parse_fields(struct request *request, const uint8_t *at, size_t left, char *room,
                         struct failure *why) {
    while (left > 0) {
        if (left < 5 || get_be32(at + 1) > left - 5) {
            failure_set(why, EINVAL, "a field goes past the end of the request");
            return false;
        }
        uint8_t tag = at[0];
        uint32_t length = get_be32(at + 1);
        const struct rule *rule = rule_for(request->kind, tag);
        if (rule == NULL || (request->has[tag] && !is_repeated(rule->type)) ||
            !store(request, rule, at + 5, length, room)) {
            failure_set(why, EINVAL, "field %u of request kind %u is %s", tag, request->kind,
                        rule == NULL ? "unknown" : "malformed or there twice");
            return false;
        }
        request->has[tag] = true;
        room += length + 1;
        at += 5 + length;
        left -= 5 + (size_t)length;
    }
    for (size_t i = 0; i < RULE_COUNT; i++)
        if (rules[i].kind == request->kind && rules[i].required && !request->has[rules[i].tag]) {
            failure_set(why, EINVAL, "field %u of request kind %u is missing", rules[i].tag,
                        request->kind);
            return false;
        }
    return true;
}

bool request_parse(struct request *request, const uint8_t *payload, uint32_t length,
                   struct failure *why) {
    memset(request, 0, sizeof *request);
    request->kind = length > 0 ? payload[0] : 0;
    if (request->kind < KIND_EXEC || request->kind > KIND_LISTENERS) {
        failure_set(why, EINVAL, "unknown kind of request: %u", request->kind);
        return false;
    }
    /* A field takes 5 bytes and its value on the wire, and its value and a NUL here. */
    size_t pointers = length / 5 + 2;
    request->memory = malloc(length + 1);
    request->arguments.items = calloc(pointers, sizeof(char *));
    request->environment.items = calloc(pointers, sizeof(char *));
    if (!request->memory || !request->arguments.items || !request->environment.items) {
        failure_set(why, ENOMEM, "the guest is out of memory");
        request_free(request);
        return false;
    }
    if (!parse_fields(request, payload + 1, length - 1, (char *)request->memory, why)) {
        request_free(request);
        return false;
    }
    return true;
}

void request_free(struct request *request) {
    free(request->memory);
    free(request->arguments.items);
    free(request->environment.items);
    memset(request, 0, sizeof *request);
}
