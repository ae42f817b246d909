/* Prints every open descriptor below 4096, then the environment. */
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

extern char **environ;

int main(void)
{
    for (int fd = 0; fd < 4096; fd++)
        if (fcntl(fd, F_GETFD) >= 0)
            printf("%d ", fd);
    printf("\n");
    for (char **variable = environ; *variable; variable++)
        printf("%s\n", *variable);
    return 0;
}
