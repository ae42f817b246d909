/* Writes raw octets to the connection. Its words: x:HEX writes; r:N:HEX writes N times HEX; f:N:HEX
 * the same as a frame; g waits for a frame and prints its body in hex; e reads to the end; s sleeps
 * for ever; l starts again with the first word. */
#include <ctype.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <unistd.h>

#include "entry.h"

static unsigned char chunk[1 << 17];

static void put(const unsigned char *data, size_t size)
{
    while (size) {
        ssize_t n = write(3, data, size);
        if (n < 0) /* the connection is gone, and so are we */
            poll(NULL, 0, -1);
        data += n, size -= (size_t)n;
    }
}

static int digit(char c) { return c <= '9' ? c - '0' : c - 'a' + 10; }

/* Not with sscanf, which looks for the end of the text each time: a flood would be a trickle. */
static size_t unhex(const char *text)
{
    size_t size = 0;
    for (; isxdigit((unsigned char)text[2 * size]); size++)
        chunk[size] = (unsigned char)(digit(text[2 * size]) << 4 | digit(text[2 * size + 1]));
    return size;
}

static void get(unsigned char *data, size_t size)
{
    while (size) {
        ssize_t n = read(3, data, size);
        if (n <= 0)
            exit(9);
        data += n, size -= (size_t)n;
    }
}

static void print_frame(void)
{
    static unsigned char body[1 << 16];
    unsigned char head[9];
    size_t size = 0;
    get(head, 2);
    size = head[1];
    if (head[0] == 2) {
        get(head + 2, 7);
        size = (size_t)head[6] << 16 | (size_t)head[7] << 8 | head[8];
    }
    get(body, size);
    for (size_t i = 0; i < size; i++)
        printf("%02x", body[i]);
    printf("\n");
    fflush(stdout);
}

int attack(int argc, char **argv)
{
    signal(SIGPIPE, SIG_IGN);
    for (int i = 0; i < argc; i++) {
        char *word = argv[i], *hex = word + 2;
        unsigned long times = 1;
        if (*word == 'r' || *word == 'f') {
            times = strtoul(hex, &hex, 10);
            hex++;
        }
        switch (*word) {
        case 'f': {
            size_t size = unhex(hex) * times;
            unsigned char head[9] = {2};
            for (int at = 8; at > 0; at--, size >>= 8)
                head[at] = (unsigned char)size;
            put(head, 9);
        } /* fall through */
        case 'x':
        case 'r':
            for (size_t size = unhex(hex); times; times--)
                put(chunk, size);
            break;
        case 'g':
            print_frame();
            break;
        case 'e':
            while (read(3, chunk, sizeof chunk) > 0)
                ;
            break;
        case 's':
            poll(NULL, 0, -1);
            break;
        case 'l':
            i = -1;
        }
    }
    return 0;
}
