// Coding for the wire: fp32 values to core/wire.h's forms and back. AVX-512, AVX2 or plain code,
// chosen once by what the processor has; all give the same bits.
#pragma once

#include <cstddef>

#include "core/dtype.h"
#include "core/wire.h"

namespace pycomm::cpu {

// out: coded_nbytes(wire, numel) bytes, 4-byte aligned. One segment: in block form the scales stand
// behind all codes. REQUIRES: wire is not none; in and out do not overlap.
void encode(void* out, const float* in, size_t numel, Wire wire);
void decode(float* out, const void* in, size_t numel, Wire wire);

// Whether no value is infinite or NaN. REQUIRES: dtype is float32, bfloat16 or float16.
bool all_finite(const void* values, size_t numel, DType dtype);

// out[i] = what a rank that is sent in[i] reads, segment by segment. out may be in.
void round_trip(float* out, const float* in, size_t numel, Wire wire);

}  // namespace pycomm::cpu
