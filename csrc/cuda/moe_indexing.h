// Which warp, lane and slot of the MoE kernels touches what: arithmetic that the kernels (moe_*.cu)
// and the CPU tests both run.
#pragma once

#include <cstdint>

#include "core/block_format.h"
#include "cuda/indexing.h"

namespace pycomm::cuda {

constexpr int kWarp = 32;
constexpr int kTurns = 4;  // vectors that each lane of a warp moves of one tile

// A warp's work: columns begin to end - 1 of one row. Tiles begin at multiples of a warp's vectors,
// so they are aligned as their row is.
struct RowTile {
  int64_t row, begin, end;
};

PYCOMM_HD int64_t tile_numel(int per_vector) { return int64_t{kWarp} * kTurns * per_vector; }
PYCOMM_HD int64_t tiles_per_row(int64_t width, int per_vector) {
  return ceil_div(width, tile_numel(per_vector));
}
// REQUIRES: 0 <= item < n_rows * tiles_per_row(width, per_vector), so width > 0.
PYCOMM_HD RowTile row_tile(int64_t item, int64_t width, int per_vector) {
  const int64_t n_tiles = tiles_per_row(width, per_vector), row = item / n_tiles;
  const int64_t begin = (item - row * n_tiles) * tile_numel(per_vector);
  const int64_t end = begin + tile_numel(per_vector);
  return {row, begin, end < width ? end : width};
}

// The first column of a lane's vector in a turn; the tile has no such vector where it is end or
// more.
PYCOMM_HD int64_t lane_column(const RowTile& tile, int turn, int lane, int per_vector) {
  return tile.begin + (int64_t{turn} * kWarp + lane) * per_vector;
}

// A warp's lanes where something holds, as bits.
PYCOMM_HD int n_set(uint32_t lanes) {
#ifdef __CUDA_ARCH__
  return __popc(lanes);
#else
  return __builtin_popcount(lanes);
#endif
}
PYCOMM_HD int n_set_below(uint32_t lanes, int lane) { return n_set(lanes & ((1u << lane) - 1)); }

// A row in fp8: the codes of all blocks, then their scales; 4-byte aligned where the buffer is.
PYCOMM_HD int64_t coded_row_nbytes(int64_t width) {
  return quantised_nbytes(width, BlockCode::e4m3);
}
PYCOMM_HD int64_t scale_offset(int64_t width, int64_t column) {
  return scales_offset(width, BlockCode::e4m3) +
         column / kBlockNumel * static_cast<int64_t>(sizeof(float));
}
PYCOMM_HD int64_t padded_width(int64_t width) { return n_blocks(width) * kBlockNumel; }

}  // namespace pycomm::cuda
