/* Takes all there is of something: the first word says of what. Prints how that ended, if it did. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "entry.h"

static void *wait_for_ever(void *unused)
{
    poll(NULL, 0, -1);
    return unused;
}

/* As many threads as it gets, and what kept it from the next. */
static void threads(void)
{
    pthread_attr_t attributes;
    pthread_t thread;
    int count = 1, error = 0;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 32768);
    while (count < 10000 && !(error = pthread_create(&thread, &attributes, wait_for_ever, NULL)))
        count++;
    printf("%s at %d\n", error == EAGAIN ? "EAGAIN" : strerror(error), count);
}

/* Memory for ever, all of it touched; `at_end` says so when there is no more. */
static void memory(int at_end)
{
    for (int count = 0;; count++) {
        char *block = malloc(1 << 20);
        if (block)
            memset(block, 1, 1 << 20);
        else if (at_end) {
            printf("%s at %d\n", errno == ENOMEM ? "ENOMEM" : strerror(errno), count);
            return;
        }
    }
}

static void descriptors(void)
{
    int fd, last = 0;
    while ((fd = fcntl(3, F_DUPFD, 0)) >= 0)
        last = fd;
    printf("%s at %d\n", errno == EMFILE ? "EMFILE" : strerror(errno), last + 1);
}

static void flood(void)
{
    static char block[1 << 16];
    memset(block, 'x', sizeof block);
    for (int i = 0; i < 1024; i++)
        if (write(1 + i % 2, block, sizeof block) < 0)
            exit(1);
}

static void ignore(void)
{
    for (int number = 1; number < NSIG; number++)
        signal(number, SIG_IGN);
    puts("ignores them all");
    fflush(stdout);
    for (;;)
        poll(NULL, 0, -1);
}

static void handler(int number) { (void)number; }

static void spin(void)
{
    signal(SIGXCPU, handler); /* a handler for it buys no time */
    for (volatile unsigned long n = 0;; n++)
        ;
}

static void *spin_thread(void *unused)
{
    spin();
    return unused;
}

static void spin_on_threads(void)
{
    pthread_t thread;
    for (int i = 0; i < 8; i++)
        pthread_create(&thread, NULL, spin_thread, NULL);
    spin();
}

static void core(void)
{
    struct rlimit limit = {1, 1};
    getrlimit(RLIMIT_CORE, &limit);
    printf("%lu %lu\n", (unsigned long)limit.rlim_cur, (unsigned long)limit.rlim_max);
    fflush(stdout);
    raise(SIGABRT);
}

/* Writes beyond the end of what it holds: what each says, or that it went. */
static void grow(int fd)
{
    signal(SIGXFSZ, SIG_IGN);
    off_t end = lseek(fd, 0, SEEK_END);
    if (end < 0)
        puts("no file");
    else if (write(fd, "x", 1) == 1)
        puts("it grew");
    else
        puts(strerror(errno));
}

static void *touch_volatile(volatile char *at)
{
    *at = 1;
    return (void *)at;
}

static int overflow(int depth)
{
    volatile char block[1 << 14];
    touch_volatile(block);
    return depth < 0 ? 0 : overflow(depth + 1) + block[0];
}

/* The memory it has that nobody counts: a mapping of ring in, again and again. */
static void mappings(void)
{
    int count = 0;
    while (mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, 5, 0) != MAP_FAILED)
        count++;
    printf("%s at %d\n", errno == ENOMEM ? "ENOMEM" : strerror(errno), count);
}

static void open_file(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    puts(fd >= 0                              ? "opened"
         : errno == EPERM || errno == EACCES ? "refused"
         : errno == ENOENT                   ? "no such file"
                                             : strerror(errno));
}

extern char **environ;

static void inherited(void)
{
    for (int fd = 0; fd < 4096; fd++)
        if (fcntl(fd, F_GETFD) >= 0)
            printf("%d ", fd);
    for (char **variable = environ; *variable; variable++)
        printf("%s ", *variable);
}

int attack(int argc, char **argv)
{
    const char *what = argv[0];
    if (!strcmp(what, "threads"))
        threads();
    else if (!strcmp(what, "memory"))
        memory(0);
    else if (!strcmp(what, "address-space"))
        memory(1);
    else if (!strcmp(what, "mappings"))
        mappings();
    else if (!strcmp(what, "descriptors"))
        descriptors();
    else if (!strcmp(what, "flood"))
        flood();
    else if (!strcmp(what, "ignore"))
        ignore();
    else if (!strcmp(what, "spin"))
        spin();
    else if (!strcmp(what, "spin-threads"))
        spin_on_threads();
    else if (!strcmp(what, "core"))
        core();
    else if (!strcmp(what, "grow") && argc > 1)
        grow(atoi(argv[1]));
    else if (!strcmp(what, "open") && argc > 1)
        open_file(argv[1]);
    else if (!strcmp(what, "inherited"))
        inherited();
    else if (!strcmp(what, "stack"))
        return overflow(0);
    else
        return 2;
    fflush(stdout);
    _exit(0);
}
