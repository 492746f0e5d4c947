// Rows by index: what an expert exchange does with the rows of a token, wherever they lie, also in
// other ranks' heaps. The order of every sum is the caller's, so results depend on nothing else.
// Thread safety: pure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/dtype.h"
#include "core/wire.h"

namespace pycomm::cpu {

// n_rows rows of one width, one after the other.
struct Rows {
  const std::byte* data = nullptr;
  int64_t n_rows = 0;
};

// For i < n: row rows[i] of sources[source[i]] goes to row to[i] of out, or to row i where `to` is
// nullptr. rows[i] = -1 gives zeros. Errors: Error(invalid_argument) for an index that is out of
// range, before anything is written.
void copy_rows(std::byte* out, int64_t n_out, const int64_t* to, const std::vector<Rows>& sources,
               const int64_t* source, const int64_t* rows, int64_t n, size_t row_nbytes);

// For i < n: row i of out = the sum over j = offsets[i] .. offsets[i + 1] - 1, in this order, of
// weights[j] * row rows[j] of sources[source[j]], from +0, in fp32 with the product rounded before
// it is added, and rounded once to out_dtype. weights nullptr: without the product. Errors: as
// copy_rows(), and for offsets that do not rise from 0. REQUIRES: dtypes are float32, bfloat16 or
// float16.
void combine_rows(void* out, DType out_dtype, const std::vector<Rows>& sources, DType dtype,
                  const int64_t* source, const int64_t* rows, const int64_t* offsets,
                  const float* weights, int64_t n, int64_t n_terms, size_t width);

// out[i] = the dot product of row a_rows[i] of a and row b_rows[i] of b (nullptr: row i), in fp32
// with the product rounded before it is added; 0 where either row is -1. The order is that of
// cuda::row_dots(): by column, each value of 32 vectors of 16 bytes sums its own; then each vector
// its values, in order; then vector v takes v + 16's, v + 8's, .. v + 1's. Errors and dtypes: as
// combine_rows().
void row_dots(float* out, const Rows& a, const int64_t* a_rows, const Rows& b,
              const int64_t* b_rows, DType dtype, int64_t n, size_t width);

// The layout of n slots in n_bins bins. For i < n: positions[i] = how many slots before i are of
// bin bins[i], -1 where that is none of 0 .. n_bins - 1; counts[b] of n_bins; offsets[b] of n_bins
// + 1: the slots of all bins before b.
void count_slots(int64_t* positions, int64_t* counts, int64_t* offsets, const int64_t* bins,
                 int64_t n, int64_t n_bins);

// Row by row, each a segment of its own: coded_nbytes(wire, width) bytes (coding.h).
void encode_rows(std::byte* out, const void* in, DType dtype, int64_t n, size_t width, Wire wire);
void decode_rows(void* out, const std::byte* in, DType dtype, int64_t n, size_t width, Wire wire);

}  // namespace pycomm::cpu
