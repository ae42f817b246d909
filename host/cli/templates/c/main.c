/* Continues a prompt and streams the text as it comes. */
#include "inferlet.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int complete(const char *prompt, uint32_t max_tokens)
{
    uint32_t models;
    const pie_model *model = pie_available_models(&models);
    pie_generation how = {
        .max_tokens = max_tokens,
        .sampling = {.stop = model->eos_tokens, .stop_count = model->eos_count},
    };
    pie_context *context = pie_context_create(0);
    if (!context)
        return pie_error().code;

    int code = pie_context_fill(context, prompt, strlen(prompt), true);
    if (!code)
        code = pie_context_start(context, &how);
    for (pie_piece piece = {0}; !code && !piece.finish;) {
        code = pie_context_next(context, &piece);
        if (!code && piece.length) /* 0: a character that is not complete */
            code = pie_send(piece.text, piece.length, NULL);
    }
    pie_context_destroy(context);
    return code;
}

int main(void)
{
    if (pie_init()) {
        pie_perror("@NAME@");
        return 1;
    }
    const char *prompt = pie_get_arg(0), *count = pie_get_arg(1);
    long max_tokens = count ? strtol(count, NULL, 10) : 64;
    if (!prompt || max_tokens < 1 || max_tokens > 1000000) {
        fputs("usage: piehost launch . -- PROMPT [MAX_TOKENS]\n", stderr);
        return 2;
    }
    if (complete(prompt, (uint32_t)max_tokens)) {
        pie_perror("@NAME@");
        return 1;
    }
    return 0;
}
