// Which thread touches which element: arithmetic that the kernels and the CPU tests both run.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace pycomm::cuda {

constexpr int kVectorBytes = 16;  // the widest load and store of one thread

PYCOMM_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// n elements cut into a scalar head, whole 16-byte vectors, and a scalar tail.
// Invariant: head + n_vectors * per_vector + tail = n, and every vector is aligned in all arrays.
struct VectorSpan {
  int64_t head;
  int64_t n_vectors;
  int64_t tail;
  int per_vector;

  PYCOMM_HD int64_t n_scalars() const { return head + tail; }
  // The element that scalar i, 0 <= i < n_scalars(), stands for.
  PYCOMM_HD int64_t scalar(int64_t i) const { return i < head ? i : i + n_vectors * per_vector; }
};

// misalignment: the arrays' addresses modulo 16, all equal; -1 where they differ, which leaves no
// vector at all. REQUIRES: addresses are multiples of element_size, and that is a power of two up
// to 16.
PYCOMM_HD VectorSpan vector_span(int64_t n, int element_size, int misalignment) {
  const int per_vector = kVectorBytes / element_size;
  if (misalignment < 0) return {0, 0, n, per_vector};
  int64_t head = ((kVectorBytes - misalignment) % kVectorBytes) / element_size;
  if (head > n) head = n;
  const int64_t n_vectors = (n - head) / per_vector;
  return {head, n_vectors, n - head - n_vectors * per_vector, per_vector};
}

PYCOMM_HD int common_misalignment(const void* a, const void* b) {
  const int of_a = static_cast<int>(reinterpret_cast<uintptr_t>(a) % kVectorBytes);
  const int of_b = static_cast<int>(reinterpret_cast<uintptr_t>(b) % kVectorBytes);
  return of_a == of_b ? of_a : -1;
}

// The segment that holds tile: the last s with tile_begin[s] <= tile. Empty segments have no tile
// and are never returned. REQUIRES: tile_begin[0 .. n_segments] ascends from 0, and 0 <= tile <
// tile_begin[n_segments].
PYCOMM_HD int find_segment(const int32_t* tile_begin, int n_segments, int32_t tile) {
  int low = 0, high = n_segments;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (tile_begin[middle] <= tile ? low : high) = middle;
  }
  return low;
}

}  // namespace pycomm::cuda
