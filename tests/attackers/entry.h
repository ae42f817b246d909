/* An attack as a program, or as a library that an interpreter loads: it then runs as it is loaded
 * (Node, Perl), or is called (Python). Its words follow "attack NAME" on the command line. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int attack(int argc, char **argv);

static int entered(int argc, char **argv)
{
    for (; argc > 2; argc--, argv++)
        if (!strcmp(*argv, "attack")) {
            int code = attack(argc - 2, argv + 2);
            fflush(stdout);
            _exit(code); /* an interpreter is not asked how it would like to end */
        }
    return 2;
}

#ifdef LIBRARY
__attribute__((constructor)) static void loaded(int argc, char **argv) { entered(argc, argv); }
#else
int main(int argc, char **argv) { return entered(argc, argv); }
#endif
