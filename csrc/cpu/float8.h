// Reductions of fp8. A sum that is rounded to fp8 at every hop keeps no digit that is right, so
// what runs is a reduction of fp32: widened once before, narrowed once at the end.
#pragma once

#include "core/engine.h"

namespace pycomm::cpu {

// Puts the launch on fp32 copies of input and output; its finish() then writes the output.
void put_on_float32(Launch& launch);

inline bool goes_as_float32(const Launch& launch) {
  return is_float8(launch.fingerprint.dtype) && launch.dtype != launch.fingerprint.dtype;
}

}  // namespace pycomm::cpu
