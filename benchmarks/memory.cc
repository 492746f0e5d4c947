// What this machine's memory and scheduler do, in the ways that the CPU engine could use them. Two
// processes, one per core. Prints a line per measurement: group, variant, bytes, median µs.
// memory.py compiles and runs it.
#include <immintrin.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <vector>

using Clock = std::chrono::steady_clock;

namespace {

struct Shared {
  alignas(128) std::atomic<long> arrived[2][16];
  alignas(128) std::atomic<long> flag[2][16];
  alignas(128) std::atomic<long> written[16];
  alignas(128) std::atomic<long> read[16];
  alignas(128) std::atomic<int> word[2][32];
  char* address[2];
};
constexpr size_t kMost = size_t{64} << 20;

Shared* shared;
char* ring;
int me;
pid_t peer;
long arrivals = 0;

char* mapped(size_t nbytes, int flags) {
  auto* data = static_cast<char*>(
      ::mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, flags | MAP_ANONYMOUS, -1, 0));
  if (data == MAP_FAILED) std::abort();
  std::memset(data, 1, nbytes);
  return data;
}

void stay_on(int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  ::sched_setaffinity(0, sizeof(set), &set);
}

void meet() {
  shared->arrived[me][0].store(++arrivals);
  while (shared->arrived[!me][0].load() < arrivals) _mm_pause();
}

std::function<void()> freshly = [] {};  // what happens before each call, untimed

void report(const char* group, const char* variant, size_t nbytes, int repeats,
            const std::function<void()>& call, double divisor = 1) {
  std::vector<double> times;
  for (int i = 0; i < repeats; ++i) {
    freshly();
    meet();
    const auto begin = Clock::now();
    call();
    auto end = Clock::now();
    meet();
    if (divisor == 1) end = Clock::now();  // when both are done; a round trip ends with its answer
    times.push_back(std::chrono::duration<double, std::micro>(end - begin).count());
  }
  std::sort(times.begin(), times.end());
  if (me == 0)
    std::printf("%s\t%s\t%zu\t%.3f\n", group, variant, nbytes, times[times.size() / 2] / divisor);
  std::fflush(stdout);
}

__attribute__((target("avx"))) void lines(char* to, const char* from, size_t nbytes) {
  for (size_t i = 0; i < nbytes; i += 32)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
}

__attribute__((target("avx"))) void past_the_caches(char* to, const char* from, size_t nbytes) {
  for (size_t i = 0; i < nbytes; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
  _mm_sfence();
}

int repeats(size_t nbytes) { return nbytes <= (1 << 20) ? 200 : nbytes <= (16 << 20) ? 15 : 5; }

void flags() {
  constexpr int kRounds = 20000;
  report(
      "round trip", "flag, spinning, two cores", 8, 5,
      [] {
        static long count = 0;
        for (int i = 0; i < kRounds; ++i) {
          ++count;
          if (me == 0) shared->flag[0][0].store(count, std::memory_order_release);
          while (shared->flag[!me][0].load(std::memory_order_acquire) < count) _mm_pause();
          if (me == 1) shared->flag[1][0].store(count, std::memory_order_release);
        }
      },
      kRounds);
  const auto futex = [](bool on_one_core) {
    const int rounds = on_one_core ? 20000 : 300;
    const auto call = [rounds] {
      static int count = 0;
      const auto wait = [](std::atomic<int>& word, int value) {
        int seen = 0;
        while ((seen = word.load()) < value)
          ::syscall(SYS_futex, &word, FUTEX_WAIT, seen, nullptr, nullptr, 0);
      };
      const auto wake = [](std::atomic<int>& word, int value) {
        word.store(value);
        ::syscall(SYS_futex, &word, FUTEX_WAKE, 1, nullptr, nullptr, 0);
      };
      for (int i = 0; i < rounds; ++i) {
        ++count;
        if (me == 0) wake(shared->word[0][0], count);
        wait(shared->word[!me][0], count);
        if (me == 1) wake(shared->word[1][0], count);
      }
    };
    report("round trip", on_one_core ? "futex, one core" : "futex, two cores", 8, 5, call, rounds);
  };
  futex(false);
  meet();
  stay_on(0);
  // On one core meet() spins for a time slice: few repeats of many rounds.
  futex(true);
  report(
      "round trip", "sched_yield, one core", 8, 5,
      [] {
        static long count = 1 << 20;
        for (int i = 0; i < 20000; ++i) {
          ++count;
          if (me == 0) shared->flag[0][0].store(count);
          while (shared->flag[!me][0].load() < count) ::sched_yield();
          if (me == 1) shared->flag[1][0].store(count);
        }
      },
      20000);
  meet();
  stay_on(me);
}

void copies(char* mine, char* other) {
  for (const size_t n : {size_t{4} << 10, size_t{32} << 10, size_t{512} << 10}) {
    for (const int shift : {0, 16}) {
      const char* at = shift ? "16 bytes off" : "aligned alike";
      char name[64];
      std::snprintf(name, sizeof(name), "memcpy, %s", at);
      report("copy, both cores", name, n, 400, [&] { std::memcpy(other + shift, mine, n); });
      std::snprintf(name, sizeof(name), "by lines, %s", at);
      report("copy, both cores", name, n, 400, [&] { lines(other + shift, mine, n); });
    }
  }
  for (const size_t n : {size_t{1} << 20, size_t{16} << 20, kMost}) {
    report("copy, both cores", "by lines", n, repeats(n), [&] { lines(other, mine, n); });
    report("copy, both cores", "past the caches", n, repeats(n),
           [&] { past_the_caches(other, mine, n); });
  }
}

// One message of n bytes from process 0 to process 1.
void messages(char* mine, char* other, const char* pages) {
  for (const size_t n :
       {size_t{8} << 10, size_t{64} << 10, size_t{512} << 10, size_t{4} << 20, kMost}) {
    char name[96];
    // What is sent was written a moment ago: a reader does not have it in its own cache.
    freshly = [mine, n] { std::memset(mine, 2, n); };
    const auto vm = [&](bool write, size_t offset, size_t nbytes) {
      for (size_t i = 0; i < nbytes; i += 128 << 10) {
        const size_t part = std::min(nbytes - i, size_t{128} << 10);
        const iovec here{(write ? mine : other) + offset + i, part};
        const iovec there{shared->address[!me] + offset + i, part};
        write ? ::process_vm_writev(peer, &here, 1, &there, 1, 0)
              : ::process_vm_readv(peer, &here, 1, &there, 1, 0);
      }
    };
    std::snprintf(name, sizeof(name), "process_vm_readv, %s", pages);
    report("message", name, n, repeats(n), [&] {
      if (me == 1) vm(false, 0, n);
    });
    std::snprintf(name, sizeof(name), "process_vm_readv and writev, each half, %s", pages);
    report("message", name, n, repeats(n), [&] { vm(me == 0, me == 0 ? 0 : n / 2, n / 2); });
    for (const size_t size : {size_t{128} << 10, size_t{512} << 10, size_t{2} << 20})
      for (const bool streams : {false, true}) {
        if (streams && n < kMost) continue;
        constexpr size_t kChunk = 16 << 10;
        const long slots = static_cast<long>(size / kChunk);
        static long position = 0;
        meet();
        position = 0;
        shared->written[0] = shared->read[0] = 0;
        meet();
        const auto call = [&] {
          for (size_t i = 0; i < n; i += kChunk, ++position) {
            const size_t part = std::min(kChunk, n - i);
            char* slot = ring + static_cast<size_t>(position % slots) * kChunk;
            if (me == 0) {
              while (position - shared->read[0].load(std::memory_order_acquire) >= slots)
                _mm_pause();
              lines(slot, mine + i, part);
              shared->written[0].store(position + 1, std::memory_order_release);
            } else {
              while (shared->written[0].load(std::memory_order_acquire) <= position) _mm_pause();
              streams ? past_the_caches(other + i, slot, part) : lines(other + i, slot, part);
              shared->read[0].store(position + 1, std::memory_order_release);
            }
          }
        };
        std::snprintf(name, sizeof(name), "two copies over a ring of %zu KiB%s, %s", size >> 10,
                      streams ? ", out past the caches" : "", pages);
        report("message", name, n, repeats(n), call);
      }
  }
}

}  // namespace

int main() {
  shared = reinterpret_cast<Shared*>(mapped(sizeof(Shared), MAP_SHARED));
  std::memset(static_cast<void*>(shared), 0, sizeof(Shared));
  ring = mapped(size_t{2} << 20, MAP_SHARED);
  const pid_t parent = ::getpid();
  const pid_t child = ::fork();
  me = child == 0;
  peer = me ? parent : child;
  stay_on(me);
  flags();
  for (const bool huge : {false, true}) {
    char* mine = mapped(kMost + 4096, MAP_PRIVATE);
    char* other = mapped(kMost + 4096, MAP_PRIVATE);
    if (huge)
      for (char* data : {mine, other}) {
        ::madvise(data, kMost, MADV_DONTNEED);
        ::madvise(data, kMost, MADV_HUGEPAGE);
        std::memset(data, 1, kMost);
      }
    shared->address[me] = mine;
    meet();
    if (!huge) copies(mine, other);
    messages(mine, other, huge ? "huge pages" : "4 KiB pages");
    freshly = [] {};
    meet();
    ::munmap(mine, kMost + 4096);
    ::munmap(other, kMost + 4096);
    meet();
  }
  if (me == 0) ::waitpid(child, nullptr, 0);
  return 0;
}
