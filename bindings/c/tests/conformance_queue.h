/* conformance_queue -- steps on a queue: pages, embeds, sampling, exports, and its errors. */

#define SLOTS 64

static pie_queue queue; /* of the step that runs */
static pie_kvpage kv;
static pie_emb hidden; /* one hidden state behind the prompt */

static uint32_t page_size(void)
{
    return pie_get_kvpage_size(0);
}

/* A new queue whose `kv` holds the prompt. */
static void prefill(void)
{
    queue = pie_create_queue(0, NULL);
    kv = pie_alloc_kvpage(queue, SLOTS / page_size(), NULL);
    pie_emb inputs = pie_alloc_emb(queue, token_count, NULL);
    hidden = pie_alloc_emb(queue, 1, NULL);
    pie_embed_txt(queue, inputs, 0, tokens, token_count, 0, NULL);
    pie_pass pass = {.inputs = {inputs, 0, token_count},
                     .write = {kv, 0, token_count},
                     .outputs = {hidden, 0, 1}};
    pie_forward(queue, &pass, NULL);
    pie_dealloc_emb(queue, inputs, NULL);
}

/* The hidden state behind one token at `position` that reads the slots before it. */
static pie_emb next(pie_ref token, uint32_t position, const pie_kv_span *reads, uint32_t count,
                    const uint8_t *mask, size_t mask_length)
{
    pie_emb emb = pie_alloc_emb(queue, 1, NULL);
    pie_embed_txt_at(queue, emb, 0, &token, 1, &position, NULL);
    pie_pass pass = {.inputs = {emb, 0, 1}, .reads = reads, .read_count = count,
                     .outputs = {emb, 0, 1}, .positions = &position,
                     .mask = mask, .mask_length = mask_length};
    pie_forward(queue, &pass, NULL);
    return emb;
}

/* Says how the queue came through the step, and ends both. */
static void finish(const char *step)
{
    pie_future synchronized;
    pie_synchronize(queue, &synchronized);
    add(" |");
    tell(synchronized, NULL);
    pie_destroy_queue(queue, NULL);
    end(step);
}

static void chain(void)
{
    enum { STEPS = 6 };
    pie_future sampled[STEPS];
    pie_token token = pie_new_token();
    pie_sampling lazy = {.lazy = true};
    prefill();
    pie_set_queue_priority(queue, 3, NULL);
    pie_sample(queue, hidden, 0, token, &lazy, &sampled[0]);
    for (uint32_t i = 1; i < STEPS; i++) {
        uint32_t at = token_count + i - 1;
        pie_kv_span reads = {kv, 0, at};
        pie_emb emb = pie_alloc_emb(queue, 1, NULL);
        pie_ref late = pie_late(token);
        pie_embed_txt(queue, emb, 0, &late, 1, at, NULL);
        pie_pass pass = {.inputs = {emb, 0, 1}, .reads = &reads, .read_count = 1,
                         .write = {kv, at, 1}, .outputs = {emb, 0, 1}};
        pie_forward(queue, &pass, NULL);
        pie_sample(queue, emb, 0, token, &lazy, &sampled[i]);
        pie_dealloc_emb(queue, emb, NULL);
    }
    for (int i = 0; i < STEPS; i++)
        tell(sampled[i], NULL);
    pie_dealloc_token(queue, token, NULL);
    finish("chain");
}

static void stops(void)
{
    pie_future first, again, dropped, dist;
    pie_value value = {0};
    pie_token token = pie_new_token(), after = pie_new_token();
    prefill();
    pie_sample(queue, hidden, 0, token, NULL, &first);
    if (tell(first, &value)) {
        pie_sampling stopping = {.stop = &value.number, .stop_count = 1};
        pie_kv_span reads = {kv, 0, token_count};
        pie_sample(queue, hidden, 0, token, &stopping, &again);
        pie_emb emb = next(pie_late(token), token_count, &reads, 1, NULL, 0);
        pie_sample(queue, emb, 0, after, NULL, &dropped);
        pie_get_next_dist(queue, emb, 0, 4, 0, &dist);
        tell(again, NULL);
        tell(dropped, NULL);
        tell(dist, NULL);
        pie_value_free(&value);
    }
    finish("stops");
}

static void sample(void)
{
    uint32_t count;
    const pie_model *model = pie_available_models(&count);
    pie_ref allowed[40];
    for (int i = 0; i < 40; i++)
        allowed[i] = 100 + i;
    size_t size, octets = (model->vocab_size + 7) / 8;
    uint8_t *ring = pie_ring_in(&size);
    uint32_t place = 64;
    pie_future answer, made;
    if (size < place + octets)
        place = 0;
    if (size >= octets)
        pie_pack_token_mask(allowed, 40, model->vocab_size, ring + place);
    prefill();
    pie_history history = pie_alloc_history(queue, tokens, token_count, &made);
    pie_extend_history(queue, history, tokens, 2, NULL);
    pie_bias bias[] = {{120, 3.0}, {121, -2.5}};
    pie_sampling how = {.temperature = 0.75, .top_k = 20, .top_p = 0.5, .min_p = 0.125,
                        .seeded = true, .seed = 7, .masked = true, .mask = place, .bias = bias,
                        .bias_count = 2, .history = history, .repetition_penalty = 1.5,
                        .presence_penalty = 0.5, .frequency_penalty = 0.25, .logprobs = true,
                        .k = 4, .offset = 128};
    pie_sample(queue, hidden, 0, pie_new_token(), &how, &answer);
    tell(made, NULL);
    tell(answer, NULL);
    pie_dealloc_history(queue, history, NULL);
    finish("sample");
}

static void get_next_dist(void)
{
    pie_future few, all;
    pie_dist dist;
    prefill();
    pie_get_next_dist(queue, hidden, 0, 3, 0, &few);
    pie_get_next_dist(queue, hidden, 0, pie_get_limits()->top_k, 64, &all);
    if (tell(few, NULL) && !pie_read_dist(0, 3, &dist))
        add(" %u %u %u", dist.tokens[0], dist.tokens[1], dist.tokens[2]);
    tell(all, NULL);
    finish("get_next_dist");
}

static void pages(void)
{
    uint8_t mask[SLOTS / 8];
    pie_future plain, masked;
    uint32_t size = page_size();
    prefill();
    pie_kvpage copy = pie_alloc_kvpage(queue, 1, NULL);
    pie_copy_kvpage(queue, (pie_kv_span){kv, 0, 2}, (pie_kv_span){copy, 0, 2}, NULL);
    pie_mask_kvpage(queue, (pie_kv_span){copy, 1, 1}, false, NULL);
    pie_kvpage shared = pie_share_kvpage(queue, kv, 0, 1, NULL);
    pie_dealloc_kvpage_range(queue, kv, SLOTS / size - 1, 1, NULL);
    pie_kv_span both[] = {{shared, 0, token_count}, {copy, 0, 2}};
    pie_emb one = next(tokens[0], token_count, both, 2, NULL, 0);
    memset(mask, 0x55, sizeof mask);
    pie_emb other = next(tokens[0], token_count, both, 1, mask, (token_count + 8) / 8);
    pie_sample(queue, one, 0, pie_new_token(), NULL, &plain);
    pie_sample(queue, other, 0, pie_new_token(), NULL, &masked);
    tell(plain, NULL);
    tell(masked, NULL);
    pie_dealloc_kvpage(queue, copy, 0, NULL);
    finish("pages");
}

/* Hidden states out and in again, if the model has them. */
static void vectors(void)
{
    uint32_t count;
    size_t octets = pie_available_models(&count)->hidden_size * sizeof(float);
    pie_future read, back;
    prefill();
    pie_emb_span span = {hidden, 0, 1};
    pie_read_emb(queue, span, 0, &read);
    if (tell(read, NULL)) {
        float *in = pie_ring_in_floats(0, octets / sizeof *in);
        const float *out = pie_ring_out_floats(0, octets / sizeof *out);
        if (in && out)
            memcpy(in, out, octets);
        pie_write_emb(queue, span, 0, token_count, NULL);
        pie_read_emb(queue, span, (uint32_t)octets, &back);
        if (tell(back, NULL) && in && out)
            add(memcmp(in, out + octets / sizeof *out, octets) ? " changed" : " the same");
    }
    finish("vectors");
}

static void write_emb(void)
{
    uint32_t count, positions[] = {3, 5};
    size_t floats = 2 * pie_available_models(&count)->hidden_size;
    float *ring = pie_ring_in_floats(0, floats);
    prefill();
    pie_emb emb = pie_alloc_emb(queue, 2, NULL);
    if (ring)
        memset(ring, 0, floats * sizeof *ring);
    pie_write_emb_at(queue, (pie_emb_span){emb, 0, 2}, 0, positions, NULL);
    finish("write_emb");
}

static void exports(void)
{
    char meta[300];
    pie_future exported, listed, imported, said, ended;
    memset(meta, 'm', sizeof meta);
    prefill();
    pie_export_kvpage(queue, "here", &(pie_kv_range){kv, 0, 1}, 1, meta, sizeof meta, 60, &exported);
    tell(exported, NULL);
    pie_list_exported("he", NULL, &listed);
    tell(listed, NULL);
    pie_kvpage page = pie_import_kvpage(queue, "here", &imported);
    if (tell(imported, NULL)) {
        pie_kv_span reads = {page, 0, token_count};
        pie_sample(queue, next(5, token_count, &reads, 1, NULL, 0), 0, pie_new_token(), NULL, &said);
        tell(said, NULL);
    }
    pie_unexport_kvpage("here", &ended);
    tell(ended, NULL);
    finish("exports");
}

/* Answers of several queues and of none, all waited for together. */
static void at_once(void)
{
    pie_future answers[7];
    pie_queue queues[2];
    for (int i = 0; i < 2; i++) {
        prefill();
        queues[i] = queue;
        pie_sample(queue, hidden, 0, pie_new_token(), NULL, &answers[i]);
        pie_synchronize(queue, &answers[2 + i]);
    }
    pie_store_get("nothing", &answers[4]);
    pie_tokenize(0, "a b c", 5, true, &answers[5]);
    pie_store_exists("nothing", &answers[6]);
    for (int i = 0; i < 7; i++)
        tell(answers[i], NULL);
    for (int i = 0; i < 2; i++)
        pie_destroy_queue(queues[i], NULL);
    end("queues");
}

/* ---------------------------------------------------------------------------------- errors --- */

static void wrong(void)
{
    uint32_t count;
    pie_future answer;
    const pie_model *model = pie_available_models(&count);
    pie_ref token = 5;

    prefill();
    pie_alloc_kvpage(queue, pie_get_limits()->kv_pages + 1, NULL);
    finish("over_quota");

    prefill();
    pie_share_kvpage(queue, kv, 0, 1, NULL);
    pie_mask_kvpage(queue, (pie_kv_span){kv, 0, 1}, false, NULL);
    finish("shared_page");

    prefill();
    pie_sample(queue, pie_alloc_emb(queue, 1, NULL), 0, pie_new_token(), NULL, &answer);
    tell(answer, NULL);
    finish("unwritten");

    prefill();
    pie_embed_txt(queue, hidden, 0, &token, 1, model->max_context, NULL);
    finish("bad_position");

    prefill();
    token = model->vocab_size;
    pie_embed_txt(queue, hidden, 0, &token, 1, 0, NULL);
    finish("bad_argument");

    prefill();
    pie_dealloc_kvpage_range(queue, kv, 0, 1, NULL);
    pie_mask_kvpage(queue, (pie_kv_span){kv, 0, 1}, false, NULL);
    finish("bad_span");

    prefill();
    pie_import_kvpage(queue, "nowhere", NULL);
    finish("not_found");

    prefill(); /* all in one frame, so the accelerator has not begun */
    pie_sample(queue, hidden, 0, pie_new_token(), NULL, &answer);
    pie_cancel(queue, NULL);
    tell(answer, NULL);
    finish("cancelled");
}
