/* driver -- makes the calls that it reads from standard input, one a line, and prints what they
 * give, so that a test in another language can play the controller. tests/test_c_binding.py does.
 *
 * A line is words; `@5` before a call asks for its answer under request 5, by which `wait`, `ready`
 * and `forget` name it. Octets are hex, `-` for none; arrays have their length before them; handles
 * that a call makes are given too. The binding counts requests and handles up by itself: the file
 * is included, not linked, only so that the counters can be set to what a vector holds. */
#include "../inferlet.c"

static char *line, *rest;
static pie_context *context;
static pie_stream stream;
static uint32_t cut_after;

static const char *word(void)
{
    const char *w = strtok_r(NULL, " \n", &rest);
    if (!w) {
        fprintf(stderr, "driver: a word is missing\n");
        _exit(99);
    }
    return w;
}

static uint32_t number(void)
{
    return (uint32_t)strtoull(word(), NULL, 10);
}

static bool next_is_nil(void)
{
    const char *w = rest + strspn(rest, " ");
    if (strncmp(w, "nil", 3))
        return false;
    word();
    return true;
}

/* Octets in memory of exactly their size, so that the sanitizer sees every read beyond. */
static uint8_t *octets(size_t *length)
{
    const char *hex = word();
    *length = *hex == '-' ? 0 : strlen(hex) / 2;
    uint8_t *data = malloc(*length ? *length : 1);
    for (size_t i = 0; i < *length; i++) {
        unsigned octet;
        sscanf(hex + 2 * i, "%2x", &octet);
        data[i] = (uint8_t)octet;
    }
    return data;
}

static void print_hex(const void *data, size_t length)
{
    if (!length)
        putchar('-');
    for (size_t i = 0; i < length; i++)
        printf("%02x", ((const uint8_t *)data)[i]);
}

static pie_ref *refs(uint32_t *count)
{
    *count = number();
    pie_ref *list = malloc((*count + 1) * sizeof *list);
    for (uint32_t i = 0; i < *count; i++)
        list[i] = strtoll(word(), NULL, 10);
    return list;
}

static uint32_t *positions(uint32_t count)
{
    uint32_t *list = malloc((count + 1) * sizeof *list);
    for (uint32_t i = 0; i < count; i++)
        list[i] = number();
    return list;
}

static pie_queue queue(void) { return (pie_queue){number()}; }
static pie_kvpage kvpage(void) { return (pie_kvpage){number()}; }
static pie_emb emb(void) { return (pie_emb){number()}; }

static pie_kv_span kv_span(void)
{
    pie_kv_span s = {.kv = kvpage()};
    s.first = number();
    s.length = number();
    return s;
}

static pie_emb_span emb_span(void)
{
    pie_emb_span s = {.emb = emb()};
    s.first = number();
    s.length = number();
    return s;
}

static void print_error(int code)
{
    pie_error_info e = pie_error();
    printf("error %d %s ", code, pie_error_name(code));
    print_hex(e.message, strlen(e.message));
    putchar(' ');
    print_hex(e.hint, strlen(e.hint));
    putchar('\n');
}

static void print_value(int code, pie_value v)
{
    if (code) {
        print_error(code);
        return;
    }
    if (v.kind == PIE_NIL)
        printf("nil %lld", (long long)v.number);
    else if (v.kind == PIE_NUMBER)
        printf("number %lld", (long long)v.number);
    else if (v.kind == PIE_BYTES) {
        printf("bytes ");
        print_hex(v.bytes, v.length);
    } else {
        printf("tokens %zu", v.length);
        for (size_t i = 0; i < v.length; i++)
            printf(" %lld", (long long)v.tokens[i]);
    }
    putchar('\n');
    free(v.bytes);
    free(v.tokens);
}

static int embed_txt(pie_future *answer)
{
    uint32_t count, first;
    pie_queue q = queue();
    pie_emb target = emb();
    first = number();
    pie_ref *tokens = refs(&count);
    bool each = !strcmp(word(), "at");
    int code;
    if (each) {
        uint32_t *at = positions(number());
        code = pie_embed_txt_at(q, target, first, tokens, count, at, answer);
        free(at);
    } else
        code = pie_embed_txt(q, target, first, tokens, count, number(), answer);
    free(tokens);
    return code;
}

static int forward(pie_future *answer)
{
    pie_queue q = queue();
    pie_pass pass = {.inputs = emb_span()};
    pass.read_count = number();
    pie_kv_span *reads = malloc((pass.read_count + 1) * sizeof *reads);
    for (uint32_t i = 0; i < pass.read_count; i++)
        reads[i] = kv_span();
    pass.reads = reads;
    if (!next_is_nil())
        pass.write = kv_span();
    if (!next_is_nil())
        pass.outputs = emb_span();
    uint32_t *at = next_is_nil() ? NULL : positions(number());
    uint8_t *mask = next_is_nil() ? NULL : octets(&pass.mask_length);
    pass.positions = at;
    pass.mask = mask;
    int code = pie_forward(q, &pass, answer);
    free(reads);
    free(at);
    free(mask);
    return code;
}

static pie_sampling sampling(pie_ref **stop)
{
    pie_sampling s = {.temperature = strtod(word(), NULL)};
    s.top_k = number();
    s.top_p = strtod(word(), NULL);
    s.min_p = strtod(word(), NULL);
    s.seeded = !next_is_nil();
    s.seed = s.seeded ? strtoull(word(), NULL, 10) : 0;
    s.stop = *stop = refs(&s.stop_count);
    s.lazy = number();
    return s;
}

static int sample(pie_future *answer)
{
    pie_queue q = queue();
    pie_emb from = emb();
    uint32_t index = number();
    pie_token token = {number()};
    pie_ref *stop;
    pie_sampling s = sampling(&stop);
    int code = pie_sample(q, from, index, token, &s, answer);
    free(stop);
    return code;
}

static int on_token(pie_ref token, void *user)
{
    uint32_t *left = user;
    printf("token %lld\n", (long long)token);
    fflush(stdout);
    return --*left == 0;
}

static int generate(void)
{
    uint32_t count = number();
    pie_ref *stop;
    pie_sampling s = sampling(&stop);
    uint32_t left = cut_after ? cut_after : UINT32_MAX;
    int code = pie_context_generate(context, count, &s, on_token, &left);
    free(stop);
    return code;
}

static int failed(uint32_t id)
{
    return id ? PIE_OK : pie_error().code;
}

/* One queued call, in the order of the ABI's op codes. False if it is none of them. */
static bool queued(const char *name, pie_future *answer, int *code)
{
    size_t length;
    uint8_t *data = NULL;
    uint32_t first, pages;
    pie_queue q;
    if (!strcmp(name, "1")) {
        data = octets(&length);
        *code = pie_send(data, length, answer);
    } else if (!strcmp(name, "2"))
        *code = pie_receive(answer);
    else if (!strcmp(name, "3")) {
        pie.last_queue = number() - 1;
        *code = failed(pie_create_queue(number(), answer).id);
    } else if (!strcmp(name, "4"))
        *code = pie_destroy_queue(queue(), answer);
    else if (!strcmp(name, "5"))
        *code = pie_synchronize(queue(), answer);
    else if (!strcmp(name, "6")) {
        q = queue();
        *code = pie_set_queue_priority(q, atoi(word()), answer);
    } else if (!strcmp(name, "7"))
        *code = pie_cancel(queue(), answer);
    else if (!strcmp(name, "8")) {
        q = queue();
        pie.last_kvpage = number() - 1;
        *code = failed(pie_alloc_kvpage(q, number(), answer).id);
    } else if (!strcmp(name, "9")) {
        q = queue();
        pie_kvpage kv = kvpage();
        first = number();
        *code = next_is_nil() ? pie_dealloc_kvpage(q, kv, first, answer)
                              : pie_dealloc_kvpage_range(q, kv, first, number(), answer);
    } else if (!strcmp(name, "10")) {
        q = queue();
        pie.last_kvpage = number() - 1;
        pie_kvpage source = kvpage();
        first = number();
        pages = number();
        *code = failed(pie_share_kvpage(q, source, first, pages, answer).id);
    } else if (!strcmp(name, "11")) {
        q = queue();
        pie_kv_span source = kv_span(), target = kv_span();
        *code = pie_copy_kvpage(q, source, target, answer);
    } else if (!strcmp(name, "12")) {
        q = queue();
        pie_kv_span span = kv_span();
        *code = pie_mask_kvpage(q, span, number(), answer);
    } else if (!strcmp(name, "13")) {
        q = queue();
        pie.last_emb = number() - 1;
        *code = failed(pie_alloc_emb(q, number(), answer).id);
    } else if (!strcmp(name, "14")) {
        q = queue();
        *code = pie_dealloc_emb(q, emb(), answer);
    } else if (!strcmp(name, "15")) {
        q = queue();
        *code = pie_dealloc_token(q, (pie_token){number()}, answer);
    } else if (!strcmp(name, "16"))
        *code = embed_txt(answer);
    else if (!strcmp(name, "17"))
        *code = forward(answer);
    else if (!strcmp(name, "18")) {
        q = queue();
        pie_emb from = emb();
        uint32_t index = number(), k = number();
        *code = pie_get_next_dist(q, from, index, k, number(), answer);
    } else if (!strcmp(name, "19"))
        *code = sample(answer);
    else if (!strcmp(name, "20")) {
        uint32_t model = number();
        data = octets(&length);
        *code = pie_tokenize(model, (const char *)data, length, number(), answer);
    } else
        return false;
    free(data);
    return true;
}

static pie_future named(void)
{
    return (pie_future){(uint64_t)number() + 1};
}

static void print_startup(void)
{
    uint32_t models, traits;
    const pie_model *m = pie_available_models(&models);
    const pie_limits *l = pie_get_limits();
    printf("id %s\nmodels %u\n", pie_get_id(), models);
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
    printf("limits %u %u %u %u %u %u %u\n", l->kv_pages, l->embeds, l->tokens, l->commands,
           l->frame_bytes, l->top_k, l->ring_bytes);
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
    char *text = malloc(length ? length : 1);
    pie_detokenize(tokens, count, text, length);
    print_hex(text, length);
    putchar('\n');
    free(text);
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
    printf("dist");
    for (uint32_t i = 0; i < dist.count; i++)
        printf(" %u %.9g", dist.tokens[i], (double)dist.probabilities[i]);
    putchar('\n');
}

static void report(int code)
{
    if (code)
        print_error(code);
    else
        puts("ok");
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
    else if (!strcmp(name, "push")) {
        const char *text = pie_stream_push(&stream, strtoll(word(), NULL, 10), &length);
        print_hex(text, length);
        putchar('\n');
    } else if (!strcmp(name, "end")) {
        const char *text = pie_stream_end(&stream, &length);
        print_hex(text, length);
        putchar('\n');
        pie_stream_free(&stream);
    } else if (!strcmp(name, "context")) {
        context = pie_context_create(number());
        report(context ? PIE_OK : pie_error().code);
    } else if (!strcmp(name, "fill")) {
        uint8_t *text = octets(&length);
        report(pie_context_fill(context, (char *)text, length, number()));
        free(text);
    } else if (!strcmp(name, "fill_tokens")) {
        uint32_t count;
        pie_ref *tokens = refs(&count);
        report(pie_context_fill_tokens(context, tokens, count));
        free(tokens);
    } else if (!strcmp(name, "cut_after"))
        cut_after = number();
    else if (!strcmp(name, "generate"))
        report(generate());
    else if (!strcmp(name, "destroy")) {
        pie_context_destroy(context);
        context = NULL;
    } else if (!strcmp(name, "exit"))
        exit((int)number());
    else {
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
        if (!queued(name, asked ? &answer : NULL, &code))
            other(name);
        else if (code)
            print_error(code);
        else if (asked && answer.id != (uint64_t)request + 1)
            puts("another request id");
        fflush(stdout);
    }
    free(line);
    pie_context_destroy(context);
    return 0;
}
