/* Makes one chosen file operation below one folder fail, or kills the process at it.

   io_faults.py compiles and arms it. Loaded by LD_PRELOAD, it stands before libc's functions that
   change files, for Python and for the C++ and Rust libraries alike. An operation is known by its
   key, "FUNCTION PATH" with the path relative to the folder and its random parts as '#', and by how
   often this key came before in the process: threads may change the order of operations on
   different files, but hardly that on one. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sendfile.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { PASS = 0, KILL = -1 };
enum { MOST_KEYS = 8192 };

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static int armed, log_file = -1, error_number, is_lasting, has_failed;
static char folder[PATH_MAX], target[2 * PATH_MAX];
static size_t folder_length;
static long target_ordinal;
static struct { char *key; long count; } keys[MOST_KEYS];

/* Begins to watch. log: a file descriptor that gets a line per operation, or -1. key, ordinal: of
   the operation that fails with `error`, or kills where that is -1; lasting: from then on, whatever
   needs space fails. */
void faults_arm(const char *root, int log, const char *key, long ordinal, int error, int lasting) {
  snprintf(folder, sizeof folder, "%s/", root);
  folder_length = strlen(folder);
  snprintf(target, sizeof target, "%s", key);
  target_ordinal = ordinal, error_number = error, is_lasting = lasting, log_file = log, armed = 1;
}

static void *next(const char *name) { return dlsym(RTLD_NEXT, name); }

static int is_hex(char c) { return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'); }

/* Copies a path; digits and a to f in a row, ten or more, become '#', and so do the eight
   characters that Python's tempfile puts before ".tmp" or after the dot of a hidden name. */
static void normalise(char *to, const char *from, size_t size) {
  char *end = to + size - 2;
  while (*from && to < end) {
    size_t run = 0;
    while (is_hex(from[run])) run++;
    size_t part = strcspn(from, "./");
    int is_last = from[part] == 0 || from[part] == '/';
    int is_random = !strncmp(from + part, ".tmp", 4) || (from[-2] == '/' && is_last);
    if (part == 8 && from[-1] == '.' && is_random) run = 8;
    else if (run < 10) { *to++ = *from++; continue; }
    *to++ = '#', from += run;
  }
  *to = 0;
}

/* What is to happen to an operation: PASS, KILL or the number of an error. */
static int verdict(const char *function, const char *path, int needs_space) {
  if (!armed || !path || strncmp(path, folder, folder_length)) return PASS;
  char key[2 * PATH_MAX];
  int length = snprintf(key, sizeof key, "%s ", function);
  normalise(key + length, path + folder_length, sizeof key - length - 1);
  pthread_mutex_lock(&mutex);
  int place = 0;
  while (place < MOST_KEYS - 1 && keys[place].key && strcmp(keys[place].key, key)) place++;
  if (!keys[place].key) keys[place].key = strdup(key);
  long ordinal = keys[place].count++;
  int result = PASS;
  if (has_failed && is_lasting && needs_space) result = error_number;
  if (!has_failed && ordinal == target_ordinal && !strcmp(key, target)) {
    has_failed = 1, result = error_number;
  }
  if (log_file >= 0) dprintf(log_file, "%s\n", key);
  pthread_mutex_unlock(&mutex);
  return result;
}

static char *path_of(int fd, char *path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, path, PATH_MAX - 1);
  if (length < 0) return NULL;
  path[length] = 0;
  return path;
}

static char *path_at(int directory, const char *name, char *path) {
  if (!armed || !name) return NULL;
  if (name[0] == '/') { snprintf(path, PATH_MAX, "%s", name); return path; }
  if (directory == AT_FDCWD ? !getcwd(path, PATH_MAX) : !path_of(directory, path)) return NULL;
  size_t length = strlen(path);
  snprintf(path + length, PATH_MAX - length, "/%s", name);
  return path;
}

static void die(void) {
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

/* Returns with -1 where the operation is to fail. */
#define FAIL(result) do { \
    if (result == KILL) die(); \
    if (result != PASS) { errno = result; return -1; } \
  } while (0)

#define BY_NAME(function, arguments, names, directory, name, needs_space) \
  int function arguments { \
    char path[PATH_MAX]; \
    int result = verdict(#function, path_at(directory, name, path), needs_space); \
    FAIL(result); \
    return ((int (*) arguments) next(#function)) names; \
  }
BY_NAME(mkdir, (const char *name, mode_t mode), (name, mode), AT_FDCWD, name, 1)
BY_NAME(mkdirat, (int directory, const char *name, mode_t mode), (directory, name, mode),
        directory, name, 1)
BY_NAME(rmdir, (const char *name), (name), AT_FDCWD, name, 0)
BY_NAME(unlink, (const char *name), (name), AT_FDCWD, name, 0)
BY_NAME(unlinkat, (int directory, const char *name, int flags), (directory, name, flags),
        directory, name, 0)
BY_NAME(rename, (const char *from, const char *to), (from, to), AT_FDCWD, to, 0)
BY_NAME(renameat, (int from_directory, const char *from, int directory, const char *to),
        (from_directory, from, directory, to), directory, to, 0)
BY_NAME(renameat2, (int from_directory, const char *from, int directory, const char *to,
                    unsigned int flags),
        (from_directory, from, directory, to, flags), directory, to, 0)
BY_NAME(link, (const char *from, const char *to), (from, to), AT_FDCWD, to, 1)
BY_NAME(symlink, (const char *from, const char *to), (from, to), AT_FDCWD, to, 1)
BY_NAME(truncate, (const char *name, off_t size), (name, size), AT_FDCWD, name, 0)
BY_NAME(truncate64, (const char *name, off64_t size), (name, size), AT_FDCWD, name, 0)

#define BY_FILE(type, function, arguments, names, fd, needs_space) \
  type function arguments { \
    char path[PATH_MAX]; \
    int result = armed ? verdict(#function, path_of(fd, path), needs_space) : PASS; \
    FAIL(result); \
    return ((type (*) arguments) next(#function)) names; \
  }
BY_FILE(int, fsync, (int fd), (fd), fd, 0)
BY_FILE(int, fdatasync, (int fd), (fd), fd, 0)
BY_FILE(int, ftruncate, (int fd, off_t size), (fd, size), fd, 0)
BY_FILE(int, ftruncate64, (int fd, off64_t size), (fd, size), fd, 0)
BY_FILE(int, fallocate, (int fd, int mode, off_t offset, off_t size), (fd, mode, offset, size),
        fd, 1)
BY_FILE(int, posix_fallocate, (int fd, off_t offset, off_t size), (fd, offset, size), fd, 1)
BY_FILE(int, fchmod, (int fd, mode_t mode), (fd, mode), fd, 0)
BY_FILE(ssize_t, writev, (int fd, const struct iovec *parts, int count), (fd, parts, count), fd, 1)
BY_FILE(ssize_t, pwritev, (int fd, const struct iovec *parts, int count, off_t offset),
        (fd, parts, count, offset), fd, 1)
BY_FILE(ssize_t, pwritev64, (int fd, const struct iovec *parts, int count, off64_t offset),
        (fd, parts, count, offset), fd, 1)
BY_FILE(ssize_t, pwritev2,
        (int fd, const struct iovec *parts, int count, off_t offset, int flags),
        (fd, parts, count, offset, flags), fd, 1)
BY_FILE(ssize_t, sendfile, (int fd, int from, off_t *offset, size_t size),
        (fd, from, offset, size), fd, 1)
BY_FILE(ssize_t, sendfile64, (int fd, int from, off64_t *offset, size_t size),
        (fd, from, offset, size), fd, 1)
BY_FILE(ssize_t, copy_file_range, (int from, off64_t *from_offset, int fd, off64_t *offset,
                                   size_t size, unsigned int flags),
        (from, from_offset, fd, offset, size, flags), fd, 1)

/* A process that is killed in a write leaves half of it. */
#define WRITES(function, arguments, names, half) \
  ssize_t function arguments { \
    char path[PATH_MAX]; \
    int result = armed ? verdict(#function, path_of(fd, path), 1) : PASS; \
    ssize_t (*libc) arguments = next(#function); \
    if (result == KILL) libc half; \
    FAIL(result); \
    return libc names; \
  }
WRITES(write, (int fd, const void *bytes, size_t size), (fd, bytes, size), (fd, bytes, size / 2))
WRITES(pwrite, (int fd, const void *bytes, size_t size, off_t offset),
       (fd, bytes, size, offset), (fd, bytes, size / 2, offset))
WRITES(pwrite64, (int fd, const void *bytes, size_t size, off64_t offset),
       (fd, bytes, size, offset), (fd, bytes, size / 2, offset))

size_t fwrite(const void *bytes, size_t size, size_t count, FILE *file) {
  char path[PATH_MAX];
  size_t (*libc)(const void *, size_t, size_t, FILE *) = next("fwrite");
  int result = armed ? verdict("fwrite", path_of(fileno(file), path), 1) : PASS;
  if (result == KILL) libc(bytes, size, count / 2, file), fflush(file), die();
  if (result != PASS) { errno = result; return 0; }
  return libc(bytes, size, count, file);
}

#define OPENS(function, arguments, names, directory) \
  int function arguments { \
    mode_t mode = 0; \
    if (flags & (O_CREAT | __O_TMPFILE)) { \
      va_list rest; \
      va_start(rest, flags); \
      mode = va_arg(rest, mode_t); \
      va_end(rest); \
    } \
    char path[PATH_MAX]; \
    int writes = (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC); \
    int result = armed && writes ? verdict("open", path_at(directory, name, path), 1) : PASS; \
    FAIL(result); \
    return ((int (*) arguments) next(#function)) names; \
  }
OPENS(open, (const char *name, int flags, ...), (name, flags, mode), AT_FDCWD)
OPENS(open64, (const char *name, int flags, ...), (name, flags, mode), AT_FDCWD)
OPENS(openat, (int directory, const char *name, int flags, ...), (directory, name, flags, mode),
      directory)
OPENS(openat64, (int directory, const char *name, int flags, ...), (directory, name, flags, mode),
      directory)

#define FILES(function) \
  FILE *function(const char *name, const char *how) { \
    char path[PATH_MAX]; \
    int writes = how[0] != 'r' || strchr(how, '+'); \
    int result = armed && writes ? verdict("open", path_at(AT_FDCWD, name, path), 1) : PASS; \
    if (result == KILL) die(); \
    if (result != PASS) { errno = result; return NULL; } \
    return ((FILE *(*)(const char *, const char *)) next(#function))(name, how); \
  }
FILES(fopen)
FILES(fopen64)
