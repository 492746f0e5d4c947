// Wire: how the values of a collective look on links between hosts. `none`: as they are. A coded
// message is fp32 values cut into segments of kWireSegment, each coded by itself: bf16 as 2 bytes a
// value, to nearest even; the others in block_format.h's form.
#pragma once

#include <cstdint>

#include "core/block_format.h"

namespace pycomm {

enum class Wire : uint8_t { none, bf16, fp8, int8, int4 };
constexpr int kWires = 5;

constexpr const char* name_of(Wire wire) {
  constexpr const char* names[] = {"none", "bf16", "fp8", "int8", "int4"};
  return static_cast<int>(wire) < kWires ? names[static_cast<int>(wire)] : "unknown";
}

// REQUIRES: wire is fp8, int8 or int4.
constexpr BlockCode block_code(Wire wire) {
  return wire == Wire::fp8    ? BlockCode::e4m3
         : wire == Wire::int8 ? BlockCode::int8
                              : BlockCode::int4;
}

// Values that are coded and sent together: whole blocks, and as many bytes of fp32 as the engine
// moves between two looks at other links.
constexpr uint64_t kWireSegment = 16384;

// Bytes of numel coded values that begin a segment. Additive over whole segments.
constexpr uint64_t coded_nbytes(Wire wire, uint64_t numel) {
  if (wire == Wire::none) return numel * sizeof(float);
  if (wire == Wire::bf16) return numel * 2;
  return static_cast<uint64_t>(quantised_nbytes(static_cast<int64_t>(numel), block_code(wire)));
}

}  // namespace pycomm
