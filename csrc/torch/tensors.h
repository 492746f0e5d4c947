// What both front ends need of torch: dtypes by name, tensors in memory that peers map, and c10d's
// stores as pycomm's.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <c10/util/safe_numerics.h>

#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <vector>

#include "core/dtype.h"
#include "core/status.h"
#include "core/store.h"
#include "cpu/endpoint.h"

namespace pycomm::torch_layer {

inline std::optional<DType> dtype_of(at::ScalarType type) {
  switch (type) {
    case at::kByte:
      return DType::uint8;
    case at::kChar:
      return DType::int8;
    case at::kShort:
      return DType::int16;
    case at::kInt:
      return DType::int32;
    case at::kLong:
      return DType::int64;
    case at::kUInt16:
      return DType::uint16;
    case at::kUInt32:
      return DType::uint32;
    case at::kUInt64:
      return DType::uint64;
    case at::kHalf:
      return DType::float16;
    case at::kBFloat16:
      return DType::bfloat16;
    case at::kFloat:
      return DType::float32;
    case at::kDouble:
      return DType::float64;
    case at::kBool:
      return DType::boolean;
    case at::kComplexFloat:
      return DType::complex64;
    case at::kComplexDouble:
      return DType::complex128;
    case at::kFloat8_e4m3fn:
      return DType::float8_e4m3fn;
    case at::kFloat8_e5m2:
      return DType::float8_e5m2;
    case at::kFloat8_e4m3fnuz:
    case at::kFloat8_e5m2fnuz:
    case at::kFloat8_e8m0fnu:
      return DType::bytes;  // moved, not reduced
    default:
      return std::nullopt;
  }
}

// An uninitialised tensor on the endpoint's heap, which lives as long as its tensors.
inline at::Tensor empty_in_peer_memory(const std::shared_ptr<cpu::Endpoint>& endpoint,
                                       at::IntArrayRef shape, at::ScalarType dtype) {
  const auto refuse = [&](const char* text) {
    std::ostringstream message;
    message << "empty: shape " << shape << " is " << text;
    throw Error(Code::invalid_argument, message.str());
  };
  int64_t numel = 1;
  for (const int64_t size : shape)
    if (size < 0 || c10::mul_overflows(numel, size, &numel)) refuse("not one");
  uint64_t nbytes = 0;
  if (c10::mul_overflows(static_cast<uint64_t>(numel), c10::elementSize(dtype), &nbytes))
    refuse("too large");
  std::byte* data = endpoint->peer_memory().allocate(nbytes);
  return at::from_blob(
      data, shape,
      [endpoint](void* pointer) {
        endpoint->peer_memory().heap().release(static_cast<std::byte*>(pointer));
      },
      at::TensorOptions().dtype(dtype));
}

class TorchStore final : public Store {
 public:
  // Works on a connection of its own: another thread may sit in wait() on the caller's for minutes.
  explicit TorchStore(const c10::intrusive_ptr<c10d::Store>& store) : store_(store->clone()) {}
  void set(const std::string& key, const std::string& value) override {
    store_->set(key, std::vector<uint8_t>(value.begin(), value.end()));
  }
  std::vector<std::string> get_all(const std::vector<std::string>& keys,
                                   std::chrono::milliseconds timeout) override {
    try {
      store_->wait(keys, timeout);
    } catch (const std::exception& error) {
      std::string missing;
      for (const auto& key : keys)
        if (!store_->check({key})) missing += (missing.empty() ? "'" : ", '") + key + "'";
      throw Error(Code::timeout,
                  "set-up waited " +
                      std::to_string(static_cast<double>(timeout.count()) / 1000.0).substr(0, 6) +
                      " s for " + missing +
                      " in the store: did every rank start, and does each reach the store? (" +
                      error.what() + ")");
    }
    std::vector<std::string> values;
    if (store_->hasExtendedApi()) {
      for (const auto& value : store_->multiGet(keys))
        values.emplace_back(value.begin(), value.end());
    } else {
      for (const auto& key : keys) {
        const auto value = store_->get(key);
        values.emplace_back(value.begin(), value.end());
      }
    }
    return values;
  }
  std::optional<std::string> peek(const std::string& key) override {
    if (!store_->check({key})) return std::nullopt;
    const auto value = store_->get(key);
    return std::string(value.begin(), value.end());
  }

 private:
  const c10::intrusive_ptr<c10d::Store> store_;
};

}  // namespace pycomm::torch_layer
