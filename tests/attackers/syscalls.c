/* Makes raw system calls for who asks: reads a number and six arguments from descriptor 3, each of
 * 64 bits, and writes back the result of 64 bits, until the end of what it reads. */
#include <stdint.h>
#include <unistd.h>

static long call(const uint64_t *c)
{
    static char stack[4096] __attribute__((aligned(16)));
    static long scratch;
    uint64_t a = c[1], b = c[2];
    register uint64_t d __asm__("r10") = c[4];
    register uint64_t e __asm__("r8") = c[5];
    register uint64_t f __asm__("r9") = c[6];
    long result;
    if (c[0] == 56) { /* clone: the thread has a stack of its own, and ends at once */
        b = (uint64_t)(stack + sizeof stack);
        d = (uint64_t)&scratch;
    } else if (c[0] == 158 && (uint32_t)a == 0x1002) /* arch_prctl SET_FS: to what it is */
        __asm__("mov %%fs:0, %0" : "=r"(b));
    uint64_t third = c[0] == 56 ? (uint64_t)&scratch : c[3];
    __asm__ volatile("syscall\n"
                     "cmpq $56, %[number]\n"
                     "jne 1f\n"
                     "testq %%rax, %%rax\n"
                     "jne 1f\n"
                     "xorl %%edi, %%edi\n"
                     "movl $60, %%eax\n"
                     "syscall\n"
                     "1:"
                     : "=a"(result), "+D"(a), "+S"(b), "+d"(third), "+r"(d), "+r"(e), "+r"(f)
                     : "0"(c[0]), [number] "b"(c[0])
                     : "rcx", "r11", "memory", "cc");
    return result;
}

int main(void)
{
    uint64_t wanted[7];
    while (1) {
        for (size_t have = 0; have < sizeof wanted;) {
            ssize_t n = read(3, (char *)wanted + have, sizeof wanted - have);
            if (n <= 0)
                return 0;
            have += (size_t)n;
        }
        long result = call(wanted);
        if (write(3, &result, sizeof result) != sizeof result)
            return 1;
    }
}
