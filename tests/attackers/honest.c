/* What an honest program does: memory, threads, waiting, the descriptors it was given. */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/uio.h>
#include <sched.h>
#include <time.h>
#include <unistd.h>

#define CHECK(condition)                                                   \
    do {                                                                   \
        if (!(condition)) {                                                \
            printf("line %d: %s (errno %d)\n", __LINE__, #condition, errno); \
            exit(1);                                                       \
        }                                                                  \
    } while (0)

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t all_done = PTHREAD_COND_INITIALIZER;
static int done;
static volatile sig_atomic_t signalled;

static void *worker(void *argument)
{
    char *memory = malloc(1 << 20);
    CHECK(memory);
    memset(memory, (int)(long)argument, 1 << 20);
    CHECK(prctl(PR_SET_NAME, "worker") == 0);
    free(memory);
    pthread_mutex_lock(&mutex);
    done++;
    pthread_cond_signal(&all_done);
    pthread_mutex_unlock(&mutex);
    return argument;
}

static void handler(int number) { signalled = number; }

int main(void)
{
    pthread_t threads[8];
    for (long i = 0; i < 8; i++)
        CHECK(pthread_create(&threads[i], NULL, worker, (void *)i) == 0);
    pthread_mutex_lock(&mutex);
    while (done < 8) {
        struct timespec until;
        clock_gettime(CLOCK_REALTIME, &until);
        until.tv_sec += 10;
        CHECK(pthread_cond_timedwait(&all_done, &mutex, &until) == 0);
    }
    pthread_mutex_unlock(&mutex);
    for (long i = 0; i < 8; i++) {
        void *result;
        CHECK(pthread_join(threads[i], &result) == 0 && result == (void *)i);
    }

    char *big = malloc(64 << 20);
    CHECK(big);
    memset(big, 1, 64 << 20);
    CHECK((big = realloc(big, 96 << 20)));
    CHECK(madvise((void *)(((long)big + 4095) & ~4095L), 1 << 20, MADV_DONTNEED) == 0);
    free(big);
    char *page = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(page != MAP_FAILED && mprotect(page, 4096, PROT_READ | PROT_WRITE) == 0);
    *page = 1;
    CHECK(munmap(page, 4096) == 0);

    char text[16];
    CHECK(mmap(NULL, 65536, PROT_READ, MAP_SHARED, 4, 0) != MAP_FAILED);
    char *ring_in = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_SHARED, 5, 0);
    CHECK(ring_in != MAP_FAILED && memcpy(ring_in + 65530, "inside", 6));
    CHECK(fcntl(6, F_GET_SEALS) > 0);
    CHECK(lseek(6, 0, SEEK_SET) == 0 && read(6, text, 7) == 7 && !memcmp(text, "\x81\xa4" "args\x90", 7));
    CHECK(lseek(7, 0, SEEK_SET) == 0 && read(7, text, 5) == 5 && !memcmp(text, "vocab", 5));

    struct pollfd waiting = {.fd = 3, .events = POLLIN | POLLOUT};
    CHECK(poll(&waiting, 1, 0) == 1 && waiting.revents == POLLOUT);
    waiting.events = POLLIN;
    struct timespec short_time = {0, 1000000};
    CHECK(ppoll(&waiting, 1, &short_time, NULL) == 0);
    CHECK(fcntl(3, F_SETFL, fcntl(3, F_GETFL) | O_NONBLOCK) == 0);
    CHECK(read(3, text, 1) == -1 && errno == EAGAIN);
    int pending = -1;
    CHECK(ioctl(3, FIONREAD, &pending) == 0 && pending == 0);
    struct iovec parts[2] = {{"pi", 2}, {"e", 1}};
    CHECK(writev(3, parts, 2) == 3);

    CHECK(getrandom(text, sizeof text, 0) == sizeof text);
    CHECK(nanosleep(&short_time, NULL) == 0 && sched_yield() == 0);
    struct rlimit limit;
    CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur == 64);
    CHECK(signal(SIGUSR1, handler) != SIG_ERR && raise(SIGUSR1) == 0 && signalled == SIGUSR1);
    printf("honest\n");
    return 7;
}
