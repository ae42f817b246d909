/* Sends commands as fast as they are answered, a thousand at a time. */
#include "inferlet.h"

#define MANY 1000 /* the binding keeps 1,024 answers */

int main(void)
{
    pie_future futures[MANY];
    if (pie_init() || pie_send("ready", 5, NULL))
        return 1;
    pie_queue queue = pie_create_queue(0, NULL);
    for (;;) {
        for (int i = 0; i < MANY; i++)
            if (pie_set_queue_priority(queue, 0, &futures[i]))
                return 1;
        for (int i = 0; i < MANY; i++)
            if (pie_wait(futures[i], NULL))
                return 1;
    }
}
