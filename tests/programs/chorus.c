/* chorus.py's twin: goes on from a prompt when told to, past any end token. */
#include <stdlib.h>
#include <string.h>

#include "inferlet.h"

static int send_piece(pie_ref token, void *stream)
{
    size_t length;
    const char *text = pie_stream_push(stream, token, &length);
    return !text || (length && pie_send(text, length, NULL));
}

int main(void)
{
    pie_stream stream = {0};
    pie_sampling greedy = {0};
    pie_future go;
    pie_value value;
    size_t length;
    if (pie_init())
        return 1;
    const char *prompt = pie_get_arg(1), *count = pie_get_arg(3); /* --prompt P --max-tokens N */
    pie_context *context = pie_context_create(0);
    if (!context || pie_context_fill(context, prompt, strlen(prompt), true) ||
        pie_send("ready", 5, NULL) || pie_receive(&go) || pie_wait(go, &value) ||
        pie_context_generate(context, (uint32_t)atoi(count), &greedy, send_piece, &stream)) {
        pie_perror("chorus");
        return 1;
    }
    const char *rest = pie_stream_end(&stream, &length);
    if (length)
        pie_send(rest, length, NULL);
    pie_stream_free(&stream);
    return 0;
}
