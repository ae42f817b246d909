/* conformance -- every command of docs/abi.md through the C binding, and every error that a program
 * can meet without doing wrong; for piehost conform. It sends one message a step: what came of it,
 * and the names of errors. They are the same in every weather, but for those with errors.
 *
 *     conformance [URL]    URL: of a server that answers; without one the steps of HTTP are left out
 *     conformance child    says back what it is told
 *
 * conformance_queue.h has the steps on a queue, conformance_services.h those without one. */
#include "inferlet.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define PROMPT "The capital of France is"

static char line[4096]; /* of the step that runs */
static size_t used;
static pie_ref tokens[32]; /* of PROMPT */
static uint32_t token_count;

/* Adds to what the step says. */
static void add(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    int size = vsnprintf(line + used, sizeof line - used, format, arguments);
    va_end(arguments);
    used += size > 0 && (size_t)size < sizeof line - used ? (size_t)size : 0;
}

/* The step is over: says what came of it. */
static void end(const char *step)
{
    char message[sizeof line + 64];
    int size = snprintf(message, sizeof message, "%s:%s\n", step, line);
    pie_send(message, (size_t)size, NULL);
    used = 0;
    line[0] = '\0';
}

/* Waits for an answer, and says what it is, or the error. */
static bool tell(pie_future future, pie_value *kept)
{
    pie_value value;
    int code = pie_wait(future, &value);
    if (code) {
        add(" %s", pie_error_name(code));
        return false;
    }
    switch (value.kind) {
    case PIE_NIL: add(" nil"); break;
    case PIE_NUMBER:
    case PIE_BOOL: add(" %ld", (long)value.number); break;
    case PIE_BYTES: add(" %zu octets, '%.20s'", value.length, (char *)value.bytes); break;
    case PIE_TOKENS: add(" %zu tokens, the last %ld", value.length,
                         value.length ? (long)value.tokens[value.length - 1] : -1L); break;
    case PIE_TEXT: add(" text"); break;
    case PIE_NAMES: add(" %zu names", value.length); break;
    case PIE_MESSAGE: add(" message of %zu", value.length); break;
    case PIE_QUOTAS: add(" quotas, the first %s", value.length ? value.quotas[0].name : "none"); break;
    case PIE_RESPONSE: add(" status %ld", (long)value.number); break;
    case PIE_IMPORTED: add(" %ld pages, meta of %zu", (long)value.number, value.length); break;
    case PIE_EXPORTS: add(" %zu exports", value.length); break;
    case PIE_SAMPLED: add(" %ld, %.3f, %u", (long)value.number, value.logprob, value.entries); break;
    }
    if (kept)
        *kept = value;
    else
        pie_value_free(&value);
    return true;
}

#include "conformance_queue.h"

#include "conformance_services.h"

/* -------------------------------------------------------------------------------- messages --- */

static void text(void)
{
    static const pie_chat_message question = {"user", PROMPT};
    pie_future answer;
    pie_value value = {0};
    pie_tokenize(0, PROMPT, sizeof PROMPT - 1, true, &answer);
    bool tokenized = tell(answer, &value);
    token_count = 5;
    for (uint32_t i = 0; i < token_count; i++)
        tokens[i] = tokenized && value.length == 5 ? value.tokens[i] : (pie_ref)(5 + i);
    pie_value_free(&value);
    end("tokenize");
    pie_chat(0, &question, 1, true, &answer);
    tell(answer, NULL);
    end("chat");
    for (int i = 0; i < 2; i++) {
        pie_receive(&answer);
        tell(answer, NULL);
    }
    end("receive");
}

static void echo(void)
{
    pie_future answer;
    pie_value value;
    while (pie_receive(&answer), !pie_wait(answer, &value)) {
        pie_send(value.bytes, value.length, NULL);
        pie_value_free(&value);
    }
}

int main(void)
{
    if (pie_init()) {
        pie_perror("conformance");
        return 1;
    }
    const char *argument = pie_get_arg(0);
    if (argument && !strcmp(argument, "child")) {
        echo();
        return 0;
    }
    text();
    chain();
    stops();
    sample();
    get_next_dist();
    pages();
    vectors();
    write_emb();
    exports();
    wrong();
    at_once();
    store();
    broadcasts();
    lagged();
    children();
    http(argument);
    pie_future answer;
    pie_quota(&answer);
    tell(answer, NULL);
    end("quota");
    return pie_flush() ? 1 : 0;
}
