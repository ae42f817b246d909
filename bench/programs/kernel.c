/* What the layers of the sandbox add to calls of the kernel: nanoseconds each, on stdout. No
 * inferlet by itself, so that it runs outside of the sandbox as well. */
#define _DEFAULT_SOURCE /* syscall, MAP_ANONYMOUS */
#include <stdio.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { CALLS = 200000, PAGES = 8192, PAGE = 4096 };

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

int main(void)
{
    nanosleep(&(struct timespec){.tv_nsec = 100000000}, NULL); /* by then it is in its group */
    double start = now();
    for (int i = 0; i < CALLS; i++)
        syscall(SYS_getpid);
    double plain = (now() - start) / CALLS;

    int word = 0; /* wakes nobody: the cheapest call with a rule on its arguments */
    start = now();
    for (int i = 0; i < CALLS; i++)
        syscall(SYS_futex, &word, 1, 1, NULL, NULL, 0);
    double ruled = (now() - start) / CALLS;

    start = now(); /* pages of 4 KiB, also where the machine would rather give huge ones */
    char *memory = mmap(NULL, (size_t)PAGES * PAGE, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return 1;
    madvise(memory, (size_t)PAGES * PAGE, MADV_NOHUGEPAGE);
    for (size_t i = 0; i < PAGES; i++)
        memory[i * PAGE] = 1;
    double page = (now() - start) / PAGES;
    printf("%.1f %.1f %.1f\n", plain, ruled, page);
    return 0;
}
