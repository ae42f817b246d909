/* member -- the member of three_languages that is written in C, with bindings/c.
 *
 * main.py starts it with: its language, the group's name, its part of the text, and how many tokens
 * to go on for. It does what the other two do: saves its part, says so, and goes on from each. */
#include <inferlet.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *language, *group;
static uint32_t max_tokens;

/* The next broadcast in the group: "start LANGUAGE ..." by main.py, or "saved LANGUAGE". */
static int hear(pie_subscription subscription, pie_value *message)
{
    pie_future answer;
    int code = pie_next_message(subscription, &answer);
    return code ? code : pie_wait(answer, message);
}

/* Tells main.py what came of it: whose pages, who said they are there, of how many tokens they are,
 * how many were imported, and the text. */
static int report(const char *whose, const char *sender, const pie_context_stats *imported,
                  const pie_context *context)
{
    char line[PIE_MAX_MESSAGE];
    uint32_t count, before = imported->prompt_tokens;
    const pie_ref *tokens = pie_context_tokens(context, &count);
    int head = snprintf(line, sizeof line, "%s %s %" PRIu32 " %" PRIu32 " ", whose, sender, before,
                        imported->pages);
    size_t room = sizeof line - (size_t)head;
    size_t length = pie_detokenize(tokens + before, count - before, line + head, room);
    return pie_send(line, (size_t)head + (length < room ? length : room), NULL);
}

/* Goes on from the pages that `whose` has saved, which are not computed again. */
static int go_on(const char *whose, const char *sender)
{
    uint32_t models;
    const pie_model *model = pie_available_models(&models);
    pie_sampling greedy = {.stop = model->eos_tokens, .stop_count = model->eos_count};
    char name[PIE_MAX_NAME + 1];
    snprintf(name, sizeof name, "%s/%s", group, whose);
    pie_context *context = pie_context_restore(0, name);
    if (!context)
        return pie_error().code;
    pie_context_stats imported = pie_context_get_stats(context);
    int code = pie_context_generate(context, max_tokens, &greedy, NULL, NULL);
    if (!code)
        code = report(whose, sender, &imported, context);
    pie_context_destroy(context);
    return code;
}

/* Makes the pages of `part` and tells the others that they are there. The export holds them as long
 * as this program runs, so the context may go. */
static int save(const char *part)
{
    char name[PIE_MAX_NAME + 1], text[64];
    snprintf(name, sizeof name, "%s/%s", group, language);
    snprintf(text, sizeof text, "saved %s", language);
    pie_context *context = pie_context_create(0);
    if (!context)
        return pie_error().code;
    int code = pie_context_fill(context, part, strlen(part), true);
    if (!code)
        code = pie_context_save(context, name, PIE_NO_LEASE);
    pie_context_destroy(context);
    return code ? code : pie_broadcast(group, text, strlen(text), true, NULL);
}

static int take_part(const char *part)
{
    pie_future answer;
    pie_value message;
    pie_subscription subscription = pie_subscribe(group, true, &answer);
    int left = 0, code = pie_wait(answer, NULL);
    if (!code)
        code = pie_send("ready", 5, NULL);
    if (!code)
        code = hear(subscription, &message); /* "start python c node" */
    if (code)
        return code;
    for (const char *at = (char *)message.bytes; (at = strchr(at, ' ')); at++)
        left++;
    pie_value_free(&message);

    for (code = save(part); !code && left; left--) { /* its own pages are one of them */
        if ((code = hear(subscription, &message)))
            break;
        code = go_on((char *)message.bytes + strlen("saved "), message.text);
        pie_value_free(&message);
    }
    /* The others may not have what they need yet: main.py says when all do, by closing. */
    if (!code && !(code = pie_receive(&answer)) && (code = pie_wait(answer, NULL)) == PIE_CLOSED)
        code = PIE_OK;
    return code;
}

int main(void)
{
    if (pie_init() || !pie_get_arg(3)) {
        fputs("member: main.py of this folder starts it\n", stderr);
        return 2;
    }
    language = pie_get_arg(0);
    group = pie_get_arg(1);
    max_tokens = (uint32_t)strtoul(pie_get_arg(3), NULL, 10);
    if (take_part(pie_get_arg(2))) {
        pie_perror("the member in C");
        return 1;
    }
    return 0;
}
