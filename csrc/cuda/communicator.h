// Communicator: one NCCL communicator that never blocks its caller beyond a deadline. All calls on
// it are non-blocking to NCCL; what NCCL still does in the background is polled. Thread safety: all
// members; abort() may come at any time, after which every call fails.
#pragma once

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "core/engine.h"
#include "cuda/nccl_api.h"

namespace pycomm::cuda {

class Communicator {
 public:
  // Asked some times a second by who waits for other ranks; what it throws ends the wait.
  using Check = std::function<void()>;
  // max_ctas: multiprocessors that an operation takes at most; NCCL's choice where there is none.
  // who: "group 'dp', rank 1 of 4 (host a, cuda:0)", which every message begins with.
  // Errors of all three: Error(timeout) with what NCCL was about, Error(internal) with NCCL's text.
  static std::shared_ptr<Communicator> create(std::shared_ptr<const NcclApi> api,
                                              const NcclUniqueId& id, int rank, int size,
                                              std::optional<int> max_ctas, const std::string& who,
                                              const Check& check, Clock::time_point deadline);
  // All ranks of this one call it; nullptr where color is kNcclNoColor.
  std::shared_ptr<Communicator> split(int color, int key, std::optional<int> max_ctas,
                                      const std::string& who, const Check& check,
                                      Clock::time_point deadline);
  // All ranks but `excluded` call it, with the same list. hangs: some operation may never end.
  // Errors: Error(invalid_argument) where the library cannot.
  std::shared_ptr<Communicator> shrink(std::vector<int> excluded, bool hangs,
                                       std::optional<int> max_ctas, const std::string& who,
                                       Clock::time_point deadline);
  ~Communicator();

  const NcclApi& api() const { return *api_; }

  // One call, or several as one NCCL group; returns when NCCL has taken it.
  // what: the operation, for messages.
  using Calls = std::function<NcclResult(NcclComm*)>;
  void run(const std::string& what, const Check& check, Clock::time_point deadline,
           const Calls& calls);

  Status status();  // what NCCL says of its background work; ok() also while that goes on
  void revoke();    // ends this rank's operations where the library can, else aborts
  void abort();     // and frees; what hangs on the device ends. Never blocks on other ranks
  void finish(Clock::time_point deadline);  // waits for other ranks to finish too, then frees

 private:
  Communicator(std::shared_ptr<const NcclApi> api, NcclComm* comm, std::string who)
      : api_(std::move(api)), who_(std::move(who)), comm_(comm) {}
  std::shared_ptr<Communicator> derive(
      const char* what, std::optional<int> max_ctas, const std::string& who, bool without_child,
      bool parent_is_broken, const Check& check, Clock::time_point deadline,
      const std::function<NcclResult(NcclComm*, NcclComm**, void*)>& call);
  Status result(NcclResult result, const std::string& what) const;
  void settle(const std::string& what, const Check& check, Clock::time_point deadline);

  const std::shared_ptr<const NcclApi> api_;
  const std::string who_;
  std::mutex mutex_;  // held for one call of NCCL at a time
  NcclComm* comm_;    // nullptr once freed
  std::atomic<bool> revoked_{false};
  std::vector<std::shared_ptr<std::atomic<NcclComm*>>> children_;  // what NCCL may still write
};

}  // namespace pycomm::cuda
