// Many gradients to one bucket with a scale, and back: one launch instead of one copy per tensor.
#include "cuda/cuda.h"
#include "cuda/launch.cuh"

namespace pycomm::cuda {
namespace {

// config: one CUDA block moves one tile of one tensor. The tensors travel in the kernel's
// arguments, of which there are 4 KiB.
constexpr int kTileBytes = kThreads * kVectorBytes * 4;
constexpr int kMaxTensors = 128;

struct Arguments {
  char* bucket;  // where the first of these tensors begins
  float scale;
  int n_tensors;
  char* tensor[kMaxTensors];
  int64_t begin[kMaxTensors + 1];       // tensor i is bucket elements begin[i] to begin[i + 1]
  int32_t tile_begin[kMaxTensors + 1];  // and tiles tile_begin[i] to tile_begin[i + 1]
};
static_assert(sizeof(Arguments) <= 4096);

template <class T, bool kPack>
__global__ void __launch_bounds__(kThreads) bucket_kernel(const __grid_constant__ Arguments args) {
  constexpr int kTileNumel = kTileBytes / sizeof(T);
  const int tile = static_cast<int>(blockIdx.x);
  const int which = find_segment(args.tile_begin, args.n_tensors, tile);
  const int64_t offset = int64_t{tile - args.tile_begin[which]} * kTileNumel;
  const int64_t left = args.begin[which + 1] - args.begin[which] - offset;
  T* tensor = reinterpret_cast<T*>(args.tensor[which]) + offset;
  T* bucket = reinterpret_cast<T*>(args.bucket) + args.begin[which] + offset;
  const T* from = kPack ? tensor : bucket;
  T* to = kPack ? bucket : tensor;

  const VectorSpan span =
      vector_span(left < kTileNumel ? left : kTileNumel, sizeof(T), common_misalignment(from, to));
  const auto* from_vectors = reinterpret_cast<const Vector<T>*>(from + span.head);
  auto* to_vectors = reinterpret_cast<Vector<T>*>(to + span.head);
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < span.n_vectors; i += kThreads) {
    Vector<T> x = from_vectors[i];
#pragma unroll
    for (int k = 0; k < Vector<T>::n; ++k) x.x[k] = narrow<T>(widen(x.x[k]) * args.scale);
    to_vectors[i] = x;
  }
  for (int64_t i = threadIdx.x; i < span.n_scalars(); i += kThreads) {
    const int64_t at = span.scalar(i);
    to[at] = narrow<T>(widen(from[at]) * args.scale);
  }
}

// launch
template <bool kPack>
Status run(char* bucket, std::span<const Tensor> tensors, float scale, DType dtype, void* stream) {
  return for_float_type(kPack ? "pack" : "unpack", dtype, [&]<class T>(T) -> Status {
    while (!tensors.empty()) {
      const auto batch = tensors.first(std::min<size_t>(tensors.size(), kMaxTensors));
      tensors = tensors.subspan(batch.size());
      Arguments args{};
      args.bucket = bucket;
      args.scale = scale;
      args.n_tensors = static_cast<int>(batch.size());
      for (size_t i = 0; i < batch.size(); ++i) {
        const int64_t numel = static_cast<int64_t>(batch[i].numel);
        args.tensor[i] = static_cast<char*>(batch[i].data);
        args.begin[i + 1] = args.begin[i] + numel;
        args.tile_begin[i + 1] =
            args.tile_begin[i] + static_cast<int32_t>(ceil_div(numel * sizeof(T), kTileBytes));
      }
      if (const int32_t n_tiles = args.tile_begin[batch.size()]; n_tiles > 0) {
        bucket_kernel<T, kPack><<<n_tiles, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
        if (Status status = launched(kPack ? "pack" : "unpack"); !status.ok()) return status;
      }
      bucket += args.begin[batch.size()] * static_cast<int64_t>(sizeof(T));
    }
    return {};
  });
}

}  // namespace

Status pack(void* bucket, std::span<const Tensor> tensors, float scale, DType dtype, void* stream) {
  return run<true>(static_cast<char*>(bucket), tensors, scale, dtype, stream);
}

Status unpack(const void* bucket, std::span<const Tensor> tensors, float scale, DType dtype,
              void* stream) {
  return run<false>(static_cast<char*>(const_cast<void*>(bucket)), tensors, scale, dtype,
                    stream);  // only read
}

}  // namespace pycomm::cuda
