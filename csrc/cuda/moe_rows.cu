// Rows by index: spread to experts' order, summed back to tokens' order, and what the gradients of
// such a sum are made of.
#include "cuda/moe_launch.cuh"

namespace pycomm::cuda {
namespace {

// config: a warp moves one tile of one row (moe_indexing.h), a lane up to kTurns vectors of it.
template <class T, int n>
struct alignas(n * sizeof(T) < kVectorBytes ? n * sizeof(T) : kVectorBytes) Values {
  T x[n];
};

struct Expand {
  Buffers sources;
  char* out;
  const int64_t *source, *rows, *to;
  int64_t n, width;
};

struct Weigh {
  Buffers sources;
  char* out;
  float* dots;
  const int64_t *source, *rows, *to, *places;
  const float* weights;
  const char* b;
  int64_t n, width;
  bool whole;  // as Combine's, and of b
};

struct Combine {
  Buffers sources;
  char* out;
  const int64_t *source, *rows, *offsets;
  const float* weights;
  int64_t n, width;
  bool whole;  // every row of every source and of out is 16-byte aligned
};

struct Dots {
  float* out;
  const char *a, *b;
  const int64_t *a_rows, *b_rows;
  int64_t n, width;
  bool whole;
};

template <class T>
__global__ void __launch_bounds__(kThreads) expand_kernel(const __grid_constant__ Expand args) {
  constexpr int kPerVector = Vector<T>::n;
  const int64_t n_items = args.n * tiles_per_row(args.width, kPerVector);
  for (int64_t item = this_warp(); item < n_items; item += n_warps()) {
    const RowTile tile = row_tile(item, args.width, kPerVector);
    const int64_t row = args.rows[tile.row], n = tile.end - tile.begin;
    T* const to =
        reinterpret_cast<T*>(args.out) + at(args.to, tile.row, tile.row) * args.width + tile.begin;
    if (row < 0) {
      const VectorSpan span = vector_span(n, sizeof(T), common_misalignment(to, to));
      auto* const vectors = reinterpret_cast<Vector<T>*>(to + span.head);
      Vector<T> zeros;
#pragma unroll
      for (int k = 0; k < kPerVector; ++k) zeros.x[k] = narrow<T>(0.0f);
      for (int64_t i = this_lane(); i < span.n_vectors; i += kWarp) vectors[i] = zeros;
      for (int64_t i = this_lane(); i < span.n_scalars(); i += kWarp)
        to[span.scalar(i)] = zeros.x[0];
      continue;
    }
    const T* const from =
        reinterpret_cast<const T*>(args.sources.of[at(args.source, tile.row, 0)]) +
        row * args.width + tile.begin;
    const VectorSpan span = vector_span(n, sizeof(T), common_misalignment(from, to));
    const auto* const from_vectors = reinterpret_cast<const Vector<T>*>(from + span.head);
    auto* const to_vectors = reinterpret_cast<Vector<T>*>(to + span.head);
#pragma unroll 4
    for (int64_t i = this_lane(); i < span.n_vectors; i += kWarp) to_vectors[i] = from_vectors[i];
    for (int64_t i = this_lane(); i < span.n_scalars(); i += kWarp)
      to[span.scalar(i)] = from[span.scalar(i)];
  }
}

// n values of one column range, where they lie; what is past the end reads as 0.
template <class T, int kN>
__device__ __forceinline__ Values<T, kN> load(const T* from, int64_t left, bool whole) {
  if (whole && left >= kN) return *reinterpret_cast<const Values<T, kN>*>(from);
  Values<T, kN> x;
#pragma unroll
  for (int k = 0; k < kN; ++k) x.x[k] = k < left ? from[k] : narrow<T>(0.0f);
  return x;
}

template <class T, int kN>
__device__ __forceinline__ void store(T* to, const Values<T, kN>& x, int64_t left, bool whole) {
  if (whole && left >= kN) {
    *reinterpret_cast<Values<T, kN>*>(to) = x;
  } else {
#pragma unroll
    for (int k = 0; k < kN; ++k)
      if (k < left) to[k] = x.x[k];
  }
}

template <class T, class Out>
__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ Combine args) {
  constexpr int kPerVector = Vector<T>::n;
  const int64_t n_items = args.n * tiles_per_row(args.width, kPerVector);
  for (int64_t item = this_warp(); item < n_items; item += n_warps()) {
    const RowTile tile = row_tile(item, args.width, kPerVector);
    const int64_t begin = args.offsets[tile.row], end = args.offsets[tile.row + 1];
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int64_t column = lane_column(tile, turn, this_lane(), kPerVector);
      const int64_t left = tile.end - column;
      if (left <= 0) break;
      float sum[kPerVector] = {};
#pragma unroll 4
      for (int64_t j = begin; j < end; ++j) {
        const T* const row = reinterpret_cast<const T*>(args.sources.of[at(args.source, j, 0)]) +
                             args.rows[j] * args.width + column;
        const float weight = args.weights != nullptr ? args.weights[j] : 1.0f;
        const auto x = load<T, kPerVector>(row, left, args.whole);
        // Neither intrinsic is ever fused, so the CPU's bits.
#pragma unroll
        for (int k = 0; k < kPerVector; ++k)
          sum[k] = __fadd_rn(sum[k], __fmul_rn(widen(x.x[k]), weight));
      }
      Values<Out, kPerVector> y;
#pragma unroll
      for (int k = 0; k < kPerVector; ++k) y.x[k] = narrow<Out>(sum[k]);
      store(reinterpret_cast<Out*>(args.out) + tile.row * args.width + column, y, left, args.whole);
    }
  }
}

// Each value of a lane's vector sums its own products, by column; then the lane adds up its values
// in order, and the lanes are added as a tree: the CPU's bits (cpu/rows.h).
template <int kN>
struct Products {
  float sums[kN] = {};
  template <class T>
  __device__ __forceinline__ void add(const Values<T, kN>& x, const Values<T, kN>& y) {
#pragma unroll
    for (int k = 0; k < kN; ++k)
      sums[k] = __fadd_rn(sums[k], __fmul_rn(widen(x.x[k]), widen(y.x[k])));
  }
  __device__ __forceinline__ float sum() const {
    float sum = sums[0];
#pragma unroll
    for (int k = 1; k < kN; ++k) sum = __fadd_rn(sum, sums[k]);
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, offset));
    return sum;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) dots_kernel(const Dots args) {
  constexpr int kPerVector = Vector<T>::n;
  for (int64_t i = this_warp(); i < args.n; i += n_warps()) {
    const int64_t a_row = at(args.a_rows, i, i), b_row = at(args.b_rows, i, i);
    Products<kPerVector> products;
    if (a_row >= 0 && b_row >= 0) {
      const T* const a = reinterpret_cast<const T*>(args.a) + a_row * args.width;
      const T* const b = reinterpret_cast<const T*>(args.b) + b_row * args.width;
#pragma unroll 4
      for (int64_t column = int64_t{this_lane()} * kPerVector; column < args.width;
           column += kWarp * kPerVector)
        products.add(load<T, kPerVector>(a + column, args.width - column, args.whole),
                     load<T, kPerVector>(b + column, args.width - column, args.whole));
    }
    const float sum = products.sum();
    if (this_lane() == 0) args.out[i] = sum;
  }
}

// A warp takes a whole row, as dots_kernel's do.
template <class T>
__global__ void __launch_bounds__(kThreads) weigh_kernel(const __grid_constant__ Weigh args) {
  constexpr int kPerVector = Vector<T>::n;
  for (int64_t i = this_warp(); i < args.n; i += n_warps()) {
    const int64_t row = args.rows[i], place = at(args.places, i, i);
    const T* const from =
        row < 0
            ? nullptr
            : reinterpret_cast<const T*>(args.sources.of[at(args.source, i, 0)]) + row * args.width;
    const T* const b = args.b == nullptr || row < 0
                           ? nullptr
                           : reinterpret_cast<const T*>(args.b) + place * args.width;
    T* const to = reinterpret_cast<T*>(args.out) + at(args.to, i, i) * args.width;
    const float weight = args.weights[place];
    Products<kPerVector> products;
#pragma unroll 4
    for (int64_t column = int64_t{this_lane()} * kPerVector; column < args.width;
         column += kWarp * kPerVector) {
      const int64_t left = args.width - column;
      const auto x = load<T, kPerVector>(from + column, from == nullptr ? 0 : left,
                                         args.whole && from != nullptr);
      if (b != nullptr) products.add(x, load<T, kPerVector>(b + column, left, args.whole));
      Values<T, kPerVector> y;
#pragma unroll
      for (int k = 0; k < kPerVector; ++k)
        y.x[k] = narrow<T>(from == nullptr ? 0.0f : __fmul_rn(widen(x.x[k]), weight));
      store(to + column, y, left, args.whole);
    }
    const float sum = products.sum();
    if (this_lane() == 0 && args.dots != nullptr) args.dots[place] = sum;
  }
}

}  // namespace

// launch
Status expand_rows(void* out, std::span<const void* const> sources, const int64_t* source,
                   const int64_t* rows, const int64_t* to, int64_t n, int64_t width, DType dtype,
                   void* stream) {
  return for_float_type("expand_rows", dtype, [&]<class T>(T) -> Status {
    if (Status status = check_rows("expand_rows", n, width); !status.ok()) return status;
    Expand args{{}, static_cast<char*>(out), source, rows, to, n, width};
    if (Status status = gather("expand_rows", sources, sizeof(T), &args.sources); !status.ok())
      return status;
    if (n == 0 || width == 0) return {};
    expand_kernel<T><<<grid<T>(n, width), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
    return launched("expand_rows");
  });
}

Status weigh_rows(void* out, float* dots, std::span<const void* const> sources,
                  const int64_t* source, const int64_t* rows, const int64_t* to,
                  const int64_t* places, const float* weights, const void* b, int64_t n,
                  int64_t width, DType dtype, void* stream) {
  return for_float_type("weigh_rows", dtype, [&]<class T>(T) -> Status {
    if (Status status = check_rows("weigh_rows", n, width); !status.ok()) return status;
    const int64_t row_nbytes = width * static_cast<int64_t>(sizeof(T));
    Weigh args{{},
               static_cast<char*>(out),
               dots,
               source,
               rows,
               to,
               places,
               weights,
               static_cast<const char*>(b),
               n,
               width,
               aligned(out, row_nbytes) && aligned(b, row_nbytes)};
    if (Status status = gather("weigh_rows", sources, sizeof(T), &args.sources); !status.ok())
      return status;
    for (const void* each : sources) args.whole = args.whole && aligned(each, row_nbytes);
    if (n == 0) return {};
    weigh_kernel<T><<<grid_for(n * kWarp), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
    return launched("weigh_rows");
  });
}

Status combine_rows(void* out, DType out_dtype, std::span<const void* const> sources, DType dtype,
                    const int64_t* source, const int64_t* rows, const int64_t* offsets,
                    const float* weights, int64_t n, int64_t width, void* stream) {
  return for_float_type("combine_rows", dtype, [&]<class T>(T) -> Status {
    return for_float_type("combine_rows", out_dtype, [&]<class Out>(Out) -> Status {
      if (Status status = check_rows("combine_rows", n, width); !status.ok()) return status;
      Combine args{{},
                   static_cast<char*>(out),
                   source,
                   rows,
                   offsets,
                   weights,
                   n,
                   width,
                   aligned(out, width * static_cast<int64_t>(sizeof(Out)))};
      if (Status status = gather("combine_rows", sources, sizeof(T), &args.sources); !status.ok())
        return status;
      for (const void* each : sources)
        args.whole = args.whole && aligned(each, width * static_cast<int64_t>(sizeof(T)));
      if (n == 0 || width == 0) return {};
      combine_kernel<T, Out>
          <<<grid<T>(n, width), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
      return launched("combine_rows");
    });
  });
}

Status row_dots(float* out, const void* a, const int64_t* a_rows, const void* b,
                const int64_t* b_rows, int64_t n, int64_t width, DType dtype, void* stream) {
  return for_float_type("row_dots", dtype, [&]<class T>(T) -> Status {
    if (Status status = check_rows("row_dots", n, width); !status.ok()) return status;
    const int64_t row_nbytes = width * static_cast<int64_t>(sizeof(T));
    const Dots args{out,
                    static_cast<const char*>(a),
                    static_cast<const char*>(b),
                    a_rows,
                    b_rows,
                    n,
                    width,
                    aligned(a, row_nbytes) && aligned(b, row_nbytes)};
    if (n == 0) return {};
    dots_kernel<T><<<grid_for(n * kWarp), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
    return launched("row_dots");
  });
}

}  // namespace pycomm::cuda
