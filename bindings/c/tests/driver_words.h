/* driver_words -- how the driver reads the words of a line, and prints what a call gave. */

static char *line, *rest;

static const char *word(void)
{
    const char *w = strtok_r(NULL, " \n", &rest);
    if (!w) {
        fprintf(stderr, "driver: a word is missing\n");
        _exit(99);
    }
    return w;
}

static bool more_words(void)
{
    return rest[strspn(rest, " \n")] != 0;
}

static uint32_t number(void)
{
    return (uint32_t)strtoull(word(), NULL, 10);
}

static double real(void)
{
    return strtod(word(), NULL);
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

/* A C string, in memory of exactly its size. */
static char *text(void)
{
    size_t length;
    char *data = (char *)octets(&length);
    data = realloc(data, length + 1);
    data[length] = 0;
    return data;
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

static pie_future named(void)
{
    return (pie_future){(uint64_t)number() + 1};
}

static void print_hex(const void *data, size_t length)
{
    if (!length)
        putchar('-');
    for (size_t i = 0; i < length; i++)
        printf("%02x", ((const uint8_t *)data)[i]);
}

static void print_text(const char *string)
{
    putchar(' ');
    print_hex(string, strlen(string));
}

static void print_error(int code)
{
    pie_error_info e = pie_error();
    printf("error %d %s", code, pie_error_name(code));
    print_text(e.message);
    print_text(e.hint);
    putchar('\n');
}

static void report(int code)
{
    if (code)
        print_error(code);
    else
        puts("ok");
}

static void print_tokens(const pie_value *v)
{
    printf("tokens %zu", v->length);
    for (size_t i = 0; i < v->length; i++)
        printf(" %lld", (long long)v->tokens[i]);
}

static void print_names(const pie_value *v)
{
    printf("names %zu", v->length);
    for (size_t i = 0; i < v->length; i++)
        print_text(v->names[i]);
}

static void print_quotas(const pie_value *v)
{
    printf("quotas %zu", v->length);
    for (size_t i = 0; i < v->length; i++) {
        print_text(v->quotas[i].name);
        printf(" %.17g", v->quotas[i].left);
    }
}

static void print_response(const pie_value *v)
{
    printf("response %lld %zu", (long long)v->number, v->length);
    for (size_t i = 0; i < v->length; i++) {
        print_text(v->headers[i].name);
        print_text(v->headers[i].value);
    }
}

static void print_exports(const pie_value *v)
{
    printf("exports %zu", v->length);
    for (size_t i = 0; i < v->length; i++) {
        print_text(v->exports[i].name);
        printf(" %u", v->exports[i].pages);
        print_text(v->exports[i].exporter);
        printf(" %.17g", v->exports[i].seconds_left);
    }
}

static void print_entries(const pie_dist *dist)
{
    printf("dist");
    for (uint32_t i = 0; i < dist->count; i++)
        printf(" %u %.9g", dist->tokens[i], (double)dist->probabilities[i]);
    putchar('\n');
}

static void print_value(int code, pie_value v)
{
    if (code) {
        print_error(code);
        return;
    }
    switch (v.kind) {
    case PIE_NIL:
        printf("nil %lld", (long long)v.number);
        break;
    case PIE_NUMBER:
        printf("number %lld", (long long)v.number);
        break;
    case PIE_BOOL:
        printf("bool %lld", (long long)v.number);
        break;
    case PIE_SAMPLED:
        printf("sampled %lld %.17g %u", (long long)v.number, v.logprob, v.entries);
        break;
    case PIE_BYTES:
        printf("bytes ");
        print_hex(v.bytes, v.length);
        break;
    case PIE_TEXT:
        printf("text");
        print_text(v.text);
        break;
    case PIE_MESSAGE:
        printf("message ");
        print_hex(v.bytes, v.length);
        print_text(v.text);
        break;
    case PIE_IMPORTED:
        printf("imported %lld ", (long long)v.number);
        print_hex(v.bytes, v.length);
        break;
    case PIE_TOKENS:
        print_tokens(&v);
        break;
    case PIE_NAMES:
        print_names(&v);
        break;
    case PIE_QUOTAS:
        print_quotas(&v);
        break;
    case PIE_RESPONSE:
        print_response(&v);
        break;
    case PIE_EXPORTS:
        print_exports(&v);
        break;
    }
    putchar('\n');
    pie_value_free(&v);
}
