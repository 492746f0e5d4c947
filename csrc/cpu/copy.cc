#include "cpu/copy.h"

#include <algorithm>
#include <cstring>
#include <fstream>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pycomm::cpu {
namespace {

#if defined(__x86_64__)
constexpr size_t kLine = 64;

// Whole lines to a line's beginning, from anywhere. Ahead: how far the source is asked for.
template <bool streams>
__attribute__((target("avx"))) void copy_lines(char* to, const char* from, size_t n_lines) {
  for (; n_lines > 0; --n_lines, from += kLine, to += kLine) {
    if constexpr (streams) _mm_prefetch(from + 1024, _MM_HINT_T0);  // harmless past the end
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32));
    auto* line = reinterpret_cast<__m256i*>(to);
    if constexpr (streams) {
      _mm256_stream_si256(line, low);
      _mm256_stream_si256(line + 1, high);
    } else {
      _mm256_store_si256(line, low);
      _mm256_store_si256(line + 1, high);
    }
  }
}

template <bool streams>
void copy_by_lines(char* to, const char* from, size_t nbytes) {
  const size_t head = std::min(nbytes, (kLine - reinterpret_cast<uintptr_t>(to) % kLine) % kLine);
  const size_t n_lines = (nbytes - head) / kLine, tail = head + n_lines * kLine;
  std::memcpy(to, from, head);
  copy_lines<streams>(to + head, from + head, n_lines);
  std::memcpy(to + tail, from + tail, nbytes - tail);
  if constexpr (streams) _mm_sfence();
}
#endif

}  // namespace

void copy(void* to, const void* from, size_t nbytes, bool streams) {
#if defined(__x86_64__)
  static const bool has_avx = __builtin_cpu_supports("avx");
  if (nbytes >= 512 && has_avx) {
    auto* out = static_cast<char*>(to);
    const auto* in = static_cast<const char*>(from);
    return streams ? copy_by_lines<true>(out, in, nbytes) : copy_by_lines<false>(out, in, nbytes);
  }
#endif
  if (nbytes > 0) std::memcpy(to, from, nbytes);
}

bool exceeds_cache(uint64_t nbytes) {
  static const uint64_t cache = [] {
    // Not sysconf(3): in a virtual machine it may give eight times what cores share.
    std::ifstream file("/sys/devices/system/cpu/cpu0/cache/index3/size");
    uint64_t kib = 0;
    return file >> kib && kib > 0 ? kib << 10 : uint64_t{32} << 20;  // "32768K"
  }();
  return nbytes > cache;
}

}  // namespace pycomm::cpu
