// StagedEngine: collectives and messages of device memory through the host, where NCCL cannot
// connect hosts: copied to pinned memory, exchanged by the group of the same ranks on host memory
// (shared memory inside hosts, TCP between them), and copied back.
//
// All block their caller, also those that are started: at their end the result is on its stream.
// What the host's group cannot, or that it is broken, it says itself; closing this leaves it open.
// Operations cannot be captured into a graph. Thread safety: all members, one operation at a time.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/group.h"
#include "cuda/device.h"

namespace pycomm::cuda {

class StagedEngine final : public Engine, public std::enable_shared_from_this<StagedEngine> {
 public:
  // stream: for what is started; the engine makes one where there is none.
  StagedEngine(std::shared_ptr<Device> device, std::shared_ptr<Group> host, void* stream);
  ~StagedEngine() override;

  uint64_t native_nbytes(Collective, bool) const override { return UINT64_MAX; }
  bool on_device() const override { return true; }
  bool spans_hosts() const override { return false; }  // a wire is the host's group's
  void run(Launch launch) override;
  std::shared_ptr<Work> start(Launch launch, std::shared_ptr<void> keep_alive) override;
  std::shared_ptr<Work> start_together(std::vector<Launch> launches, std::vector<Message> messages,
                                       std::shared_ptr<void> keep_alive) override;
  std::shared_ptr<Work> send(const void* data, uint64_t nbytes, int peer, int64_t tag,
                             Clock::time_point deadline, std::shared_ptr<void> keep_alive) override;
  std::shared_ptr<Work> recv(void* data, uint64_t nbytes, int peer, int64_t tag,
                             Clock::time_point deadline, std::shared_ptr<void> keep_alive) override;
  void run_send(const void* data, uint64_t nbytes, int peer, int64_t tag,
                Clock::time_point deadline) override;
  int run_recv(void* data, uint64_t nbytes, int peer, int64_t tag,
               Clock::time_point deadline) override;
  Stats stats() const override { return host_->engine().stats(); }
  uint64_t sequence() const override { return host_->engine().sequence(); }
  Status broken() const override { return host_->engine().broken(); }
  void revoke(const Status& why) override { host_->engine().revoke(why); }
  void close() override {}

 private:
  friend class StagedWork;
  // REQUIRES of these: mutex_ is held.
  void stage(const Launch& launch, Device::Stream stream);
  void exchange(const std::vector<Message>& messages, Device::Stream stream);
  std::byte* pinned(uint64_t nbytes);
  void wait(Device::Stream stream, Clock::time_point deadline);

  const std::shared_ptr<Device> device_;
  const std::shared_ptr<Group> host_;
  const bool makes_stream_;
  Device::Stream stream_;
  std::mutex mutex_;
  Device::Event reached_;  // by wait()
  std::byte* pinned_ = nullptr;
  uint64_t pinned_nbytes_ = 0;
};

}  // namespace pycomm::cuda
