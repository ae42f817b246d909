/* inferlet.c -- see inferlet.h, which is the documentation, and docs/abi.md, the contract.
 *
 * Sections: state, errors, encoding, outbox, futures, decoding, inbox, start-up, commands, text,
 * stream, context. The last two use only what inferlet.h declares to everyone.
 *
 * System calls made here: read, write, poll, lseek, mmap, munmap, rt_sigaction, and malloc's. */
#define _POSIX_C_SOURCE 200809L

#include "inferlet.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* ----------------------------------------------------------------------------------- state --- */

enum { SOCKET_FD = 3, RING_FD = 4, STARTUP_FD = 6, VOCAB_FD = 7 };
enum { SHORT_HEADER = 2, LONG_HEADER = 9, ARRAY_HEADER = 3, HEADERS = LONG_HEADER + ARRAY_HEADER };

/* What an answer may be, one bit a pie_kind: anything else is a wrong answer. */
enum { WANT_NIL = 1 << PIE_NIL, WANT_NUMBER = 1 << PIE_NUMBER };
enum { WANT_BYTES = 1 << PIE_BYTES, WANT_TOKENS = 1 << PIE_TOKENS };

enum { FREE, WAITING, FORGOTTEN, ANSWERED };

/* A request that is not yet answered and waited for. Request r lives at index r modulo the size. */
struct future {
    uint32_t request;
    uint8_t state, wanted;
    int code;         /* of an error answer; else 0 */
    char *message;    /* of an error answer, malloc'ed: message, NUL, hint, NUL */
    pie_value value;
};

/* Memory of the start-up block's strings and arrays, chained so that all of it stays reachable. */
struct kept {
    struct kept *next;
    max_align_t data[];
};

static struct {
    bool started;
    int lost; /* the code that ended the connection, or 0 */
    char lost_why[256];

    pie_error_info error; /* points into the two below */
    char message[1024];
    char hint[512];

    /* Outbox: whole commands in [HEADERS, HEADERS + size), the one being encoded in the `tail`
     * octets after them. Room for one more frame, so that overflow shows only at its end. */
    uint8_t out[HEADERS + 2 * PIE_MAX_FRAME];
    size_t size, tail;
    uint32_t commands;
    bool refused, overflow; /* of the command being encoded */
    struct future *asked;   /* its future, or NULL */

    uint8_t in[LONG_HEADER + PIE_MAX_FRAME];
    size_t received;

    struct future futures[PIE_MAX_FUTURES];
    uint32_t last_request, last_queue, last_kvpage, last_emb, last_token;

    struct kept *kept;
    const char *id;
    const char **args;
    uint32_t arg_count;
    pie_model *models;
    uint32_t model_count;
    pie_limits limits;

    const uint8_t *ring;
    size_t ring_size;
    const uint8_t *vocab;
    uint32_t vocab_count;
    size_t vocab_text, vocab_size; /* where the text starts and ends */
} pie; /* zero at first, so that it takes memory only as it is used */

/* ---------------------------------------------------------------------------------- errors --- */

__attribute__((format(printf, 3, 4)))
static int fail(int code, const char *hint, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    vsnprintf(pie.message, sizeof pie.message, format, list);
    va_end(list);
    snprintf(pie.hint, sizeof pie.hint, "%s", hint);
    pie.error = (pie_error_info){code, pie.message, pie.hint};
    return code;
}

static int no_memory(void)
{
    return fail(PIE_OUT_OF_MEMORY, "raise the memory quota", "malloc failed in this process");
}

/* Ends the connection for good: every answer that is waited for fails with `code` from here on. */
static int lose(int code, const char *why)
{
    if (!pie.lost) {
        pie.lost = code;
        snprintf(pie.lost_why, sizeof pie.lost_why, "%s", why);
    }
    return fail(pie.lost, "end this program; the host's log says what happened", "%s",
                pie.lost_why);
}

pie_error_info pie_error(void)
{
    return pie.error.message ? pie.error : (pie_error_info){PIE_OK, "", ""};
}

const char *pie_error_name(int code)
{
    static const char *const names[] = {
        "ok",           "bad_frame",  "bad_handle",  "bad_span",  "bad_position",
        "bad_argument", "bad_mask",   "over_quota",  "shared_page", "unwritten",
        "cancelled",    "out_of_memory", "backend",  "missing_trait", "closed",
    };
    return code >= 0 && (size_t)code < sizeof names / sizeof *names ? names[code] : "error";
}

void pie_perror(const char *who)
{
    char line[2048];
    pie_error_info e = pie_error();
    int n = snprintf(line, sizeof line, "%s: %s: %s%s%s%s\n", who, pie_error_name(e.code),
                     e.message, *e.hint ? " (try: " : "", e.hint, *e.hint ? ")" : "");
    size_t length = n < 0 ? 0 : (size_t)n < sizeof line ? (size_t)n : sizeof line - 1;
    while (length && write(2, line, length) < 0 && errno == EINTR) {
    }
}

/* -------------------------------------------------------------------------------- encoding --- */

/* Refuses the command being encoded; the first reason counts. The puts then only fill the tail,
 * and end() rolls it back, so that the calls below stay straight lines. */
static void refuse(int code, const char *hint, const char *message)
{
    if (!pie.refused)
        fail(code, hint, "%s", message);
    pie.refused = true;
}

static void put(const void *data, size_t length)
{
    if (length > PIE_MAX_FRAME - pie.tail)
        pie.overflow = true;
    else if (length) {
        memcpy(pie.out + HEADERS + pie.size + pie.tail, data, length);
        pie.tail += length;
    }
}

/* A type octet and `value` in `width` octets, most significant first. */
static void put_wide(uint8_t type, uint64_t value, unsigned width)
{
    uint8_t octets[9] = {type};
    for (unsigned i = 0; i < width; i++)
        octets[1 + i] = (uint8_t)(value >> 8 * (width - 1 - i));
    put(octets, 1 + width);
}

static void put_uint(uint64_t n)
{
    if (n < 0x80)
        put_wide((uint8_t)n, 0, 0);
    else if (n <= 0xff)
        put_wide(0xcc, n, 1);
    else if (n <= 0xffff)
        put_wide(0xcd, n, 2);
    else if (n <= 0xffffffff)
        put_wide(0xce, n, 4);
    else
        put_wide(0xcf, n, 8);
}

static void put_int(int64_t n)
{
    if (n >= 0)
        put_uint((uint64_t)n);
    else if (n >= -32)
        put_wide((uint8_t)n, 0, 0);
    else if (n >= INT8_MIN)
        put_wide(0xd0, (uint64_t)n, 1);
    else if (n >= INT16_MIN)
        put_wide(0xd1, (uint64_t)n, 2);
    else if (n >= INT32_MIN)
        put_wide(0xd2, (uint64_t)n, 4);
    else
        put_wide(0xd3, (uint64_t)n, 8);
}

static void put_nil(void)
{
    put_wide(0xc0, 0, 0);
}

static void put_bool(bool b)
{
    put_wide(b ? 0xc3 : 0xc2, 0, 0);
}

static void put_double(double d)
{
    uint64_t bits;
    memcpy(&bits, &d, sizeof bits);
    put_wide(0xcb, bits, 8);
}

static void put_array(size_t n)
{
    if (n < 16)
        put_wide((uint8_t)(0x90 | n), 0, 0);
    else if (n <= 0xffff)
        put_wide(0xdc, n, 2);
    else
        pie.overflow = true; /* so many items take more than a frame */
}

/* The length of a bin or str, at most 65,536 here: more is more than a frame. */
static void put_length(uint8_t type8, uint8_t type16, size_t n)
{
    if (n <= 0xff)
        put_wide(type8, n, 1);
    else if (n <= 0xffff)
        put_wide(type16, n, 2);
    else
        pie.overflow = true;
}

static void put_bin(const void *data, size_t n)
{
    put_length(0xc4, 0xc5, n);
    put(data, n);
}

static void put_str(const char *text, size_t n)
{
    if (n < 32)
        put_wide((uint8_t)(0xa0 | n), 0, 0);
    else
        put_length(0xd9, 0xda, n);
    put(text, n);
}

static void put_handle(uint32_t id)
{
    if (!id)
        refuse(PIE_BAD_HANDLE, "check the call that made it", "a handle with id 0 was used");
    put_uint(id);
}

static void put_index(uint32_t id, uint32_t index)
{
    put_array(2);
    put_handle(id);
    put_uint(index);
}

static void put_span(uint32_t id, uint32_t first, uint32_t length)
{
    put_array(3);
    put_handle(id);
    put_uint(first);
    put_uint(length);
}

static void put_position(uint32_t position)
{
    if (position > INT32_MAX)
        refuse(PIE_BAD_POSITION, "stay below the model's max_context",
               "a position is at most 2147483647");
    put_uint(position);
}

static void put_positions(const uint32_t *positions, uint32_t count)
{
    put_array(count);
    for (uint32_t i = 0; i < count && !pie.overflow; i++)
        put_position(positions[i]);
}

/* ---------------------------------------------------------------------------------- outbox --- */

static int write_all(const uint8_t *data, size_t length)
{
    while (length) {
        ssize_t n = write(SOCKET_FD, data, length);
        if (n >= 0) {
            data += n;
            length -= (size_t)n;
        } else if (errno == EAGAIN) {
            struct pollfd fd = {.fd = SOCKET_FD, .events = POLLOUT};
            poll(&fd, 1, -1);
        } else if (errno != EINTR)
            return lose(PIE_CLOSED, "the connection to the controller ended");
    }
    return PIE_OK;
}

static size_t array_header(uint32_t items)
{
    return items < 16 ? 1 : ARRAY_HEADER;
}

int pie_flush(void)
{
    if (pie.lost)
        return lose(pie.lost, "");
    if (!pie.commands)
        return PIE_OK;
    /* The headers are written backwards from the first command, so that nothing is moved. */
    uint8_t *start = pie.out + HEADERS - array_header(pie.commands);
    if (pie.commands < 16)
        start[0] = (uint8_t)(0x90 | pie.commands);
    else {
        start[0] = 0xdc;
        start[1] = (uint8_t)(pie.commands >> 8);
        start[2] = (uint8_t)pie.commands;
    }
    size_t body = array_header(pie.commands) + pie.size;
    size_t total = body + (body < 256 ? SHORT_HEADER : LONG_HEADER);
    start -= total - body;
    start[0] = body < 256 ? 0 : 2;
    for (size_t i = 1; i < total - body; i++)
        start[i] = (uint8_t)(body >> 8 * (total - body - 1 - i));
    int code = write_all(start, total);
    memmove(pie.out + HEADERS, pie.out + HEADERS + pie.size, pie.tail);
    pie.size = pie.commands = 0;
    return code;
}

static void flush_at_exit(void)
{
    pie_flush();
}

/* --------------------------------------------------------------------------------- futures --- */

static struct future *find_future(uint32_t request)
{
    struct future *f = &pie.futures[request % PIE_MAX_FUTURES];
    return f->state != FREE && f->request == request ? f : NULL;
}

static void free_future(struct future *f)
{
    free(f->message);
    free(f->value.bytes);
    free(f->value.tokens);
    memset(f, 0, sizeof *f);
}

static struct future *new_future(uint8_t wanted)
{
    for (uint32_t tries = 0; tries < PIE_MAX_FUTURES; tries++) {
        uint32_t request = ++pie.last_request;
        struct future *f = &pie.futures[request % PIE_MAX_FUTURES];
        if (f->state == FREE) {
            f->request = request;
            f->state = WAITING;
            f->wanted = wanted;
            return f;
        }
    }
    refuse(PIE_OVER_QUOTA, "wait for some with pie_wait, or give them up with pie_forget",
           "all futures are in use");
    return NULL;
}

/* Starts a command of `fields` fields. What goes wrong is kept for end(). */
static void begin(uint8_t op, uint32_t fields, uint8_t wanted, const pie_future *answer)
{
    pie.tail = 0;
    pie.refused = pie.overflow = false;
    pie.asked = NULL;
    if (!pie.started)
        refuse(PIE_CLOSED, "call pie_init first, and check its result", "not connected");
    else if (pie.lost) {
        lose(pie.lost, "");
        pie.refused = true;
    } else if (answer)
        pie.asked = new_future(wanted);
    put_array(fields + 2);
    put_uint(op);
    if (pie.asked)
        put_uint(pie.asked->request);
    else
        put_nil();
}

/* Ends the command: into the outbox, or rolled back with an error. */
static int end(pie_future *answer)
{
    if (!pie.refused && 1 + pie.tail > PIE_MAX_FRAME)
        pie.overflow = true;
    if (pie.overflow)
        refuse(PIE_BAD_ARGUMENT, "split it into several calls",
               "the command does not fit into one frame of 65536 octets");
    if (!pie.refused &&
        (pie.commands == PIE_MAX_COMMANDS ||
         array_header(pie.commands + 1) + pie.size + pie.tail > PIE_MAX_FRAME) &&
        pie_flush())
        pie.refused = true;
    if (pie.refused) {
        pie.tail = 0;
        if (pie.asked)
            free_future(pie.asked);
        if (answer)
            answer->id = 0;
        return pie.error.code;
    }
    pie.size += pie.tail;
    pie.tail = 0;
    pie.commands++;
    if (answer)
        answer->id = (uint64_t)pie.asked->request + 1;
    return PIE_OK;
}

/* -------------------------------------------------------------------------------- decoding --- */

/* A bounded msgpack reader: every get checks type and room, and sets `bad` for good. */
struct reader {
    const uint8_t *at, *end;
    bool bad;
};

static uint8_t peek(const struct reader *r)
{
    return r->at < r->end ? *r->at : 0xc1; /* 0xc1 is no msgpack type */
}

static const uint8_t *get(struct reader *r, uint64_t length)
{
    static const uint8_t nothing[1];
    if (r->bad || length > (uint64_t)(r->end - r->at)) {
        r->bad = true;
        return nothing;
    }
    r->at += length;
    return r->at - length;
}

static uint64_t get_wide(struct reader *r, unsigned width)
{
    uint64_t value = 0;
    const uint8_t *octets = get(r, width);
    for (unsigned i = 0; i < width && !r->bad; i++)
        value = value << 8 | octets[i];
    return value;
}

static bool get_nil(struct reader *r)
{
    if (peek(r) != 0xc0)
        return false;
    r->at++;
    return true;
}

static uint64_t get_uint(struct reader *r, uint64_t most)
{
    uint8_t type = *get(r, 1);
    uint64_t value = type;
    if (type >= 0xcc && type <= 0xcf)
        value = get_wide(r, 1u << (type - 0xcc));
    else if (type >= 0x80)
        r->bad = true;
    if (value > most)
        r->bad = true;
    return r->bad ? 0 : value;
}

/* Items of an array (fix 0x90, 16 and 32 from 0xdc) or map (fix 0x80, 16 and 32 from 0xde). */
static uint32_t get_count(struct reader *r, uint8_t fix, uint8_t wide)
{
    uint8_t type = *get(r, 1);
    uint64_t count = type & 0x0f;
    if (type == wide)
        count = get_wide(r, 2);
    else if (type == wide + 1)
        count = get_wide(r, 4);
    else if ((type & 0xf0) != fix)
        r->bad = true;
    if (r->bad || count > (uint64_t)(r->end - r->at)) /* an item takes an octet at least */
        r->bad = true;
    return r->bad ? 0 : (uint32_t)count;
}

static uint32_t get_array(struct reader *r)
{
    return get_count(r, 0x90, 0xdc);
}

static const uint8_t *get_bin(struct reader *r, size_t *length)
{
    uint8_t type = *get(r, 1);
    if (type < 0xc4 || type > 0xc6)
        r->bad = true;
    *length = get_wide(r, 1u << (type >= 0xc4 && type <= 0xc6 ? type - 0xc4 : 0));
    const uint8_t *data = get(r, *length);
    if (r->bad)
        *length = 0;
    return data;
}

static const char *get_str(struct reader *r, size_t *length)
{
    uint8_t type = *get(r, 1);
    if ((type & 0xe0) == 0xa0)
        *length = type & 0x1f;
    else if (type >= 0xd9 && type <= 0xdb)
        *length = get_wide(r, 1u << (type - 0xd9));
    else
        r->bad = true;
    const char *data = (const char *)get(r, r->bad ? 0 : *length);
    if (r->bad)
        *length = 0;
    return data;
}

/* Passes over one value of any type. No recursion: `left` counts what is still to be read. */
static void skip(struct reader *r)
{
    for (uint64_t left = 1; left && !r->bad; left--) {
        size_t length;
        uint8_t type = peek(r);
        if ((type & 0xe0) == 0xa0 || (type >= 0xd9 && type <= 0xdb))
            get_str(r, &length);
        else if (type >= 0xc4 && type <= 0xc6)
            get_bin(r, &length);
        else if ((type & 0xf0) == 0x90 || type == 0xdc || type == 0xdd)
            left += get_array(r);
        else if ((type & 0xf0) == 0x80 || type == 0xde || type == 0xdf)
            left += 2 * (uint64_t)get_count(r, 0x80, 0xde);
        else if (type == 0xca || type == 0xcb) /* float 32, 64 */
            get(r, type == 0xca ? 5 : 9);
        else if (type >= 0xcc && type <= 0xd3) /* uint, int 8 to 64 */
            get(r, 1 + (1u << ((type - 0xcc) & 3)));
        else if (type == 0xc1 || (type >= 0xc7 && type <= 0xc9) || (type >= 0xd4 && type <= 0xd8))
            r->bad = true; /* reserved, or an extension type, which the ABI does not use */
        else
            get(r, 1); /* small number, nil, bool */
    }
}

/* ----------------------------------------------------------------------------------- inbox --- */

/* The ids of an array, malloc'ed; *no_room if that failed. */
static pie_ref *get_tokens(struct reader *r, size_t *length, bool *no_room)
{
    uint32_t count = get_array(r);
    pie_ref *tokens = malloc((count ? count : 1) * sizeof *tokens);
    *no_room = !tokens;
    for (uint32_t i = 0; i < count && !r->bad; i++) {
        uint64_t token = get_uint(r, UINT32_MAX);
        if (tokens)
            tokens[i] = (pie_ref)token;
    }
    *length = count;
    return tokens;
}

/* The value of an answer, into the future `f`. */
static void get_value(struct reader *r, struct future *f, bool *no_room)
{
    pie_value *v = &f->value;
    uint8_t type = peek(r);
    v->number = PIE_NO_TOKEN;
    if (get_nil(r))
        v->kind = PIE_NIL;
    else if (type >= 0xc4 && type <= 0xc6) {
        const uint8_t *data = get_bin(r, &v->length);
        v->kind = PIE_BYTES;
        if ((v->bytes = malloc(v->length + 1))) {
            memcpy(v->bytes, data, v->length);
            v->bytes[v->length] = 0;
        } else
            *no_room = true;
    } else if ((type & 0xf0) == 0x90 || type == 0xdc || type == 0xdd) {
        v->kind = PIE_TOKENS;
        v->tokens = get_tokens(r, &v->length, no_room);
    } else {
        v->kind = PIE_NUMBER;
        v->number = (pie_ref)get_uint(r, UINT32_MAX);
    }
    if (!(f->wanted & 1 << v->kind))
        r->bad = true;
}

static void get_error(struct reader *r, struct future *f, bool *no_room)
{
    size_t length, hint_length;
    f->code = (int)get_uint(r, INT32_MAX);
    const char *message = get_str(r, &length);
    const char *hint = get_str(r, &hint_length);
    if (!f->code)
        r->bad = true;
    if (!(f->message = malloc(length + hint_length + 2))) {
        *no_room = true;
        return;
    }
    memcpy(f->message, message, length);
    f->message[length] = 0;
    memcpy(f->message + length + 1, hint, hint_length);
    f->message[length + 1 + hint_length] = 0;
}

/* Takes the answers of one frame. False if it is not a frame of answers to what was asked. */
static bool take_frame(const uint8_t *body, size_t size)
{
    struct reader r = {body, body + size, false};
    for (uint32_t count = get_array(&r); count && !r.bad; count--) {
        bool no_room = false;
        uint32_t fields = get_array(&r);
        uint64_t failed = get_uint(&r, 1);
        struct future *f = find_future((uint32_t)get_uint(&r, UINT32_MAX));
        if (r.bad || fields != (failed ? 5 : 3) || !f || f->state == ANSWERED)
            return false;
        if (failed)
            get_error(&r, f, &no_room);
        else
            get_value(&r, f, &no_room);
        if (r.bad)
            return false;
        if (no_room) { /* the answer is lost, the connection is not */
            free(f->message);
            f->message = NULL;
            f->code = PIE_OUT_OF_MEMORY;
        }
        if (f->state == FORGOTTEN)
            free_future(f);
        else
            f->state = ANSWERED;
    }
    return !r.bad && r.at == r.end;
}

/* Takes the whole frames of the inbox and moves the rest to its front. */
static int take_frames(void)
{
    size_t at = 0;
    while (pie.received - at >= SHORT_HEADER) {
        const uint8_t *p = pie.in + at;
        uint64_t size = p[1];
        size_t header = SHORT_HEADER;
        if (p[0] == 2) {
            if (pie.received - at < LONG_HEADER)
                break;
            struct reader r = {p + 1, p + LONG_HEADER, false};
            size = get_wide(&r, 8);
            header = LONG_HEADER;
        }
        if (p[0] & ~2 || size > PIE_MAX_FRAME)
            return lose(PIE_BAD_FRAME, "the controller sent a wrong frame header");
        if (pie.received - at - header < size)
            break;
        if (!take_frame(p + header, size))
            return lose(PIE_BAD_FRAME, "the controller sent a wrong answer");
        at += header + size;
    }
    pie.received -= at;
    memmove(pie.in, pie.in + at, pie.received);
    return PIE_OK;
}

/* Reads once, waiting for something to arrive, and takes what is whole. */
static int receive_some(void)
{
    if (pie.lost)
        return lose(pie.lost, "");
    ssize_t n = read(SOCKET_FD, pie.in + pie.received, sizeof pie.in - pie.received);
    if (n > 0) {
        pie.received += (size_t)n;
        return take_frames();
    }
    if (n < 0 && errno == EINTR)
        return PIE_OK;
    if (n < 0 && errno == EAGAIN) {
        struct pollfd fd = {.fd = SOCKET_FD, .events = POLLIN};
        poll(&fd, 1, -1);
        return PIE_OK;
    }
    return lose(PIE_CLOSED, "the connection to the controller ended");
}

static struct future *future_of(pie_future future)
{
    struct future *f = future.id ? find_future((uint32_t)(future.id - 1)) : NULL;
    return f && f->state != FORGOTTEN ? f : NULL;
}

int pie_wait(pie_future future, pie_value *value)
{
    if (value)
        *value = (pie_value){.number = PIE_NO_TOKEN};
    if (!future.id && pie.error.code)
        return pie.error.code; /* the call that should have made it failed */
    struct future *f = future_of(future);
    if (!f)
        return fail(PIE_BAD_HANDLE, "wait for a future once, and for one that was asked for",
                    "no such future");
    int code = f->state == ANSWERED ? PIE_OK : pie_flush();
    while (!code && f->state == WAITING)
        code = receive_some();
    if (f->state == ANSWERED && f->code && !f->message)
        code = no_memory();
    else if (f->state == ANSWERED && f->code)
        code = fail(f->code, f->message + strlen(f->message) + 1, "%s", f->message);
    else if (f->state == ANSWERED) {
        code = PIE_OK;
        if (value) {
            *value = f->value;
            f->value.bytes = NULL; /* the caller's now */
            f->value.tokens = NULL;
        }
    }
    free_future(f);
    return code;
}

bool pie_ready(pie_future future)
{
    struct pollfd fd = {.fd = SOCKET_FD, .events = POLLIN};
    struct future *f = future_of(future);
    if (!f || f->state == ANSWERED || pie_flush())
        return true;
    while (f->state == WAITING && poll(&fd, 1, 0) > 0)
        if (receive_some())
            return true;
    return f->state != WAITING;
}

void pie_forget(pie_future future)
{
    struct future *f = future_of(future);
    if (f && f->state == ANSWERED)
        free_future(f);
    else if (f)
        f->state = FORGOTTEN;
}

/* -------------------------------------------------------------------------------- start-up --- */

/* Zeroed memory for as long as the process lives. NULL sets `bad`. */
static void *keep(struct reader *r, size_t size)
{
    struct kept *k = calloc(1, sizeof *k + size);
    if (!k) {
        r->bad = true;
        return NULL;
    }
    k->next = pie.kept;
    pie.kept = k;
    return k->data;
}

static const char *keep_str(struct reader *r)
{
    size_t length;
    const char *text = get_str(r, &length);
    char *copy = keep(r, length + 1);
    if (copy)
        memcpy(copy, text, length);
    return copy ? copy : "";
}

static const char **keep_strs(struct reader *r, uint32_t *count)
{
    *count = get_array(r);
    const char **strings = keep(r, *count * sizeof *strings);
    for (uint32_t i = 0; i < *count && !r->bad; i++)
        strings[i] = keep_str(r);
    return strings;
}

static bool key_is(const char *key, size_t length, const char *name)
{
    return length == strlen(name) && !memcmp(key, name, length);
}

static uint32_t get_u32(struct reader *r)
{
    return (uint32_t)get_uint(r, UINT32_MAX);
}

static void get_model(struct reader *r, pie_model *m)
{
    m->name = m->description = m->architecture = "";
    m->bos_token = PIE_NO_TOKEN;
    for (uint32_t keys = get_count(r, 0x80, 0xde); keys && !r->bad; keys--) {
        size_t n;
        const char *key = get_str(r, &n);
        if (key_is(key, n, "name"))
            m->name = keep_str(r);
        else if (key_is(key, n, "description"))
            m->description = keep_str(r);
        else if (key_is(key, n, "architecture"))
            m->architecture = keep_str(r);
        else if (key_is(key, n, "chat_template"))
            m->chat_template = get_nil(r) ? NULL : keep_str(r);
        else if (key_is(key, n, "traits"))
            m->traits = keep_strs(r, &m->trait_count);
        else if (key_is(key, n, "page_size"))
            m->page_size = get_u32(r);
        else if (key_is(key, n, "vocab_size"))
            m->vocab_size = get_u32(r);
        else if (key_is(key, n, "hidden_size"))
            m->hidden_size = get_u32(r);
        else if (key_is(key, n, "max_context"))
            m->max_context = get_u32(r);
        else if (key_is(key, n, "bos_token"))
            m->bos_token = get_nil(r) ? PIE_NO_TOKEN : (pie_ref)get_u32(r);
        else if (key_is(key, n, "eos_tokens")) {
            m->eos_count = get_array(r);
            pie_ref *eos = keep(r, m->eos_count * sizeof *eos);
            for (uint32_t i = 0; i < m->eos_count && !r->bad; i++)
                eos[i] = (pie_ref)get_u32(r);
            m->eos_tokens = eos;
        } else
            skip(r);
    }
    if (!m->page_size || !m->max_context)
        r->bad = true;
}

static void get_limits(struct reader *r)
{
    static const struct {
        const char *key;
        uint32_t *value;
    } fields[] = {
        {"kv_pages", &pie.limits.kv_pages},       {"embeds", &pie.limits.embeds},
        {"tokens", &pie.limits.tokens},           {"commands", &pie.limits.commands},
        {"frame_bytes", &pie.limits.frame_bytes}, {"top_k", &pie.limits.top_k},
        {"ring_bytes", &pie.limits.ring_bytes},
    };
    for (uint32_t keys = get_count(r, 0x80, 0xde); keys && !r->bad; keys--) {
        size_t n, i = 0, count = sizeof fields / sizeof *fields;
        const char *key = get_str(r, &n);
        while (i < count && !key_is(key, n, fields[i].key))
            i++;
        if (i < count)
            *fields[i].value = get_u32(r);
        else
            skip(r);
    }
}

static bool get_startup(struct reader *r)
{
    uint32_t abi = 0;
    pie.id = "";
    for (uint32_t keys = get_count(r, 0x80, 0xde); keys && !r->bad; keys--) {
        size_t n;
        const char *key = get_str(r, &n);
        if (key_is(key, n, "abi"))
            abi = get_u32(r);
        else if (key_is(key, n, "id"))
            pie.id = keep_str(r);
        else if (key_is(key, n, "args"))
            pie.args = keep_strs(r, &pie.arg_count);
        else if (key_is(key, n, "models")) {
            pie.model_count = get_array(r);
            pie.models = keep(r, pie.model_count * sizeof *pie.models);
            for (uint32_t i = 0; i < pie.model_count && !r->bad; i++)
                get_model(r, &pie.models[i]);
        } else if (key_is(key, n, "limits"))
            get_limits(r);
        else
            skip(r);
    }
    return !r->bad && r->at == r->end && abi == PIE_ABI;
}

/* Maps the whole of a memfd. The sealed ones are mapped private: kernels before 6.7 refuse a shared
 * mapping of a write-sealed file, even a read-only one. NULL if there is nothing to map. */
static const uint8_t *map_fd(int fd, int flags, size_t *size)
{
    off_t length = lseek(fd, 0, SEEK_END); /* fstat is newfstatat in glibc, and not allowed */
    if (length <= 0)
        return NULL;
    void *address = mmap(NULL, (size_t)length, PROT_READ, flags, fd, 0);
    *size = (size_t)length;
    return address == MAP_FAILED ? NULL : address;
}

static uint32_t le32(const uint8_t *p)
{
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static bool open_vocab(void)
{
    pie.vocab = map_fd(VOCAB_FD, MAP_PRIVATE, &pie.vocab_size);
    if (!pie.vocab || pie.vocab_size < 16 || memcmp(pie.vocab, "PIEV", 4) ||
        le32(pie.vocab + 4) != 1)
        return false;
    uint32_t count = le32(pie.vocab + 8);
    if (pie.vocab_size < 16 || (pie.vocab_size - 16) / 5 < count) /* a start and a flag each */
        return false;
    pie.vocab_count = count;
    pie.vocab_text = 16 + 5 * (size_t)count;
    return true;
}

int pie_init(void)
{
    static const char launch[] = "start it with `piehost launch`";
    size_t size = 0;
    if (pie.started)
        return PIE_OK;
    const uint8_t *block = map_fd(STARTUP_FD, MAP_PRIVATE, &size);
    struct reader r = {block, block + size, !block};
    bool whole = block && get_startup(&r);
    if (block)
        munmap((void *)(uintptr_t)block, size);
    if (!whole)
        return fail(PIE_CLOSED, launch,
                    "descriptor 6 holds no start-up block of ABI version 1: this program was not "
                    "started by piehost, or by one that this binding does not fit");
    if (!open_vocab())
        return fail(PIE_CLOSED, launch, "descriptor 7 holds no vocabulary table of version 1");
    pie.ring = map_fd(RING_FD, MAP_SHARED, &pie.ring_size);
    if (!pie.ring)
        pie.ring_size = 0;

    struct sigaction action;
    if (!sigaction(SIGPIPE, NULL, &action) && action.sa_handler == SIG_DFL) {
        action.sa_handler = SIG_IGN;
        sigaction(SIGPIPE, &action, NULL);
    }
    if (atexit(flush_at_exit))
        return no_memory();
    pie.started = true;
    return PIE_OK;
}

const char *pie_get_id(void)
{
    return pie.id ? pie.id : "";
}

const char *pie_get_arg(uint32_t index)
{
    return index < pie.arg_count ? pie.args[index] : NULL;
}

const pie_model *pie_available_models(uint32_t *count)
{
    *count = pie.model_count;
    return pie.models;
}

const char *const *pie_available_traits(uint32_t model, uint32_t *count)
{
    *count = model < pie.model_count ? pie.models[model].trait_count : 0;
    return model < pie.model_count ? pie.models[model].traits : NULL;
}

uint32_t pie_get_kvpage_size(uint32_t model)
{
    return model < pie.model_count ? pie.models[model].page_size : 0;
}

const pie_limits *pie_get_limits(void)
{
    return &pie.limits;
}

/* -------------------------------------------------------------------------------- commands --- */

/* The next handle of a kind: 1 and up, and after 2**32 - 1 from 1 again. */
static uint32_t fresh(uint32_t *last)
{
    *last = *last == UINT32_MAX ? 1 : *last + 1;
    return *last;
}

pie_ref pie_late(pie_token token)
{
    return -1 - (pie_ref)token.id;
}

int pie_send(const void *data, size_t length, pie_future *answer)
{
    begin(1, 1, WANT_NIL, answer);
    if (length > PIE_MAX_MESSAGE)
        refuse(PIE_BAD_ARGUMENT, "send it in parts", "a message has at most 60000 octets");
    put_bin(data, length);
    return end(answer);
}

int pie_receive(pie_future *answer)
{
    begin(2, 0, WANT_BYTES, answer);
    return end(answer);
}

pie_queue pie_create_queue(uint32_t model, pie_future *answer)
{
    pie_queue queue = {fresh(&pie.last_queue)};
    begin(3, 2, WANT_NIL, answer);
    put_handle(queue.id);
    put_uint(model);
    return end(answer) ? (pie_queue){0} : queue;
}

int pie_destroy_queue(pie_queue queue, pie_future *answer)
{
    begin(4, 1, WANT_NIL, answer);
    put_handle(queue.id);
    return end(answer);
}

int pie_synchronize(pie_queue queue, pie_future *answer)
{
    begin(5, 1, WANT_NIL, answer);
    put_handle(queue.id);
    return end(answer);
}

int pie_set_queue_priority(pie_queue queue, int priority, pie_future *answer)
{
    begin(6, 2, WANT_NIL, answer);
    put_handle(queue.id);
    if (priority < -8 || priority > 7)
        refuse(PIE_BAD_ARGUMENT, "choose one from -8 to 7", "no such priority");
    put_int(priority);
    return end(answer);
}

int pie_cancel(pie_queue queue, pie_future *answer)
{
    begin(7, 1, WANT_NIL, answer);
    put_handle(queue.id);
    return end(answer);
}

pie_kvpage pie_alloc_kvpage(pie_queue queue, uint32_t pages, pie_future *answer)
{
    pie_kvpage kv = {fresh(&pie.last_kvpage)};
    begin(8, 3, WANT_NIL, answer);
    put_handle(queue.id);
    put_handle(kv.id);
    put_uint(pages);
    return end(answer) ? (pie_kvpage){0} : kv;
}

int pie_dealloc_kvpage(pie_queue queue, pie_kvpage kv, uint32_t first_page, pie_future *answer)
{
    begin(9, 4, WANT_NIL, answer);
    put_handle(queue.id);
    put_handle(kv.id);
    put_uint(first_page);
    put_nil();
    return end(answer);
}

int pie_dealloc_kvpage_range(pie_queue queue, pie_kvpage kv, uint32_t first_page, uint32_t pages,
                             pie_future *answer)
{
    begin(9, 4, WANT_NIL, answer);
    put_handle(queue.id);
    put_handle(kv.id);
    put_uint(first_page);
    put_uint(pages);
    return end(answer);
}

pie_kvpage pie_share_kvpage(pie_queue queue, pie_kvpage source, uint32_t first_page, uint32_t pages,
                            pie_future *answer)
{
    pie_kvpage kv = {fresh(&pie.last_kvpage)};
    begin(10, 5, WANT_NIL, answer);
    put_handle(queue.id);
    put_handle(kv.id);
    put_handle(source.id);
    put_uint(first_page);
    put_uint(pages);
    return end(answer) ? (pie_kvpage){0} : kv;
}

int pie_copy_kvpage(pie_queue queue, pie_kv_span source, pie_kv_span target, pie_future *answer)
{
    begin(11, 3, WANT_NIL, answer);
    put_handle(queue.id);
    put_span(source.kv.id, source.first, source.length);
    put_span(target.kv.id, target.first, target.length);
    return end(answer);
}

int pie_mask_kvpage(pie_queue queue, pie_kv_span span, bool visible, pie_future *answer)
{
    begin(12, 3, WANT_NIL, answer);
    put_handle(queue.id);
    put_span(span.kv.id, span.first, span.length);
    put_bool(visible);
    return end(answer);
}

pie_emb pie_alloc_emb(pie_queue queue, uint32_t count, pie_future *answer)
{
    pie_emb emb = {fresh(&pie.last_emb)};
    begin(13, 3, WANT_NIL, answer);
    put_handle(queue.id);
    put_handle(emb.id);
    put_uint(count);
    return end(answer) ? (pie_emb){0} : emb;
}

int pie_dealloc_emb(pie_queue queue, pie_emb emb, pie_future *answer)
{
    begin(14, 2, WANT_NIL, answer);
    put_handle(queue.id);
    put_handle(emb.id);
    return end(answer);
}

pie_token pie_new_token(void)
{
    return (pie_token){fresh(&pie.last_token)};
}

int pie_dealloc_token(pie_queue queue, pie_token token, pie_future *answer)
{
    begin(15, 2, WANT_NIL, answer);
    put_handle(queue.id);
    put_handle(token.id);
    return end(answer);
}

static void put_tokens(const pie_ref *tokens, uint32_t count)
{
    put_array(count);
    for (uint32_t i = 0; i < count && !pie.overflow; i++) {
        if (tokens[i] > INT32_MAX || tokens[i] == PIE_NO_TOKEN || tokens[i] < -0x100000000)
            refuse(PIE_BAD_ARGUMENT, "pass ids below vocab_size or what pie_late gives",
                   "neither a token id nor a late-bound token");
        put_int(tokens[i]);
    }
}

int pie_embed_txt(pie_queue queue, pie_emb target, uint32_t first, const pie_ref *tokens,
                  uint32_t count, uint32_t position, pie_future *answer)
{
    begin(16, 4, WANT_NIL, answer);
    put_handle(queue.id);
    put_index(target.id, first);
    put_tokens(tokens, count);
    put_position(position);
    return end(answer);
}

int pie_embed_txt_at(pie_queue queue, pie_emb target, uint32_t first, const pie_ref *tokens,
                     uint32_t count, const uint32_t *positions, pie_future *answer)
{
    begin(16, 4, WANT_NIL, answer);
    put_handle(queue.id);
    put_index(target.id, first);
    put_tokens(tokens, count);
    put_positions(positions, count);
    return end(answer);
}

int pie_forward(pie_queue queue, const pie_pass *pass, pie_future *answer)
{
    const pie_emb_span *in = &pass->inputs, *out = &pass->outputs;
    begin(17, 7, WANT_NIL, answer);
    put_handle(queue.id);
    put_span(in->emb.id, in->first, in->length);
    if (pass->read_count > PIE_MAX_READS)
        refuse(PIE_BAD_ARGUMENT, "read longer spans", "a forward reads at most 1024 spans");
    put_array(pass->read_count);
    for (uint32_t i = 0; i < pass->read_count && !pie.refused; i++)
        put_span(pass->reads[i].kv.id, pass->reads[i].first, pass->reads[i].length);
    if (pass->write.kv.id)
        put_span(pass->write.kv.id, pass->write.first, pass->write.length);
    else
        put_nil();
    if (out->emb.id)
        put_span(out->emb.id, out->first, out->length);
    else
        put_nil();
    if (pass->positions)
        put_positions(pass->positions, in->length);
    else
        put_nil();
    if (pass->mask)
        put_bin(pass->mask, pass->mask_length);
    else
        put_nil();
    return end(answer);
}

void pie_pack_mask(const bool *attend, uint32_t rows, uint32_t columns, uint8_t *packed)
{
    size_t width = ((size_t)columns + 7) / 8;
    memset(packed, 0, rows * width);
    for (size_t row = 0; row < rows; row++)
        for (size_t column = 0; column < columns; column++)
            if (attend[row * columns + column])
                packed[row * width + column / 8] |= (uint8_t)(1u << column % 8);
}

int pie_get_next_dist(pie_queue queue, pie_emb emb, uint32_t index, uint32_t k, uint32_t offset,
                      pie_future *answer)
{
    begin(18, 4, WANT_NUMBER | WANT_NIL, answer);
    put_handle(queue.id);
    put_index(emb.id, index);
    put_uint(k);
    put_uint(offset);
    return end(answer);
}

int pie_read_dist(uint32_t offset, uint32_t count, pie_dist *dist)
{
    if (offset % 4 || offset > pie.ring_size || (pie.ring_size - offset) / 8 < count)
        return fail(PIE_BAD_ARGUMENT, "use an offset that is a multiple of 4, within ring_bytes",
                    "%lu entries at %lu lie outside ring out, which has %zu octets",
                    (unsigned long)count, (unsigned long)offset, pie.ring_size);
    /* Both casts keep alignment: the mapping is a page's, offset and size are multiples of 4. */
    const uint8_t *place = pie.ring ? pie.ring + offset : NULL;
    dist->tokens = (const uint32_t *)(const void *)place;
    dist->probabilities = (const float *)(const void *)(place + (place ? 4 * (size_t)count : 0));
    dist->count = count;
    return PIE_OK;
}

int pie_sample(pie_queue queue, pie_emb emb, uint32_t index, pie_token token,
               const pie_sampling *sampling, pie_future *answer)
{
    static const pie_sampling greedy;
    const pie_sampling *s = sampling ? sampling : &greedy;
    begin(19, 10, WANT_NUMBER | WANT_NIL, answer);
    /* Written so that NaN fails. */
    if (!(s->temperature >= 0 && s->temperature <= 1e6 && s->top_p >= 0 && s->top_p <= 1 &&
          s->min_p >= 0 && s->min_p <= 1))
        refuse(PIE_BAD_ARGUMENT, "temperature is 0 to 1000000, top_p and min_p are 0 to 1",
               "a sampling parameter is out of range");
    if (s->stop_count > PIE_MAX_STOP)
        refuse(PIE_BAD_ARGUMENT, "stop at fewer, and look at the others here",
               "a sample has at most 64 stop tokens");
    put_handle(queue.id);
    put_index(emb.id, index);
    put_handle(token.id);
    put_double(s->temperature);
    put_uint(s->top_k);
    put_double(s->top_p == 0 ? 1.0 : s->top_p);
    put_double(s->min_p);
    if (s->seeded)
        put_uint(s->seed);
    else
        put_nil();
    put_array(s->stop_count);
    for (uint32_t i = 0; i < s->stop_count && !pie.refused; i++) {
        if (s->stop[i] < 0 || s->stop[i] > UINT32_MAX)
            refuse(PIE_BAD_ARGUMENT, "pass ids below vocab_size", "a stop token is no token id");
        put_uint((uint64_t)s->stop[i]);
    }
    put_bool(s->lazy);
    return end(answer);
}

/* ------------------------------------------------------------------------------------ text --- */

/* Takes the next octet of UTF-8 into the character held by `s`. 1: it is complete; 0: it needs
 * more; -1: the octet starts no character; -2: what was held can be none, and the octet is still
 * to be taken. A malformed run is split as Unicode recommends (and Python does). */
static int take_octet(pie_stream *s, uint8_t octet)
{
    if (!s->need) {
        s->count = 0;
        s->low = 0x80;
        s->high = 0xbf;
        if (octet < 0x80)
            s->need = 0;
        else if (octet >= 0xc2 && octet <= 0xdf)
            s->need = 1;
        else if (octet >= 0xe0 && octet <= 0xef)
            s->need = 2;
        else if (octet >= 0xf0 && octet <= 0xf4)
            s->need = 3;
        else
            return -1;
        if (octet == 0xe0)
            s->low = 0xa0; /* shorter forms exist */
        else if (octet == 0xed)
            s->high = 0x9f; /* surrogates */
        else if (octet == 0xf0)
            s->low = 0x90; /* shorter forms exist */
        else if (octet == 0xf4)
            s->high = 0x8f; /* beyond U+10FFFF */
    } else if (octet < s->low || octet > s->high) {
        s->need = 0;
        return -2;
    } else {
        s->low = 0x80;
        s->high = 0xbf;
        s->need--;
    }
    s->held[s->count++] = octet;
    return s->need ? 0 : 1;
}

static bool is_utf8(const char *text, size_t length)
{
    pie_stream s = {0};
    for (size_t i = 0; i < length; i++)
        if (take_octet(&s, (uint8_t)text[i]) < 0)
            return false;
    return !s.need;
}

int pie_tokenize(uint32_t model, const char *text, size_t length, bool special, pie_future *answer)
{
    begin(20, 3, WANT_TOKENS, answer);
    if (length > PIE_MAX_TEXT)
        refuse(PIE_BAD_ARGUMENT, "shorten it", "a text has at most 32768 octets");
    else if (!is_utf8(text, length))
        refuse(PIE_BAD_ARGUMENT, "convert it to UTF-8", "the text is not valid UTF-8");
    put_uint(model);
    put_str(text, length);
    put_bool(special);
    return end(answer);
}

/* An entry of the vocabulary; one outside it, or one the table has wrong, is empty. */
static pie_vocab vocab_at(pie_ref token)
{
    if (token < 0 || token >= (pie_ref)pie.vocab_count)
        return (pie_vocab){"", 0, true};
    const uint8_t *starts = pie.vocab + 12 + 4 * (size_t)token;
    uint32_t start = le32(starts), stop = le32(starts + 4);
    bool control = pie.vocab[12 + 4 * ((size_t)pie.vocab_count + 1) + (size_t)token] & 1;
    if (start > stop || stop > pie.vocab_size - pie.vocab_text)
        return (pie_vocab){"", 0, control};
    return (pie_vocab){(const char *)pie.vocab + pie.vocab_text + start, stop - start, control};
}

size_t pie_detokenize(const pie_ref *tokens, size_t count, char *text, size_t capacity)
{
    size_t length = 0;
    for (size_t i = 0; i < count; i++) {
        pie_vocab v = vocab_at(tokens[i]);
        if (v.control)
            continue;
        size_t room = length < capacity ? capacity - length : 0;
        if (room)
            memcpy(text + length, v.text, v.length < room ? v.length : room);
        length += v.length;
    }
    return length;
}

uint32_t pie_get_vocabs(uint32_t first, pie_vocab *vocabs, uint32_t capacity)
{
    for (uint32_t i = 0; i < capacity && (uint64_t)first + i < pie.vocab_count; i++)
        vocabs[i] = vocab_at((pie_ref)first + i);
    return pie.vocab_count;
}

/* ---------------------------------------------------------------------------------- stream --- */

static const char replacement[] = "\xef\xbf\xbd"; /* U+FFFD */

/* Room for `length` octets of text and a NUL. */
static bool stream_room(pie_stream *s, size_t length)
{
    if (s->capacity > length)
        return true;
    char *buffer = realloc(s->buffer, 2 * length + 16);
    if (!buffer) {
        no_memory();
        return false;
    }
    s->buffer = buffer;
    s->capacity = 2 * length + 16;
    return true;
}

const char *pie_stream_push(pie_stream *s, pie_ref token, size_t *length)
{
    pie_vocab v = vocab_at(token);
    size_t count = v.control ? 0 : v.length, at = 0;
    if (length)
        *length = 0;
    /* An octet completes a character of up to four, or is replaced by three and one more. */
    if (!stream_room(s, 3 * count + sizeof s->held + 3))
        return NULL;
    for (size_t i = 0; i < count; i++) {
        int taken = take_octet(s, (uint8_t)v.text[i]);
        if (taken == 0)
            continue;
        const void *text = taken == 1 ? (const void *)s->held : replacement;
        size_t size = taken == 1 ? s->count : 3;
        memcpy(s->buffer + at, text, size);
        at += size;
        if (taken == -2)
            i--; /* what was held is replaced; now the octet itself */
    }
    s->buffer[at] = 0;
    if (length)
        *length = at;
    return s->buffer;
}

const char *pie_stream_end(pie_stream *s, size_t *length)
{
    if (length)
        *length = 0;
    if (!stream_room(s, 3))
        return NULL;
    const char *rest = s->need ? replacement : "";
    memcpy(s->buffer, rest, strlen(rest) + 1);
    s->need = 0;
    if (length)
        *length = strlen(rest);
    return s->buffer;
}

void pie_stream_free(pie_stream *s)
{
    free(s->buffer);
    *s = (pie_stream){0};
}

/* --------------------------------------------------------------------------------- context --- */

enum {
    FILL_INPUTS = 512, /* inputs of one forward of a fill */
    CHAIN_STEPS = 32,  /* steps that are queued at once */
    COMMANDS_A_STEP = 3
};

struct pie_context {
    uint32_t model;
    pie_queue queue;
    pie_emb hidden;      /* one embed: the input of a step, then its hidden state; what is sampled
                          * from, unless a token is pending */
    pie_token token;     /* the last one sampled, bound again by every step */
    pie_kv_span *blocks; /* `length` is what the block holds; filled one after the other */
    pie_kv_span *reads;  /* as many as there are blocks */
    uint32_t block_count;
    uint32_t slots;      /* of all blocks */
    uint32_t length;     /* slots written: tokens that have gone through the model */
    pie_ref pending;     /* appended, but not yet through the model; or PIE_NO_TOKEN */
    int failed;          /* the code of the first error, or 0 */
    pie_future waiting[2 * CHAIN_STEPS]; /* answers of queued samples, a ring */
};

/* Remembers the first error: what the queue holds is not known any more. */
static int context_failed(pie_context *c, int code)
{
    if (code && !c->failed)
        c->failed = code;
    return code;
}

static int context_check(const pie_context *c)
{
    if (!c)
        return fail(PIE_BAD_HANDLE, "check the result of pie_context_create", "no context");
    if (c->failed)
        return fail(c->failed, "destroy it and start again", "the context failed before");
    return PIE_OK;
}

pie_context *pie_context_create(uint32_t model)
{
    if (model >= pie.model_count) {
        fail(PIE_BAD_ARGUMENT, "choose one from pie_available_models", "there is no model %lu",
             (unsigned long)model);
        return NULL;
    }
    pie_context *c = calloc(1, sizeof *c);
    if (!c) {
        no_memory();
        return NULL;
    }
    c->model = model;
    c->pending = PIE_NO_TOKEN;
    c->token = pie_new_token();
    c->queue = pie_create_queue(model, NULL);
    c->hidden = pie_alloc_emb(c->queue, 1, NULL);
    if (!c->hidden.id) {
        free(c);
        return NULL;
    }
    return c;
}

void pie_context_destroy(pie_context *c)
{
    if (!c)
        return;
    pie_destroy_queue(c->queue, NULL); /* frees all that was made through it */
    free(c->blocks);
    free(c->reads);
    free(c);
}

/* Makes room for `count` more tokens now, of at most `later` that are expected (later >= count). A
 * block has at least a quarter of what there is, so that n pages are O(log n) blocks. */
static int reserve(pie_context *c, uint32_t count, uint32_t later)
{
    uint32_t page = pie.models[c->model].page_size, have = c->slots - c->length;
    if (have >= count)
        return PIE_OK;
    uint32_t want = count - have;
    if (want < c->slots / 4)
        want = c->slots / 4 < later - have ? c->slots / 4 : later - have;
    uint32_t pages = (want + page - 1) / page;
    pie_kv_span *blocks = realloc(c->blocks, (c->block_count + 1) * sizeof *blocks);
    if (!blocks)
        return no_memory();
    c->blocks = blocks;
    pie_kv_span *reads = realloc(c->reads, (c->block_count + 1) * sizeof *reads);
    if (!reads)
        return no_memory();
    c->reads = reads;
    pie_kvpage kv = pie_alloc_kvpage(c->queue, pages, NULL);
    if (!kv.id)
        return pie.error.code;
    blocks[c->block_count++] = (pie_kv_span){kv, 0, pages * page};
    c->slots += pages * page;
    return PIE_OK;
}

/* Queues the forward of `count` embedded inputs, which appends them; cut where a block ends. */
static int append(pie_context *c, pie_emb emb, uint32_t count, bool output)
{
    for (uint32_t done = 0; done < count;) {
        uint32_t block = 0, before = 0, reads = 0;
        while (before + c->blocks[block].length <= c->length)
            before += c->blocks[block++].length;
        uint32_t at = c->length - before, room = c->blocks[block].length - at;
        uint32_t n = count - done < room ? count - done : room;
        memcpy(c->reads, c->blocks, block * sizeof *c->reads);
        reads = block;
        if (at)
            c->reads[reads++] = (pie_kv_span){c->blocks[block].kv, 0, at};
        pie_pass pass = {
            .inputs = {emb, done, n},
            .reads = c->reads,
            .read_count = reads,
            .write = {c->blocks[block].kv, at, n},
        };
        done += n;
        if (output && done == count)
            pass.outputs = (pie_emb_span){c->hidden, 0, 1};
        int code = pie_forward(c->queue, &pass, NULL);
        if (code)
            return code;
        c->length += n;
    }
    return PIE_OK;
}

/* Inputs of one forward of a fill: half of the cap leaves room for a second context. */
static uint32_t fill_inputs(void)
{
    uint32_t half = pie.limits.embeds / 2;
    return half < 2 ? 2 : half < FILL_INPUTS ? half : FILL_INPUTS;
}

static int fill_tokens(pie_context *c, const pie_ref *tokens, uint32_t count)
{
    uint32_t pending = c->pending != PIE_NO_TOKEN, left = count;
    uint32_t most = pie.models[c->model].max_context;
    if (!count)
        return PIE_OK;
    if (count > most - pending || c->length > most - pending - count) {
        return fail(PIE_BAD_POSITION, "shorten the text",
                    "%lu tokens after %lu are more than the model's context of %lu",
                    (unsigned long)count, (unsigned long)(c->length + pending),
                    (unsigned long)most);
    }
    int code = reserve(c, count + pending, count + pending);
    while (left && !code) {
        uint32_t n = fill_inputs() - pending;
        n = left < n ? left : n;
        pie_emb emb = pie_alloc_emb(c->queue, n + pending, NULL);
        if (pending)
            code = pie_embed_txt(c->queue, emb, 0, &c->pending, 1, c->length, NULL);
        if (!code)
            code = pie_embed_txt(c->queue, emb, pending, tokens + (count - left), n,
                                 c->length + pending, NULL);
        left -= n;
        if (!code)
            code = append(c, emb, n + pending, !left);
        if (!code)
            code = pie_dealloc_emb(c->queue, emb, NULL);
        c->pending = PIE_NO_TOKEN;
        pending = 0;
    }
    return context_failed(c, code);
}

int pie_context_fill_tokens(pie_context *c, const pie_ref *tokens, uint32_t count)
{
    int code = context_check(c);
    return code ? code : fill_tokens(c, tokens, count);
}

int pie_context_fill(pie_context *c, const char *text, size_t length, bool special)
{
    pie_value value;
    pie_future answer;
    int code = context_check(c);
    if (code || (code = pie_tokenize(c->model, text, length, special, &answer)) ||
        (code = pie_wait(answer, &value)))
        return code;
    code = fill_tokens(c, value.tokens, (uint32_t)value.length);
    free(value.tokens);
    return code;
}

/* Queues `steps` steps as sample number `queued` on: each but the first of all embeds the token
 * before it, which is late-bound, and runs the model on it. */
static int queue_chain(pie_context *c, uint32_t queued, uint32_t steps, uint32_t count,
                       const pie_sampling *sampling)
{
    pie_ref last = pie_late(c->token);
    pie_sampling s = *sampling;
    uint32_t inputs = queued ? steps : steps - 1;
    int code = reserve(c, inputs, inputs + (count - queued - steps));
    for (uint32_t until = queued + steps; queued < until && !code; queued++) {
        if (queued && ((code = pie_embed_txt(c->queue, c->hidden, 0, &last, 1, c->length, NULL)) ||
                       (code = append(c, c->hidden, 1, true))))
            break;
        /* The first is waited for, and the last one brings all with it. */
        s.lazy = sampling->lazy && queued && queued + 1 < count;
        code = pie_sample(c->queue, c->hidden, 0, c->token, &s,
                          &c->waiting[queued % (2 * CHAIN_STEPS)]);
    }
    return code;
}

static bool stops(const pie_sampling *sampling, pie_ref token)
{
    for (uint32_t i = 0; i < sampling->stop_count; i++)
        if (sampling->stop[i] == token)
            return true;
    return false;
}

/* Drops what is queued beyond the first `length` slots. Blocks that nothing was written to may
 * never have been made, as the cancel dropped that too: they are let go, made or not. */
static int cut(pie_context *c)
{
    pie_future done;
    int code = pie_cancel(c->queue, NULL);
    uint32_t kept = 0;
    for (uint32_t slots = 0; kept < c->block_count && slots < c->length; kept++)
        slots += c->blocks[kept].length;
    if (code || kept == c->block_count)
        return code;
    for (uint32_t i = kept; i < c->block_count; i++) {
        pie_dealloc_kvpage(c->queue, c->blocks[i].kv, 0, NULL);
        c->slots -= c->blocks[i].length;
    }
    c->block_count = kept;
    if ((code = pie_synchronize(c->queue, &done)))
        return code;
    code = pie_wait(done, NULL);
    return code == PIE_BAD_HANDLE ? PIE_OK : code;
}

int pie_context_generate(pie_context *c, uint32_t count, const pie_sampling *sampling,
                         pie_on_token on_token, void *user)
{
    pie_sampling s = sampling ? *sampling : (pie_sampling){0};
    uint32_t queued = 0, answered = 0, wanted = count;
    bool stopped = false, cut_short = false;
    int code = context_check(c);
    if (code || !count)
        return code;
    if (c->pending != PIE_NO_TOKEN) { /* by its id, so that a stop is passed over */
        pie_ref pending = c->pending;
        c->pending = PIE_NO_TOKEN;
        if ((code = fill_tokens(c, &pending, 1)))
            return code;
    }
    if (!c->length)
        return fail(PIE_BAD_ARGUMENT, "fill the context first", "there is nothing to go on from");

    uint32_t base = c->length, most = pie.models[c->model].max_context;
    if (count > most - base + 1) /* the last token is not run */
        count = most - base + 1;
    uint32_t chain = pie.limits.commands / (2 * COMMANDS_A_STEP);
    chain = chain < 1 ? 1 : chain < CHAIN_STEPS ? chain : CHAIN_STEPS;
    s.lazy = chain == CHAIN_STEPS; /* half of a shorter chain may be fewer than are held back */
    while (answered < count && !stopped && !cut_short) {
        /* The next chain goes out when half of the last is answered. */
        if (queued < count && queued - answered <= chain / 2) {
            uint32_t steps = count - queued < chain ? count - queued : chain;
            if ((code = queue_chain(c, queued, steps, count, &s)))
                break;
            queued += steps;
        }
        pie_value value;
        if ((code = pie_wait(c->waiting[answered % (2 * CHAIN_STEPS)], &value)))
            break;
        if (value.number == PIE_NO_TOKEN) {
            code = fail(PIE_BACKEND, "report it", "a sample was dropped before any stop");
            break;
        }
        answered++;
        c->pending = value.number;
        stopped = stops(&s, value.number);
        cut_short = !stopped && on_token && on_token(value.number, user);
    }
    for (uint32_t i = answered; i < queued; i++)
        pie_forget(c->waiting[i % (2 * CHAIN_STEPS)]);
    /* Slots written beyond are written again before they are read. */
    c->length = base + (answered ? answered - 1 : 0);
    if (!code && cut_short && answered < queued)
        code = cut(c);
    if (!code && !stopped && !cut_short && count < wanted)
        return fail(PIE_BAD_POSITION, "ask for fewer tokens, or start from a shorter text",
                    "the model's context of %lu is full", (unsigned long)most);
    return context_failed(c, code);
}
