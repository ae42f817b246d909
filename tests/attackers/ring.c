/* Two threads change the first octets of ring in as fast as they can while the accelerator reads
 * them. Its words are how many octets, and frames in hex, written in a circle; each answer must
 * come, and nothing in ring out may ever be a number that is not finite: then one thing was looked
 * at, and another taken. */
#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

#include "entry.h"

enum { SIZE = 65536 };
static volatile unsigned char *ring;
static unsigned span;

static void *flip(void *unused)
{
    for (unsigned n = 1;; n = n * 1664525 + 1013904223)
        ring[(n >> 8) % span] = (unsigned char)(n >> 24 & 1 ? 0xff : 0);
    return unused;
}

int attack(int argc, char **argv)
{
    pthread_t thread;
    unsigned char frame[4096], answer[4096];
    const volatile unsigned *out = mmap(NULL, SIZE, PROT_READ, MAP_SHARED, 4, 0);
    int answers = 0;
    span = (unsigned)atoi(argv[0]);
    ring = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, 5, 0);
    if (ring == MAP_FAILED || out == MAP_FAILED || !span || span > SIZE)
        return 1;
    for (int i = 0; i < 2; i++)
        if (pthread_create(&thread, NULL, flip, NULL))
            return 1;
    for (int round = 0; round < 300; round++)
        for (int i = 1; i < argc; i++) {
            size_t size = 0;
            for (unsigned octet; sscanf(argv[i] + 2 * size, "%2x", &octet) == 1; size++)
                frame[size] = (unsigned char)octet;
            if (write(3, frame, size) != (ssize_t)size || read(3, answer, sizeof answer) <= 0)
                return 1;
            answers++;
            if ((*out & 0x7f800000) == 0x7f800000) {
                puts("a number that is not finite went through");
                return 1;
            }
        }
    printf("%d answers\n", answers);
    fflush(stdout);
    _exit(0);
}
