/* driver_context -- the support layer's calls: contexts are numbered, `use` says which is meant. */

enum { CONTEXTS = 16 };

static pie_context *contexts[CONTEXTS], *context; /* `context` is one of them, the current */
static uint32_t cut_after;

/* What the next generation is to do beside drawing; set by lines before it. */
static pie_generation how;
static char **stop_strings;
static uint32_t stop_length; /* stop_when: the text has so many octets */
static char choice[16];      /* which sampler or constraint */

static uint32_t current(void)
{
    uint32_t i = 0;
    while (i < CONTEXTS && contexts[i] != context)
        i++;
    return i;
}

static bool long_enough(const char *string, size_t length, void *user)
{
    (void)user;
    if (strlen(string) != length)
        _exit(98);
    return length >= stop_length;
}

/* The second most probable token; "low": the lowest id; "end": ends after the first look; "wrong":
 * an id that is none; "beside": the id after that of the most probable; "tell": the most probable,
 * and prints all. */
static pie_ref pick(const pie_dist *dist, void *user)
{
    (void)user;
    pie_ref low = dist->tokens[0];
    for (uint32_t i = 0; i < dist->count; i++)
        low = dist->tokens[i] < low ? dist->tokens[i] : low;
    if (!strcmp(choice, "tell")) {
        print_entries(dist);
        return dist->tokens[0];
    }
    return !strcmp(choice, "end")      ? PIE_NO_TOKEN
           : !strcmp(choice, "wrong")  ? 1000000
           : !strcmp(choice, "low")    ? low
           : !strcmp(choice, "beside") ? dist->tokens[0] + 1
                                       : dist->tokens[1];
}

/* Token n may be one whose id is n modulo 3; "three": and after three there is no more to say;
 * "dead": and then nothing is allowed. */
static int allow(const pie_ref *tokens, uint32_t count, uint8_t *allowed, void *user)
{
    (void)tokens;
    (void)user;
    uint32_t vocab = pie_available_models(&(uint32_t){0})[0].vocab_size;
    if (count >= 3 && !strcmp(choice, "three"))
        return 1;
    if (count >= 3 && !strcmp(choice, "dead"))
        return 0;
    for (uint32_t token = count % 3; token < vocab; token += 3)
        allowed[token / 8] |= (uint8_t)(1u << token % 8);
    return 0;
}

static void set_choice(void)
{
    snprintf(choice, sizeof choice, "%s", word());
}

static void set_stop_strings(void)
{
    for (uint32_t i = 0; i < how.stop_string_count; i++)
        free(stop_strings[i]);
    free(stop_strings);
    how.stop_string_count = number();
    stop_strings = calloc(how.stop_string_count + 1, sizeof *stop_strings);
    for (uint32_t i = 0; i < how.stop_string_count; i++)
        stop_strings[i] = text();
    how.stop_strings = (const char *const *)stop_strings;
}

/* Forgets what generations were to do, and frees it. */
static void reset_how(void)
{
    free((void *)how.sampling.stop);
    free((void *)how.sampling.bias);
    for (uint32_t i = 0; i < how.stop_string_count; i++)
        free(stop_strings[i]);
    free(stop_strings);
    stop_strings = NULL;
    how = (pie_generation){0};
}

/* `count` and the fields of a sample. */
static void read_how(void)
{
    pie_ref *stop;
    pie_bias *bias;
    free((void *)how.sampling.stop); /* of a generation before, which has ended */
    free((void *)how.sampling.bias);
    how.max_tokens = number();
    how.sampling = sampling(&stop, &bias);
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
    pie_bias *bias;
    pie_sampling s = sampling(&stop, &bias);
    uint32_t left = cut_after ? cut_after : UINT32_MAX;
    int code = pie_context_generate(context, count, &s, on_token, &left);
    free(bias);
    return done(code, stop);
}

static void print_piece(const pie_piece *piece)
{
    printf("piece %lld ", (long long)piece->token);
    print_hex(piece->text, piece->length);
    printf(" %.17g %d\n", piece->logprob, piece->finish);
}

/* All pieces to the last. */
static int run_generation(void)
{
    pie_piece piece = {.finish = PIE_GOING_ON};
    int code = PIE_OK;
    while (!code && !piece.finish)
        if (!(code = pie_context_next(context, &piece)))
            print_piece(&piece);
    return code;
}

/* A piece of each of the first `count` contexts in turn, until all have ended. */
static int run_all(uint32_t count)
{
    uint32_t ended = 0;
    for (uint32_t i = 0; ended < count; i = (i + 1) % count) {
        pie_piece piece;
        if (!i)
            ended = 0;
        int code = pie_context_next(contexts[i], &piece);
        if (code)
            return code;
        ended += piece.finish != PIE_GOING_ON;
        printf("of %u ", i);
        print_piece(&piece);
    }
    return PIE_OK;
}

static void print_context_tokens(void)
{
    uint32_t count;
    const pie_ref *tokens = pie_context_tokens(context, &count);
    printf("tokens %u", count);
    for (uint32_t i = 0; i < count; i++)
        printf(" %lld", (long long)tokens[i]);
    putchar('\n');
}

static void print_stats(void)
{
    pie_context_stats s = pie_context_get_stats(context);
    printf("stats %u %u %u %u %d %d\n", s.prompt_tokens, s.generated_tokens, s.pages, s.shared_pages,
           s.first_token_seconds > 0, s.tokens_per_second > 0);
}

static int fill_chat(void)
{
    uint32_t count = number();
    char **strings;
    pie_chat_message *messages = chat_messages(count, &strings);
    int code = pie_context_chat(context, messages, count, number());
    free_strings(strings, 2 * count);
    return done(code, messages);
}

static int save(void)
{
    char *name = text();
    int64_t lease = next_is_nil() ? PIE_NO_LEASE : strtoll(word(), NULL, 10);
    return done(pie_context_save(context, name, lease), name);
}

static int made_context(uint32_t at, pie_context *made)
{
    contexts[at] = made;
    return made ? PIE_OK : pie_error().code;
}

static int restore(void)
{
    uint32_t at = number(), model = number();
    char *name = text();
    int code = made_context(at, pie_context_restore(model, name));
    context = contexts[at];
    return done(code, name);
}

static int gather(void)
{
    uint32_t count = number();
    pie_future *futures = malloc((count + 1) * sizeof *futures);
    pie_value *values = malloc((count + 1) * sizeof *values);
    for (uint32_t i = 0; i < count; i++)
        futures[i] = named();
    int code = pie_gather(futures, count, values);
    for (uint32_t i = 0; i < count; i++)
        print_value(PIE_OK, values[i]);
    free(values);
    return done(code, futures);
}

static int best_of(void)
{
    uint32_t n = number();
    double mean = 0;
    read_how();
    int code = pie_context_best_of(context, n, &how, &mean);
    if (!code)
        printf("mean %.17g\n", mean);
    return code;
}

/* The call of the support layer called `name`. False if there is none. */
static bool supported(const char *name)
{
    uint32_t n;
    size_t length;
    pie_piece piece;
    int code = PIE_OK;
    if (!strcmp(name, "context")) {
        n = current() < CONTEXTS ? current() : 0;
        code = made_context(n, context = pie_context_create(number()));
    } else if (!strcmp(name, "use")) {
        context = contexts[number()];
        return true;
    } else if (!strcmp(name, "fill")) {
        uint8_t *data = octets(&length);
        code = done(pie_context_fill(context, (char *)data, length, number()), data);
    } else if (!strcmp(name, "fill_tokens")) {
        pie_ref *tokens = refs(&n);
        code = done(pie_context_fill_tokens(context, tokens, n), tokens);
    } else if (!strcmp(name, "append"))
        code = pie_context_append(context, number());
    else if (!strcmp(name, "chat"))
        code = fill_chat();
    else if (!strcmp(name, "trim"))
        code = pie_context_trim(context, number());
    else if (!strcmp(name, "rewind"))
        code = pie_context_rewind(context, number());
    else if (!strcmp(name, "mask")) {
        uint32_t begin = number(), end_at = number();
        code = pie_context_mask(context, begin, end_at, number());
    } else if (!strcmp(name, "evict")) {
        n = number();
        code = pie_context_evict(context, n, number());
    } else if (!strcmp(name, "window")) {
        n = number();
        code = pie_context_window(context, n, number());
    } else if (!strcmp(name, "fork")) {
        n = number();
        code = made_context(n, pie_context_fork(context));
    } else if (!strcmp(name, "join")) {
        n = number();
        code = pie_context_join(context, contexts[n]);
        contexts[n] = code ? contexts[n] : NULL;
    } else if (!strcmp(name, "save"))
        code = save();
    else if (!strcmp(name, "unsave")) {
        char *saved_name = text();
        code = done(pie_context_unsave(saved_name), saved_name);
    } else if (!strcmp(name, "restore"))
        code = restore();
    else if (!strcmp(name, "destroy")) {
        pie_context_destroy(context);
        n = current();
        if (n < CONTEXTS)
            contexts[n] = NULL;
        context = NULL;
        return true;
    } else if (!strcmp(name, "tokens_of")) {
        print_context_tokens();
        return true;
    } else if (!strcmp(name, "stats")) {
        print_stats();
        return true;
    } else if (!strcmp(name, "cut_after")) {
        cut_after = number();
        return true;
    } else if (!strcmp(name, "generate"))
        code = generate();
    else if (!strcmp(name, "stop_strings")) {
        set_stop_strings();
        return true;
    } else if (!strcmp(name, "stop_when")) {
        stop_length = number();
        how.stop_when = long_enough;
        return true;
    } else if (!strcmp(name, "sampler")) {
        set_choice();
        how.sampler = pick;
        return true;
    } else if (!strcmp(name, "constrain")) {
        set_choice();
        how.constrain = allow;
        return true;
    } else if (!strcmp(name, "plain")) {
        reset_how();
        return true;
    } else if (!strcmp(name, "start")) {
        read_how();
        code = pie_context_start(context, &how);
    } else if (!strcmp(name, "next")) {
        if (!(code = pie_context_next(context, &piece))) {
            print_piece(&piece);
            return true;
        }
    } else if (!strcmp(name, "stop"))
        code = pie_context_stop(context);
    else if (!strcmp(name, "run"))
        code = run_generation();
    else if (!strcmp(name, "run_all"))
        code = run_all(number());
    else if (!strcmp(name, "best_of"))
        code = best_of();
    else if (!strcmp(name, "gather"))
        code = gather();
    else
        return false;
    report(code);
    return true;
}
