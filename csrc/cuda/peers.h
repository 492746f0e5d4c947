// Peers: small all_reduces of the ranks of one host by the kernel that reads and writes their
// memory (peer_protocol.h). Each rank has a buffer that all have mapped (symmetric_memory.h).
// Thread safety: run() is called by one thread at a time, in the order in which all ranks call it,
// and what it launches stands in the order of one stream; the others are free.
#pragma once

#include <atomic>
#include <memory>
#include <string>

#include "core/engine.h"
#include "cuda/device.h"
#include "cuda/peer_protocol.h"
#include "cuda/symmetric_memory.h"

namespace pycomm::cuda {

class Peers {
 public:
  // All ranks call it. nullptr, on all of them, where one cannot map another's memory; `why` says
  // which and why. capacity: bytes of the largest tensor.
  static std::unique_ptr<Peers> create(std::shared_ptr<Device> device, int rank, int size,
                                       int64_t capacity, const SymmetricMemory::Exchange& exchange,
                                       std::string* why);
  ~Peers();  // REQUIRES: nothing of this rank is under way, or end() was called

  // Whether the kernel has it. The same on all ranks that give one launch.
  static bool has(const Launch& launch);
  bool takes(const Launch& launch) const {
    return has(launch) && static_cast<int64_t>(launch.input_nbytes) <= capacity_;
  }
  // tag: of the operation; ranks whose tags differ fail. Errors: Error of the device.
  void run(const Launch& launch, uint32_t tag, Device::Stream stream);
  // Of the launches that have ended: ok(), or Code::timeout, Code::mismatch.
  Status status() const;
  void end();  // what is under way ends soon
  // Unmaps the others' buffers; false where something is still under way, and stays so.
  bool leave();
  void all_have_left() { memory_->all_have_left(); }

 private:
  Peers(std::shared_ptr<Device> device, int rank, int size, int64_t capacity)
      : device_(std::move(device)), rank_(rank), size_(size), capacity_(capacity) {}
  void make();
  bool idle();  // what was launched has ended; waits a little for that

  const std::shared_ptr<Device> device_;
  const int rank_, size_;
  const int64_t capacity_;
  uint32_t epoch_ = 0;
  Device::Stream stream_ = nullptr;  // of end()
  Device::Event last_ = nullptr;     // the end of the last launch
  std::atomic<bool> launched_{false};
  uint32_t* failed_ = nullptr;  // pinned: the kernel's word
  std::unique_ptr<SymmetricMemory> memory_;
};

}  // namespace pycomm::cuda
