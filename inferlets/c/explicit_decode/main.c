/* explicit_decode -- the listing of section 4.2 of the Pie paper (arXiv 2510.24051): pages, embeds,
 * positions and each step by hand. Every token is looked at here before the next step, so a step
 * is a round trip; text_completion queues chains of late-bound tokens instead. Greedy only: another
 * temperature is refused. */
#include "../options.h"

static const char usage[] = "usage: explicit_decode --prompt TEXT --max-tokens N "
                            "[--temperature 0] [--top-p P] [--seed S]\n";

enum { PREFILL = 512 }; /* inputs of one forward */

static bool is_eos(const pie_model *model, pie_ref token)
{
    for (uint32_t i = 0; i < model->eos_count; i++)
        if (model->eos_tokens[i] == token)
            return true;
    return false;
}

/* The most probable token after the hidden state in embed 0 of `out`, through ring out. */
static int most_probable(pie_queue queue, pie_emb out, pie_ref *token)
{
    pie_future answer;
    pie_value written;
    pie_dist dist;
    int code = pie_get_next_dist(queue, out, 0, 1, 0, &answer);
    if (code || (code = pie_wait(answer, &written)) ||
        (code = pie_read_dist(0, (uint32_t)written.number, &dist)))
        return code;
    *token = dist.tokens[0];
    return PIE_OK;
}

static int complete(const struct options *o)
{
    uint32_t models;
    const pie_model *model = pie_available_models(&models);
    uint32_t page_size = pie_get_kvpage_size(0);
    pie_future answer;
    pie_value prompt;
    pie_stream stream = {0};
    int code;

    if ((code = pie_tokenize(0, o->prompt, strlen(o->prompt), true, &answer)) ||
        (code = pie_wait(answer, &prompt)))
        return code;
    uint32_t length = (uint32_t)prompt.length, most = length + o->max_tokens;
    if (most < length || most > model->max_context)
        most = model->max_context;

    /* Allocate. */
    pie_queue queue = pie_create_queue(0, NULL);
    pie_kvpage kv = pie_alloc_kvpage(queue, (most + page_size - 1) / page_size, NULL);
    pie_emb in = pie_alloc_emb(queue, PREFILL, NULL);
    pie_emb out = pie_alloc_emb(queue, 1, NULL);

    /* Prefill; the last forward leaves the hidden state of the last token in `out`. */
    for (uint32_t at = 0; at < length && !code; at += PREFILL) {
        uint32_t n = length - at < PREFILL ? length - at : PREFILL;
        pie_embed_txt(queue, in, 0, prompt.tokens + at, n, at, NULL);
        code = pie_forward(queue,
                           &(pie_pass){
                               .inputs = {in, 0, n},
                               .reads = &(pie_kv_span){kv, 0, at},
                               .read_count = at > 0,
                               .write = {kv, at, n},
                               .outputs = {out, 0, 1},
                           },
                           NULL);
    }
    free(prompt.tokens);

    /* Decode. */
    for (uint32_t step = 0; step < o->max_tokens && !code; step++) {
        pie_ref token = PIE_NO_TOKEN;
        size_t size;
        if ((code = most_probable(queue, out, &token)) || is_eos(model, token))
            break;
        const char *text = pie_stream_push(&stream, token, &size);
        if (text && size)
            pie_send(text, size, NULL);
        if (step + 1 == o->max_tokens)
            break;
        uint32_t position = length + step;
        pie_embed_txt(queue, in, 0, &token, 1, position, NULL);
        code = pie_forward(queue,
                           &(pie_pass){
                               .inputs = {in, 0, 1},
                               .reads = &(pie_kv_span){kv, 0, position},
                               .read_count = 1,
                               .write = {kv, position, 1},
                               .outputs = {out, 0, 1},
                           },
                           NULL);
    }

    size_t size;
    const char *rest = pie_stream_end(&stream, &size);
    if (rest && size)
        pie_send(rest, size, NULL);
    pie_stream_free(&stream);
    pie_destroy_queue(queue, NULL);
    return code;
}

int main(void)
{
    struct options options = {0};
    if (pie_init()) {
        pie_perror("explicit_decode");
        return 1;
    }
    if (!read_options(&options, usage))
        return 2;
    if (options.sampling.temperature > 0) {
        print_usage(usage);
        return 2;
    }
    if (complete(&options)) {
        pie_perror("explicit_decode");
        return 1;
    }
    return 0;
}
