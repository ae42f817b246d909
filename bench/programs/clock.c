/* clock.py's twin: generates when told to and says when its first and last token came. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "inferlet.h"

static double first, last;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static int note(pie_ref token, void *user)
{
    (void)token;
    (void)user;
    last = now();
    if (first == 0)
        first = last;
    return 0;
}

int main(void)
{
    pie_sampling greedy = {0};
    pie_future go;
    pie_value value;
    char text[128];
    if (pie_init())
        return 1;
    /* --prompt-tokens N --new-tokens M */
    uint32_t prompt = (uint32_t)atoi(pie_get_arg(1)), count = (uint32_t)atoi(pie_get_arg(3));
    pie_ref *tokens = malloc(prompt * sizeof *tokens);
    for (uint32_t i = 0; i < prompt; i++)
        tokens[i] = 10 + i % 200;
    pie_context *context = pie_context_create(0);
    if (!context || pie_send("ready", 5, NULL) || pie_receive(&go) || pie_wait(go, &value))
        return 1;
    double start = now();
    if (pie_context_fill_tokens(context, tokens, prompt) ||
        pie_context_generate(context, count, &greedy, note, NULL)) {
        pie_perror("clock");
        return 1;
    }
    snprintf(text, sizeof text, "%.9f %.9f %.9f", start, first, last);
    return pie_send(text, strlen(text), NULL);
}
