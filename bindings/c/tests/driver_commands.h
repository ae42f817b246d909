/* driver_commands -- the calls of the ABI's commands, one for each op code, made from words. */

static int failed(uint32_t id)
{
    return id ? PIE_OK : pie_error().code;
}

/* Frees `a`, if any, and gives `code`. */
static int done(int code, void *a)
{
    free(a);
    return code;
}

static int embed_txt(pie_future *answer)
{
    uint32_t count, first;
    pie_queue q = queue();
    pie_emb target = emb();
    first = number();
    pie_ref *tokens = refs(&count);
    int code;
    if (!strcmp(word(), "at")) {
        uint32_t *at = positions(number());
        code = pie_embed_txt_at(q, target, first, tokens, count, at, answer);
        free(at);
    } else
        code = pie_embed_txt(q, target, first, tokens, count, number(), answer);
    return done(code, tokens);
}

static int write_emb(pie_future *answer)
{
    pie_queue q = queue();
    pie_emb_span target = emb_span();
    uint32_t offset = number();
    if (strcmp(word(), "at"))
        return pie_write_emb(q, target, offset, number(), answer);
    uint32_t *at = positions(number());
    return done(pie_write_emb_at(q, target, offset, at, answer), at);
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
    return done(code, mask);
}

/* The fields of a sample; those after `lazy` may be left out. */
static pie_sampling sampling(pie_ref **stop, pie_bias **bias)
{
    pie_sampling s = {.temperature = real()};
    s.top_k = number();
    s.top_p = real();
    s.min_p = real();
    s.seeded = !next_is_nil();
    s.seed = s.seeded ? strtoull(word(), NULL, 10) : 0;
    s.stop = *stop = refs(&s.stop_count);
    s.lazy = number();
    *bias = NULL;
    if (!more_words())
        return s;
    s.masked = !next_is_nil();
    s.mask = s.masked ? number() : 0;
    s.bias_count = number();
    s.bias = *bias = malloc((s.bias_count + 1) * sizeof **bias);
    for (uint32_t i = 0; i < s.bias_count; i++) {
        (*bias)[i].token = strtoll(word(), NULL, 10);
        (*bias)[i].bias = real();
    }
    s.history.id = next_is_nil() ? 0 : number();
    s.repetition_penalty = real();
    s.presence_penalty = real();
    s.frequency_penalty = real();
    s.logprobs = number();
    s.k = number();
    s.offset = number();
    return s;
}

static int sample(pie_future *answer)
{
    pie_queue q = queue();
    pie_emb from = emb();
    uint32_t index = number();
    pie_token token = {number()};
    pie_ref *stop;
    pie_bias *bias;
    pie_sampling s = sampling(&stop, &bias);
    int code = pie_sample(q, from, index, token, &s, answer);
    free(bias);
    return done(code, stop);
}

static int history(int op, pie_future *answer)
{
    uint32_t count, id;
    pie_queue q = queue();
    id = number();
    pie_ref *tokens = refs(&count);
    if (op == 49)
        return done(pie_extend_history(q, (pie_history){id}, tokens, count, answer), tokens);
    pie.last_history = id - 1;
    return done(failed(pie_alloc_history(q, tokens, count, answer).id), tokens);
}

static void free_strings(char **strings, uint32_t count)
{
    for (uint32_t i = 0; i < count; i++)
        free(strings[i]);
    free(strings);
}

/* `count` messages; their 2 * `count` strings are to be freed too. */
static pie_chat_message *chat_messages(uint32_t count, char ***strings)
{
    pie_chat_message *messages = calloc(count + 1, sizeof *messages);
    *strings = calloc(2 * (size_t)count + 1, sizeof **strings);
    for (uint32_t i = 0; i < count; i++) {
        messages[i].role = (*strings)[2 * i] = text();
        messages[i].content = (*strings)[2 * i + 1] = text();
    }
    return messages;
}

static int chat(pie_future *answer)
{
    uint32_t model = number(), count = number();
    char **strings;
    pie_chat_message *messages = chat_messages(count, &strings);
    int code = pie_chat(model, messages, count, number(), answer);
    free_strings(strings, 2 * count);
    return done(code, messages);
}

/* A command of a name and of octets. */
static int with_name(int op, pie_future *answer)
{
    size_t length;
    char *name = text();
    uint8_t *data = op == 22 || op == 27 ? octets(&length) : NULL;
    int code = op == 22   ? pie_broadcast(name, data, length, number(), answer)
               : op == 26 ? pie_store_get(name, answer)
               : op == 27 ? pie_store_set(name, data, length, answer)
               : op == 28 ? pie_store_delete(name, answer)
               : op == 29 ? pie_store_exists(name, answer)
                          : pie_unexport_kvpage(name, answer);
    free(name);
    return done(code, data);
}

static int list(int op, pie_future *answer)
{
    char *prefix = text(), *after = text();
    int code = op == 30 ? pie_store_list(prefix, after, answer)
                        : pie_list_exported(prefix, after, answer);
    free(prefix);
    return done(code, after);
}

static int subscribe(pie_future *answer)
{
    pie.last_subscription = number() - 1;
    char *topic = text();
    return done(failed(pie_subscribe(topic, number(), answer).id), topic);
}

static int http(int op, pie_future *answer)
{
    size_t length = 0;
    pie.last_http = number() - 1;
    char *url = text();
    uint8_t *body = op == 32 ? octets(&length) : NULL;
    uint32_t count = number();
    pie_header *headers = calloc(count + 1, sizeof *headers);
    char **strings = calloc(2 * (size_t)count + 1, sizeof *strings);
    for (uint32_t i = 0; i < count; i++) {
        headers[i].name = strings[2 * i] = text();
        headers[i].value = strings[2 * i + 1] = text();
    }
    pie_http made = op == 32
                        ? pie_http_post(url, body, length, headers, count, number(), answer)
                        : pie_http_get(url, headers, count, answer);
    free_strings(strings, 2 * count);
    free(headers);
    free(body);
    return done(failed(made.id), url);
}

static int spawn(pie_future *answer)
{
    pie.last_child = number() - 1;
    char *program = text();
    uint32_t count = number();
    char **args = calloc(count + 1, sizeof *args);
    for (uint32_t i = 0; i < count; i++)
        args[i] = text();
    int code = failed(pie_spawn(program, (const char *const *)args, count, answer).id);
    free_strings(args, count);
    return done(code, program);
}

/* A command of a stream or child and of octets. */
static int to_handle(int op, pie_future *answer)
{
    size_t length;
    uint32_t id = number();
    uint8_t *data = octets(&length);
    int code = op == 33 ? pie_http_write((pie_http){id}, data, length, number(), answer)
                        : pie_send_child((pie_child){id}, data, length, answer);
    return done(code, data);
}

static int export_kvpage(pie_future *answer)
{
    size_t length;
    pie_queue q = queue();
    char *name = text();
    uint32_t count = number();
    pie_kv_range *ranges = malloc((count + 1) * sizeof *ranges);
    for (uint32_t i = 0; i < count; i++) {
        pie_kv_span s = kv_span();
        ranges[i] = (pie_kv_range){s.kv, s.first, s.length};
    }
    uint8_t *meta = octets(&length);
    int64_t lease = next_is_nil() ? PIE_NO_LEASE : strtoll(word(), NULL, 10);
    int code = pie_export_kvpage(q, name, ranges, count, meta, length, lease, answer);
    free(name);
    free(ranges);
    return done(code, meta);
}

static int import_kvpage(pie_future *answer)
{
    pie_queue q = queue();
    pie.last_kvpage = number() - 1;
    char *name = text();
    return done(failed(pie_import_kvpage(q, name, answer).id), name);
}

static int send_message(pie_future *answer)
{
    size_t length;
    uint8_t *data = octets(&length);
    return done(pie_send(data, length, answer), data);
}

static int tokenize(pie_future *answer)
{
    size_t length;
    uint32_t model = number();
    uint8_t *data = octets(&length);
    return done(pie_tokenize(model, (char *)data, length, number(), answer), data);
}

/* Pages, embeds and tokens. */
static int memory(int op, pie_future *answer)
{
    pie_queue q = queue();
    uint32_t first, id;
    pie_kv_span source;
    switch (op) {
    case 8:
        pie.last_kvpage = number() - 1;
        return failed(pie_alloc_kvpage(q, number(), answer).id);
    case 9:
        id = number();
        first = number();
        return next_is_nil()
                   ? pie_dealloc_kvpage(q, (pie_kvpage){id}, first, answer)
                   : pie_dealloc_kvpage_range(q, (pie_kvpage){id}, first, number(), answer);
    case 10:
        pie.last_kvpage = number() - 1;
        id = number();
        first = number();
        return failed(pie_share_kvpage(q, (pie_kvpage){id}, first, number(), answer).id);
    case 11:
        source = kv_span();
        return pie_copy_kvpage(q, source, kv_span(), answer);
    case 12:
        source = kv_span();
        return pie_mask_kvpage(q, source, number(), answer);
    case 13:
        pie.last_emb = number() - 1;
        return failed(pie_alloc_emb(q, number(), answer).id);
    case 14:
        return pie_dealloc_emb(q, emb(), answer);
    case 15:
        return pie_dealloc_token(q, (pie_token){number()}, answer);
    default:
        return pie_dealloc_history(q, (pie_history){number()}, answer);
    }
}

/* What reads embeds into ring out. */
static int to_ring(int op, pie_future *answer)
{
    pie_queue q = queue();
    if (op == 46) {
        pie_emb_span source = emb_span();
        return pie_read_emb(q, source, number(), answer);
    }
    pie_emb from = emb();
    uint32_t index = number(), k = number();
    return pie_get_next_dist(q, from, index, k, number(), answer);
}

/* The call of the op code `op`. -1 if it is none. */
static int queued(int op, pie_future *answer)
{
    switch (op) {
    case 1:
        return send_message(answer);
    case 2:
        return pie_receive(answer);
    case 3:
        pie.last_queue = number() - 1;
        return failed(pie_create_queue(number(), answer).id);
    case 4:
        return pie_destroy_queue(queue(), answer);
    case 5:
        return pie_synchronize(queue(), answer);
    case 6: {
        pie_queue q = queue();
        return pie_set_queue_priority(q, atoi(word()), answer);
    }
    case 7:
        return pie_cancel(queue(), answer);
    case 8: case 9: case 10: case 11: case 12: case 13: case 14: case 15: case 50:
        return memory(op, answer);
    case 16:
        return embed_txt(answer);
    case 17:
        return forward(answer);
    case 18: case 46:
        return to_ring(op, answer);
    case 19:
        return sample(answer);
    case 20:
        return tokenize(answer);
    case 21:
        return pie_quota(answer);
    case 22: case 26: case 27: case 28: case 29: case 43:
        return with_name(op, answer);
    case 23:
        return subscribe(answer);
    case 24:
        return pie_unsubscribe((pie_subscription){number()}, answer);
    case 25:
        return pie_next_message((pie_subscription){number()}, answer);
    case 30: case 45:
        return list(op, answer);
    case 31: case 32:
        return http(op, answer);
    case 33: case 37:
        return to_handle(op, answer);
    case 34:
        return pie_http_read((pie_http){number()}, answer);
    case 35:
        return pie_http_close((pie_http){number()}, answer);
    case 36:
        return spawn(answer);
    case 38:
        return pie_receive_child((pie_child){number()}, answer);
    case 39:
        return pie_close_child((pie_child){number()}, answer);
    case 40:
        return pie_wait_child((pie_child){number()}, answer);
    case 41:
        return pie_end_child((pie_child){number()}, answer);
    case 42:
        return export_kvpage(answer);
    case 44:
        return import_kvpage(answer);
    case 47:
        return write_emb(answer);
    case 48: case 49:
        return history(op, answer);
    case 51:
        return chat(answer);
    default:
        return -1;
    }
}
