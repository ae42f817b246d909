/* calls.py's twin. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "inferlet.h"

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

int main(void)
{
    pie_value value;
    char text[64];
    if (pie_init())
        return 1;
    int count = atoi(pie_get_arg(1)); /* --count N */
    pie_future *futures = malloc((size_t)count * sizeof *futures);
    pie_queue queue = pie_create_queue(0, NULL);
    double start = now();
    for (int i = 0; i < count; i++)
        if (pie_synchronize(queue, &futures[0]) || pie_wait(futures[0], &value))
            return 1;
    double alone = (now() - start) / count;
    start = now();
    for (int i = 0; i < count; i++)
        if (pie_synchronize(queue, &futures[i])) {
            pie_perror("calls");
            return 1;
        }
    for (int i = 0; i < count; i++)
        if (pie_wait(futures[i], &value))
            return 1;
    double together = (now() - start) / count;
    snprintf(text, sizeof text, "%.3f %.3f", alone * 1e6, together * 1e6);
    return pie_send(text, strlen(text), NULL);
}
