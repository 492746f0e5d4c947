// Element-wise kernels. dst may be a or b itself, never a partial overlap. AVX-512, AVX2 or plain
// code, chosen once by what the processor has. bf16 and fp16 are combined in fp32 and rounded to
// nearest even once. REQUIRES: the pair (dtype, op) passed Group::check().
#pragma once

#include <cstddef>

#include "core/dtype.h"

namespace pycomm::cpu {

// dst[i] = a[i] (op) b[i]; avg combines as sum. min and max propagate NaN, as torch.minimum does.
// Integers wrap.
void reduce(void* dst, const void* a, const void* b, size_t numel, DType dtype, ReduceOp op);

// data[i] /= divisor, the end of avg. Integers truncate towards zero.
void divide(void* data, size_t numel, DType dtype, int divisor);

}  // namespace pycomm::cpu
