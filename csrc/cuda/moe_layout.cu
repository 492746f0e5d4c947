// Where the rows of each expert stand: counts and offsets, then each slot's place.
#include "cuda/moe_launch.cuh"

namespace pycomm::cuda {
namespace {

// config: a CUDA block counts one tile of slots; the last to finish adds up the tiles. A slot's
// rank in its tile is found by comparing it with all of the tile: no atomics, so one order, and no
// bound on experts.
struct Arguments {
  int64_t *counts, *offsets;
  const int64_t* expert;
  int64_t n_slots, n_experts, align;
  unsigned* n_done;     // workspace: blocks that have finished, then
  int32_t* tile_begin;  // [n_tiles, n_experts]: counts of a tile; at the end those of all before it
};

struct Places {
  int64_t *out_of_slot, *slot_of_out;
  int64_t n_out;
};

__device__ int load_tile(const Arguments& args, int64_t tile, int64_t* expert) {
  const int64_t left = args.n_slots - tile * kSlotsPerTile;
  const int n = static_cast<int>(left < kSlotsPerTile ? left : kSlotsPerTile);
  const int i = static_cast<int>(threadIdx.x);
  if (i < n) expert[i] = args.expert[tile * kSlotsPerTile + i];
  return n;
}

__device__ void offsets_of_counts(const Arguments& args) {
  __shared__ int64_t sum[kSlotsPerTile];
  const int i = static_cast<int>(threadIdx.x);
  int64_t carry = 0;
  if (i == 0) args.offsets[0] = 0;
  for (int64_t base = 0; base < args.n_experts; base += kSlotsPerTile) {
    const int64_t e = base + i;
    int64_t count = 0;
    if (e < args.n_experts) {
      const int64_t n_tiles = ceil_div(args.n_slots, kSlotsPerTile);
#pragma unroll 8
      for (int64_t tile = 0; tile < n_tiles; ++tile) {
        int32_t* const begin = args.tile_begin + tile * args.n_experts + e;
        const int32_t n = __ldcg(begin);  // another block wrote it
        *begin = static_cast<int32_t>(count);
        count += n;
      }
      args.counts[e] = count;
    }
    sum[i] = padded_count(count, args.align);
    __syncthreads();
    for (int step = 1; step < kSlotsPerTile; step *= 2) {
      const int64_t before = i >= step ? sum[i - step] : 0;
      __syncthreads();
      sum[i] += before;
      __syncthreads();
    }
    if (e < args.n_experts) args.offsets[e + 1] = carry + sum[i];
    carry += sum[kSlotsPerTile - 1];
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kSlotsPerTile) offsets_kernel(const Arguments args) {
  __shared__ int64_t expert[kSlotsPerTile];
  __shared__ bool is_last;
  const int64_t tile = blockIdx.x;
  const int i = static_cast<int>(threadIdx.x), n = load_tile(args, tile, expert);
  int32_t* const counts = args.tile_begin + tile * args.n_experts;
  for (int64_t e = i; e < args.n_experts; e += kSlotsPerTile) counts[e] = 0;
  __syncthreads();
  if (i < n && has_expert(expert[i], args.n_experts)) {
    const Equals found = equals(expert, n, i);
    if (found.before == 0) counts[expert[i]] = found.all;
  }
  __threadfence();  // this thread's counts are seen before its block counts as done
  __syncthreads();
  if (i == 0) is_last = atomicAdd(args.n_done, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;
  __threadfence();               // pairs with the others' above
  if (i == 0) *args.n_done = 0;  // for the next launch
  offsets_of_counts(args);
}

__global__ void __launch_bounds__(kSlotsPerTile)
    places_kernel(const Arguments args, const Places places) {
  __shared__ int64_t expert[kSlotsPerTile];
  const int64_t tile = blockIdx.x, slot = tile * kSlotsPerTile + threadIdx.x;
  const int i = static_cast<int>(threadIdx.x), n = load_tile(args, tile, expert);
  __syncthreads();
  if (i < n) {
    int64_t row = -1;
    if (has_expert(expert[i], args.n_experts))
      row = args.offsets[expert[i]] + args.tile_begin[tile * args.n_experts + expert[i]] +
            equals(expert, n, i).before;
    if (row >= places.n_out) row = -1;
    places.out_of_slot[slot] = row;
    if (row >= 0) places.slot_of_out[row] = slot;
  }
  // Rows of no slot: behind each expert's, and behind all.
  const int64_t n_threads = int64_t{gridDim.x} * kSlotsPerTile;
  for (int64_t e = slot; e < args.n_experts; e += n_threads)
    for (int64_t row = args.offsets[e] + args.counts[e];
         row < args.offsets[e + 1] && row < places.n_out; ++row)
      places.slot_of_out[row] = -1;
  for (int64_t row = args.offsets[args.n_experts] + slot; row < places.n_out; row += n_threads)
    places.slot_of_out[row] = -1;
}

// launch
constexpr size_t kCounterBytes = 8;

unsigned n_tiles(int64_t n_slots) {  // one also where there is no slot: offsets are written
  return static_cast<unsigned>(std::max<int64_t>(1, ceil_div(n_slots, kSlotsPerTile)));
}

Status check(const char* kernel, int64_t n_slots, int64_t n_experts, int64_t align,
             const void* workspace) {
  const std::string name = std::string("CUDA kernel '") + kernel + "'";
  if (n_slots < 0 || n_slots > INT32_MAX || n_experts < 1 || align < 1)
    return {Code::invalid_argument, name + " takes 0 to 2^31 - 1 slots, 1 expert or more and " +
                                        "align of 1 or more, not " + std::to_string(n_slots) +
                                        ", " + std::to_string(n_experts) + " and " +
                                        std::to_string(align)};
  const auto off = static_cast<unsigned>(reinterpret_cast<uintptr_t>(workspace) % kCounterBytes);
  if (off == 0) return {};
  return {Code::invalid_argument, name + " needs its workspace 8-byte aligned; it is " +
                                      std::to_string(off) + " bytes off"};
}

Arguments arguments(const int64_t* counts, const int64_t* offsets, const int64_t* expert,
                    int64_t n_slots, int64_t n_experts, int64_t align, const void* workspace) {
  char* const memory = static_cast<char*>(const_cast<void*>(workspace));
  return {const_cast<int64_t*>(counts),
          const_cast<int64_t*>(offsets),
          expert,
          n_slots,
          n_experts,
          align,
          reinterpret_cast<unsigned*>(memory),
          reinterpret_cast<int32_t*>(memory + kCounterBytes)};
}

}  // namespace

size_t expert_workspace_nbytes(int64_t n_slots, int64_t n_experts) {
  return kCounterBytes + sizeof(int32_t) * n_tiles(n_slots) * static_cast<size_t>(n_experts);
}

Status expert_offsets(int64_t* counts, int64_t* offsets, const int64_t* expert, int64_t n_slots,
                      int64_t n_experts, int64_t align, void* workspace, void* stream) {
  if (Status status = check("expert_offsets", n_slots, n_experts, align, workspace); !status.ok())
    return status;
  const auto args = arguments(counts, offsets, expert, n_slots, n_experts, align, workspace);
  offsets_kernel<<<n_tiles(n_slots), kSlotsPerTile, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return launched("expert_offsets");
}

Status expert_places(int64_t* out_of_slot, int64_t* slot_of_out, int64_t n_out,
                     const int64_t* counts, const int64_t* offsets, const int64_t* expert,
                     int64_t n_slots, int64_t n_experts, const void* workspace, void* stream) {
  if (Status status = check("expert_places", n_slots, n_experts, 1, workspace); !status.ok())
    return status;
  if (n_out < 0)
    return {Code::invalid_argument,
            "CUDA kernel 'expert_places' takes no " + std::to_string(n_out) + " output rows"};
  const auto args = arguments(counts, offsets, expert, n_slots, n_experts, 1, workspace);
  places_kernel<<<n_tiles(n_slots), kSlotsPerTile, 0, static_cast<cudaStream_t>(stream)>>>(
      args, {out_of_slot, slot_of_out, n_out});
  return launched("expert_places");
}

}  // namespace pycomm::cuda
