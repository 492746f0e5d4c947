// What the torch layer sees of CUDA: kernels to launch on a stream, and what this machine has. No
// CUDA header is needed to include this one: a stream is a cudaStream_t passed as void*.
//
// Nothing here runs at import: the CUDA runtime starts with the first call, and without a GPU each
// says so in its result. Launches are asynchronous, on the calling thread's current device; memory
// must stay until the stream has passed. They hold no state, so any thread may call them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>
#ifdef __CUDACC__
#include <cuda_fp8.h>
#endif

#include "core/block_format.h"
#include "core/dtype.h"
#include "core/status.h"
#include "cuda/nccl_api.h"
#include "cuda/peer_protocol.h"

namespace pycomm::cuda {

// dst[i] = a[i] (op) b[i] for float32, float16 and bfloat16 with sum, product, min or max, computed
// in fp32 and rounded once; avg combines as sum. min and max propagate NaN. dst may be a or b. Any
// numel and alignment; 16 bytes at a time where dst, a and b are equally aligned.
Status reduce(void* dst, const void* a, const void* b, size_t numel, DType dtype, ReduceOp op,
              void* stream);

// src to its quantised form of quantised_nbytes(numel, code) (core/block_format.h), code int8 or
// e4m3. REQUIRES: dst is 16-byte aligned.
Status quantise(void* dst, const void* src, size_t numel, DType dtype, BlockCode code, void* stream,
                Loss loss = {});

// And back: dst[i] = value, or dst[i] += value where accumulate. REQUIRES: src is 16-byte aligned.
Status dequantise(void* dst, const void* src, size_t numel, DType dtype, BlockCode code,
                  bool accumulate, void* stream);

// dst[i] = factor * the sum of value i over n_forms quantised forms of numel values each, which lie
// stride_bytes apart: in fp32, in their order, rounded once. REQUIRES: as dequantise.
Status dequantise_sum(void* dst, const void* src, int n_forms, int64_t stride_bytes, size_t numel,
                      DType dtype, BlockCode code, float factor, void* stream);

// dst = the quantised form of what dequantise_sum would give in float32, without that in between.
// dst may be one of the forms. REQUIRES: both are 16-byte aligned.
Status requantise_sum(void* dst, const void* src, int n_forms, int64_t stride_bytes, size_t numel,
                      BlockCode code, float factor, void* stream, Loss loss = {});

struct Tensor {
  void* data;
  size_t numel;
};

// bucket = scale * the tensors, one after the other without gaps; unpack is the way back. Any
// number of tensors, 0 included.
Status pack(void* bucket, std::span<const Tensor> tensors, float scale, DType dtype, void* stream);
Status unpack(const void* bucket, std::span<const Tensor> tensors, float scale, DType dtype,
              void* stream);

// One launch of peer_protocol.h's all_reduce for float32, float16 and bfloat16, computed in fp32
// and rounded once; args.n_blocks is set here, alike on ranks that give one numel. Buffers: of
// peer_buffer_nbytes(capacity), zeroed, 256-byte aligned, mapped by all ranks.
// Errors: invalid_argument also where the ranks that share this device would not all fit on it.
Status peer_all_reduce(PeerArguments args, DType dtype, bool two_shot, int n_ranks_on_device,
                       void* stream);

struct DeviceInfo {
  std::string name;
  int major, minor;  // compute capability
  int n_multiprocessors;
  size_t memory_nbytes;
};

// What `pycomm info` prints. Versions are 0 where there is none; problems are empty where all is
// well.
struct Info {
  int runtime_version = 0;  // the CUDA runtime inside the module: 13000 is 13.0
  int driver_version = 0;   // the newest CUDA that the driver serves
  std::vector<DeviceInfo> devices;
  std::string device_problem;
  std::string nccl_path;
  int nccl_version = 0;  // 21805 is 2.18.5
  std::vector<NcclFeature> nccl_features;
  std::string nccl_problem;
};

// nccl_wheel: path of the libnccl.so.2 that torch's wheels brought, or empty. Never fails.
Info info(const std::string& nccl_wheel);

}  // namespace pycomm::cuda
