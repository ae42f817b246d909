/* Makes one raw system call: call NUMBER ARGUMENT... and prints its result (minus errno).
 * An argument is a number, or s: and a string whose address is passed. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    long a[7] = {0};
    for (int i = 1; i < argc && i <= 7; i++)
        a[i - 1] = strncmp(argv[i], "s:", 2) ? (long)strtoull(argv[i], NULL, 0) : (long)(argv[i] + 2);
    setvbuf(stdout, NULL, _IONBF, 0);
    long result = syscall(a[0], a[1], a[2], a[3], a[4], a[5], a[6]);
    printf("%ld\n", result < 0 ? -errno : result);
    return 0;
}
