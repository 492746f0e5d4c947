// Element-wise kernels. dst may be a or b itself, never a partial overlap. AVX-512, AVX2 or plain
// code, chosen once by what the processor has. bf16 and fp16 are combined in fp32 and rounded to
// nearest even once. REQUIRES: the pair (dtype, op) passed Group::check(), and dtype is its own
// reduced_as().
#pragma once

#include <cstddef>

#include "core/dtype.h"

namespace pycomm::cpu {

// dst[i] = a[i] (op) b[i]; avg combines as sum. min and max propagate NaN, as torch.minimum does.
// Integers wrap.
void reduce(void* dst, const void* a, const void* b, size_t numel, DType dtype, ReduceOp op);

// data[i] /= divisor, the end of avg. Integers truncate towards zero.
void divide(void* data, size_t numel, DType dtype, int divisor);

// fp8, bf16 or fp16 to fp32, exactly, and back as torch casts: to nearest even once, beyond the
// largest value to NaN (e4m3fn) or infinity.
void to_float32(float* out, const void* in, size_t numel, DType dtype);
void from_float32(void* out, const float* in, size_t numel, DType dtype);

}  // namespace pycomm::cpu
