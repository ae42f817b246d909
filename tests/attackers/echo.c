/* An honest inferlet: answers on its socket what it is sent, until end-of-file. */
#include <unistd.h>

int main(void)
{
    char buffer[256];
    ssize_t n;
    while ((n = read(3, buffer, sizeof buffer)) > 0)
        if (write(3, buffer, (size_t)n) != n)
            return 1;
    return 0;
}
