/* A clock that can be moved for some processes: `chaos.py` preloads it. CHAOS_CLOCK names a file of eight bytes, the
 * seconds by which the time of day is off. Monotonic clocks and the times of files stay right, as where a clock is set. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static int (*real)(clockid_t, struct timespec *);
static volatile int64_t none, *off = &none;

__attribute__((constructor)) static void begin(void) {
  real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
  const char *path = getenv("CHAOS_CLOCK");
  int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  if (file < 0) return;
  void *place = mmap(NULL, sizeof *off, PROT_READ, MAP_SHARED, file, 0);
  if (place != MAP_FAILED) off = place;
  close(file);
}

int clock_gettime(clockid_t id, struct timespec *now) {
  if (!real) begin();
  int failed = real(id, now);
  if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) now->tv_sec += *off;
  return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  struct timespec there;
  if (clock_gettime(CLOCK_REALTIME, &there)) return -1;
  now->tv_sec = there.tv_sec, now->tv_usec = there.tv_nsec / 1000;
  return 0;
}

time_t time(time_t *now) {
  struct timespec there;
  clock_gettime(CLOCK_REALTIME, &there);
  if (now) *now = there.tv_sec;
  return there.tv_sec;
}
