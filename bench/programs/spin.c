/* Says so, then keeps as many cores busy as it has threads: what a neighbour may not notice. */
#include <pthread.h>
#include <stdlib.h>

#include "inferlet.h"

static void *spin(void *nothing)
{
    for (volatile unsigned long turns = 0;; turns++)
        ;
    return nothing;
}

int main(void)
{
    pthread_t thread;
    if (pie_init())
        return 1;
    int threads = atoi(pie_get_arg(1)); /* --threads N */
    if (pie_send("ready", 5, NULL) || pie_flush())
        return 1;
    for (int i = 1; i < threads; i++)
        if (pthread_create(&thread, NULL, spin, NULL))
            return 2;
    spin(NULL);
}
