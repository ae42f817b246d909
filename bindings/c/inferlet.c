/* inferlet.c -- see inferlet.h, which is the documentation, and docs/abi.md, the contract.
 *
 * Sections: state, errors, UTF-8, encoding, outbox, futures, decoding, values, inbox, start-up,
 * rings; the commands by what they are about: messages, queues, memory, model, sampling, text,
 * broadcasts, store, http, children, exports; the support layer: stream, context (its slots, its
 * tokens), generation, branches, saved contexts. The support layer uses what inferlet.h declares to
 * everyone and, of what is here, UTF-8, errors, the vocabulary, what start-up read, and how many
 * futures are free.
 *
 * System calls made here: read, write, poll, lseek, mmap, munmap, rt_sigaction, clock_gettime, and
 * malloc's. */
#define _POSIX_C_SOURCE 200809L

#include "inferlet.h"

#include <errno.h>
#include <math.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* ----------------------------------------------------------------------------------- state --- */

enum { SOCKET_FD = 3, RING_OUT_FD = 4, RING_IN_FD = 5, STARTUP_FD = 6, VOCAB_FD = 7 };
enum { SHORT_HEADER = 2, LONG_HEADER = 9, ARRAY_HEADER = 3, HEADERS = LONG_HEADER + ARRAY_HEADER };

/* Beside a pie_kind: nil is a right answer too. Any other than these two is a wrong one. */
enum { OR_NIL = 0x80 };

enum { FREE, WAITING, FORGOTTEN, ANSWERED };

/* A request that is not yet answered and waited for. Request r lives at index r modulo the size. */
struct future {
    uint32_t request;
    uint8_t state, wanted; /* the pie_kind of its answer, perhaps OR_NIL */
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
    uint32_t last_request, last_queue, last_kvpage, last_emb, last_token, last_history;
    uint32_t last_subscription, last_http, last_child;

    struct kept *kept;
    const char *id, *version, *user, *job;
    double deadline;
    const char **args;
    uint32_t arg_count;
    pie_model *models;
    uint32_t model_count;
    pie_limits limits;

    const uint8_t *ring_out;
    uint8_t *ring_in;
    size_t ring_out_size, ring_in_size;
    const uint8_t *vocab;
    uint32_t vocab_count;
    size_t vocab_text, vocab_size; /* where the text starts and ends */

    pie_context *contexts; /* all there are: they share the quota of embeds */
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

/* An error that is told again, after other calls. */
struct error {
    int code; /* 0: none */
    char message[sizeof pie.message], hint[sizeof pie.hint];
};

static struct error last_error(void)
{
    struct error e = {.code = pie.error.code};
    snprintf(e.message, sizeof e.message, "%s", pie_error().message);
    snprintf(e.hint, sizeof e.hint, "%s", pie_error().hint);
    return e;
}

static int tell(const struct error *e)
{
    return fail(e->code, e->hint, "%s", e->message);
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
        "ok",           "bad_frame",     "bad_handle",  "bad_span",      "bad_position",
        "bad_argument", "bad_mask",      "over_quota",  "shared_page",   "unwritten",
        "cancelled",    "out_of_memory", "backend",     "missing_trait", "closed",
        "denied",       "not_found",     "unavailable", "lagged",
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

/* ----------------------------------------------------------------------------------- UTF-8 --- */

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

static void put_map(size_t n)
{
    if (n < 16)
        put_wide((uint8_t)(0x80 | n), 0, 0);
    else
        put_wide(0xde, n, 2); /* of headers, at most 64 */
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

/* A str of an inferlet's own: `least` to `most` octets of UTF-8. NULL is as "". */
static void put_text(const char *text, size_t least, size_t most, const char *bounds)
{
    size_t length = text ? strlen(text) : 0;
    if (length < least || length > most)
        refuse(PIE_BAD_ARGUMENT, "choose another", bounds);
    else if (!is_utf8(text, length))
        refuse(PIE_BAD_ARGUMENT, "convert it to UTF-8", "a text is not valid UTF-8");
    put_str(text, length);
}

/* A str whose only bound is the frame's. */
static void put_whole(const char *text)
{
    put_text(text, 0, PIE_MAX_FRAME, "a text does not fit into one frame of 65536 octets");
}

/* A topic, a key, the name of an export. */
static void put_name(const char *name)
{
    put_text(name, 1, PIE_MAX_NAME, "a name has 1 to 256 octets");
}

static void put_prefix(const char *prefix)
{
    put_text(prefix, 0, PIE_MAX_NAME, "a prefix, or a program's name, has at most 256 octets");
}

/* A bin of an inferlet's own. */
static void put_payload(const void *data, size_t length)
{
    if (length > PIE_MAX_MESSAGE)
        refuse(PIE_BAD_ARGUMENT, "split it into parts",
               "a message, a value or a part of a body has at most 60000 octets");
    put_bin(data, length);
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
    free(f->value.block);
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

static uint32_t get_u32(struct reader *r)
{
    return (uint32_t)get_uint(r, UINT32_MAX);
}

static bool get_bool(struct reader *r)
{
    uint8_t type = *get(r, 1);
    if (type != 0xc2 && type != 0xc3)
        r->bad = true;
    return type == 0xc3;
}

/* A number of any type. */
static double get_double(struct reader *r)
{
    uint8_t type = peek(r);
    double value = 0;
    if (type == 0xca) {
        get(r, 1);
        uint32_t bits = (uint32_t)get_wide(r, 4);
        float narrow;
        memcpy(&narrow, &bits, sizeof narrow);
        value = (double)narrow;
    } else if (type == 0xcb) {
        get(r, 1);
        uint64_t bits = get_wide(r, 8);
        memcpy(&value, &bits, sizeof value);
    } else if (type >= 0xe0) {
        value = (int8_t)*get(r, 1);
    } else if (type >= 0xd0 && type <= 0xd3) {
        get(r, 1);
        unsigned width = 1u << (type - 0xd0);
        uint64_t sign = (uint64_t)1 << (8 * width - 1);
        value = (double)(int64_t)((get_wide(r, width) ^ sign) - sign); /* two's complement */
    } else
        value = (double)get_uint(r, UINT64_MAX);
    return value;
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

static uint32_t get_map(struct reader *r)
{
    return get_count(r, 0x80, 0xde);
}

/* The head of an array of exactly `items` items. */
static void get_tuple(struct reader *r, uint32_t items)
{
    if (get_array(r) != items)
        r->bad = true;
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
            left += 2 * (uint64_t)get_map(r);
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

/* ---------------------------------------------------------------------------------- values --- */

/* Makes the block of the value that begins at `begin`: `head` octets for the items of its array,
 * then room for its text, which `text` gets. Text takes no more than on the wire, a NUL for each
 * header. NULL if `r` is bad, or if malloc failed: then the value is passed over. */
static void *make_block(struct reader *r, struct future *f, const uint8_t *begin, size_t head,
                        char **text)
{
    struct reader whole = {begin, r->end, r->bad};
    skip(&whole);
    r->bad = whole.bad;
    if (r->bad)
        return NULL;
    f->value.block = calloc(1, head + (size_t)(whole.at - begin) + 1);
    if (!f->value.block) { /* the answer is lost, the connection is not */
        f->code = PIE_OUT_OF_MEMORY;
        r->at = whole.at;
        return NULL;
    }
    *text = (char *)f->value.block + head;
    return f->value.block;
}

/* The next str, copied to `*text` with a NUL behind it. */
static const char *copy_str(struct reader *r, char **text, size_t *length)
{
    const char *data = get_str(r, length);
    char *copy = *text;
    if (r->bad)
        return "";
    memcpy(copy, data, *length);
    copy[*length] = 0;
    *text += *length + 1;
    return copy;
}

static void copy_bin(struct reader *r, pie_value *v, char **text)
{
    const uint8_t *data = get_bin(r, &v->length);
    if (r->bad)
        return;
    v->bytes = memcpy(*text, data, v->length);
    v->bytes[v->length] = 0;
    *text += v->length + 1;
}

/* A name that holds a NUL is no C string, and is left out. */
static void get_names(struct reader *r, struct future *f)
{
    pie_value *v = &f->value;
    const uint8_t *begin = r->at;
    char *text;
    uint32_t count = get_array(r);
    v->names = make_block(r, f, begin, count * sizeof *v->names, &text);
    for (uint32_t i = 0; v->names && i < count && !r->bad; i++) {
        size_t length;
        const char *name = copy_str(r, &text, &length);
        if (strlen(name) == length)
            v->names[v->length++] = name;
    }
}

static void get_exports(struct reader *r, struct future *f)
{
    pie_value *v = &f->value;
    const uint8_t *begin = r->at;
    char *text;
    uint32_t count = get_array(r);
    v->exports = make_block(r, f, begin, count * sizeof *v->exports, &text);
    for (uint32_t i = 0; v->exports && i < count && !r->bad; i++) {
        pie_exported *e = &v->exports[v->length];
        size_t length, ignored;
        get_tuple(r, 4);
        e->name = copy_str(r, &text, &length);
        e->pages = get_u32(r);
        e->exporter = copy_str(r, &text, &ignored);
        e->seconds_left = get_nil(r) ? -1 : get_double(r);
        v->length += strlen(e->name) == length;
    }
}

static void get_quotas(struct reader *r, struct future *f)
{
    pie_value *v = &f->value;
    const uint8_t *begin = r->at;
    char *text;
    uint32_t count = get_map(r);
    v->quotas = make_block(r, f, begin, count * sizeof *v->quotas, &text);
    for (; v->quotas && v->length < count && !r->bad; v->length++) {
        size_t length;
        v->quotas[v->length].name = copy_str(r, &text, &length);
        v->quotas[v->length].left = get_double(r);
    }
}

static void get_response(struct reader *r, struct future *f)
{
    pie_value *v = &f->value;
    const uint8_t *begin = r->at;
    char *text;
    get_tuple(r, 2);
    v->number = get_u32(r);
    uint32_t count = get_map(r);
    v->headers = make_block(r, f, begin, count * sizeof *v->headers, &text);
    for (; v->headers && v->length < count && !r->bad; v->length++) {
        size_t length;
        v->headers[v->length].name = copy_str(r, &text, &length);
        v->headers[v->length].value = copy_str(r, &text, &length);
    }
}

static void get_tokens(struct reader *r, struct future *f)
{
    pie_value *v = &f->value;
    const uint8_t *begin = r->at;
    char *text;
    uint32_t count = get_array(r);
    v->tokens = make_block(r, f, begin, count * sizeof *v->tokens, &text);
    for (; v->tokens && v->length < count && !r->bad; v->length++)
        v->tokens[v->length] = get_u32(r);
}

/* The value of an answer, into the future `f`, which knows what kind it is to be. */
static void get_value(struct reader *r, struct future *f)
{
    pie_value *v = &f->value;
    const uint8_t *begin = r->at;
    char *text;
    size_t ignored;
    v->number = PIE_NO_TOKEN;
    if ((f->wanted & OR_NIL || f->wanted == PIE_NIL) && get_nil(r)) {
        v->kind = PIE_NIL;
        return;
    }
    v->kind = (pie_kind)(f->wanted & ~OR_NIL);
    switch (v->kind) {
    case PIE_NIL:
        r->bad = true;
        break;
    case PIE_NUMBER:
        v->number = get_u32(r);
        break;
    case PIE_BOOL:
        v->number = get_bool(r);
        break;
    case PIE_SAMPLED:
        get_tuple(r, 3);
        v->number = get_u32(r);
        v->logprob = get_double(r);
        v->entries = get_u32(r);
        break;
    case PIE_BYTES:
        if (make_block(r, f, begin, 0, &text))
            copy_bin(r, v, &text);
        break;
    case PIE_TEXT:
        if (make_block(r, f, begin, 0, &text))
            v->text = copy_str(r, &text, &ignored);
        break;
    case PIE_MESSAGE:
        get_tuple(r, 2);
        if (make_block(r, f, begin, 0, &text)) {
            copy_bin(r, v, &text);
            v->text = copy_str(r, &text, &ignored);
        }
        break;
    case PIE_IMPORTED:
        get_tuple(r, 2);
        v->number = get_u32(r);
        if (make_block(r, f, begin, 0, &text))
            copy_bin(r, v, &text);
        break;
    case PIE_TOKENS:
        get_tokens(r, f);
        break;
    case PIE_NAMES:
        get_names(r, f);
        break;
    case PIE_QUOTAS:
        get_quotas(r, f);
        break;
    case PIE_RESPONSE:
        get_response(r, f);
        break;
    case PIE_EXPORTS:
        get_exports(r, f);
        break;
    }
}

void pie_value_free(pie_value *value)
{
    free(value->block);
    *value = (pie_value){.number = PIE_NO_TOKEN};
}

/* ----------------------------------------------------------------------------------- inbox --- */

static void get_error(struct reader *r, struct future *f)
{
    size_t length, hint_length;
    f->code = (int)get_uint(r, INT32_MAX);
    const char *message = get_str(r, &length);
    const char *hint = get_str(r, &hint_length);
    if (!f->code)
        r->bad = true;
    if (!(f->message = malloc(length + hint_length + 2))) {
        f->code = PIE_OUT_OF_MEMORY;
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
        uint32_t fields = get_array(&r);
        uint64_t failed = get_uint(&r, 1);
        struct future *f = find_future((uint32_t)get_uint(&r, UINT32_MAX));
        if (r.bad || fields != (failed ? 5 : 3) || !f || f->state == ANSWERED)
            return false;
        if (failed)
            get_error(&r, f);
        else
            get_value(&r, f);
        if (r.bad)
            return false;
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
            f->value.block = NULL; /* the caller's now */
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

static void get_model(struct reader *r, pie_model *m)
{
    m->name = m->description = m->architecture = "";
    m->bos_token = PIE_NO_TOKEN;
    for (uint32_t keys = get_map(r); keys && !r->bad; keys--) {
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
        {"kv_pages", &pie.limits.kv_pages},           {"embeds", &pie.limits.embeds},
        {"tokens", &pie.limits.tokens},               {"commands", &pie.limits.commands},
        {"frame_bytes", &pie.limits.frame_bytes},     {"top_k", &pie.limits.top_k},
        {"ring_bytes", &pie.limits.ring_bytes},       {"ring_in_bytes", &pie.limits.ring_in_bytes},
        {"history", &pie.limits.history},             {"export_pages", &pie.limits.export_pages},
        {"children", &pie.limits.children},           {"http_streams", &pie.limits.http_streams},
        {"subscriptions", &pie.limits.subscriptions},
    };
    for (uint32_t keys = get_map(r); keys && !r->bad; keys--) {
        size_t n, i = 0, count = sizeof fields / sizeof *fields;
        const char *key = get_str(r, &n);
        while (i < count && !key_is(key, n, fields[i].key))
            i++;
        if (i < count)
            *fields[i].value = get_u32(r);
        else if (key_is(key, n, "store_bytes"))
            pie.limits.store_bytes = get_uint(r, UINT64_MAX);
        else
            skip(r);
    }
}

static bool get_startup(struct reader *r)
{
    uint32_t abi = 0;
    pie.id = pie.version = pie.user = pie.job = "";
    pie.deadline = INFINITY;
    for (uint32_t keys = get_map(r); keys && !r->bad; keys--) {
        size_t n;
        const char *key = get_str(r, &n);
        if (key_is(key, n, "abi"))
            abi = get_u32(r);
        else if (key_is(key, n, "id"))
            pie.id = keep_str(r);
        else if (key_is(key, n, "version"))
            pie.version = keep_str(r);
        else if (key_is(key, n, "user"))
            pie.user = keep_str(r);
        else if (key_is(key, n, "job"))
            pie.job = keep_str(r);
        else if (key_is(key, n, "deadline"))
            pie.deadline = get_nil(r) ? INFINITY : get_double(r);
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
 * mapping of a write-sealed file, even a read-only one. NULL and 0 if there is nothing to map. */
static uint8_t *map_fd(int fd, int access, int flags, size_t *size)
{
    off_t length = lseek(fd, 0, SEEK_END); /* fstat is newfstatat in glibc, and not allowed */
    void *address = MAP_FAILED;
    if (length > 0)
        address = mmap(NULL, (size_t)length, access, flags, fd, 0);
    *size = address == MAP_FAILED ? 0 : (size_t)length;
    return address == MAP_FAILED ? NULL : address;
}

static uint32_t le32(const uint8_t *p)
{
    return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static bool open_vocab(void)
{
    pie.vocab = map_fd(VOCAB_FD, PROT_READ, MAP_PRIVATE, &pie.vocab_size);
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
    uint8_t *block = map_fd(STARTUP_FD, PROT_READ, MAP_PRIVATE, &size);
    struct reader r = {block, block ? block + size : NULL, !block};
    bool whole = block && get_startup(&r);
    if (block)
        munmap(block, size);
    if (!whole)
        return fail(PIE_CLOSED, launch,
                    "descriptor 6 holds no start-up block of ABI version 1: this program was not "
                    "started by piehost, or by one that this binding does not fit");
    if (!open_vocab())
        return fail(PIE_CLOSED, launch, "descriptor 7 holds no vocabulary table of version 1");
    pie.ring_out = map_fd(RING_OUT_FD, PROT_READ, MAP_SHARED, &pie.ring_out_size);
    pie.ring_in = map_fd(RING_IN_FD, PROT_READ | PROT_WRITE, MAP_SHARED, &pie.ring_in_size);

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

const char *pie_get_version(void)
{
    return pie.version ? pie.version : "";
}

const char *pie_get_user(void)
{
    return pie.user ? pie.user : "";
}

const char *pie_get_job(void)
{
    return pie.job ? pie.job : "";
}

double pie_get_deadline(void)
{
    return pie.started ? pie.deadline : INFINITY;
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

/* ----------------------------------------------------------------------------------- rings --- */

uint8_t *pie_ring_in(size_t *size)
{
    if (size)
        *size = pie.ring_in_size;
    return pie.ring_in;
}

const uint8_t *pie_ring_out(size_t *size)
{
    if (size)
        *size = pie.ring_out_size;
    return pie.ring_out;
}

/* Whether `count` entries of `width` octets, whose numbers take four, lie at `offset` of a ring of
 * `size`. Numbers are aligned then: a mapping begins at a page. */
static bool in_ring(size_t size, uint32_t offset, size_t count, size_t width)
{
    if (offset % 4 == 0 && offset <= size && (size - offset) / width >= count)
        return true;
    fail(PIE_BAD_ARGUMENT, "use an offset that is a multiple of 4, within the ring's size",
         "%zu entries at %lu lie outside the ring, which has %zu octets", count,
         (unsigned long)offset, size);
    return false;
}

float *pie_ring_in_floats(uint32_t offset, size_t count)
{
    if (!in_ring(pie.ring_in_size, offset, count, sizeof(float)))
        return NULL;
    return (float *)(void *)(pie.ring_in ? pie.ring_in + offset : NULL);
}

const float *pie_ring_out_floats(uint32_t offset, size_t count)
{
    if (!in_ring(pie.ring_out_size, offset, count, sizeof(float)))
        return NULL;
    return (const float *)(const void *)(pie.ring_out ? pie.ring_out + offset : NULL);
}

int pie_read_dist(uint32_t offset, uint32_t count, pie_dist *dist)
{
    if (!in_ring(pie.ring_out_size, offset, count, 2 * sizeof(float)))
        return pie.error.code;
    const uint8_t *place = pie.ring_out ? pie.ring_out + offset : NULL;
    dist->tokens = (const uint32_t *)(const void *)place;
    dist->probabilities = (const float *)(const void *)(place ? place + 4 * (size_t)count : NULL);
    dist->count = count;
    return PIE_OK;
}

/* ------------------------------------------------------------------- commands of one shape --- */

/* The next handle of a kind: 1 and up, and after 2**32 - 1 from 1 again. */
static uint32_t fresh(uint32_t *last)
{
    *last = *last == UINT32_MAX ? 1 : *last + 1;
    return *last;
}

/* A command whose only field is a handle. */
static int on_handle(uint8_t op, uint32_t id, uint8_t wanted, pie_future *answer)
{
    begin(op, 1, wanted, answer);
    put_handle(id);
    return end(answer);
}

/* A command of a queue whose only other field is a handle. */
static int on_queue(uint8_t op, pie_queue queue, uint32_t id, pie_future *answer)
{
    begin(op, 2, PIE_NIL, answer);
    put_handle(queue.id);
    put_handle(id);
    return end(answer);
}

/* A command whose only field is a name. */
static int on_name(uint8_t op, const char *name, uint8_t wanted, pie_future *answer)
{
    begin(op, 1, wanted, answer);
    put_name(name);
    return end(answer);
}

/* A page of a list of names. */
static int list_names(uint8_t op, const char *prefix, const char *after, uint8_t wanted,
                      pie_future *answer)
{
    begin(op, 2, wanted, answer);
    put_prefix(prefix);
    put_prefix(after);
    return end(answer);
}

/* -------------------------------------------------------------------------------- messages --- */

int pie_send(const void *data, size_t length, pie_future *answer)
{
    begin(1, 1, PIE_NIL, answer);
    put_payload(data, length);
    return end(answer);
}

int pie_receive(pie_future *answer)
{
    begin(2, 0, PIE_BYTES, answer);
    return end(answer);
}

int pie_quota(pie_future *answer)
{
    begin(21, 0, PIE_QUOTAS, answer);
    return end(answer);
}

/* ---------------------------------------------------------------------------------- queues --- */

pie_queue pie_create_queue(uint32_t model, pie_future *answer)
{
    pie_queue queue = {fresh(&pie.last_queue)};
    begin(3, 2, PIE_NIL, answer);
    put_handle(queue.id);
    put_uint(model);
    return end(answer) ? (pie_queue){0} : queue;
}

int pie_destroy_queue(pie_queue queue, pie_future *answer)
{
    return on_handle(4, queue.id, PIE_NIL, answer);
}

int pie_synchronize(pie_queue queue, pie_future *answer)
{
    return on_handle(5, queue.id, PIE_NIL, answer);
}

int pie_set_queue_priority(pie_queue queue, int priority, pie_future *answer)
{
    begin(6, 2, PIE_NIL, answer);
    put_handle(queue.id);
    if (priority < -8 || priority > 7)
        refuse(PIE_BAD_ARGUMENT, "choose one from -8 to 7", "no such priority");
    put_int(priority);
    return end(answer);
}

int pie_cancel(pie_queue queue, pie_future *answer)
{
    return on_handle(7, queue.id, PIE_NIL, answer);
}

/* ---------------------------------------------------------------------------------- memory --- */

pie_kvpage pie_alloc_kvpage(pie_queue queue, uint32_t pages, pie_future *answer)
{
    pie_kvpage kv = {fresh(&pie.last_kvpage)};
    begin(8, 3, PIE_NIL, answer);
    put_handle(queue.id);
    put_handle(kv.id);
    put_uint(pages);
    return end(answer) ? (pie_kvpage){0} : kv;
}

int pie_dealloc_kvpage(pie_queue queue, pie_kvpage kv, uint32_t first_page, pie_future *answer)
{
    begin(9, 4, PIE_NIL, answer);
    put_handle(queue.id);
    put_handle(kv.id);
    put_uint(first_page);
    put_nil();
    return end(answer);
}

int pie_dealloc_kvpage_range(pie_queue queue, pie_kvpage kv, uint32_t first_page, uint32_t pages,
                             pie_future *answer)
{
    begin(9, 4, PIE_NIL, answer);
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
    begin(10, 5, PIE_NIL, answer);
    put_handle(queue.id);
    put_handle(kv.id);
    put_handle(source.id);
    put_uint(first_page);
    put_uint(pages);
    return end(answer) ? (pie_kvpage){0} : kv;
}

int pie_copy_kvpage(pie_queue queue, pie_kv_span source, pie_kv_span target, pie_future *answer)
{
    begin(11, 3, PIE_NIL, answer);
    put_handle(queue.id);
    put_span(source.kv.id, source.first, source.length);
    put_span(target.kv.id, target.first, target.length);
    return end(answer);
}

int pie_mask_kvpage(pie_queue queue, pie_kv_span span, bool visible, pie_future *answer)
{
    begin(12, 3, PIE_NIL, answer);
    put_handle(queue.id);
    put_span(span.kv.id, span.first, span.length);
    put_bool(visible);
    return end(answer);
}

pie_emb pie_alloc_emb(pie_queue queue, uint32_t count, pie_future *answer)
{
    pie_emb emb = {fresh(&pie.last_emb)};
    begin(13, 3, PIE_NIL, answer);
    put_handle(queue.id);
    put_handle(emb.id);
    put_uint(count);
    return end(answer) ? (pie_emb){0} : emb;
}

int pie_dealloc_emb(pie_queue queue, pie_emb emb, pie_future *answer)
{
    return on_queue(14, queue, emb.id, answer);
}

pie_token pie_new_token(void)
{
    return (pie_token){fresh(&pie.last_token)};
}

pie_ref pie_late(pie_token token)
{
    return -1 - (pie_ref)token.id;
}

int pie_dealloc_token(pie_queue queue, pie_token token, pie_future *answer)
{
    return on_queue(15, queue, token.id, answer);
}

/* ----------------------------------------------------------------------------------- model --- */

static void begin_embed(pie_queue queue, pie_emb target, uint32_t first, const pie_ref *tokens,
                        uint32_t count, const pie_future *answer)
{
    begin(16, 4, PIE_NIL, answer);
    put_handle(queue.id);
    put_index(target.id, first);
    put_tokens(tokens, count);
}

int pie_embed_txt(pie_queue queue, pie_emb target, uint32_t first, const pie_ref *tokens,
                  uint32_t count, uint32_t position, pie_future *answer)
{
    begin_embed(queue, target, first, tokens, count, answer);
    put_position(position);
    return end(answer);
}

int pie_embed_txt_at(pie_queue queue, pie_emb target, uint32_t first, const pie_ref *tokens,
                     uint32_t count, const uint32_t *positions, pie_future *answer)
{
    begin_embed(queue, target, first, tokens, count, answer);
    put_positions(positions, count);
    return end(answer);
}

int pie_read_emb(pie_queue queue, pie_emb_span source, uint32_t offset, pie_future *answer)
{
    begin(46, 3, PIE_NUMBER | OR_NIL, answer);
    put_handle(queue.id);
    put_span(source.emb.id, source.first, source.length);
    put_uint(offset);
    return end(answer);
}

static void begin_write(pie_queue queue, pie_emb_span target, uint32_t offset,
                        const pie_future *answer)
{
    begin(47, 4, PIE_NIL, answer);
    put_handle(queue.id);
    put_span(target.emb.id, target.first, target.length);
    put_uint(offset);
}

int pie_write_emb(pie_queue queue, pie_emb_span target, uint32_t offset, uint32_t position,
                  pie_future *answer)
{
    begin_write(queue, target, offset, answer);
    put_position(position);
    return end(answer);
}

int pie_write_emb_at(pie_queue queue, pie_emb_span target, uint32_t offset,
                     const uint32_t *positions, pie_future *answer)
{
    begin_write(queue, target, offset, answer);
    put_positions(positions, target.length);
    return end(answer);
}

int pie_forward(pie_queue queue, const pie_pass *pass, pie_future *answer)
{
    const pie_emb_span *in = &pass->inputs, *out = &pass->outputs;
    begin(17, 7, PIE_NIL, answer);
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

/* -------------------------------------------------------------------------------- sampling --- */

int pie_get_next_dist(pie_queue queue, pie_emb emb, uint32_t index, uint32_t k, uint32_t offset,
                      pie_future *answer)
{
    begin(18, 4, PIE_NUMBER | OR_NIL, answer);
    put_handle(queue.id);
    put_index(emb.id, index);
    put_uint(k);
    put_uint(offset);
    return end(answer);
}

/* False for NaN. */
static bool within(double x, double low, double high)
{
    return x >= low && x <= high;
}

/* Refuses what would be a wrong frame. */
static void check_sampling(const pie_sampling *s)
{
    if (!within(s->temperature, 0, 1e6) || !within(s->top_p, 0, 1) || !within(s->min_p, 0, 1))
        refuse(PIE_BAD_ARGUMENT, "temperature is 0 to 1000000, top_p and min_p are 0 to 1",
               "a sampling parameter is out of range");
    if (!within(s->repetition_penalty, 0, 1e6) || !within(s->presence_penalty, -1e6, 1e6) ||
        !within(s->frequency_penalty, -1e6, 1e6))
        refuse(PIE_BAD_ARGUMENT,
               "repetition_penalty is 0 to 1000000, the others are -1000000 to 1000000",
               "a penalty is out of range");
    if (s->stop_count > PIE_MAX_STOP)
        refuse(PIE_BAD_ARGUMENT, "stop at fewer, and look at the others here",
               "a sample has at most 64 stop tokens");
    if (s->bias_count > PIE_MAX_BIAS)
        refuse(PIE_BAD_ARGUMENT, "use a mask", "a sample has at most 1024 biased tokens");
}

/* A token that cannot be a late-bound one. */
static void put_id(pie_ref token)
{
    if (token < 0 || token > UINT32_MAX)
        refuse(PIE_BAD_ARGUMENT, "pass ids below vocab_size",
               "a stop token or a biased one is no token id");
    put_uint((uint64_t)token);
}

int pie_sample(pie_queue queue, pie_emb emb, uint32_t index, pie_token token,
               const pie_sampling *sampling, pie_future *answer)
{
    static const pie_sampling greedy;
    const pie_sampling *s = sampling ? sampling : &greedy;
    pie_kind kind = s->logprobs || s->k ? PIE_SAMPLED : PIE_NUMBER;
    begin(19, 19, (uint8_t)(kind | OR_NIL), answer);
    check_sampling(s);
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
    for (uint32_t i = 0; i < s->stop_count && !pie.refused; i++)
        put_id(s->stop[i]);
    put_bool(s->lazy);
    if (s->masked)
        put_uint(s->mask);
    else
        put_nil();
    put_array(s->bias_count);
    for (uint32_t i = 0; i < s->bias_count && !pie.refused; i++) {
        put_array(2);
        put_id(s->bias[i].token);
        if (isnan(s->bias[i].bias))
            refuse(PIE_BAD_ARGUMENT, "check where it comes from", "a bias is not a number");
        put_double(s->bias[i].bias);
    }
    if (s->history.id)
        put_uint(s->history.id);
    else
        put_nil();
    put_double(s->repetition_penalty == 0 ? 1.0 : s->repetition_penalty);
    put_double(s->presence_penalty);
    put_double(s->frequency_penalty);
    put_bool(s->logprobs);
    put_uint(s->k);
    put_uint(s->offset);
    return end(answer);
}

int pie_pack_token_mask(const pie_ref *allowed, size_t count, uint32_t vocab_size, uint8_t *packed)
{
    memset(packed, 0, ((size_t)vocab_size + 7) / 8);
    for (size_t i = 0; i < count; i++) {
        if (allowed[i] < 0 || allowed[i] >= (pie_ref)vocab_size)
            return fail(PIE_BAD_ARGUMENT, "pass ids below vocab_size", "%lld is no token of %lu",
                        (long long)allowed[i], (unsigned long)vocab_size);
        packed[allowed[i] / 8] |= (uint8_t)(1u << allowed[i] % 8);
    }
    return PIE_OK;
}

pie_history pie_alloc_history(pie_queue queue, const pie_ref *prompt, uint32_t count,
                              pie_future *answer)
{
    pie_history history = {fresh(&pie.last_history)};
    begin(48, 3, PIE_NIL, answer);
    put_handle(queue.id);
    put_handle(history.id);
    put_tokens(prompt, count);
    return end(answer) ? (pie_history){0} : history;
}

int pie_extend_history(pie_queue queue, pie_history history, const pie_ref *tokens, uint32_t count,
                       pie_future *answer)
{
    begin(49, 3, PIE_NIL, answer);
    put_handle(queue.id);
    put_handle(history.id);
    put_tokens(tokens, count);
    return end(answer);
}

int pie_dealloc_history(pie_queue queue, pie_history history, pie_future *answer)
{
    return on_queue(50, queue, history.id, answer);
}

/* ------------------------------------------------------------------------------------ text --- */

int pie_tokenize(uint32_t model, const char *text, size_t length, bool special, pie_future *answer)
{
    begin(20, 3, PIE_TOKENS, answer);
    if (length > PIE_MAX_TEXT)
        refuse(PIE_BAD_ARGUMENT, "shorten it", "a text has at most 32768 octets");
    else if (!is_utf8(text, length))
        refuse(PIE_BAD_ARGUMENT, "convert it to UTF-8", "the text is not valid UTF-8");
    put_uint(model);
    put_str(text, length);
    put_bool(special);
    return end(answer);
}

int pie_chat(uint32_t model, const pie_chat_message *messages, uint32_t count,
             bool generation_prompt, pie_future *answer)
{
    begin(51, 3, PIE_TOKENS, answer);
    put_uint(model);
    if (count > PIE_MAX_CHAT)
        refuse(PIE_BAD_ARGUMENT, "leave the oldest out", "a chat has at most 1024 messages");
    put_array(count);
    for (uint32_t i = 0; i < count && !pie.refused && !pie.overflow; i++) {
        put_map(2);
        put_str("role", 4);
        put_whole(messages[i].role);
        put_str("content", 7);
        put_whole(messages[i].content);
    }
    put_bool(generation_prompt);
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

/* ----------------------------------------------------------------------------- broadcasts --- */

int pie_broadcast(const char *topic, const void *data, size_t length, bool job,
                  pie_future *answer)
{
    begin(22, 3, PIE_NUMBER, answer);
    put_name(topic);
    put_payload(data, length);
    put_bool(job);
    return end(answer);
}

pie_subscription pie_subscribe(const char *topic, bool job, pie_future *answer)
{
    pie_subscription subscription = {fresh(&pie.last_subscription)};
    begin(23, 3, PIE_NIL, answer);
    put_handle(subscription.id);
    put_name(topic);
    put_bool(job);
    return end(answer) ? (pie_subscription){0} : subscription;
}

int pie_unsubscribe(pie_subscription subscription, pie_future *answer)
{
    return on_handle(24, subscription.id, PIE_NIL, answer);
}

int pie_next_message(pie_subscription subscription, pie_future *answer)
{
    return on_handle(25, subscription.id, PIE_MESSAGE, answer);
}

/* ----------------------------------------------------------------------------------- store --- */

int pie_store_get(const char *key, pie_future *answer)
{
    return on_name(26, key, PIE_BYTES | OR_NIL, answer);
}

int pie_store_set(const char *key, const void *value, size_t length, pie_future *answer)
{
    begin(27, 2, PIE_NIL, answer);
    put_name(key);
    put_payload(value, length);
    return end(answer);
}

int pie_store_delete(const char *key, pie_future *answer)
{
    return on_name(28, key, PIE_BOOL, answer);
}

int pie_store_exists(const char *key, pie_future *answer)
{
    return on_name(29, key, PIE_BOOL, answer);
}

int pie_store_list(const char *prefix, const char *after, pie_future *answer)
{
    return list_names(30, prefix, after, PIE_NAMES, answer);
}

/* ------------------------------------------------------------------------------------ http --- */

static void put_url(const char *url)
{
    put_text(url, 1, PIE_MAX_URL, "a URL has 1 to 8192 octets");
}

/* A map on the wire, so that a name is said once. */
static void put_headers(const pie_header *headers, uint32_t count)
{
    if (count > PIE_MAX_HEADERS)
        refuse(PIE_BAD_ARGUMENT, "send fewer", "a request has at most 64 headers");
    put_map(count);
    for (uint32_t i = 0; i < count && !pie.refused; i++) {
        put_text(headers[i].name, 1, PIE_MAX_FRAME, "a header has a name");
        put_whole(headers[i].value);
        for (uint32_t j = 0; j < i && !pie.refused; j++)
            if (!strcmp(headers[j].name, headers[i].name))
                refuse(PIE_BAD_ARGUMENT, "join its values with a comma", "a header is there twice");
    }
}

pie_http pie_http_get(const char *url, const pie_header *headers, uint32_t count,
                      pie_future *answer)
{
    pie_http http = {fresh(&pie.last_http)};
    begin(31, 3, PIE_RESPONSE, answer);
    put_handle(http.id);
    put_url(url);
    put_headers(headers, count);
    return end(answer) ? (pie_http){0} : http;
}

pie_http pie_http_post(const char *url, const void *body, size_t length, const pie_header *headers,
                       uint32_t count, bool more, pie_future *answer)
{
    pie_http http = {fresh(&pie.last_http)};
    begin(32, 5, PIE_RESPONSE, answer);
    put_handle(http.id);
    put_url(url);
    put_payload(body, length);
    put_headers(headers, count);
    put_bool(more);
    return end(answer) ? (pie_http){0} : http;
}

int pie_http_write(pie_http http, const void *data, size_t length, bool more, pie_future *answer)
{
    begin(33, 3, PIE_NIL, answer);
    put_handle(http.id);
    put_payload(data, length);
    put_bool(more);
    return end(answer);
}

int pie_http_read(pie_http http, pie_future *answer)
{
    return on_handle(34, http.id, PIE_BYTES, answer);
}

int pie_http_close(pie_http http, pie_future *answer)
{
    return on_handle(35, http.id, PIE_NIL, answer);
}

/* -------------------------------------------------------------------------------- children --- */

pie_child pie_spawn(const char *program, const char *const *args, uint32_t count,
                    pie_future *answer)
{
    pie_child child = {fresh(&pie.last_child)};
    begin(36, 3, PIE_TEXT, answer);
    put_handle(child.id);
    put_prefix(program);
    if (count > PIE_MAX_ARGS)
        refuse(PIE_BAD_ARGUMENT, "send them as a message", "a child has at most 256 arguments");
    put_array(count);
    for (uint32_t i = 0; i < count && !pie.refused && !pie.overflow; i++)
        put_whole(args[i]);
    return end(answer) ? (pie_child){0} : child;
}

int pie_send_child(pie_child child, const void *data, size_t length, pie_future *answer)
{
    begin(37, 2, PIE_NIL, answer);
    put_handle(child.id);
    put_payload(data, length);
    return end(answer);
}

int pie_receive_child(pie_child child, pie_future *answer)
{
    return on_handle(38, child.id, PIE_BYTES, answer);
}

int pie_close_child(pie_child child, pie_future *answer)
{
    return on_handle(39, child.id, PIE_NIL, answer);
}

int pie_wait_child(pie_child child, pie_future *answer)
{
    return on_handle(40, child.id, PIE_NUMBER, answer);
}

int pie_end_child(pie_child child, pie_future *answer)
{
    return on_handle(41, child.id, PIE_NIL, answer);
}

/* --------------------------------------------------------------------------------- exports --- */

int pie_export_kvpage(pie_queue queue, const char *name, const pie_kv_range *pages, uint32_t count,
                      const void *meta, size_t meta_length, int64_t lease, pie_future *answer)
{
    begin(42, 5, PIE_NIL, answer);
    put_handle(queue.id);
    put_name(name);
    if (count < 1 || count > PIE_MAX_RANGES)
        refuse(PIE_BAD_ARGUMENT, "export longer ranges", "an export has 1 to 1024 page ranges");
    put_array(count);
    for (uint32_t i = 0; i < count && !pie.refused; i++)
        put_span(pages[i].kv.id, pages[i].first_page, pages[i].pages);
    put_payload(meta, meta_length);
    if (lease > UINT32_MAX)
        refuse(PIE_BAD_ARGUMENT, "choose a shorter one", "a lease is at most 4294967295 seconds");
    if (lease < 0)
        put_nil();
    else
        put_uint((uint64_t)lease);
    return end(answer);
}

int pie_unexport_kvpage(const char *name, pie_future *answer)
{
    return on_name(43, name, PIE_NIL, answer);
}

pie_kvpage pie_import_kvpage(pie_queue queue, const char *name, pie_future *answer)
{
    pie_kvpage kv = {fresh(&pie.last_kvpage)};
    begin(44, 3, PIE_IMPORTED, answer);
    put_handle(queue.id);
    put_handle(kv.id);
    put_name(name);
    return end(answer) ? (pie_kvpage){0} : kv;
}

int pie_list_exported(const char *prefix, const char *after, pie_future *answer)
{
    return list_names(45, prefix, after, PIE_EXPORTS, answer);
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

/* Token i of a context is at position i and its keys and values in slot i. Whole pages of slots lie
 * in blocks; a page that was evicted lies in none. Slots from `written` on may hold leftovers of a
 * generation that ended early: nothing reads them, and later writes replace them. */

enum {
    FILL_INPUTS = 512,   /* most inputs of one forward of a fill */
    FEW_INPUTS = 64,     /* so few are worth a wait for more */
    CHAIN_STEPS = 32,    /* steps that are queued at once */
    COMMANDS_A_STEP = 3,
    DIST_TOKENS = 256,   /* of a sampler's distribution, unless it asks for others */
    MAX_HIDDEN = 500     /* runs of hidden tokens; a forward reads at most 1,024 spans */
};

/* Slots [begin, begin + length) of the context are slots [first, ...) of `kv`; whole pages. */
struct block {
    pie_kvpage kv;
    uint32_t first, begin, length;
};

struct range {
    uint32_t begin, end; /* of tokens */
};

/* In order, apart from each other. */
struct ranges {
    struct range *at;
    uint32_t count, capacity;
};

struct generation {
    pie_generation how;
    bool running, own_history;
    bool complete;        /* the constraint has nothing more to allow */
    uint32_t base, count; /* tokens of the context at its start; how many it may add */
    uint32_t queued, answered;
    pie_finish finish;
    pie_stream stream;
    char *text; /* all of it; octets from `given` on may be the beginning of a stop string */
    size_t length, capacity, given;
    double started, first, last; /* seconds: the start, the first token, the latest one */
    uint32_t *allowed; /* what of a sampler's distribution the constraint allows */
    pie_future waiting[2 * CHAIN_STEPS]; /* answers of queued steps, a ring */
};

struct pie_context {
    pie_context *next; /* in pie.contexts */
    uint32_t model;
    pie_queue queue; /* id 0: an error ended the last one, and the next call opens another */
    pie_emb hidden;  /* one embed: the input of a step, then its hidden state */
    bool ready;      /* it is that of the last token, computed with what is to be seen now */
    pie_token token; /* the last one sampled, bound again by every step */
    pie_ref *tokens;
    uint32_t length, capacity;
    uint32_t filled, generated; /* tokens, whatever was trimmed since */
    uint32_t written;   /* tokens before it have gone through the model */
    uint32_t inputs;    /* embeds that its fills may hold, one after the other */
    uint32_t shared;    /* slots of pages that others may hold too: copied before a write */
    struct block *blocks; /* by `begin` */
    uint32_t block_count, block_capacity;
    pie_kv_span *reads;
    uint32_t read_capacity;
    struct ranges hidden_tokens, evicted; /* left out of `reads`; those of them for good */
    uint32_t sink, recent;                /* the window; recent 0: none */
    struct generation run;
    struct error failed; /* of the queue, that no call has told of */
};

/* Room for `count` items of `size` octets. NULL, and `array` as it was, if there is none. */
static void *grown(void *array, uint32_t *capacity, size_t count, size_t size)
{
    if (count <= *capacity)
        return array;
    size_t most = count + count / 2 + 8;
    void *larger = most > UINT32_MAX ? NULL : realloc(array, most * size);
    if (!larger) {
        no_memory();
        return NULL;
    }
    *capacity = (uint32_t)most;
    return larger;
}

static int add_range(struct ranges *r, uint32_t begin, uint32_t end)
{
    struct range *at = grown(r->at, &r->capacity, r->count + 1, sizeof *at);
    uint32_t i = 0, j;
    if (!at)
        return pie.error.code;
    r->at = at;
    while (i < r->count && at[i].end < begin)
        i++;
    for (j = i; j < r->count && at[j].begin <= end; j++) { /* those it touches become one */
        begin = at[j].begin < begin ? at[j].begin : begin;
        end = at[j].end > end ? at[j].end : end;
    }
    memmove(at + i + 1, at + j, (r->count - j) * sizeof *at);
    at[i] = (struct range){begin, end};
    r->count += 1 - (j - i);
    return PIE_OK;
}

/* Nothing to allocate, so that it cannot fail, where `end` is behind them all. */
static int remove_range(struct ranges *r, uint32_t begin, uint32_t end)
{
    uint32_t kept = 0;
    for (uint32_t i = 0; i < r->count; i++) {
        struct range *at = r->at, old = at[i];
        if (old.begin < begin && old.end > end) { /* it falls in two; the others are apart */
            if (!(at = grown(at, &r->capacity, r->count + 1, sizeof *at)))
                return pie.error.code;
            r->at = at;
            memmove(at + i + 2, at + i + 1, (r->count++ - i - 1) * sizeof *at);
            at[i].end = begin;
            at[i + 1] = (struct range){end, old.end};
            return PIE_OK;
        }
        if (old.begin >= begin && old.begin < end)
            old.begin = old.end < end ? old.end : end;
        else if (old.end > begin && old.begin < begin)
            old.end = begin;
        if (old.begin < old.end)
            at[kept++] = old;
    }
    r->count = kept;
    return PIE_OK;
}

static bool overlaps(const struct ranges *r, uint32_t begin, uint32_t end)
{
    for (uint32_t i = 0; i < r->count; i++)
        if (r->at[i].begin < end && r->at[i].end > begin)
            return true;
    return false;
}

/* Whether one of them goes beyond both ends. */
static bool splits(const struct ranges *r, uint32_t begin, uint32_t end)
{
    for (uint32_t i = 0; i < r->count; i++)
        if (r->at[i].begin < begin && r->at[i].end > end)
            return true;
    return false;
}

static int copy_ranges(struct ranges *to, const struct ranges *from)
{
    for (uint32_t i = 0; i < from->count; i++)
        if (add_range(to, from->at[i].begin, from->at[i].end))
            return pie.error.code;
    return PIE_OK;
}

/* Tells, once, of an error that no call has told of. */
static int context_check(pie_context *c)
{
    if (!c)
        return fail(PIE_BAD_HANDLE, "check the result of pie_context_create", "no context");
    int code = c->failed.code ? tell(&c->failed) : PIE_OK;
    c->failed.code = PIE_OK;
    return code;
}

static int open_queue(pie_context *c)
{
    c->token = pie_new_token();
    c->queue = pie_create_queue(c->model, NULL);
    c->hidden = pie_alloc_emb(c->queue, 1, NULL);
    if (c->hidden.id)
        return PIE_OK;
    c->queue = (pie_queue){0};
    return pie.error.code;
}

static int slide(pie_context *c);

static void forget_steps(struct generation *g)
{
    for (uint32_t i = g->answered; i < g->queued; i++)
        pie_forget(g->waiting[i % (2 * CHAIN_STEPS)]); /* no harm to what was waited for */
    g->queued = g->answered;
}

/* After an error of the queue: gives back all that lies on it, and ends a generation. The next call
 * opens another queue, on which what is not evicted goes through the model again. Returns `code`,
 * and leaves its words. */
static int restart(pie_context *c, int code)
{
    struct generation *g = &c->run;
    if (!code)
        return PIE_OK;
    struct error e = last_error();
    if (c->queue.id)
        pie_destroy_queue(c->queue, NULL);
    c->queue = (pie_queue){0};
    c->block_count = c->written = c->shared = c->inputs = 0;
    c->ready = g->own_history = false;
    forget_steps(g);
    if (g->running) {
        g->running = false;
        g->finish = PIE_FINISH_CLOSED;
        slide(c);
    }
    return tell(&e);
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
    if (open_queue(c)) {
        free(c);
        return NULL;
    }
    c->next = pie.contexts;
    pie.contexts = c;
    return c;
}

static void free_generation(struct generation *g)
{
    forget_steps(g);
    pie_stream_free(&g->stream);
    free(g->text);
    free(g->allowed);
    *g = (struct generation){.finish = g->finish};
}

void pie_context_destroy(pie_context *c)
{
    if (!c)
        return;
    if (c->queue.id)
        pie_destroy_queue(c->queue, NULL); /* frees all that was made through it */
    for (pie_context **at = &pie.contexts; *at; at = &(*at)->next)
        if (*at == c) {
            *at = c->next;
            break;
        }
    free_generation(&c->run);
    free(c->tokens);
    free(c->blocks);
    free(c->reads);
    free(c->hidden_tokens.at);
    free(c->evicted.at);
    free(c);
}

/* --------------------------------------------------------------------------- context: slots --- */

static uint32_t page_size(const pie_context *c)
{
    return pie.models[c->model].page_size;
}

static uint32_t page_of(const pie_context *c, uint32_t slot)
{
    return slot / page_size(c) * page_size(c);
}

/* Slot behind the page of `slot` - 1. */
static uint32_t page_end(const pie_context *c, uint32_t slot)
{
    return page_of(c, slot + page_size(c) - 1);
}

static int add_block(pie_context *c, struct block block)
{
    struct block *blocks = grown(c->blocks, &c->block_capacity, c->block_count + 1, sizeof *blocks);
    if (!blocks)
        return pie.error.code;
    c->blocks = blocks;
    blocks[c->block_count++] = block;
    return PIE_OK;
}

static int alloc_block(pie_context *c, uint32_t begin, uint32_t pages)
{
    pie_kvpage kv = pie_alloc_kvpage(c->queue, pages, NULL);
    if (!kv.id)
        return pie.error.code;
    return add_block(c, (struct block){kv, 0, begin, pages * page_size(c)});
}

/* The block that holds `slot`, or NULL. The last ones are looked for most. */
static struct block *block_of(const pie_context *c, uint32_t slot)
{
    for (uint32_t i = c->block_count; i-- && c->blocks[i].begin + c->blocks[i].length > slot;)
        if (c->blocks[i].begin <= slot)
            return &c->blocks[i];
    return NULL;
}

/* Lets the whole pages between `begin` and `end` go, and a handle with its last page. */
static int free_pages(pie_context *c, uint32_t begin, uint32_t end)
{
    begin = page_end(c, begin);
    end = end == UINT32_MAX ? end : page_of(c, end);
    for (uint32_t i = 0; i < c->block_count; i++) {
        struct block *b = &c->blocks[i], old = *b;
        uint32_t stop = old.begin + old.length;
        uint32_t from = begin > old.begin ? begin : old.begin, to = end < stop ? end : stop;
        uint32_t handles = 0;
        int code;
        if (from >= to)
            continue;
        for (uint32_t j = 0; j < c->block_count; j++)
            handles += c->blocks[j].kv.id == old.kv.id;
        if (to < stop) { /* what is behind becomes a block of its own */
            if ((code = add_block(c, (struct block){0})))
                return code;
            b = &c->blocks[i];
            memmove(b + 2, b + 1, (c->block_count - i - 2) * sizeof *b);
            b[1] = (struct block){old.kv, old.first + (to - old.begin), to, stop - to};
        }
        b->length = from - old.begin;
        if (!b->length) {
            memmove(b, b + 1, (c->block_count-- - i - 1) * sizeof *b);
            i--;
        }
        if (handles == 1 && from == old.begin && to == stop)
            code = pie_dealloc_kvpage(c->queue, old.kv, 0, NULL);
        else
            code = pie_dealloc_kvpage_range(c->queue, old.kv,
                                            (old.first + from - old.begin) / page_size(c),
                                            (to - from) / page_size(c), NULL);
        if (code)
            return code;
    }
    return PIE_OK;
}

/* Makes the page that is written next the context's own. */
static int unshare(pie_context *c)
{
    uint32_t begin = page_of(c, c->written), slots = c->written - begin;
    if (c->written >= c->shared)
        return PIE_OK;
    c->shared = begin;
    const struct block *held = block_of(c, begin);
    pie_kv_span source = {{0}, 0, slots};
    if (held && slots) {
        source.kv = held->kv;
        source.first = held->first + (begin - held->begin);
    }
    int code = PIE_OK;
    pie_kvpage own = {0};
    if (source.kv.id && !(own = pie_alloc_kvpage(c->queue, 1, NULL)).id)
        return pie.error.code;
    if (own.id)
        code = pie_copy_kvpage(c->queue, source, (pie_kv_span){own, 0, slots}, NULL);
    if (!code)
        code = free_pages(c, begin, UINT32_MAX);
    if (!code && own.id)
        code = add_block(c, (struct block){own, 0, begin, page_size(c)});
    return code;
}

/* Makes room to write slots up to `end`, of at most `most` that are expected (most >= end). A block
 * has at least a quarter of what there is, so that n pages are O(log n) blocks. */
static int reserve(pie_context *c, uint32_t end, uint32_t most)
{
    uint32_t held = 0, begin = page_of(c, c->written);
    if (end > c->written && unshare(c))
        return pie.error.code;
    if (!block_of(c, c->written)) { /* all are full, or its page was evicted */
        if (free_pages(c, begin, UINT32_MAX))
            return pie.error.code;
    } else
        begin = c->blocks[c->block_count - 1].begin + c->blocks[c->block_count - 1].length;
    for (uint32_t i = 0; i < c->block_count; i++)
        held += c->blocks[i].length;
    if (end <= begin)
        return PIE_OK;
    uint32_t quarter = held / 4; /* where the quota has room for it */
    if (end - begin < quarter && (held + quarter) / page_size(c) < pie.limits.kv_pages)
        end = most - begin < quarter ? most : begin + quarter;
    return alloc_block(c, begin, (page_end(c, end) - begin) / page_size(c));
}

/* Puts the spans of the slots before `end` that are to be seen into `reads`, without those of the
 * range `gone`, and their number into `count`. */
static int find_reads(pie_context *c, uint32_t end, struct range gone, uint32_t *count)
{
    const struct ranges *hidden = &c->hidden_tokens;
    uint32_t h = 0;
    *count = 0;
    for (uint32_t i = 0; i < c->block_count && c->blocks[i].begin < end; i++) {
        const struct block *b = &c->blocks[i];
        uint32_t at = b->begin, stop = at + b->length < end ? at + b->length : end;
        while (at < stop) {
            while (h < hidden->count && hidden->at[h].end <= at)
                h++;
            struct range next = h < hidden->count ? hidden->at[h] : (struct range){end, end};
            if (gone.begin < gone.end && at < gone.end && gone.begin < next.begin)
                next = gone;
            if (next.begin <= at) {
                at = next.end;
                continue;
            }
            pie_kv_span *reads = grown(c->reads, &c->read_capacity, *count + 1, sizeof *reads);
            if (!reads)
                return pie.error.code;
            c->reads = reads;
            uint32_t until = next.begin < stop ? next.begin : stop;
            reads[(*count)++] = (pie_kv_span){b->kv, b->first + (at - b->begin), until - at};
            at = until;
        }
    }
    return PIE_OK;
}

/* Queues the forward of `count` embedded inputs as the next tokens; cut where a block ends. */
static int forward_inputs(pie_context *c, pie_emb emb, uint32_t count, struct range gone,
                          bool output)
{
    int code = PIE_OK;
    for (uint32_t done = 0, n; done < count && !code; done += n) {
        const struct block *b = block_of(c, c->written); /* reserved before */
        uint32_t at = c->written - b->begin, room = b->length - at;
        n = count - done < room ? count - done : room;
        pie_pass pass = {
            .inputs = {emb, done, n},
            .write = {b->kv, b->first + at, n},
        };
        if (output && done + n == count)
            pass.outputs = (pie_emb_span){c->hidden, 0, 1};
        if (!(code = find_reads(c, c->written, gone, &pass.read_count))) {
            pass.reads = c->reads;
            code = pie_forward(c->queue, &pass, NULL);
        }
        c->written += n;
    }
    return code;
}

static int wait_for_queue(pie_queue queue)
{
    pie_future done;
    int code = pie_synchronize(queue, &done);
    return code ? code : pie_wait(done, NULL);
}

/* Waits until all that is queued was carried out. */
static int wait_for(pie_context *c)
{
    int code = restart(c, wait_for_queue(c->queue));
    if (!code)
        c->inputs = 0;
    return code;
}

/* Inputs of the next forward of a fill, of `wanted`. Half of the embeds that other fills leave, so
 * that there is room for more; if that is little, those others are waited for. */
static uint32_t fill_inputs(pie_context *c, uint32_t wanted)
{
    for (bool waited = false;; waited = true) {
        uint64_t held = 0;
        for (pie_context *o = pie.contexts; o; o = o->next)
            held += 1 + (o == c ? 0 : o->inputs);
        uint64_t half = pie.limits.embeds > held ? (pie.limits.embeds - held) / 2 : 0;
        uint32_t n = half > FILL_INPUTS ? FILL_INPUTS : half ? (uint32_t)half : 1;
        if (n >= wanted || n >= FEW_INPUTS || waited)
            return n < wanted ? n : wanted;
        for (pie_context *o = pie.contexts; o; o = o->next)
            if (o != c && o->inputs && wait_for(o))
                o->failed = last_error(); /* the next call on it tells of that */
    }
}

/* How many of `most` tokens from `at` on may be inputs of one forward, which attend to each other:
 * up to a hidden one, and that one alone. */
static uint32_t seen_together(const pie_context *c, uint32_t at, uint32_t most)
{
    const struct ranges *hidden = &c->hidden_tokens;
    uint32_t i = 0;
    while (i < hidden->count && hidden->at[i].end <= at)
        i++;
    if (i == hidden->count)
        return most;
    uint32_t until = hidden->at[i].begin > at ? hidden->at[i].begin - at : 1;
    return until < most ? until : most;
}

/* Goes past the evicted tokens that `written` is at, but not past the last token, whose hidden state
 * is asked for. Returns how far what is behind them can be written. */
static uint32_t skip_evicted(pie_context *c)
{
    for (uint32_t i = 0; i < c->evicted.count; i++) {
        struct range r = c->evicted.at[i];
        if (r.begin > c->written)
            return r.begin;
        if (r.end > c->written)
            c->written = r.end < c->length ? r.end : c->length - 1;
    }
    return c->length;
}

/* Queues what brings the tokens from `written` to `end` through the model. */
static int write_run(pie_context *c, uint32_t end)
{
    int code = reserve(c, end, end);
    while (c->written < end && !code) {
        uint32_t n = seen_together(c, c->written, end - c->written);
        n = fill_inputs(c, n);
        c->inputs = c->inputs > n ? c->inputs : n;
        pie_emb emb = pie_alloc_emb(c->queue, n, NULL);
        code = pie_embed_txt(c->queue, emb, 0, c->tokens + c->written, n, c->written, NULL);
        if (!code)
            code = forward_inputs(c, emb, n, (struct range){0, 0}, c->written + n == c->length);
        if (!code)
            code = pie_dealloc_emb(c->queue, emb, NULL);
    }
    return code;
}

/* The same for all tokens, so that the last one's hidden state is there. */
static int write_tokens(pie_context *c)
{
    int code = PIE_OK;
    if (c->ready)
        return PIE_OK;
    if (c->written == c->length) /* the last one once more: its slot is written as it was */
        c->written--;
    while (c->written < c->length && !code)
        code = write_run(c, skip_evicted(c));
    c->ready = !code;
    return restart(c, code);
}

/* -------------------------------------------------------------------------- context: tokens --- */

static void end_generation(pie_context *c, pie_finish finish);

/* What every call on a context begins with: it ends a generation that was left early. */
static int settle(pie_context *c)
{
    int code = context_check(c);
    if (code)
        return code;
    if (c->run.running)
        end_generation(c, PIE_FINISH_CLOSED);
    return c->queue.id ? PIE_OK : open_queue(c);
}

static int push_tokens(pie_context *c, const pie_ref *tokens, uint32_t count)
{
    pie_ref *all = grown(c->tokens, &c->capacity, (size_t)c->length + count, sizeof *all);
    if (!all)
        return pie.error.code;
    c->tokens = all;
    if (count)
        memcpy(all + c->length, tokens, count * sizeof *all);
    c->length += count;
    return PIE_OK;
}

int pie_context_fill_tokens(pie_context *c, const pie_ref *tokens, uint32_t count)
{
    int code = settle(c);
    if (code || !count)
        return code;
    const pie_model *m = &pie.models[c->model];
    if (count > m->max_context - c->length)
        return fail(PIE_BAD_POSITION, "shorten the text, or trim the context",
                    "%lu tokens after %lu are more than the model's context of %lu",
                    (unsigned long)count, (unsigned long)c->length, (unsigned long)m->max_context);
    for (uint32_t i = 0; i < count; i++)
        if (tokens[i] < 0 || tokens[i] >= (pie_ref)m->vocab_size)
            return fail(PIE_BAD_ARGUMENT, "pass ids below vocab_size", "%lld is no token of %lu",
                        (long long)tokens[i], (unsigned long)m->vocab_size);
    if ((code = push_tokens(c, tokens, count)))
        return code;
    c->filled += count;
    c->ready = false;
    if ((code = write_tokens(c))) {
        c->length -= count;
        c->filled -= count;
    }
    return code;
}

int pie_context_append(pie_context *c, pie_ref token)
{
    return pie_context_fill_tokens(c, &token, 1);
}

/* Appends the tokens that are the answer of `future`. */
static int fill_answer(pie_context *c, pie_future answer)
{
    pie_value value;
    int code = pie_wait(answer, &value);
    if (!code)
        code = pie_context_fill_tokens(c, value.tokens, (uint32_t)value.length);
    pie_value_free(&value);
    return code;
}

int pie_context_fill(pie_context *c, const char *text, size_t length, bool special)
{
    pie_future answer;
    int code = settle(c);
    if (code || (code = pie_tokenize(c->model, text, length, special, &answer)))
        return code;
    return fill_answer(c, answer);
}

int pie_context_chat(pie_context *c, const pie_chat_message *messages, uint32_t count,
                     bool generation_prompt)
{
    pie_future answer;
    int code = settle(c);
    if (code || (code = pie_chat(c->model, messages, count, generation_prompt, &answer)))
        return code;
    return fill_answer(c, answer);
}

const pie_ref *pie_context_tokens(const pie_context *c, uint32_t *count)
{
    *count = c ? c->length : 0;
    return c ? c->tokens : NULL;
}

int pie_context_trim(pie_context *c, uint32_t length)
{
    int code = settle(c);
    if (code)
        return code;
    if (length > c->length)
        return fail(PIE_BAD_ARGUMENT, "keep at most what there is", "cannot keep %lu of %lu tokens",
                    (unsigned long)length, (unsigned long)c->length);
    if (length == c->length)
        return PIE_OK;
    c->length = length;
    c->written = c->written < length ? c->written : length;
    c->ready = false;
    uint32_t end = page_end(c, length);
    c->shared = c->shared < end ? c->shared : end;
    remove_range(&c->hidden_tokens, length, UINT32_MAX);
    remove_range(&c->evicted, length, UINT32_MAX);
    return restart(c, free_pages(c, end, UINT32_MAX));
}

int pie_context_rewind(pie_context *c, uint32_t tokens)
{
    int code = settle(c);
    if (!code && tokens > c->length)
        return fail(PIE_BAD_ARGUMENT, "go back at most to the beginning",
                    "cannot go back %lu of %lu tokens", (unsigned long)tokens,
                    (unsigned long)c->length);
    return code ? code : pie_context_trim(c, c->length - tokens);
}

/* Settles, and refuses to hide or show tokens that are not there, or too many runs of them. */
static int check_range(pie_context *c, uint32_t begin, uint32_t end, bool visible)
{
    const struct ranges *hidden = &c->hidden_tokens;
    int code = settle(c);
    if (code)
        return code;
    if (begin > end || end > c->length)
        return fail(PIE_BAD_ARGUMENT, "pass a first token and one behind the last",
                    "there are no tokens %lu to %lu of %lu", (unsigned long)begin,
                    (unsigned long)end, (unsigned long)c->length);
    bool one_more = visible ? splits(hidden, begin, end)
                            : !overlaps(hidden, begin ? begin - 1 : 0, end + 1);
    if (one_more && hidden->count >= MAX_HIDDEN)
        return fail(PIE_BAD_ARGUMENT, "hide longer runs of tokens",
                    "a context has at most %d runs of hidden tokens", MAX_HIDDEN);
    return PIE_OK;
}

int pie_context_mask(pie_context *c, uint32_t begin, uint32_t end, bool visible)
{
    int code = check_range(c, begin, end, visible);
    if (code || begin == end)
        return code;
    if (visible && overlaps(&c->evicted, begin, end))
        return fail(PIE_BAD_ARGUMENT, "trim the context and fill it again",
                    "some of the tokens %lu to %lu were evicted", (unsigned long)begin,
                    (unsigned long)end);
    c->ready = false;
    return visible ? remove_range(&c->hidden_tokens, begin, end)
                   : add_range(&c->hidden_tokens, begin, end);
}

/* Hides tokens for good and frees the pages that hold no others. */
static int evict(pie_context *c, uint32_t begin, uint32_t end)
{
    if (add_range(&c->hidden_tokens, begin, end) || add_range(&c->evicted, begin, end))
        return pie.error.code;
    for (uint32_t i = 0; i < c->evicted.count; i++) { /* which may be more than it was before */
        struct range r = c->evicted.at[i];
        if (r.begin <= begin && r.end >= end)
            return free_pages(c, r.begin, r.end);
    }
    return PIE_OK;
}

int pie_context_evict(pie_context *c, uint32_t begin, uint32_t end)
{
    int code = check_range(c, begin, end, false);
    if (code || begin == end)
        return code;
    c->ready = false;
    return restart(c, evict(c, begin, end));
}

int pie_context_window(pie_context *c, uint32_t sink, uint32_t recent)
{
    int code = settle(c);
    if (!code) {
        c->sink = sink;
        c->recent = recent;
    }
    return code;
}

/* What a token in `slot` does not see because of the window. */
static struct range beyond_window(const pie_context *c, uint32_t slot)
{
    struct range none = {0, 0};
    if (!c->recent || slot < c->recent || slot - c->recent <= c->sink)
        return none;
    return (struct range){c->sink, slot - c->recent};
}

/* Evicts what the latest token of a generation does not see because of the window. */
static int slide(pie_context *c)
{
    struct range gone = beyond_window(c, c->length ? c->length - 1 : 0);
    return gone.end && c->length > c->run.base ? evict(c, gone.begin, gone.end) : PIE_OK;
}

pie_context_stats pie_context_get_stats(const pie_context *c)
{
    pie_context_stats stats = {0};
    if (!c)
        return stats;
    const struct generation *g = &c->run;
    stats.prompt_tokens = c->filled;
    stats.generated_tokens = c->generated;
    for (uint32_t i = 0; i < c->block_count; i++) {
        const struct block *b = &c->blocks[i];
        uint32_t shared = c->shared > b->begin ? c->shared - b->begin : 0;
        stats.pages += b->length / page_size(c);
        stats.shared_pages += (shared < b->length ? shared : b->length) / page_size(c);
    }
    if (g->answered)
        stats.first_token_seconds = g->first - g->started;
    if (g->last > g->first)
        stats.tokens_per_second = (g->answered - 1) / (g->last - g->first);
    return stats;
}

/* ------------------------------------------------------------------------------ generation --- */

static double seconds_now(void)
{
    struct timespec now = {0, 0};
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static bool penalizes(const pie_sampling *s)
{
    return (s->repetition_penalty != 0 && s->repetition_penalty != 1) ||
           s->presence_penalty != 0 || s->frequency_penalty != 0;
}

static uint32_t mask_octets(const pie_context *c)
{
    return (pie.models[c->model].vocab_size + 7) / 8;
}

static int check_generation(const pie_context *c, const pie_generation *how)
{
    const pie_sampling *s = &how->sampling;
    size_t mask = mask_octets(c);
    for (uint32_t i = 0; i < how->stop_string_count; i++)
        if (!is_utf8(how->stop_strings[i], strlen(how->stop_strings[i])))
            return fail(PIE_BAD_ARGUMENT, "convert it to UTF-8", "a stop string is no UTF-8");
    if (how->constrain && (mask > pie.ring_in_size || s->mask > pie.ring_in_size - mask))
        return fail(PIE_BAD_ARGUMENT, "choose another sampling.mask",
                    "a mask of %zu octets at %lu lies outside ring in, which has %zu", mask,
                    (unsigned long)s->mask, pie.ring_in_size);
    if (how->constrain && s->masked)
        return fail(PIE_BAD_ARGUMENT, "let one of them decide",
                    "a constraint and a mask for one generation");
    if (!how->sampler && s->k)
        return fail(PIE_BAD_ARGUMENT, "give a sampler, or call pie_sample",
                    "sampling.k is for a sampler");
    if (how->sampler && (s->temperature != 0 || s->masked || s->bias_count || penalizes(s)))
        return fail(PIE_BAD_ARGUMENT, "let the sampler do it",
                    "a sampler, and parameters for another way to draw");
    if (how->sampler && s->k > pie.limits.top_k)
        return fail(PIE_BAD_ARGUMENT, "ask for fewer", "sampling.k is %lu, the limit is %lu",
                    (unsigned long)s->k, (unsigned long)pie.limits.top_k);
    if (how->sampler && !in_ring(pie.ring_out_size, s->offset, s->k, 2 * sizeof(float)))
        return pie.error.code;
    return PIE_OK;
}

/* Entries of a sampler's distribution, if `k` were asked for. */
static uint32_t dist_tokens(const pie_context *c, uint32_t k)
{
    uint32_t most = pie.models[c->model].vocab_size;
    if (!k)
        k = DIST_TOKENS < pie.limits.top_k ? DIST_TOKENS : pie.limits.top_k;
    return k < most ? k : most;
}

/* A history that holds the tokens so far, if need be. Only the repetition penalty looks at them,
 * and only at whether a token is there, so each is sent once. */
static int alloc_own_history(pie_context *c)
{
    struct generation *g = &c->run;
    uint8_t *seen = calloc(1, mask_octets(c));
    pie_ref *distinct = malloc(c->length * sizeof *distinct);
    double repetition = g->how.sampling.repetition_penalty;
    uint32_t count = 0, all = repetition != 0 && repetition != 1 ? c->length : 0;
    for (uint32_t i = 0; seen && distinct && i < all; i++) {
        uint8_t bit = (uint8_t)(1u << c->tokens[i] % 8);
        if (!(seen[c->tokens[i] / 8] & bit))
            distinct[count++] = c->tokens[i];
        seen[c->tokens[i] / 8] |= bit;
    }
    int code = seen && distinct ? PIE_OK : no_memory();
    if (!code) {
        g->how.sampling.history = pie_alloc_history(c->queue, distinct, count, NULL);
        g->own_history = g->how.sampling.history.id;
        code = g->own_history ? PIE_OK : pie.error.code;
    }
    free(seen);
    free(distinct);
    return code;
}

/* Steps that may be queued at once: so many that the accelerator does not wait, but no more than
 * the quota allows, nor so many that other contexts find no futures. */
static uint32_t chain_steps(const struct generation *g)
{
    uint32_t most = pie.limits.commands / (2 * COMMANDS_A_STEP), spare = 0;
    if (g->how.sampler || g->how.constrain)
        return 1; /* each is looked at before the next */
    for (uint32_t i = 0; i < PIE_MAX_FUTURES; i++)
        spare += pie.futures[i].state == FREE;
    most = spare / 8 < most ? spare / 8 : most;
    return most < 1 ? 1 : most < CHAIN_STEPS ? most : CHAIN_STEPS;
}

/* Asks the constraint for the next token's mask. */
static int constrain(pie_context *c)
{
    struct generation *g = &c->run;
    uint8_t *allowed = pie.ring_in + g->how.sampling.mask;
    size_t octets = mask_octets(c), i = 0;
    uint8_t last = (uint8_t)(0xff >> (8 * octets - pie.models[c->model].vocab_size));
    memset(allowed, 0, octets);
    if (g->how.constrain(c->tokens + g->base, c->length - g->base, allowed, g->how.user)) {
        g->complete = true;
        return PIE_OK;
    }
    while (i < octets && !(allowed[i] & (i + 1 < octets ? 0xff : last)))
        i++;
    if (i == octets)
        return fail(PIE_BAD_MASK, "allow one, an end token say, or return non-zero to end there",
                    "the constraint allows no token after %lu generated ones",
                    (unsigned long)(c->length - g->base));
    return PIE_OK;
}

/* Queues the next steps: each but the first of all embeds the token before it, which is late-bound,
 * runs the model on it and samples. */
static int queue_steps(pie_context *c)
{
    struct generation *g = &c->run;
    pie_sampling s = g->how.sampling;
    uint32_t left = g->count - g->queued, waited_for = g->queued - g->answered;
    int code = PIE_OK;
    if (!left || waited_for > CHAIN_STEPS / 2 || g->complete)
        return PIE_OK;
    uint32_t chain = chain_steps(g), steps = left < chain ? left : chain;
    if (waited_for > chain / 2)
        return PIE_OK; /* the next ones go out when half of the last is answered */
    if (g->how.constrain && ((code = constrain(c)) || g->complete))
        return code;
    if ((code = slide(c)))
        return restart(c, code);
    uint32_t inputs = g->queued ? steps : steps - 1;
    code = reserve(c, c->written + inputs, c->written + inputs + (left - steps));
    /* Answers of a full chain may wait for each other, but half of a shorter one may be fewer than
     * are held back. */
    bool lazy = chain == CHAIN_STEPS;
    for (uint32_t until = g->queued + steps; g->queued < until && !code; g->queued++) {
        pie_ref last = g->how.sampler ? c->tokens[c->length - 1] : pie_late(c->token);
        pie_future *answer = &g->waiting[g->queued % (2 * CHAIN_STEPS)];
        if (g->queued)
            code = pie_embed_txt(c->queue, c->hidden, 0, &last, 1, c->written, NULL);
        if (g->queued && !code)
            code = forward_inputs(c, c->hidden, 1, beyond_window(c, c->written), true);
        /* The first is waited for, and the last one brings all with it. */
        s.lazy = lazy && g->queued && g->queued + 1 < g->count;
        if (!code && g->how.sampler)
            code = pie_get_next_dist(c->queue, c->hidden, 0, s.k, s.offset, answer);
        else if (!code)
            code = pie_sample(c->queue, c->hidden, 0, c->token, &s, answer);
    }
    return restart(c, code);
}

/* Drops what is queued. Pages that nothing was written to may never have been made, as the cancel
 * dropped that too: they are let go, made or not. */
static int cut(pie_context *c)
{
    pie_future done;
    uint32_t blocks = c->block_count, end = page_end(c, c->written);
    int code = pie_cancel(c->queue, NULL);
    if (code || !blocks || c->blocks[blocks - 1].begin + c->blocks[blocks - 1].length <= end)
        return code;
    if ((code = free_pages(c, end, UINT32_MAX)) || (code = pie_synchronize(c->queue, &done)))
        return code;
    code = pie_wait(done, NULL);
    return code == PIE_BAD_HANDLE ? PIE_OK : code;
}

/* Ends the generation behind the last token of the context. What goes wrong with steps that nobody
 * waits for any more is no error: then the queue goes with them. */
static void end_generation(pie_context *c, pie_finish finish)
{
    struct generation *g = &c->run;
    uint32_t kept = c->length - g->base, waiting = g->queued - g->answered;
    /* The token before a stop token has gone through the model, and so has a prompt. */
    bool stopped = g->answered > kept;
    int code = PIE_OK;
    g->finish = finish;
    c->written = kept && !stopped ? c->length - 1 : c->length;
    c->ready = !kept && g->queued <= 1;
    /* Not before the first step, or what fills the context would be dropped with the others. */
    if (waiting && !g->answered)
        code = pie_wait(g->waiting[0], NULL);
    forget_steps(g);
    if (!code && !stopped && waiting)
        code = cut(c);
    if (!code)
        code = slide(c);
    if (!code && g->own_history)
        code = pie_dealloc_history(c->queue, g->how.sampling.history, NULL);
    g->running = false;
    restart(c, code);
}

/* Ends it, if it is not yet, because of the last error, which is returned. */
static int give_up(pie_context *c)
{
    struct error e = last_error();
    if (c->run.running)
        end_generation(c, PIE_FINISH_CLOSED);
    return tell(&e);
}

int pie_context_start(pie_context *c, const pie_generation *how)
{
    struct generation *g;
    pie_generation asked = how ? *how : (pie_generation){0};
    int code = settle(c);
    if (code)
        return code;
    const pie_model *m = &pie.models[c->model];
    if (asked.sampler)
        asked.sampling.k = dist_tokens(c, asked.sampling.k);
    if ((code = check_generation(c, &asked)))
        return code;
    if (!c->length)
        return fail(PIE_BAD_ARGUMENT, "fill the context first", "there is nothing to go on from");
    if (c->length == m->max_context)
        return fail(PIE_BAD_POSITION, "trim it, or start from a shorter text",
                    "the model's context of %lu is full", (unsigned long)m->max_context);
    if ((code = write_tokens(c)))
        return code;
    g = &c->run;
    free_generation(g);
    g->how = asked;
    g->how.sampling.masked = asked.sampling.masked || asked.constrain;
    g->base = c->length;
    g->count = m->max_context - c->length;
    g->count = asked.max_tokens < g->count ? asked.max_tokens : g->count;
    g->started = g->first = g->last = seconds_now();
    g->finish = PIE_GOING_ON;
    g->running = true;
    if (penalizes(&asked.sampling) && !asked.sampling.history.id)
        code = restart(c, alloc_own_history(c));
    if (!code)
        code = queue_steps(c);
    return code ? give_up(c) : PIE_OK;
}

static bool stops(const pie_sampling *sampling, pie_ref token)
{
    for (uint32_t i = 0; i < sampling->stop_count; i++)
        if (sampling->stop[i] == token)
            return true;
    return false;
}

/* The natural logarithm of a probability. libm's would be one more library to link with. */
static double log_of(double p)
{
    static const double ln_2 = 0.693147180559945309417;
    double sum = 0;
    int exponent = 0;
    if (!(p > 0))
        return -INFINITY;
    for (; p < 0.70710678118654752; p *= 2)
        exponent--;
    double y = (p - 1) / (p + 1), term = y; /* 2 artanh y, |y| < 0.172 */
    for (int n = 1; n < 24; n += 2, term *= y * y)
        sum += term / n;
    return 2 * sum + exponent * ln_2;
}

static bool allows(const pie_context *c, pie_ref token)
{
    const uint8_t *allowed = pie.ring_in + c->run.how.sampling.mask;
    return token < (pie_ref)pie.models[c->model].vocab_size && allowed[token / 8] >> token % 8 & 1;
}

/* Leaves of `dist` what the constraint allows, with probabilities that add up to 1, in memory of the
 * generation's own. */
static int keep_allowed(pie_context *c, pie_dist *dist)
{
    uint32_t count = 0;
    double sum = 0;
    uint32_t *tokens = realloc(c->run.allowed, 8 * ((size_t)dist->count + 1));
    if (!tokens)
        return no_memory();
    c->run.allowed = tokens;
    float *probabilities = (float *)(tokens + dist->count);
    for (uint32_t i = 0; i < dist->count; i++)
        if (allows(c, dist->tokens[i])) {
            tokens[count] = dist->tokens[i];
            probabilities[count++] = dist->probabilities[i];
            sum += (double)dist->probabilities[i];
        }
    if (!count)
        return fail(PIE_BAD_MASK, "raise sampling.k, or use the constraint without the sampler",
                    "the constraint allows none of the %lu most probable tokens, which are all "
                    "that the sampler gets", (unsigned long)dist->count);
    for (uint32_t i = 0; i < count; i++)
        probabilities[i] = sum > 0 ? (float)((double)probabilities[i] / sum) : 1 / (float)count;
    *dist = (pie_dist){tokens, probabilities, count};
    return PIE_OK;
}

/* The token that the sampler takes, or PIE_NO_TOKEN, and its log-probability. */
static int choose(pie_context *c, uint32_t entries, pie_piece *piece)
{
    const pie_generation *how = &c->run.how;
    pie_dist whole, dist;
    int code = pie_read_dist(how->sampling.offset, entries, &whole);
    dist = whole;
    if (code || (how->constrain && (code = keep_allowed(c, &dist))))
        return code;
    piece->token = how->sampler(&dist, how->user);
    if (piece->token < PIE_NO_TOKEN || piece->token >= (pie_ref)pie.models[c->model].vocab_size)
        return fail(PIE_BAD_ARGUMENT, "return an id of the distribution, or PIE_NO_TOKEN to end",
                    "the sampler took %lld, which is no token", (long long)piece->token);
    if (how->constrain && piece->token != PIE_NO_TOKEN && !allows(c, piece->token))
        return fail(PIE_BAD_ARGUMENT, "return an id of the distribution, or PIE_NO_TOKEN to end",
                    "the sampler took %lld, which the constraint does not allow",
                    (long long)piece->token);
    for (uint32_t i = 0; i < whole.count; i++)
        if ((pie_ref)whole.tokens[i] == piece->token)
            piece->logprob = log_of((double)whole.probabilities[i]);
    return PIE_OK;
}

static int push_text(struct generation *g, const char *text, size_t length)
{
    if (!text)
        return pie.error.code;
    if (g->capacity - g->length <= length) {
        char *larger = realloc(g->text, 2 * (g->length + length) + 64);
        if (!larger)
            return no_memory();
        g->text = larger;
        g->capacity = 2 * (g->length + length) + 64;
    }
    memcpy(g->text + g->length, text, length);
    g->length += length;
    g->text[g->length] = 0;
    return PIE_OK;
}

/* How far the text can be given out: up to a stop string, which `found` tells of, or up to what may
 * be the beginning of one. */
static size_t clear_text(const struct generation *g, bool *found)
{
    size_t clear = g->length;
    *found = false;
    for (uint32_t i = 0; i < g->how.stop_string_count && g->text; i++) {
        const char *stop = g->how.stop_strings[i], *at = *stop ? g->text + g->given : NULL;
        for (; at && at < g->text + g->length; at++) {
            size_t left = (size_t)(g->text + g->length - at), size = strlen(stop);
            if (memcmp(at, stop, left < size ? left : size))
                continue;
            size_t offset = (size_t)(at - g->text);
            bool whole = left >= size;
            if (whole && (!*found || offset < clear))
                clear = offset;
            else if (!whole && !*found && offset < clear)
                clear = offset;
            *found = *found || whole;
            break;
        }
    }
    return clear;
}

static void give_text(struct generation *g, size_t until, pie_piece *piece)
{
    piece->length = until - g->given;
    if (piece->length)
        piece->text = g->text + g->given;
    g->given = until;
}

/* Ends the generation and gives out what text is left. */
static int finish(pie_context *c, pie_finish why, pie_piece *piece)
{
    struct generation *g = &c->run;
    size_t length;
    const char *rest = pie_stream_end(&g->stream, &length);
    if (push_text(g, rest, length))
        return give_up(c);
    give_text(g, g->length, piece);
    end_generation(c, piece->finish = why);
    return PIE_OK;
}

/* Appends the token of `piece` and gives out its text. */
static int take_token(pie_context *c, pie_piece *piece)
{
    struct generation *g = &c->run;
    size_t length;
    bool found;
    const char *text = pie_stream_push(&g->stream, piece->token, &length);
    if (push_text(g, text, length) || push_tokens(c, &piece->token, 1))
        return give_up(c);
    c->generated++;
    size_t clear = clear_text(g, &found);
    bool ends = g->how.stop_when && g->how.stop_when(g->text, g->length, g->how.user);
    give_text(g, ends && !found ? g->length : clear, piece);
    if (found || ends)
        end_generation(c, piece->finish = PIE_FINISH_STOP);
    return PIE_OK;
}

int pie_context_next(pie_context *c, pie_piece *piece)
{
    pie_value value;
    *piece = (pie_piece){.token = PIE_NO_TOKEN, .text = "", .logprob = NAN};
    int code = context_check(c);
    if (code)
        return code;
    struct generation *g = &c->run;
    if (!g->running) {
        piece->finish = g->finish;
        return g->finish ? PIE_OK : fail(PIE_BAD_ARGUMENT, "call pie_context_start before",
                                         "no generation was started on this context");
    }
    if (queue_steps(c))
        return give_up(c);
    if (g->complete || g->answered == g->count)
        return finish(c, g->complete ? PIE_FINISH_STOP : PIE_FINISH_LENGTH, piece);
    code = pie_wait(g->waiting[g->answered % (2 * CHAIN_STEPS)], &value);
    if (!code && (value.number == PIE_NO_TOKEN ||
                  (!g->how.sampler && value.number >= pie.models[c->model].vocab_size)))
        code = fail(PIE_BACKEND, "report it",
                    "a step was dropped before any stop, or sampled what is no token");
    if (code)
        return restart(c, code);
    g->last = seconds_now();
    if (++g->answered == 1) {
        g->first = g->last;
        c->inputs = 0; /* the prompt is through */
    }
    if (g->how.sampler) {
        if (choose(c, (uint32_t)value.number, piece))
            return give_up(c);
    } else {
        piece->token = value.number;
        piece->logprob = value.kind == PIE_SAMPLED ? value.logprob : NAN;
    }
    if (piece->token == PIE_NO_TOKEN || stops(&g->how.sampling, piece->token)) {
        piece->token = PIE_NO_TOKEN;
        piece->logprob = NAN;
        return finish(c, PIE_FINISH_STOP, piece);
    }
    if ((code = take_token(c, piece)) || piece->finish)
        return code;
    /* A step that waits for each token is queued before the other contexts' turns. What goes wrong
     * is told by the next call, as this token is there: the constraint is asked again. */
    if (g->answered == g->queued && queue_steps(c) && !g->running)
        c->failed = last_error();
    return PIE_OK;
}

int pie_context_stop(pie_context *c)
{
    return settle(c);
}

int pie_context_generate(pie_context *c, uint32_t count, const pie_sampling *sampling,
                         pie_on_token on_token, void *user)
{
    pie_generation how = {.max_tokens = count};
    pie_piece piece = {.finish = PIE_GOING_ON};
    if (sampling)
        how.sampling = *sampling;
    int code = pie_context_start(c, &how);
    while (!code && !piece.finish) {
        code = pie_context_next(c, &piece);
        if (!code && piece.token != PIE_NO_TOKEN && on_token && on_token(piece.token, user))
            return pie_context_stop(c);
    }
    return code;
}

/* -------------------------------------------------------------------------------- branches --- */

int pie_gather(const pie_future *futures, uint32_t count, pie_value *values)
{
    struct error first = {.code = PIE_OK};
    for (uint32_t i = 0; i < count; i++)
        if (pie_wait(futures[i], values ? &values[i] : NULL) && !first.code)
            first = last_error();
    return first.code ? tell(&first) : PIE_OK;
}

/* Makes the slots before `written` of `to` those of `from`: full pages shared, the last copied. */
static int share_slots(pie_context *to, const pie_context *from)
{
    uint32_t shared = page_of(to, to->written), size = page_size(to);
    int code = PIE_OK;
    for (uint32_t i = 0; i < from->block_count && from->blocks[i].begin < shared && !code; i++) {
        struct block b = from->blocks[i];
        b.length = b.length < shared - b.begin ? b.length : shared - b.begin;
        b.kv = pie_share_kvpage(to->queue, b.kv, b.first / size, b.length / size, NULL);
        b.first = 0;
        code = b.kv.id ? add_block(to, b) : pie.error.code;
    }
    const struct block *last = block_of(from, shared);
    if (!code && last && shared < to->written && !(code = alloc_block(to, shared, 1))) {
        pie_kv_span source = {last->kv, last->first + (shared - last->begin), to->written - shared};
        pie_kv_span target = {to->blocks[to->block_count - 1].kv, 0, source.length};
        code = pie_copy_kvpage(to->queue, source, target, NULL);
    }
    to->shared = shared;
    return code;
}

pie_context *pie_context_fork(pie_context *c)
{
    if (settle(c))
        return NULL;
    if (c->written + 1 < c->length && write_tokens(c))
        return NULL;
    if (wait_for(c))
        return NULL;
    pie_context *branch = pie_context_create(c->model);
    if (!branch)
        return NULL;
    branch->filled = c->filled;
    branch->generated = c->generated;
    branch->sink = c->sink;
    branch->recent = c->recent;
    branch->written = c->length && c->written == c->length ? c->length - 1 : c->written;
    if (push_tokens(branch, c->tokens, c->length) ||
        copy_ranges(&branch->hidden_tokens, &c->hidden_tokens) ||
        copy_ranges(&branch->evicted, &c->evicted) || share_slots(branch, c) ||
        wait_for_queue(branch->queue)) { /* only then may the pages here change */
        pie_context_destroy(branch);
        return NULL;
    }
    c->shared = c->shared > branch->shared ? c->shared : branch->shared;
    return branch;
}

int pie_context_join(pie_context *c, pie_context *branch)
{
    int code = settle(branch);
    if (code || (code = settle(c)))
        return code;
    if (c == branch || c->model != branch->model)
        return fail(PIE_BAD_ARGUMENT, "join what pie_context_fork made of this context",
                    "the two contexts are one, or of two models");
    pie_context before = *c, *next = branch->next;
    *c = *branch;
    *branch = before;
    c->next = branch->next;
    branch->next = next;
    pie_context_destroy(branch);
    return PIE_OK;
}

/* Goes on with all branches in turn, each until it ends; `means` gets their mean
 * log-probabilities. */
static int run_branches(pie_context **branches, uint32_t n, double *means)
{
    uint32_t running = n;
    for (uint32_t i = 0; i < n; i++)
        means[i] = 0;
    while (running) {
        for (uint32_t i = 0; i < n; i++) {
            pie_piece piece;
            if (!branches[i]->run.running && !branches[i]->failed.code)
                continue;
            int code = pie_context_next(branches[i], &piece);
            if (code)
                return code;
            if (piece.token != PIE_NO_TOKEN)
                means[i] += piece.logprob;
            running -= piece.finish != PIE_GOING_ON;
        }
    }
    for (uint32_t i = 0; i < n; i++) {
        uint32_t tokens = branches[i]->length - branches[i]->run.base;
        means[i] = tokens && !isnan(means[i]) ? means[i] / tokens : -INFINITY;
    }
    return PIE_OK;
}

int pie_context_best_of(pie_context *c, uint32_t n, const pie_generation *how, double *mean)
{
    int code = settle(c);
    if (code)
        return code;
    if (!n)
        return fail(PIE_BAD_ARGUMENT, "choose 1 or more", "the best of no branches");
    if (n > 1 && !(how && (how->sampler || how->sampling.temperature > 0)))
        return fail(PIE_BAD_ARGUMENT, "choose a temperature of 0.5 to 1.2",
                    "temperature 0 makes all branches the same");
    pie_context **branches = calloc(n, sizeof *branches);
    double *means = calloc(n, sizeof *means);
    pie_generation own = how ? *how : (pie_generation){0}; /* a branch's */
    own.sampling.logprobs = !own.sampler;
    if (!branches || !means)
        code = no_memory();
    for (uint32_t i = 0; i < n && !code; i++) {
        if (!(branches[i] = pie_context_fork(c)) || pie_context_start(branches[i], &own))
            code = pie.error.code;
        own.sampling.seed++;
        own.sampling.mask += own.constrain ? mask_octets(c) : 0;
        own.sampling.offset += own.sampler ? 8 * dist_tokens(c, own.sampling.k) : 0;
    }
    if (!code)
        code = run_branches(branches, n, means);
    uint32_t best = 0;
    for (uint32_t i = 1; i < n && !code; i++)
        best = means[i] > means[best] ? i : best;
    if (!code && mean)
        *mean = means[best];
    if (!code && !(code = pie_context_join(c, branches[best])))
        branches[best] = NULL;
    for (uint32_t i = 0; branches && i < n; i++)
        pie_context_destroy(branches[i]);
    free(branches);
    free(means);
    return code;
}

/* --------------------------------------------------------------------------- saved contexts --- */

/* Part p of a saved context is an export: pages of its tokens' slots side by side, and in its meta
 * this head and the tokens, three octets each. All numbers are little-endian. */
enum {
    SAVED_VERSION = 1,
    PART_TOKENS = 16384,
    SAVED_HEAD = 17 /* "PIEC", u8 version, u32 parts, u32 tokens and u32 written, of all parts */
};

struct saved {
    uint32_t parts, tokens, written;
};

static void put_le32(uint8_t *p, uint32_t n)
{
    for (int i = 0; i < 4; i++)
        p[i] = (uint8_t)(n >> 8 * i);
}

/* The name of part `part`. */
static int part_name(char *to, size_t size, const char *name, uint32_t part)
{
    const char *whole = name ? name : "";
    int n = part ? snprintf(to, size, "%s#%lu", whole, (unsigned long)part)
                 : snprintf(to, size, "%s", whole);
    if (n < 0 || (size_t)n >= size)
        return fail(PIE_BAD_ARGUMENT, "choose a shorter one", "a name has 1 to 256 octets");
    return PIE_OK;
}

/* Queues the export of the tokens [begin, end). */
static int export_part(pie_context *c, const char *name, uint32_t begin, uint32_t end,
                       int64_t lease, pie_future *answer)
{
    size_t size = SAVED_HEAD + 3 * (size_t)(end - begin);
    uint8_t *meta = malloc(size);
    pie_kv_range *pages = malloc((c->block_count + 1) * sizeof *pages);
    uint32_t count = 0, stop = page_end(c, end), a_page = page_size(c);
    int code = meta && pages ? PIE_OK : no_memory();
    for (uint32_t i = 0; !code && i < c->block_count; i++) {
        const struct block *b = &c->blocks[i];
        uint32_t from = b->begin > begin ? b->begin : begin;
        uint32_t to = b->begin + b->length < stop ? b->begin + b->length : stop;
        if (from < to)
            pages[count++] = (pie_kv_range){b->kv, (b->first + from - b->begin) / a_page,
                                            (to - from) / a_page};
    }
    if (!code) {
        memcpy(meta, "PIEC", 4);
        meta[4] = SAVED_VERSION;
        put_le32(meta + 5, (c->length + PART_TOKENS - 1) / PART_TOKENS);
        put_le32(meta + 9, c->length);
        put_le32(meta + 13, c->length); /* all are written */
        for (uint32_t i = begin; i < end; i++)
            for (unsigned octet = 0; octet < 3; octet++)
                meta[SAVED_HEAD + 3 * (i - begin) + octet] = (uint8_t)(c->tokens[i] >> 8 * octet);
        code = pie_export_kvpage(c->queue, name, pages, count, meta, size, lease, answer);
    }
    free(meta);
    free(pages);
    return code;
}

static bool is_export(const char *name)
{
    pie_future answer;
    pie_value listed;
    if (pie_list_exported(name, NULL, &answer) || pie_wait(answer, &listed))
        return false;
    bool found = listed.length && !strcmp(listed.exports[0].name, name); /* it would be the first */
    pie_value_free(&listed);
    return found;
}

/* The last error, of the export of `part`, to who knows nothing of exports. */
static int not_saved(int code, const char *part)
{
    static const char call[] = "unexport_kvpage";
    struct error e = last_error();
    char *at = strstr(e.hint, call), rest[sizeof e.hint];
    if (code == PIE_BAD_ARGUMENT && is_export(part))
        return fail(code, "pie_context_unsave it first, or save it under another name",
                    "the name '%s' is taken by a saved context or an export", part);
    if (at) {
        snprintf(rest, sizeof rest, "%s", at + strlen(call));
        snprintf(at, sizeof e.hint - (size_t)(at - e.hint), "pie_context_unsave%s", rest);
    }
    return tell(&e);
}

/* The same for the import, or the end of the export, of part `part` of the context `name`. */
static int not_found(int code, const char *name, uint32_t part)
{
    if (code != PIE_NOT_FOUND)
        return code;
    if (part)
        return fail(code, "pie_context_unsave it, and save it again",
                    "a part of the saved context '%s' is gone", name);
    return fail(code, "save it first, with a lease if it is to outlive the inferlet that saves it",
                "no saved context has the name '%s'", name);
}

int pie_context_save(pie_context *c, const char *name, int64_t lease)
{
    char part[PIE_MAX_NAME + 1];
    pie_future answer;
    int code = settle(c);
    if (code)
        return code;
    if (!c->length)
        return fail(PIE_BAD_ARGUMENT, "fill it first", "an empty context cannot be saved");
    if (c->hidden_tokens.count)
        return fail(PIE_BAD_ARGUMENT, "show them, or save before they are hidden",
                    "a saved context cannot tell that tokens are masked or evicted");
    if (c->written < c->length && (code = write_tokens(c)))
        return code;
    if ((code = wait_for(c)))
        return code;
    uint32_t parts = (c->length + PART_TOKENS - 1) / PART_TOKENS, left = parts;
    if ((code = part_name(part, sizeof part, name, parts - 1)))
        return code;
    while (left && !code) { /* the first comes last: who finds it finds all */
        uint32_t begin = (left - 1) * PART_TOKENS;
        uint32_t end = c->length - begin < PART_TOKENS ? c->length : begin + PART_TOKENS;
        part_name(part, sizeof part, name, left - 1);
        if (!(code = export_part(c, part, begin, end, lease, &answer)) &&
            !(code = pie_wait(answer, NULL)))
            left--;
    }
    if (left < parts)
        c->shared = page_end(c, c->length);
    if (!code)
        return PIE_OK;
    code = not_saved(code, part);
    /* What was exported goes again, and the queue, which stopped at the error, is usable again. */
    struct error e = last_error();
    for (uint32_t i = left; i < parts; i++) {
        part_name(part, sizeof part, name, i);
        pie_unexport_kvpage(part, NULL);
    }
    wait_for_queue(c->queue);
    return tell(&e);
}

/* Ends all exports in `listed` that are parts. */
static void unexport_parts(const pie_value *listed, size_t name_length)
{
    for (size_t i = 0; i < listed->length; i++) {
        const char *number = listed->exports[i].name + name_length + 1; /* behind the # */
        if (*number && strspn(number, "0123456789") == strlen(number))
            pie_unexport_kvpage(listed->exports[i].name, NULL);
    }
}

int pie_context_unsave(const char *name)
{
    char prefix[PIE_MAX_NAME + 1], after[PIE_MAX_NAME + 1] = "";
    pie_future answer;
    pie_value listed;
    int code = pie_unexport_kvpage(name, &answer);
    if (code || (code = pie_wait(answer, NULL)))
        return not_found(code, name, 0);
    if (snprintf(prefix, sizeof prefix, "%s#", name) >= (int)sizeof prefix)
        return PIE_OK; /* no part has so long a name */
    for (size_t count = 1; count;) {
        if ((code = pie_list_exported(prefix, after, &answer)) ||
            (code = pie_wait(answer, &listed)))
            return code;
        unexport_parts(&listed, strlen(name));
        count = listed.length;
        if (count)
            snprintf(after, sizeof after, "%s", listed.exports[count - 1].name);
        pie_value_free(&listed);
    }
    return PIE_OK;
}

/* Reads the head of part `part` and appends its tokens. */
static int read_part(pie_context *c, const pie_value *value, uint32_t part, struct saved *saved)
{
    static const char hint[] = "restore what was saved with this model";
    const pie_model *m = &pie.models[c->model];
    const uint8_t *meta = value->bytes;
    struct saved head;
    if (value->length < SAVED_HEAD || memcmp(meta, "PIEC", 4) || meta[4] != SAVED_VERSION)
        return fail(PIE_BAD_ARGUMENT, hint, "the export is no saved context of version 1");
    head = (struct saved){le32(meta + 5), le32(meta + 9), le32(meta + 13)};
    if (!part)
        *saved = head;
    uint32_t begin = part * PART_TOKENS;
    uint32_t tokens = head.tokens - begin < PART_TOKENS ? head.tokens - begin : PART_TOKENS;
    uint32_t written = head.written > begin ? head.written - begin : 0;
    written = written < tokens ? written : tokens;
    if (head.tokens > m->max_context)
        return fail(PIE_BAD_POSITION, hint,
                    "the saved context has %lu tokens, this model holds %lu",
                    (unsigned long)head.tokens, (unsigned long)m->max_context);
    if (!head.tokens || head.written > head.tokens ||
        head.parts != (head.tokens + PART_TOKENS - 1) / PART_TOKENS || part >= head.parts ||
        memcmp(&head, saved, sizeof head) || value->length != SAVED_HEAD + 3 * (size_t)tokens ||
        value->number < page_end(c, written) / page_size(c) ||
        value->number > PART_TOKENS / page_size(c))
        return fail(PIE_BAD_ARGUMENT, hint,
                    "part %lu of the saved context does not fit the others or this model",
                    (unsigned long)part);
    for (uint32_t i = 0; i < tokens; i++) {
        const uint8_t *octets = meta + SAVED_HEAD + 3 * (size_t)i;
        pie_ref token = octets[0] | octets[1] << 8 | octets[2] << 16;
        if (token >= (pie_ref)m->vocab_size)
            return fail(PIE_BAD_ARGUMENT, hint, "the saved token %lld is none of this model's %lu",
                        (long long)token, (unsigned long)m->vocab_size);
        if (push_tokens(c, &token, 1))
            return pie.error.code;
    }
    return PIE_OK;
}

/* Imports part `part` as the next block. */
static int import_part(pie_context *c, const char *name, uint32_t part, struct saved *saved)
{
    char own[PIE_MAX_NAME + 1];
    pie_future answer;
    pie_value value;
    int code = part_name(own, sizeof own, name, part);
    if (code)
        return code;
    pie_kvpage kv = pie_import_kvpage(c->queue, own, &answer);
    if ((code = pie_wait(answer, &value)))
        return not_found(code, name, part);
    if (!(code = read_part(c, &value, part, saved)))
        code = add_block(c, (struct block){kv, 0, part * PART_TOKENS,
                                           (uint32_t)value.number * page_size(c)});
    pie_value_free(&value);
    return code;
}

pie_context *pie_context_restore(uint32_t model, const char *name)
{
    struct saved saved = {1, 0, 0};
    pie_context *c = pie_context_create(model);
    int code = c ? PIE_OK : pie.error.code;
    for (uint32_t part = 0; part < saved.parts && !code; part++)
        code = import_part(c, name, part, &saved);
    if (code) {
        pie_context_destroy(c);
        return NULL;
    }
    c->filled = c->length;
    c->written = saved.written;
    c->shared = page_end(c, saved.written);
    if (free_pages(c, c->shared, UINT32_MAX)) { /* of which the exporter gave more than it wrote */
        pie_context_destroy(c);
        return NULL;
    }
    return c;
}
