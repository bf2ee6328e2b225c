/* Make the n-th system call of one kind on paths below a folder fail: preloaded by sweep.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

enum { OPEN, WRITE, FSYNC, RENAME, LINK, UNLINK, STAT, READ, N_KINDS };
enum { ERROR, SHORT, KILL_BEFORE, KILL_AFTER };

static char folder[PATH_MAX];
static int kind = -1, first, last, how, code, fired;
static int counts[N_KINDS];

/* Count calls of every kind below `path`, and strike calls `from` to `to` of kind `k`. */
void shim_arm(const char *path, int k, int from, int to, int h, int e) {
    strncpy(folder, path, sizeof folder - 1);
    memset(counts, 0, sizeof counts);
    kind = k; first = from; last = to; how = h; code = e; fired = 0;
}
int shim_count(int k) { return counts[k]; }
int shim_fired(void) { return fired; }

static int below(const char *path) {
    char full[PATH_MAX];
    if (!folder[0] || !path) return 0;
    if (path[0] != '/') {
        if (!getcwd(full, sizeof full)) return 0;
        size_t n = strlen(full);
        snprintf(full + n, sizeof full - n, "/%s", path);
        path = full;
    }
    return !strncmp(path, folder, strlen(folder));
}

static int is_ours(int descriptor) {
    char link[64], target[PATH_MAX];
    int saved = errno;
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t n = readlink(link, target, sizeof target - 1);
    errno = saved;
    if (n < 0) return 0;
    target[n] = 0;
    return below(target);
}

static int strikes(int k) {
    int n = __sync_add_and_fetch(&counts[k], 1);
    if (k != kind || n < first || n > last) return 0;
    fired++;
    if (how == KILL_BEFORE) kill(getpid(), SIGKILL);
    return 1;
}

#define REAL(name) (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define AROUND(k, ours, call)                                                                      \
    int struck = (ours) && strikes(k);                                                             \
    if (struck && how == ERROR) { errno = code; return -1; }                                       \
    __auto_type result = call;                                                                     \
    if (struck && how == KILL_AFTER) kill(getpid(), SIGKILL);                                      \
    return result

#define OPENING(name)                                                                              \
    int name(const char *path, int flags, ...) {                                                   \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest);     \
        __typeof__(name) *real = REAL(name);                                                       \
        AROUND(OPEN, below(path), real(path, flags, mode));                                        \
    }
#define OPENING_AT(name)                                                                           \
    int name(int at, const char *path, int flags, ...) {                                           \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest);     \
        __typeof__(name) *real = REAL(name);                                                       \
        AROUND(OPEN, below(path), real(at, path, flags, mode));                                    \
    }
OPENING(open) OPENING(open64) OPENING_AT(openat) OPENING_AT(openat64)

ssize_t write(int descriptor, const void *bytes, size_t n) {
    __typeof__(write) *real = REAL(write);
    int struck = is_ours(descriptor) && strikes(WRITE);
    if (struck && how == ERROR) { errno = code; return -1; }
    ssize_t result = real(descriptor, bytes, struck && how == SHORT ? (n + 1) / 2 : n);
    if (struck && how == KILL_AFTER) kill(getpid(), SIGKILL);
    return result;
}
#define READING(name, at, ...)                                                                     \
    ssize_t name(int descriptor, void *bytes, size_t n at) {                                       \
        __typeof__(name) *real = REAL(name);                                                       \
        int struck = n && is_ours(descriptor) && strikes(READ);                                    \
        if (struck && how == ERROR) { errno = code; return -1; }                                   \
        ssize_t result = real(descriptor, bytes, struck && how == SHORT ? (n + 1) / 2 : n __VA_ARGS__); \
        if (struck && how == KILL_AFTER) kill(getpid(), SIGKILL);                                  \
        return result;                                                                             \
    }
#define COMMA ,
READING(read, ) READING(pread, COMMA off_t offset, COMMA offset)
READING(pread64, COMMA off64_t offset, COMMA offset)
int fsync(int descriptor) {
    __typeof__(fsync) *real = REAL(fsync);
    AROUND(FSYNC, is_ours(descriptor), real(descriptor));
}
int rename(const char *from, const char *to) {
    __typeof__(rename) *real = REAL(rename);
    AROUND(RENAME, below(to), real(from, to));
}
int link(const char *from, const char *to) {
    __typeof__(link) *real = REAL(link);
    AROUND(LINK, below(to), real(from, to));
}
int linkat(int a, const char *from, int b, const char *to, int flags) {
    __typeof__(linkat) *real = REAL(linkat);
    AROUND(LINK, below(to), real(a, from, b, to, flags));
}
int unlink(const char *path) {
    __typeof__(unlink) *real = REAL(unlink);
    AROUND(UNLINK, below(path), real(path));
}
#define STATING(name, type)                                                                        \
    int name(const char *path, struct type *out) {                                                 \
        __typeof__(name) *real = REAL(name);                                                       \
        AROUND(STAT, below(path), real(path, out));                                                \
    }
STATING(stat, stat) STATING(stat64, stat64) STATING(lstat, stat) STATING(lstat64, stat64)
int fstat(int descriptor, struct stat *out) {
    __typeof__(fstat) *real = REAL(fstat);
    AROUND(STAT, is_ours(descriptor), real(descriptor, out));
}
int fstat64(int descriptor, struct stat64 *out) {
    __typeof__(fstat64) *real = REAL(fstat64);
    AROUND(STAT, is_ours(descriptor), real(descriptor, out));
}
