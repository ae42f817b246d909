/* A system call of another architecture: foreign i386 | x32. */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    long result;
    if (argc > 1 && !strcmp(argv[1], "i386"))
        __asm__ volatile("int $0x80" : "=a"(result) : "a"(20) : "memory"); /* getpid */
    else
        result = syscall(0x40000000 + 39); /* getpid */
    printf("%ld\n", result);
    return 0;
}
