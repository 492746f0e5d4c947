// DType, ReduceOp, Collective: the vocabulary that a call, a fingerprint and a kernel share. The
// values go over wires.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pycomm {

enum class DType : uint8_t {
  uint8,
  int8,
  int16,
  int32,
  int64,
  uint16,
  uint32,
  uint64,
  float16,
  bfloat16,
  float32,
  float64,
  boolean,
  complex64,
  complex128,
  float8_e4m3fn,
  float8_e5m2,
  bytes,  // opaque: collectives that only move data take any element type as bytes
};

constexpr size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::uint8:
    case DType::int8:
    case DType::boolean:
    case DType::float8_e4m3fn:
    case DType::float8_e5m2:
    case DType::bytes:
      return 1;
    case DType::int16:
    case DType::uint16:
    case DType::float16:
    case DType::bfloat16:
      return 2;
    case DType::int32:
    case DType::uint32:
    case DType::float32:
      return 4;
    case DType::int64:
    case DType::uint64:
    case DType::float64:
    case DType::complex64:
      return 8;
    case DType::complex128:
      return 16;
  }
  return 0;
}

constexpr const char* name_of(DType dtype) {
  constexpr const char* names[] = {
      "uint8",  "int8",      "int16",      "int32",         "int64",       "uint16",
      "uint32", "uint64",    "float16",    "bfloat16",      "float32",     "float64",
      "bool",   "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "bytes"};
  return static_cast<size_t>(dtype) < sizeof(names) / sizeof(*names)
             ? names[static_cast<size_t>(dtype)]
             : "unknown";
}

constexpr bool is_float8(DType dtype) {
  return dtype == DType::float8_e4m3fn || dtype == DType::float8_e5m2;
}

// What a reduction of `dtype` goes through the engine as. A sum of fp8 that is rounded at every hop
// keeps no digit that is right, so fp8 is widened once, summed in fp32 and rounded once, at the
// end.
// Real or complex; fp8 aside, of which nothing but sums of converted values are taken.
constexpr bool is_floating(DType dtype) {
  return dtype == DType::float16 || dtype == DType::bfloat16 || dtype == DType::float32 ||
         dtype == DType::float64 || dtype == DType::complex64 || dtype == DType::complex128;
}

constexpr DType reduced_as(DType dtype) { return is_float8(dtype) ? DType::float32 : dtype; }

// avg is sum, then a division by the group's size at the end (integers truncate, as NCCL does).
enum class ReduceOp : uint8_t { sum, avg, product, min, max, band, bor, bxor };

constexpr const char* name_of(ReduceOp op) {
  constexpr const char* names[] = {"sum", "avg", "product", "min", "max", "band", "bor", "bxor"};
  return static_cast<size_t>(op) < sizeof(names) / sizeof(*names) ? names[static_cast<size_t>(op)]
                                                                  : "unknown";
}

enum class Collective : uint8_t {
  all_reduce,
  reduce,
  broadcast,
  reduce_scatter,
  all_gather,
  gather,
  scatter,
  all_to_all,
  barrier,
};
constexpr int kCollectives = 9;

constexpr const char* name_of(Collective collective) {
  constexpr const char* names[] = {"all_reduce",     "reduce",     "broadcast",
                                   "reduce_scatter", "all_gather", "gather",
                                   "scatter",        "all_to_all", "barrier"};
  return static_cast<int>(collective) < kCollectives ? names[static_cast<int>(collective)]
                                                     : "unknown";
}

constexpr bool reduces(Collective collective) {
  return collective == Collective::all_reduce || collective == Collective::reduce ||
         collective == Collective::reduce_scatter;
}

constexpr bool rooted(Collective collective) {
  return collective == Collective::reduce || collective == Collective::broadcast ||
         collective == Collective::gather || collective == Collective::scatter;
}

}  // namespace pycomm
