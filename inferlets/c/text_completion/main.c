/* text_completion -- goes on from a prompt, through the support layer: fill, then generate. */
#include "../options.h"

static const char usage[] = "usage: text_completion --prompt TEXT --max-tokens N "
                            "[--temperature T] [--top-p P] [--seed S]\n";

/* Sends the characters that a token completes, as it comes. */
static int send_token(pie_ref token, void *stream)
{
    size_t length;
    const char *text = pie_stream_push(stream, token, &length);
    return !text || (length && pie_send(text, length, NULL));
}

static int complete(struct options *o)
{
    pie_stream stream = {0};
    uint32_t models;
    size_t length;
    const pie_model *model = pie_available_models(&models);
    pie_context *context = pie_context_create(0);
    if (!context)
        return pie_error().code;

    o->sampling.stop = model->eos_tokens;
    o->sampling.stop_count = model->eos_count;
    int code = pie_context_fill(context, o->prompt, strlen(o->prompt), true);
    if (!code)
        code = pie_context_generate(context, o->max_tokens, &o->sampling, send_token, &stream);

    const char *rest = pie_stream_end(&stream, &length);
    if (rest && length)
        pie_send(rest, length, NULL);
    pie_stream_free(&stream);
    pie_context_destroy(context);
    return code;
}

int main(void)
{
    struct options options = {0};
    if (pie_init()) {
        pie_perror("text_completion");
        return 1;
    }
    if (!read_options(&options, usage))
        return 2;
    if (complete(&options)) {
        pie_perror("text_completion");
        return 1;
    }
    return 0;
}
