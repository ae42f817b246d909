/* Starts as many threads as it gets, says how many it is, and keeps them until end-of-file. */
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <unistd.h>

static void *wait_for_ever(void *unused)
{
    poll(NULL, 0, -1);
    return unused;
}

int main(void)
{
    pthread_attr_t attributes;
    pthread_t thread;
    char octet;
    int count = 1;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 16384);
    while (count < 10000 && !pthread_create(&thread, &attributes, wait_for_ever, NULL))
        count++;
    dprintf(3, "%d", count);
    while (read(3, &octet, 1) > 0)
        ;
    _exit(0);
}
