/* c_decoder -- what the C binding reads: answers, the start-up block, the vocabulary table.
 *
 * libFuzzer calls it with octets of its own making, under the address and undefined behaviour
 * sanitizers. The first octet says which reader gets the rest; each runs as in a process that was
 * just started. */
#define _GNU_SOURCE
#include "../bindings/c/inferlet.c"

/* The kinds of answers that are waited for: request r is to be of kind r modulo their number. */
enum { KINDS = PIE_SAMPLED + 1, REQUESTS = 4 * KINDS };

#define CHECK(condition)                                                               \
    do {                                                                               \
        if (!(condition)) {                                                            \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);            \
            abort();                                                                   \
        }                                                                              \
    } while (0)

static volatile size_t sum; /* of what was read, so that it is read */

static void ask(void)
{
    for (uint32_t r = 0; r < REQUESTS; r++) {
        struct future *f = &pie.futures[r];
        f->request = r;
        f->state = r < 2 * KINDS ? WAITING : FORGOTTEN;
        f->wanted = (uint8_t)(r % KINDS | (r / KINDS % 2 ? OR_NIL : 0));
    }
}

/* A value is whole: its text ends where it says, and nothing lies outside its block. */
static void touch(const pie_value *v)
{
    switch (v->kind) {
    case PIE_BYTES:
    case PIE_IMPORTED:
        CHECK(v->bytes && !v->bytes[v->length]);
        break;
    case PIE_TEXT:
        CHECK(v->text);
        sum += strlen(v->text);
        break;
    case PIE_MESSAGE:
        CHECK(v->bytes && !v->bytes[v->length] && v->text);
        sum += strlen(v->text);
        break;
    case PIE_TOKENS:
        for (size_t i = 0; i < v->length; i++)
            sum += v->tokens[i];
        break;
    case PIE_NAMES:
        for (size_t i = 0; i < v->length; i++)
            sum += strlen(v->names[i]);
        break;
    case PIE_QUOTAS:
        for (size_t i = 0; i < v->length; i++)
            sum += strlen(v->quotas[i].name) + (v->quotas[i].left > 0);
        break;
    case PIE_RESPONSE:
        for (size_t i = 0; i < v->length; i++)
            sum += strlen(v->headers[i].name) + strlen(v->headers[i].value);
        break;
    case PIE_EXPORTS:
        for (size_t i = 0; i < v->length; i++)
            sum += strlen(v->exports[i].name) + strlen(v->exports[i].exporter);
        break;
    default:
        break;
    }
}

/* Frames as they arrive, in two parts: what is whole is taken from each. */
static void read_answers(const uint8_t *data, size_t size)
{
    size_t most = sizeof pie.in, first = size ? data[0] % size : 0;
    ask();
    pie.lost = 0;
    pie.received = 0;
    for (size_t at = 0; at < size && !pie.lost;) {
        size_t part = at < first ? first - at : size - at;
        part = part < most - pie.received ? part : most - pie.received;
        CHECK(part); /* a frame that fills the inbox is whole, or wrong */
        memcpy(pie.in + pie.received, data + at, part);
        pie.received += part;
        at += part;
        take_frames();
    }
    for (uint32_t r = 0; r < REQUESTS; r++) {
        struct future *f = &pie.futures[r];
        CHECK(f->state != FORGOTTEN || r >= 2 * KINDS);
        if (f->state == ANSWERED && f->code && f->message)
            sum += strlen(f->message) + strlen(f->message + strlen(f->message) + 1);
        else if (f->state == ANSWERED && !f->code)
            touch(&f->value);
        free_future(f);
    }
}

static void read_startup(const uint8_t *data, size_t size)
{
    struct reader r = {data, data + size, false};
    if (get_startup(&r)) {
        sum += strlen(pie.id) + strlen(pie.version) + strlen(pie.user);
        for (uint32_t i = 0; i < pie.arg_count; i++)
            sum += strlen(pie.args[i]);
        for (uint32_t i = 0; i < pie.model_count; i++) {
            const pie_model *m = &pie.models[i];
            CHECK(m->page_size && m->max_context);
            sum += strlen(m->name) + strlen(m->architecture) + strlen(m->description);
            for (uint32_t k = 0; k < m->trait_count; k++)
                sum += strlen(m->traits[k]);
            for (uint32_t k = 0; k < m->eos_count; k++)
                sum += (size_t)m->eos_tokens[k];
        }
    }
    for (struct kept *next; pie.kept; pie.kept = next) {
        next = pie.kept->next;
        free(pie.kept);
    }
    pie.model_count = pie.arg_count = 0;
}

/* Descriptor 7 holds the octets. What was mapped is put into memory of its exact size, so that the
 * sanitizer sees reads behind its end. */
static void read_vocab(const uint8_t *data, size_t size)
{
    CHECK(!ftruncate(VOCAB_FD, (off_t)size) && pwrite(VOCAB_FD, data, size, 0) == (ssize_t)size);
    bool whole = open_vocab();
    if (pie.vocab)
        munmap((void *)pie.vocab, pie.vocab_size);
    if (whole) {
        uint8_t *exact = malloc(size);
        CHECK(exact && size == pie.vocab_size);
        pie.vocab = memcpy(exact, data, size);
        for (uint32_t token = 0; token <= pie.vocab_count; token++) {
            pie_vocab v = vocab_at(token);
            sum += is_utf8(v.text, v.length);
        }
        free(exact);
    }
    pie.vocab = NULL;
    pie.vocab_count = 0;
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    int memory = memfd_create("vocabulary", 0);
    CHECK(memory >= 0 && dup2(memory, VOCAB_FD) == VOCAB_FD);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!size)
        return 0;
    switch (data[0] % 3) {
    case 0:
        read_answers(data + 1, size - 1);
        break;
    case 1:
        read_startup(data + 1, size - 1);
        break;
    default:
        read_vocab(data + 1, size - 1);
    }
    return 0;
}
