/* Delays each open and stat of a path below SLOW_FOLDER by a millisecond, as the file system of a busy cluster does.

       cc -shared -fPIC -O2 -o slow_files.so slow_files.c -ldl
       SLOW_FOLDER=/data LD_PRELOAD=./slow_files.so python ...                                                      */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct stat;
struct statx;

static void *next(const char *name, const char *path) {
    const char *folder = getenv("SLOW_FOLDER");
    if (folder && path && !strncmp(path, folder, strlen(folder))) {
        struct timespec delay = {0, 1000000};
        nanosleep(&delay, NULL);
    }
    return dlsym(RTLD_NEXT, name);
}

#define OPEN(name)                                                                                                     \
    int name(const char *path, int flags, ...) {                                                                       \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        int mode = va_arg(more, int);                                                                                  \
        va_end(more);                                                                                                  \
        return ((int (*)(const char *, int, ...))next(#name, path))(path, flags, mode);                                \
    }
#define STAT(name)                                                                                                     \
    int name(const char *path, struct stat *state) {                                                                   \
        return ((int (*)(const char *, struct stat *))next(#name, path))(path, state);                                 \
    }
#define STAT_AT(name)                                                                                                  \
    int name(int folder, const char *path, struct stat *state, int flags) {                                            \
        return ((int (*)(int, const char *, struct stat *, int))next(#name, path))(folder, path, state, flags);        \
    }

OPEN(open)
OPEN(open64)
STAT(stat)
STAT(stat64)
STAT(lstat)
STAT(lstat64)
STAT_AT(fstatat)
STAT_AT(fstatat64)

void *opendir(const char *path) { return ((void *(*)(const char *))next("opendir", path))(path); }
