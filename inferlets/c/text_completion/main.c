/* text_completion -- goes on from a prompt, through the support layer: fill, then generate. */
#include "../options.h"

static const char usage[] = "usage: text_completion --prompt TEXT --max-tokens N "
                            "[--temperature T] [--top-p P] [--seed S]\n";

static int complete(const struct options *o)
{
    uint32_t models;
    const pie_model *model = pie_available_models(&models);
    pie_generation how = {.max_tokens = o->max_tokens, .sampling = o->sampling};
    how.sampling.stop = model->eos_tokens;
    how.sampling.stop_count = model->eos_count;

    pie_context *context = pie_context_create(0);
    int code = context ? pie_context_fill(context, o->prompt, strlen(o->prompt), true)
                       : pie_error().code;
    if (!code)
        code = pie_context_start(context, &how);
    for (pie_piece piece = {.finish = PIE_GOING_ON}; !code && !piece.finish;)
        if (!(code = pie_context_next(context, &piece)) && piece.length)
            code = pie_send(piece.text, piece.length, NULL);
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
