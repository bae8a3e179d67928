/* Preloaded into a server or daemon: fsync and fdatasync that fail or are slow, as the file says that JEPSEN_FSYNC names:
 * "pass", "fail" (EIO, and nothing is synced), or "slow MS". Read at every call, so it changes while they run. Each call that fails or is
 * slow leaves a byte in the file that JEPSEN_FSYNC_MET names. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void count(void) {
    const char *path = getenv("JEPSEN_FSYNC_MET");
    int fd = path ? open(path, O_WRONLY | O_APPEND | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    /* That it cannot be counted is nothing to the caller. */
    if (write(fd, "x", 1) < 0)
        errno = 0;
    close(fd);
}

static int refused(void) {
    const char *path = getenv("JEPSEN_FSYNC");
    char text[32] = {0};
    int kept = errno;
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd < 0) {
        errno = kept;
        return 0;
    }
    ssize_t got = read(fd, text, sizeof text - 1);
    close(fd);
    int fails = got >= 4 && !strncmp(text, "fail", 4);
    int slow = got > 5 && !strncmp(text, "slow ", 5);
    if (fails || slow)
        count();
    if (slow)
        usleep(1000u * (useconds_t)atoi(text + 5));
    errno = fails ? EIO : kept;
    return fails;
}

int fsync(int fd) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    return refused() ? -1 : real(fd);
}

int fdatasync(int fd) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    return refused() ? -1 : real(fd);
}
