/* test_connection -- the binding against a peer scripted here, without any other language.
 *
 * Each case runs in a process of its own, because a process has one connection. It holds both ends
 * of a socketpair: descriptor 3 is the binding's, PEER the controller's, and the answers are put
 * there before they are waited for. */
#define _GNU_SOURCE

#include "inferlet.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PEER = 9 };

#define CHECK(condition)                                                      \
    do {                                                                      \
        if (!(condition)) {                                                   \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);   \
            exit(1);                                                          \
        }                                                                     \
    } while (0)

/* A memfd at the descriptor `fd`. */
static void give(int fd, const void *data, size_t length)
{
    int made = memfd_create("given", 0);
    CHECK(made >= 0 && write(made, data, length) == (ssize_t)length);
    if (made != fd) {
        CHECK(dup2(made, fd) == fd);
        close(made);
    }
}

/* Start-up block: {"abi": 1, "id": "t", "args": ["-x"], "models": [], "limits": {"tokens": 9,
 * "store_bytes": 2**32}, "version": "0", "user": "u", "job": "j", "deadline": 2.5} */
static const char block[] = "\x89\xa3" "abi" "\x01\xa2" "id" "\xa1t" "\xa4" "args" "\x91\xa2-x"
                            "\xa6" "models" "\x90\xa6" "limits" "\x82\xa6" "tokens" "\x09"
                            "\xab" "store_bytes" "\xcf\0\0\0\1\0\0\0\0"
                            "\xa7" "version" "\xa1" "0" "\xa4" "user" "\xa1u" "\xa3" "job" "\xa1j"
                            "\xa8" "deadline" "\xca\x40\x20\0\0";
/* Vocabulary of three: "a", the first two octets of the euro sign, its third. */
static const char vocab[] = "PIEV\1\0\0\0\3\0\0\0" "\0\0\0\0\1\0\0\0\3\0\0\0\4\0\0\0" "\0\0\0"
                            "a\xe2\x82\xac";

static void start(void)
{
    int ends[2];
    CHECK(!socketpair(AF_UNIX, SOCK_STREAM, 0, ends));
    int peer = fcntl(ends[1], F_DUPFD, PEER);
    int mine = fcntl(ends[0], F_DUPFD, PEER + 1);
    close(ends[0]);
    close(ends[1]);
    CHECK(peer == PEER && dup2(mine, 3) == 3);
    close(mine);
    give(4, "\0\0\0\0\0\0\0\0", 8);
    give(5, "\0\0\0\0\0\0\0\0", 8);
    give(6, block, sizeof block - 1);
    give(7, vocab, sizeof vocab - 1);
    CHECK(pie_init() == PIE_OK);
}

/* The binding wrote exactly these octets. */
static void expect(const void *octets, size_t length)
{
    uint8_t got[256];
    CHECK(length < sizeof got);
    CHECK(recv(PEER, got, sizeof got, MSG_DONTWAIT) == (ssize_t)length);
    CHECK(!memcmp(got, octets, length));
}

static void answer(const void *octets, size_t length)
{
    CHECK(write(PEER, octets, length) == (ssize_t)length);
}

#define EXPECT(text) expect(text, sizeof(text) - 1)
#define ANSWER(text) answer(text, sizeof(text) - 1)

static void what_the_process_was_given(void)
{
    uint32_t models;
    pie_available_models(&models);
    CHECK(!strcmp(pie_get_id(), "t") && !strcmp(pie_get_arg(0), "-x") && !pie_get_arg(1));
    CHECK(!models && pie_get_limits()->tokens == 9 && !pie_get_kvpage_size(0));
    CHECK(pie_get_limits()->store_bytes == (uint64_t)1 << 32 && !pie_get_limits()->history);
    CHECK(!strcmp(pie_get_version(), "0") && !strcmp(pie_get_user(), "u"));
    CHECK(!strcmp(pie_get_job(), "j") && pie_get_deadline() == 2.5);
    CHECK(pie_init() == PIE_OK); /* a second call is no error */
}

static void a_pipeline_is_one_frame(void)
{
    pie_future done;
    pie_queue q = pie_create_queue(0, NULL);
    pie_emb e = pie_alloc_emb(q, 2, NULL);
    pie_token t = pie_new_token();
    pie_ref late = pie_late(t);
    CHECK(pie_embed_txt(q, e, 1, &late, 1, 300, NULL) == PIE_OK);
    CHECK(pie_synchronize(q, &done) == PIE_OK);
    CHECK(recv(PEER, &late, 1, MSG_DONTWAIT) < 0); /* nothing has left yet */
    CHECK(pie_flush() == PIE_OK);
    EXPECT("\x00\x1c\x94"
           "\x94\x03\xc0\x01\x00"
           "\x95\x0d\xc0\x01\x01\x02"
           "\x96\x10\xc0\x01\x92\x01\x01\x91\xfe\xcd\x01\x2c"
           "\x93\x05\x01\x01");
    ANSWER("\x00\x05\x91\x93\x00\x01\xc0");
    CHECK(pie_wait(done, NULL) == PIE_OK);
    CHECK(pie_wait(done, NULL) == PIE_BAD_HANDLE);
}

static void answers_in_any_order(void)
{
    pie_future a, b, c;
    pie_value v;
    CHECK(!pie_receive(&a) && !pie_receive(&b) && !pie_receive(&c));
    CHECK(!pie_flush());
    ANSWER("\x00\x08\x91\x93\x00\x03\xc4\x02hi");
    ANSWER("\x00\x0d\x92\x93\x00\x01\xc4\x00\x95\x01\x02\x0e\xa1m\xa0");
    CHECK(pie_wait(b, &v) == PIE_CLOSED);
    CHECK(!strcmp(pie_error().message, "m") && !strcmp(pie_error().hint, ""));
    CHECK(!strcmp(pie_error_name(PIE_CLOSED), "closed"));
    CHECK(!pie_wait(c, &v) && v.kind == PIE_BYTES && v.length == 2 && !memcmp(v.bytes, "hi", 3));
    free(v.bytes);
    CHECK(pie_ready(a));
    pie_forget(a);
    CHECK(pie_wait(a, &v) == PIE_BAD_HANDLE);
}

static void a_value_is_freed_as_one(void)
{
    static const pie_header accept = {"accept", "*/*"};
    pie_future response, message, tokens;
    pie_value v;
    CHECK(pie_http_get("http://a/", &accept, 1, &response).id == 1);
    CHECK(!pie_next_message(pie_subscribe("t", true, NULL), &message));
    CHECK(!pie_tokenize(0, "x", 1, true, &tokens) && !pie_flush());
    EXPECT("\x00\x2d\x94"
           "\x95\x1f\x01\x01\xa9http://a/\x81\xa6" "accept" "\xa3*/*"
           "\x95\x17\xc0\x01\xa1t\xc3"
           "\x93\x19\x02\x01"
           "\x95\x14\x03\x00\xa1x\xc3");
    ANSWER("\x00\x1e\x93"
           "\x93\x00\x01\x92\xcc\xc8\x81\xa1" "a" "\xa2" "bc"
           "\x93\x00\x02\x92\xc4\x02hi\xa2me"
           "\x93\x00\x03\x92\x07\x08");
    CHECK(!pie_wait(message, &v) && v.kind == PIE_MESSAGE);
    CHECK(v.length == 2 && !memcmp(v.bytes, "hi", 3) && !strcmp(v.text, "me"));
    pie_value_free(&v);
    CHECK(v.kind == PIE_NIL && !v.bytes && !v.text && v.number == PIE_NO_TOKEN);
    pie_value_free(&v); /* no harm */
    CHECK(!pie_wait(response, &v) && v.kind == PIE_RESPONSE && v.number == 200 && v.length == 1);
    CHECK(!strcmp(v.headers[0].name, "a") && !strcmp(v.headers[0].value, "bc") && !v.tokens);
    pie_value_free(&v);
    CHECK(!pie_wait(tokens, &v) && v.length == 2 && v.tokens[1] == 8);
    free(v.tokens); /* does the same for this kind */
}

/* What is written to ring in is there for who has the descriptor, and ring out is its own. */
static void the_rings_are_shared(void)
{
    float one = 1.0f, got = 0;
    size_t in, out;
    CHECK(pie_ring_in(&in) && pie_ring_out(&out) && in == 8 && out == 8);
    *pie_ring_in_floats(4, 1) = one;
    CHECK(pread(5, &got, 4, 4) == 4 && got == one && pie_ring_in(NULL)[0] == 0);
    CHECK(pwrite(4, &one, 4, 4) == 4 && *pie_ring_out_floats(4, 1) == one);
    CHECK(!pie_ring_in_floats(8, 1) && pie_error().code == PIE_BAD_ARGUMENT);
}

static void a_failed_call_shows_where_it_is_used(void)
{
    pie_future f;
    pie_queue q = pie_create_queue(0, NULL);
    pie_kvpage none = {0};
    CHECK(pie_dealloc_kvpage(q, none, 0, &f) == PIE_BAD_HANDLE);
    CHECK(pie_wait(f, NULL) == PIE_BAD_HANDLE);
    CHECK(!pie_flush());
    EXPECT("\x00\x06\x91\x94\x03\xc0\x01\x00"); /* and nothing of it was sent */
}

static void the_end_of_the_controller(void)
{
    pie_future f;
    CHECK(!pie_receive(&f));
    close(PEER);
    CHECK(pie_wait(f, NULL) == PIE_CLOSED);
    CHECK(pie_receive(&f) == PIE_CLOSED && pie_flush() == PIE_CLOSED);
}

static void a_wrong_answer_ends_the_connection(void)
{
    pie_future f;
    CHECK(!pie_receive(&f) && !pie_flush());
    ANSWER("\x00\x09\x91\x93\x00\x01\xc6\xff\xff\xff\xff"); /* 4 GiB are promised */
    CHECK(pie_wait(f, NULL) == PIE_BAD_FRAME);
    CHECK(pie_receive(&f) == PIE_BAD_FRAME);
}

static void a_mask_is_packed_row_by_row(void)
{
    static const bool attend[2 * 9] = {1, 0, 1, 0, 0, 0, 0, 1, 1, /* */ 0, 1, 0, 0, 0, 0, 0, 0, 0};
    uint8_t packed[4];
    pie_pack_mask(attend, 2, 9, packed);
    CHECK(!memcmp(packed, "\x85\x01\x02\x00", 4));
}

static void text_of_tokens(void)
{
    static const pie_ref tokens[] = {0, 1, 2};
    pie_stream stream = {0};
    pie_vocab v;
    char text[3];
    size_t length;
    CHECK(pie_detokenize(tokens, 3, text, sizeof text) == 4 && !memcmp(text, "a\xe2\x82", 3));
    CHECK(!strcmp(pie_stream_push(&stream, 0, &length), "a") && length == 1);
    CHECK(!strcmp(pie_stream_push(&stream, 1, &length), "") && length == 0);
    CHECK(!strcmp(pie_stream_push(&stream, 2, NULL), "\xe2\x82\xac"));
    CHECK(!strcmp(pie_stream_push(&stream, 1, NULL), ""));
    CHECK(!strcmp(pie_stream_end(&stream, NULL), "\xef\xbf\xbd"));
    pie_stream_free(&stream);
    CHECK(pie_get_vocabs(1, &v, 1) == 3 && v.length == 2 && !v.control);
}

int main(void)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } cases[] = {
#define CASE(name) {#name, name}
        CASE(what_the_process_was_given),     CASE(a_pipeline_is_one_frame),
        CASE(answers_in_any_order),           CASE(a_failed_call_shows_where_it_is_used),
        CASE(the_end_of_the_controller),      CASE(a_wrong_answer_ends_the_connection),
        CASE(a_mask_is_packed_row_by_row),    CASE(text_of_tokens),
        CASE(a_value_is_freed_as_one),        CASE(the_rings_are_shared),
    };
    size_t failed = 0, count = sizeof cases / sizeof *cases;
    for (size_t i = 0; i < count; i++) {
        int status = 0;
        pid_t child = fork();
        if (child == 0) {
            start();
            cases[i].run();
            return 0; /* through the exit handlers, the leak check among them */
        }
        CHECK(child > 0 && waitpid(child, &status, 0) == child);
        if (status) {
            fprintf(stderr, "FAILED: %s\n", cases[i].name);
            failed++;
        }
    }
    printf("%zu cases, %s\n", count, failed ? "some failed" : "all passed");
    return failed != 0;
}
