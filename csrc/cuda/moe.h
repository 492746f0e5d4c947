// The kernels of a mixture-of-experts exchange: cuda.h's rules (pointers of the device,
// asynchronous on a stream, stateless) hold for them. Tables are int64 on the device, as
// pycomm/moe/plan.py makes them, and are not checked here: what has made them did. docs/moe.md
// defines the order of sums; results are the bits of csrc/cpu/rows.h. float32, float16 and
// bfloat16; any width and alignment, 16 bytes at a time where addresses allow.
//
// backward of expand:       combine of the gradients, without weights
// backward of combine:      weigh of y's gradient
// backward of encode, decode: the identity, so that of the rows' way: combine, expand
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/dtype.h"
#include "core/status.h"

namespace pycomm::cuda {

constexpr size_t kMaxRowBuffers = 128;  // they travel in a kernel's arguments

// For i < n: row rows[i] of sources[source[i]] goes to row to[i] of out; rows[i] = -1 gives zeros.
// source nullptr: all of sources[0]; to nullptr: row i. A copy of the bits.
Status expand_rows(void* out, std::span<const void* const> sources, const int64_t* source,
                   const int64_t* rows, const int64_t* to, int64_t n, int64_t width, DType dtype,
                   void* stream);

// The same, times weights[p] in fp32, rounded once; and dots[p] = the dot product of what was read
// and row p of b, as row_dots() has it, where p = places[i] (nullptr: i). Where rows[i] is -1,
// zeros and 0. dots and b nullptr: none.
Status weigh_rows(void* out, float* dots, std::span<const void* const> sources,
                  const int64_t* source, const int64_t* rows, const int64_t* to,
                  const int64_t* places, const float* weights, const void* b, int64_t n,
                  int64_t width, DType dtype, void* stream);

// For i < n: row i of out = the sum over j = offsets[i] .. offsets[i + 1] - 1, in this order, of
// weights[j] * row rows[j] of sources[source[j]], from +0, in fp32 with the product rounded before
// it is added, and rounded once to out_dtype. nullptrs as in expand_rows().
Status combine_rows(void* out, DType out_dtype, std::span<const void* const> sources, DType dtype,
                    const int64_t* source, const int64_t* rows, const int64_t* offsets,
                    const float* weights, int64_t n, int64_t width, void* stream);

// The layout of n slots in n_bins bins (experts, or places of them), counts and offsets in one
// launch. For i < n: positions[i] = how many slots before i are of bin bins[i], -1 where that is
// none of 0 .. n_bins - 1; counts[b] of n_bins: the slots of a bin; offsets[b] of n_bins + 1: those
// of all bins before it.
Status count_slots(int64_t* positions, int64_t* counts, int64_t* offsets, const int64_t* bins,
                   int64_t n, int64_t n_bins, void* stream);

// out[i] = the dot product of row a_rows[i] of a and row b_rows[i] of b (nullptr: row i), in fp32,
// in the order that cpu/rows.h has; 0 where either row is -1.
Status row_dots(float* out, const void* a, const int64_t* a_rows, const void* b,
                const int64_t* b_rows, int64_t n, int64_t width, DType dtype, void* stream);

// For i < n: row i of src in fp8, pycomm.moe.rows.coded_width(width) bytes, to each of its places
// j = starts[i] .. starts[i + 1] - 1: row to[j] of buffers[buffer[j]]. Read and quantised once, and
// packed for every rank that it goes to. starts nullptr: row i of buffers[0].
// REQUIRES: buffers are 4-byte aligned.
Status encode_rows(std::span<void* const> buffers, const int64_t* starts, const int64_t* buffer,
                   const int64_t* to, const void* src, int64_t n, int64_t width, DType dtype,
                   void* stream);

// And back, spread: expand_rows() of sources that hold rows in fp8.
Status decode_rows(void* out, std::span<const void* const> sources, const int64_t* source,
                   const int64_t* rows, const int64_t* to, int64_t n, int64_t width, DType dtype,
                   void* stream);

}  // namespace pycomm::cuda
