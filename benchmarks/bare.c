/* What the link itself gives: TCP as plain as C can have it. benchmarks/links.py compiles it and calls it from the
 * ranks, each with one end of the sockets. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <sys/socket.h>
#include <time.h>

static double now_us(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static int receive(int fd, char* data, size_t nbytes, int spin) {
  while (nbytes > 0) {
    const ssize_t n = recv(fd, data, nbytes, spin ? MSG_DONTWAIT : 0);
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) return -1;
    if (n > 0) data += n, nbytes -= (size_t)n;
  }
  return 0;
}

/* n round trips of 8 bytes over a blocking socket. spin: never sleeps. us[i]: what each took, on the side that is first. */
int ping(int fd, int first, int spin, int n, double* us) {
  char data[8] = {0};
  for (int i = 0; i < n; ++i) {
    const double begin = now_us();
    if (first && send(fd, data, sizeof(data), MSG_NOSIGNAL) != sizeof(data)) return -1;
    if (receive(fd, data, sizeof(data), spin) != 0) return -1;
    if (!first && send(fd, data, sizeof(data), MSG_NOSIGNAL) != sizeof(data)) return -1;
    us[i] = now_us() - begin;
  }
  return 0;
}

/* n times: both sides send 8 bytes, then wait for the other's. What an all_reduce of two cannot do without. */
int swap(int fd, int spin, int n, double* us) {
  char data[8] = {0};
  for (int i = 0; i < n; ++i) {
    const double begin = now_us();
    if (send(fd, data, sizeof(data), MSG_NOSIGNAL) != sizeof(data)) return -1;
    if (receive(fd, data, sizeof(data), spin) != 0) return -1;
    us[i] = now_us() - begin;
  }
  return 0;
}

/* Sends `out` bytes and receives `in`, both at once, over each of n_sockets (8 at most). Seconds, or -1. */
double exchange(const int* fds, int n_sockets, char* out_data, size_t out, char* in_data, size_t in) {
  size_t sent[8] = {0}, received[8] = {0};
  const double begin = now_us();
  if (n_sockets > 8) return -1;
  for (;;) {
    struct pollfd entries[8];
    int open = 0;
    for (int i = 0; i < n_sockets; ++i) {
      const short events = (short)((sent[i] < out ? POLLOUT : 0) | (received[i] < in ? POLLIN : 0));
      entries[i] = (struct pollfd){events ? fds[i] : -1, events, 0};
      open += events != 0;
    }
    if (open == 0) return (now_us() - begin) / 1e6;
    poll(entries, (nfds_t)n_sockets, 1000);
    for (int i = 0; i < n_sockets; ++i) {
      if (entries[i].revents & POLLOUT) {
        const ssize_t n = send(fds[i], out_data + sent[i], out - sent[i], MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n < 0 && errno != EAGAIN) return -1;
        if (n > 0) sent[i] += (size_t)n;
      }
      if (entries[i].revents & (POLLIN | POLLERR | POLLHUP)) {
        const ssize_t n = recv(fds[i], in_data + received[i], in - received[i], MSG_DONTWAIT);
        if (n == 0 || (n < 0 && errno != EAGAIN)) return -1;
        if (n > 0) received[i] += (size_t)n;
      }
    }
  }
}
