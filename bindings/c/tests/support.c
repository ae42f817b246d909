/* support -- an inferlet that does one thing with the support layer, so that a test can launch it
 * beside its twin in another language: `support WHAT ARGUMENTS...`. What it says are messages. */
#include "inferlet.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *argument(uint32_t i)
{
    return pie_get_arg(i) ? pie_get_arg(i) : "";
}

static uint32_t number(uint32_t i)
{
    return (uint32_t)strtoul(argument(i), NULL, 10);
}

/* Sends what the generation says, to its end. */
static int say(pie_context *context, const pie_generation *how)
{
    pie_piece piece = {.finish = PIE_GOING_ON};
    int code = pie_context_start(context, how);
    while (!code && !piece.finish)
        if (!(code = pie_context_next(context, &piece)) && piece.length)
            code = pie_send(piece.text, piece.length, NULL);
    return code;
}

static int say_tokens(const pie_context *context, uint32_t from)
{
    uint32_t count;
    char line[32];
    const pie_ref *tokens = pie_context_tokens(context, &count);
    int code = PIE_OK;
    for (; from < count && !code; from++)
        code = pie_send(line, (size_t)snprintf(line, sizeof line, "%lld ", (long long)tokens[from]),
                        NULL);
    return code;
}

/* text PROMPT MAX TEMPERATURE TOP_P SEED REPETITION PRESENCE STOP_STRING: goes on from a prompt. */
static int say_text(pie_context *context)
{
    const char *stop = argument(8);
    pie_generation how = {
        .max_tokens = number(2),
        .sampling = {.temperature = strtod(argument(3), NULL),
                     .top_p = strtod(argument(4), NULL),
                     .seeded = true,
                     .seed = number(5),
                     .repetition_penalty = strtod(argument(6), NULL),
                     .presence_penalty = strtod(argument(7), NULL)},
        .stop_strings = &stop,
        .stop_string_count = 1,
    };
    int code = pie_context_fill(context, argument(1), strlen(argument(1)), true);
    return code ? code : say(context, &how);
}

/* save NAME PROMPT: goes on by 8 tokens, saves that, and says the 8 after it. */
static int say_saved(pie_context *context)
{
    pie_generation eight = {.max_tokens = 8};
    int code = pie_context_fill(context, argument(2), strlen(argument(2)), true);
    if (!code)
        code = pie_context_generate(context, 8, NULL, NULL, NULL);
    if (!code)
        code = pie_context_save(context, argument(1), 60);
    return code ? code : say(context, &eight);
}

/* restore NAME: says the 8 tokens after a saved context. */
static int say_restored(pie_context *context)
{
    pie_generation eight = {.max_tokens = 8};
    pie_context *restored = pie_context_restore(0, argument(1));
    int code = restored ? say(restored, &eight) : pie_error().code;
    (void)context;
    pie_context_destroy(restored);
    return code;
}

/* long COUNT: fills in so many tokens, and says the next 8. */
static int say_long(pie_context *context)
{
    uint32_t count = number(1);
    pie_ref *tokens = malloc((count + 1) * sizeof *tokens);
    for (uint32_t i = 0; i < count; i++)
        tokens[i] = 40 + (i * i + i / 7) % 200;
    int code = pie_context_fill_tokens(context, tokens, count);
    if (!code)
        code = pie_context_generate(context, 8, NULL, NULL, NULL);
    free(tokens);
    return code ? code : say_tokens(context, count);
}

/* What say_hidden does, by calls alone: the prompt, then each token with the reads it should have.
 * The last token of the prompt comes once more, when the first ones are hidden. */
static int recompute(uint32_t prompt, uint32_t sink, uint32_t recent, const pie_ref *tokens,
                     uint32_t count)
{
    uint32_t page = pie_get_kvpage_size(0), hidden = 6;
    pie_queue queue = pie_create_queue(0, NULL);
    pie_kvpage kv = pie_alloc_kvpage(queue, (prompt + count) / page + 1, NULL);
    pie_emb in = pie_alloc_emb(queue, prompt, NULL), out = pie_alloc_emb(queue, 1, NULL);
    pie_token token = pie_new_token();
    int code = PIE_OK;
    for (uint32_t step = 0; step <= count && !code; step++) {
        /* step 0: the prompt. Step 1: its last token again. Step n: the one after. */
        uint32_t at = step ? prompt + step - 2 : 0, n = step ? 1 : prompt, reads = 0;
        uint32_t gone = step > 1 && at > recent ? at - recent : 0;
        pie_kv_span seen[3];
        pie_future answer;
        pie_value value;
        if (step && sink > hidden)
            seen[reads++] = (pie_kv_span){kv, hidden, sink - hidden};
        if (step)
            seen[reads++] = (pie_kv_span){kv, gone > sink ? gone : sink,
                                          at - (gone > sink ? gone : sink)};
        pie_embed_txt(queue, in, 0, tokens + at, n, at, NULL);
        code = pie_forward(queue,
                           &(pie_pass){.inputs = {in, 0, n},
                                       .reads = seen,
                                       .read_count = reads,
                                       .write = {kv, at, n},
                                       .outputs = {out, 0, 1}},
                           NULL);
        if (step && !code && !(code = pie_sample(queue, out, 0, token, NULL, &answer)) &&
            !(code = pie_wait(answer, &value)) && value.number != tokens[at + 1]) {
            fprintf(stderr, "token %u is %lld, and %lld when computed again\n", at + 1,
                    (long long)tokens[at + 1], (long long)value.number);
            return PIE_BACKEND;
        }
    }
    pie_destroy_queue(queue, NULL);
    return code;
}

/* hidden PROMPT COUNT SINK RECENT: hides the first 6 tokens of the prompt and generates with a
 * window; says the tokens if plain calls give the same. */
static int say_hidden(pie_context *context)
{
    uint32_t prompt, count, sink = number(3), recent = number(4);
    int code = pie_context_fill(context, argument(1), strlen(argument(1)), true);
    pie_context_tokens(context, &prompt);
    if (!code)
        code = pie_context_mask(context, 0, 6, false);
    if (!code)
        code = pie_context_window(context, sink, recent);
    if (!code)
        code = pie_context_generate(context, number(2), NULL, NULL, NULL);
    const pie_ref *tokens = pie_context_tokens(context, &count);
    if (!code)
        code = recompute(prompt, sink, recent, tokens, count - prompt);
    return code ? code : say_tokens(context, prompt);
}

int main(void)
{
    static const struct {
        const char *name;
        int (*run)(pie_context *);
    } all[] = {{"text", say_text},       {"save", say_saved},     {"restore", say_restored},
               {"long", say_long},       {"hidden", say_hidden}};
    if (pie_init()) {
        pie_perror("support");
        return 1;
    }
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (!strcmp(all[i].name, argument(0))) {
            pie_context *context = pie_context_create(0);
            if (!context || all[i].run(context)) {
                pie_perror("support");
                return 1;
            }
            pie_context_destroy(context);
            return 0;
        }
    return 2;
}
