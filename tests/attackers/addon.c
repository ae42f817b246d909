/* The same as call.c from inside Node: the call is made as process.dlopen loads this. */
#define main call
#include "call.c"

__attribute__((constructor)) static void loaded(int argc, char **argv)
{
    while (argc > 1 && !strstr(*argv, "addon.js"))
        argc--, argv++;
    call(argc, argv);
}
