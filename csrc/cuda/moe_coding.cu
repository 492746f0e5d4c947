// Rows in fp8 for the wire (core/block_format.h, e4m3): quantised straight into per-rank buffers,
// and read from them straight into experts' order.
#include "cuda/moe_launch.cuh"

namespace pycomm::cuda {
namespace {

// config: a warp codes one tile of one row; a lane holds 16 bytes of it, and 32 lanes (fp32) or 16
// hold one block. A coded row is 132 bytes a block, so only 4-byte alignment is sure: codes move in
// words.
constexpr BlockCode kCode = BlockCode::e4m3;
constexpr int kWord = 4;

template <class T>
constexpr int kLanes = kBlockNumel / Vector<T>::n;

template <int n>
struct alignas(kWord) Codes {
  uint8_t x[n];
};

struct Encode {
  Buffers buffers;
  const char* src;
  const int64_t *starts, *buffer, *to;
  int64_t n, width;
  bool whole;  // every row of src is 16-byte aligned
};

struct Decode {
  Buffers sources;
  char* out;
  const int64_t *source, *rows, *to;
  int64_t n, width;
  bool whole;  // every row of out is 16-byte aligned
};

template <class T>
__global__ void __launch_bounds__(kThreads) encode_kernel(const __grid_constant__ Encode args) {
  constexpr int kPerLane = Vector<T>::n;
  const int64_t padded = padded_width(args.width);
  const int64_t n_items = args.n * tiles_per_row(padded, kPerLane);
  const int lane = this_lane();
  // The lanes of one block leave the turns together: they, and only they, take part in its
  // shuffles.
  const unsigned block_mask = (kLanes<T> == 32 ? ~0u : 0xffffu) << (lane / kLanes<T> * kLanes<T>);
  for (int64_t item = this_warp(); item < n_items; item += n_warps()) {
    const RowTile tile = row_tile(item, padded, kPerLane);
    const T* const from = reinterpret_cast<const T*>(args.src) + tile.row * args.width;
    const int64_t begin = at(args.starts, tile.row, tile.row);
    const int64_t end = at(args.starts, tile.row + 1, tile.row + 1);
    if (begin == end) continue;
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int64_t column = lane_column(tile, turn, lane, kPerLane);
      if (column >= tile.end) break;
      Vector<T> x;
      if (args.whole && column + kPerLane <= args.width) {
        x = *reinterpret_cast<const Vector<T>*>(from + column);
      } else {
#pragma unroll
        for (int k = 0; k < kPerLane; ++k)
          x.x[k] = column + k < args.width ? from[column + k] : narrow<T>(0.0f);
      }
      int32_t max = 0;
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) max = ::max(max, magnitude_bits(widen(x.x[k])));
#pragma unroll
      for (int offset = kLanes<T> / 2; offset > 0; offset /= 2)
        max = ::max(max, __shfl_xor_sync(block_mask, max, offset));
      const BlockScale scale = block_scale(max, kCode);
      Codes<kPerLane> codes;
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) codes.x[k] = encode(kCode, widen(x.x[k]), scale.to_code);
      for (int64_t j = begin; j < end; ++j) {
        char* const to = args.buffers.of[at(args.buffer, j, 0)] +
                         at(args.to, j, j) * coded_row_nbytes(args.width);
        *reinterpret_cast<Codes<kPerLane>*>(to + column) = codes;
        if (lane % kLanes<T> == 0)
          *reinterpret_cast<float*>(to + scale_offset(args.width, column)) = scale.to_value;
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) decode_kernel(const __grid_constant__ Decode args) {
  constexpr int kPerLane = Vector<T>::n;
  const int64_t n_items = args.n * tiles_per_row(args.width, kPerLane);
  for (int64_t item = this_warp(); item < n_items; item += n_warps()) {
    const RowTile tile = row_tile(item, args.width, kPerLane);
    const int64_t row = args.rows[tile.row];
    const char* const from = row < 0 ? nullptr
                                     : args.sources.of[at(args.source, tile.row, 0)] +
                                           row * coded_row_nbytes(args.width);
    T* const to = reinterpret_cast<T*>(args.out) + at(args.to, tile.row, tile.row) * args.width;
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int64_t column = lane_column(tile, turn, this_lane(), kPerLane);
      if (column >= tile.end) break;
      Codes<kPerLane> codes{};
      float to_value = 0.0f;
      if (from != nullptr) {
        codes = *reinterpret_cast<const Codes<kPerLane>*>(from + column);
        to_value = *reinterpret_cast<const float*>(from + scale_offset(args.width, column));
      }
      Vector<T> x;
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) x.x[k] = narrow<T>(decode(kCode, codes.x[k], to_value));
      if (args.whole && column + kPerLane <= args.width) {
        *reinterpret_cast<Vector<T>*>(to + column) = x;
      } else {
#pragma unroll
        for (int k = 0; k < kPerLane; ++k)
          if (column + k < args.width) to[column + k] = x.x[k];
      }
    }
  }
}

}  // namespace

// launch
Status encode_rows(std::span<void* const> buffers, const int64_t* starts, const int64_t* buffer,
                   const int64_t* to, const void* src, int64_t n, int64_t width, DType dtype,
                   void* stream) {
  return for_float_type("encode_rows", dtype, [&]<class T>(T) -> Status {
    if (Status status = check_rows("encode_rows", n, width); !status.ok()) return status;
    Encode args{{},    static_cast<const char*>(src),           starts, buffer, to, n,
                width, aligned(src, width * int64_t{sizeof(T)})};
    if (Status status = gather("encode_rows", buffers, kWord, &args.buffers); !status.ok())
      return status;
    if (n == 0 || width == 0) return {};
    encode_kernel<T>
        <<<grid<T>(n, padded_width(width)), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
    return launched("encode_rows");
  });
}

Status decode_rows(void* out, std::span<const void* const> sources, const int64_t* source,
                   const int64_t* rows, const int64_t* to, int64_t n, int64_t width, DType dtype,
                   void* stream) {
  return for_float_type("decode_rows", dtype, [&]<class T>(T) -> Status {
    if (Status status = check_rows("decode_rows", n, width); !status.ok()) return status;
    Decode args{{},     static_cast<char*>(out),
                source, rows,
                to,     n,
                width,  aligned(out, width * int64_t{sizeof(T)})};
    if (Status status = gather("decode_rows", sources, kWord, &args.sources); !status.ok())
      return status;
    if (n == 0 || width == 0) return {};
    decode_kernel<T><<<grid<T>(n, width), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
    return launched("decode_rows");
  });
}

}  // namespace pycomm::cuda
