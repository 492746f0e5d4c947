// Collectives of narrower floats that go through the engine as fp32: widened once before, narrowed
// once at the end. Reductions of fp8, since a sum that is rounded to fp8 at every hop keeps no
// digit that is right; and bf16 and fp16 with a wire, whose codes are made of fp32.
#pragma once

#include "core/engine.h"

namespace pycomm::cpu {

// Puts the launch on fp32 copies of input and output; its finish() then writes the output.
void put_on_float32(Launch& launch);

inline bool goes_as_float32(const Launch& launch) {
  const DType given = launch.fingerprint.dtype;
  return launch.dtype == DType::float32 &&
         (is_float8(given) || given == DType::bfloat16 || given == DType::float16);
}

}  // namespace pycomm::cpu
