#include <cuda_runtime_api.h>

#include "cuda/cuda.h"
#include "cuda/nccl_api.h"

namespace pycomm::cuda {

Info info(const std::string& nccl_wheel) {
  Info result;
  // Neither of these two starts CUDA on a device, so a process that asks can still fork.
  if (cudaRuntimeGetVersion(&result.runtime_version) != cudaSuccess) result.runtime_version = 0;
  if (cudaDriverGetVersion(&result.driver_version) != cudaSuccess) result.driver_version = 0;

  int n_devices = 0;
  cudaError_t error = cudaGetDeviceCount(&n_devices);
  for (int i = 0; i < n_devices && error == cudaSuccess; ++i) {
    cudaDeviceProp properties;
    error = cudaGetDeviceProperties(&properties, i);
    if (error == cudaSuccess)
      result.devices.push_back({properties.name, properties.major, properties.minor,
                                properties.multiProcessorCount, properties.totalGlobalMem});
  }
  if (result.driver_version == 0) {
    result.device_problem = "no CUDA driver on this machine";
  } else if (error != cudaSuccess) {
    result.device_problem = std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
  }
  (void)cudaGetLastError();  // reported above; the next launch must not report it again

  std::shared_ptr<const NcclApi> nccl;
  if (const Status status = NcclApi::open(nccl_wheel, &nccl); status.ok()) {
    result.nccl_path = nccl->path();
    result.nccl_version = nccl->version();
    result.nccl_features = nccl->features();
  } else {
    result.nccl_problem = status.message;
  }
  return result;
}

}  // namespace pycomm::cuda
