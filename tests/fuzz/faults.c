// Preloaded, makes one call of those that a save consists of fail: lobcq_fail_at(n, error) the n-th from then on.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/types.h>

static long left = -1;
static int error_number;
static const char *failed;

void lobcq_fail_at(long n, int error) {
    failed = NULL;
    error_number = error;
    left = n;
}

// Which call failed, NULL if none has; nothing fails after it.
const char *lobcq_failed(void) {
    left = -1;
    return failed;
}

static int fails(const char *name) {
    if (left < 0 || left-- > 0) return 0;
    failed = name;
    errno = error_number;
    return 1;
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define WRAP(type, name, parameters, arguments)    \
    type name parameters {                         \
        if (fails(#name)) return (type)-1;         \
        return NEXT(name) arguments;               \
    }

#define WRAP_OPEN(name, parameters, ...)           \
    int name parameters {                          \
        va_list rest;                              \
        va_start(rest, flags);                     \
        const mode_t mode = va_arg(rest, mode_t);  \
        va_end(rest);                              \
        if (fails(#name)) return -1;               \
        return NEXT(name)(__VA_ARGS__, mode);      \
    }

WRAP_OPEN(open, (const char *path, int flags, ...), path, flags)
WRAP_OPEN(open64, (const char *path, int flags, ...), path, flags)
WRAP_OPEN(openat, (int at, const char *path, int flags, ...), at, path, flags)
WRAP_OPEN(openat64, (int at, const char *path, int flags, ...), at, path, flags)
WRAP(ssize_t, write, (int file, const void *data, size_t size), (file, data, size))
WRAP(ssize_t, pwrite64, (int file, const void *data, size_t size, off64_t at), (file, data, size, at))
WRAP(int, ftruncate64, (int file, off64_t size), (file, size))
WRAP(int, fsync, (int file), (file))
WRAP(int, fdatasync, (int file), (file))
WRAP(int, mkdir, (const char *path, mode_t mode), (path, mode))
WRAP(int, chmod, (const char *path, mode_t mode), (path, mode))
WRAP(int, rename, (const char *from, const char *to), (from, to))
WRAP(int, renameat2, (int at, const char *from, int to_at, const char *to, unsigned flags), (at, from, to_at, to, flags))
WRAP(int, link, (const char *from, const char *to), (from, to))
WRAP(int, linkat, (int at, const char *from, int to_at, const char *to, int flags), (at, from, to_at, to, flags))
WRAP(int, symlink, (const char *from, const char *to), (from, to))
WRAP(int, unlink, (const char *path), (path))
WRAP(int, unlinkat, (int at, const char *path, int flags), (at, path, flags))
WRAP(int, rmdir, (const char *path), (path))
