/* Asks what is left of its quotas and reads no answer; then asks on, for no answer, for ever. (Were
 * all to be answered, it would be ended when 6 MiB of answers wait.) */
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#include "inferlet.h"

#define MANY 4096
#define FRAME 6 /* 0, the length, and one command: [[21, id]] */

int main(void)
{
    static uint8_t frames[MANY * FRAME];
    if (pie_init() || pie_send("ready", 5, NULL) || pie_flush())
        return 1;
    for (int round = 0;; round++) {
        for (int i = 0; i < MANY; i++) {
            uint8_t id = round ? 0xc0 : (uint8_t)(i % 128); /* nil, or a number */
            const uint8_t frame[FRAME] = {0, 4, 0x91, 0x92, 21, id};
            memcpy(frames + i * FRAME, frame, FRAME);
        }
        for (size_t sent = 0; sent < sizeof frames;) {
            ssize_t n = write(3, frames + sent, sizeof frames - sent);
            if (n < 0)
                return 1;
            sent += (size_t)n;
        }
    }
}
