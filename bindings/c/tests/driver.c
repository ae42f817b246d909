/* driver -- makes the calls that it reads from standard input, one a line, and prints what they
 * give, so that a test in another language can play the controller. tests/test_c_binding.py does.
 *
 * A line is words; `@5` before a call asks for its answer under request 5, by which `wait`, `ready`
 * and `forget` name it. Octets are hex, `-` for none; arrays have their length before them; handles
 * that a call makes are given too. The binding counts requests and handles up by itself: the file
 * is included, not linked, only so that the counters can be set to what a vector holds.
 *
 * driver_words.h reads words and prints answers, driver_commands.h has the ABI's commands,
 * driver_context.h the support layer's calls; here are all others. */
#include "../inferlet.c"

#include "driver_words.h"

#include "driver_commands.h"

#include "driver_context.h"

static pie_stream stream;

static void print_startup(void)
{
    uint32_t models, traits;
    const pie_model *m = pie_available_models(&models);
    const pie_limits *l = pie_get_limits();
    printf("id %s\nversion %s\nuser %s\njob %s\ndeadline %.17g\nmodels %u\n", pie_get_id(),
           pie_get_version(), pie_get_user(), pie_get_job(), pie_get_deadline(), models);
    for (uint32_t i = 0; pie_get_arg(i); i++) {
        printf("arg ");
        print_hex(pie_get_arg(i), strlen(pie_get_arg(i)));
        putchar('\n');
    }
    for (uint32_t i = 0; i < models; i++) {
        printf("model %s|%s|%s|%s\n", m[i].name, m[i].description, m[i].architecture,
               m[i].chat_template ? m[i].chat_template : "(none)");
        printf("numbers %u %u %u %u %lld\neos", pie_get_kvpage_size(i), m[i].vocab_size,
               m[i].hidden_size, m[i].max_context, (long long)m[i].bos_token);
        for (uint32_t j = 0; j < m[i].eos_count; j++)
            printf(" %lld", (long long)m[i].eos_tokens[j]);
        printf("\ntraits");
        const char *const *names = pie_available_traits(i, &traits);
        for (uint32_t j = 0; j < traits; j++)
            printf(" %s", names[j]);
        putchar('\n');
    }
    printf("limits %u %u %u %u %u %u %u %u %u %u %u %u %u %llu\n", l->kv_pages, l->embeds,
           l->tokens, l->commands, l->frame_bytes, l->top_k, l->ring_bytes, l->ring_in_bytes,
           l->history, l->export_pages, l->children, l->subscriptions, l->http_streams,
           (unsigned long long)l->store_bytes);
}

static void print_vocab(void)
{
    uint32_t count = pie_get_vocabs(0, NULL, 0);
    pie_vocab *vocabs = malloc((count + 1) * sizeof *vocabs);
    pie_get_vocabs(0, vocabs, count);
    for (uint32_t i = 0; i < count; i++) {
        printf("%d ", vocabs[i].control);
        print_hex(vocabs[i].text, vocabs[i].length);
        putchar('\n');
    }
    free(vocabs);
    printf("count %u\n", count);
}

static void print_detokenized(void)
{
    uint32_t count;
    pie_ref *tokens = refs(&count);
    size_t length = pie_detokenize(tokens, count, NULL, 0);
    char *octets_of = malloc(length ? length : 1);
    pie_detokenize(tokens, count, octets_of, length);
    print_hex(octets_of, length);
    putchar('\n');
    free(octets_of);
    free(tokens);
}

static void print_dist(void)
{
    pie_dist dist;
    uint32_t offset = number();
    int code = pie_read_dist(offset, number(), &dist);
    if (code) {
        print_error(code);
        return;
    }
    print_entries(&dist);
}

/* `offset` and the number of floats: those of ring out. */
static void print_floats(void)
{
    uint32_t offset = number(), count = number();
    const float *floats = pie_ring_out_floats(offset, count);
    if (!floats) {
        print_error(pie_error().code);
        return;
    }
    printf("floats");
    for (uint32_t i = 0; i < count; i++)
        printf(" %.9g", (double)floats[i]);
    putchar('\n');
}

/* `offset` and numbers, their count before them: into ring in. */
static void put_floats(void)
{
    uint32_t offset = number(), count = number();
    float *floats = pie_ring_in_floats(offset, count);
    for (uint32_t i = 0; i < count; i++) {
        float value = (float)real();
        if (floats)
            floats[i] = value;
    }
    report(floats ? PIE_OK : pie_error().code);
}

/* `offset`, the size of the vocabulary and the tokens that are allowed: a mask into ring in. */
static void put_token_mask(void)
{
    uint32_t offset = number(), vocab = number(), count;
    pie_ref *allowed = refs(&count);
    size_t size;
    uint8_t *ring = pie_ring_in(&size);
    if (size < offset || size - offset < ((size_t)vocab + 7) / 8)
        _exit(99);
    report(done(pie_pack_token_mask(allowed, count, vocab, ring + offset), allowed));
}

/* Two of every kind of handle, each kind counted up by itself. */
static void make_kinds(void)
{
    for (int i = 0; i < 2; i++) {
        pie_queue q = pie_create_queue(0, NULL);
        pie_alloc_emb(q, 1, NULL);
        pie_subscribe("t", false, NULL);
        pie_spawn(NULL, NULL, 0, NULL);
        pie_alloc_history(q, NULL, 0, NULL);
        if (i) {
            pie_import_kvpage(q, "n", NULL);
            pie_http_post("u", NULL, 0, NULL, 0, false, NULL);
        } else {
            pie_alloc_kvpage(q, 1, NULL);
            pie_http_get("u", NULL, 0, NULL);
        }
    }
}

/* Forgets that a wrong frame ended the connection, so that one process reads thousands of them. */
static void again(void)
{
    pie.lost = 0;
    pie.received = 0;
}

/* A call that is not one of the ABI's commands. */
static void other(const char *name)
{
    pie_value value;
    size_t length;
    if (!strcmp(name, "flush"))
        report(pie_flush());
    else if (!strcmp(name, "wait")) {
        int code = pie_wait(named(), &value);
        print_value(code, value);
    } else if (!strcmp(name, "ready"))
        printf("%s\n", pie_ready(named()) ? "ready" : "not yet");
    else if (!strcmp(name, "forget"))
        pie_forget(named());
    else if (!strcmp(name, "startup"))
        print_startup();
    else if (!strcmp(name, "vocab"))
        print_vocab();
    else if (!strcmp(name, "detokenize"))
        print_detokenized();
    else if (!strcmp(name, "dist"))
        print_dist();
    else if (!strcmp(name, "floats"))
        print_floats();
    else if (!strcmp(name, "kinds"))
        make_kinds();
    else if (!strcmp(name, "again"))
        again();
    else if (!strcmp(name, "put_floats"))
        put_floats();
    else if (!strcmp(name, "put_token_mask"))
        put_token_mask();
    else if (!strcmp(name, "push")) {
        const char *piece = pie_stream_push(&stream, strtoll(word(), NULL, 10), &length);
        print_hex(piece, length);
        putchar('\n');
    } else if (!strcmp(name, "end")) {
        const char *piece = pie_stream_end(&stream, &length);
        print_hex(piece, length);
        putchar('\n');
        pie_stream_free(&stream);
    } else if (!strcmp(name, "exit"))
        exit((int)number());
    else if (!supported(name)) {
        fprintf(stderr, "driver: what is %s?\n", name);
        _exit(99);
    }
}

int main(void)
{
    size_t capacity = 0;
    int code = pie_init();
    report(code);
    fflush(stdout);
    while (getline(&line, &capacity, stdin) > 0) {
        const char *name = strtok_r(line, " \n", &rest);
        pie_future answer = {0};
        bool asked = *name == '@';
        uint32_t request = 0;
        if (asked) {
            request = (uint32_t)strtoull(name + 1, NULL, 10);
            pie.last_request = request - 1;
            name = word();
        }
        code = queued(atoi(name), asked ? &answer : NULL);
        if (code < 0)
            other(name);
        else if (code)
            print_error(code);
        else if (asked && answer.id != (uint64_t)request + 1)
            puts("another request id");
        fflush(stdout);
    }
    free(line);
    for (uint32_t i = 0; i < CONTEXTS; i++)
        pie_context_destroy(contexts[i]);
    reset_how();
    return 0;
}
