// The fake NCCL and its devices (fake_nccl/) as the CUDA engine's tests take them.
#pragma once

#include <cstdlib>
#include <memory>

#include "cuda/engine.h"
#include "fake_nccl/fake_nccl.h"

extern "C" pycomm::cuda::Device* pycomm_test_device(const char* id);

namespace pycomm::testing {

inline const char* fake_library = FAKE_NCCL;

inline std::shared_ptr<const cuda::NcclApi> open_fake() {
  ::setenv("PYCOMM_NCCL_LIB", fake_library, 1);
  std::shared_ptr<const cuda::NcclApi> api;
  const Status status = cuda::NcclApi::open("", &api);
  if (!status.ok()) throw Error(status);
  return api;
}

}  // namespace pycomm::testing
