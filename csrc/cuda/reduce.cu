// dst = a (op) b, element by element: the local half of a reduction whose other half just arrived.
#include "cuda/cuda.h"
#include "cuda/launch.cuh"

namespace pycomm::cuda {
namespace {

// config: bit for bit what csrc/cpu/reduce_kernels.inc computes, NaN payloads aside
struct Sum {
  static __device__ float apply(float a, float b) { return a + b; }
};
struct Product {
  static __device__ float apply(float a, float b) { return a * b; }
};
struct Min {
  static __device__ float apply(float a, float b) { return a < b || a != a ? a : b; }
};
struct Max {
  static __device__ float apply(float a, float b) { return a > b || a != a ? a : b; }
};

template <class T>
struct Arguments {
  T* dst;
  const T* a;
  const T* b;
  VectorSpan span;
};

template <class T, class Op>
__global__ void __launch_bounds__(kThreads) reduce_kernel(const Arguments<T> args) {
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x,
                stride = int64_t{gridDim.x} * kThreads;
  auto* dst = reinterpret_cast<Vector<T>*>(args.dst + args.span.head);
  const auto* a = reinterpret_cast<const Vector<T>*>(args.a + args.span.head);
  const auto* b = reinterpret_cast<const Vector<T>*>(args.b + args.span.head);
  for (int64_t i = first; i < args.span.n_vectors; i += stride) {
    const Vector<T> x = a[i], y = b[i];
    Vector<T> result;
#pragma unroll
    for (int k = 0; k < Vector<T>::n; ++k)
      result.x[k] = narrow<T>(Op::apply(widen(x.x[k]), widen(y.x[k])));
    dst[i] = result;
  }
  for (int64_t i = first; i < args.span.n_scalars(); i += stride) {
    const int64_t at = args.span.scalar(i);
    args.dst[at] = narrow<T>(Op::apply(widen(args.a[at]), widen(args.b[at])));
  }
}

template <class Op, class T>
Status launch(const Arguments<T>& args, void* stream) {
  const int64_t n_threads = std::max(args.span.n_vectors, args.span.n_scalars());
  reduce_kernel<T, Op>
      <<<grid_for(n_threads), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
  return launched("reduce");
}

}  // namespace

Status reduce(void* dst, const void* a, const void* b, size_t numel, DType dtype, ReduceOp op,
              void* stream) {
  return for_float_type("reduce", dtype, [&]<class T>(T) -> Status {
    const bool aligned_alike = common_misalignment(dst, a) >= 0 && common_misalignment(dst, b) >= 0;
    const int misalignment = aligned_alike ? common_misalignment(dst, a) : -1;
    const Arguments<T> args = {static_cast<T*>(dst), static_cast<const T*>(a),
                               static_cast<const T*>(b),
                               vector_span(static_cast<int64_t>(numel), sizeof(T), misalignment)};
    if (numel == 0) return {};
    switch (op) {
      case ReduceOp::sum:
      case ReduceOp::avg:
        return launch<Sum>(args, stream);
      case ReduceOp::product:
        return launch<Product>(args, stream);
      case ReduceOp::min:
        return launch<Min>(args, stream);
      case ReduceOp::max:
        return launch<Max>(args, stream);
      default:
        return {Code::invalid_argument,
                std::string("CUDA kernel 'reduce' has sum, avg, product, min and max, not ") +
                    name_of(op) + ", which floating point has not"};
    }
  });
}

}  // namespace pycomm::cuda
