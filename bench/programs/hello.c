/* hello.py's twin. */
#include "inferlet.h"

int main(void)
{
    return pie_init() || pie_send("hello", 5, NULL);
}
