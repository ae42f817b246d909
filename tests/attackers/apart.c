/* What only a user of its own keeps an inferlet from: apart SIBLING prints the errno of each try, 0
 * if it went through. For a process that seccomp and Landlock do not hold. */
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <unistd.h>

#define TRY(name, call) (errno = 0, (void)(call), printf("%s %d\n", name, errno))

int main(int argc, char **argv)
{
    pid_t sibling = argc > 1 ? atoi(argv[1]) : 0;
    char buffer[8];
    struct iovec here = {buffer, 8}, there = {main, 8};
    TRY("kill", kill(sibling, 0));
    TRY("ptrace", ptrace(PTRACE_ATTACH, sibling, 0, 0));
    TRY("memory", process_vm_readv(sibling, &here, 1, &there, 1, 0));
    TRY("launcher", ptrace(PTRACE_ATTACH, getppid(), 0, 0));
    TRY("setuid", setresuid(0, 0, 0));
    TRY("mount", mount("tmpfs", "/", "tmpfs", 0, 0));
    TRY("namespace", unshare(CLONE_NEWNS));
    TRY("chroot", chroot("/"));
    return 0;
}
