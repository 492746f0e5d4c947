// What a CudaEngine's ranks of one host map of each other: the peer kernel's buffers, and memory
// for callers.
#include <algorithm>
#include <thread>

#include "cuda/engine.h"

namespace pycomm::cuda {
namespace {

constexpr auto kLeave = std::chrono::milliseconds(500);

}  // namespace

// What the ranks tell each other under the keys of one purpose.
SymmetricMemory::Exchange CudaEngine::exchange_for(const std::string& purpose,
                                                   Clock::time_point deadline) {
  return [this, purpose, deadline](const std::string& name, const std::string& mine) {
    std::vector<std::string> keys;
    for (int rank = 0; rank < size_; ++rank)
      keys.push_back(purpose + "/" + name + "/" + std::to_string(rank));
    options_.store->set(keys[static_cast<size_t>(rank_)], mine);
    return await(keys, deadline);
  };
}

// What runs the launch instead of NCCL; nullptr where that has it. All ranks answer alike, and set
// it up with the first launch that can use it. REQUIRES: mutex_ is held; the ranks have met.
Peers* CudaEngine::peers_for(const Launch& launch, Device::Stream stream) {
  if (spans_hosts_ || size_ == 1 || size_ > kMaxPeers ||
      launch.input_nbytes > options_.peer_nbytes || !Peers::has(launch) ||
      device_.capturing(stream))  // a graph's launches have one epoch
    return nullptr;
  if (!peers_asked_) {
    peers_asked_ = true;
    const auto capacity = static_cast<int64_t>((options_.peer_nbytes + 15) / 16 * 16);
    std::string why;  // NCCL does what they would: no error
    peers_ = Peers::create(options_.device, rank_, size_, capacity,
                           exchange_for("peers", launch.deadline), &why);
    peers_in_use_ = peers_.get();
  }
  return peers_ != nullptr && peers_->takes(launch) ? peers_.get() : nullptr;
}

std::shared_ptr<SymmetricMemory> CudaEngine::share(int64_t nbytes,
                                                   const std::shared_ptr<SymmetricMemory>& instead,
                                                   Clock::time_point deadline, std::string* why) {
  const std::lock_guard lock(mutex_);
  require_sound();
  if (spans_hosts_)
    throw Error(Code::invalid_argument,
                me_ +
                    ": the group's ranks are on several hosts, and only those of one can map "
                    "each other's memory; make a group of each host's");
  meet(deadline);
  try {
    const auto exchange = exchange_for("memory " + std::to_string(n_shared_++), deadline);
    if (instead != nullptr) {
      instead->leave();
      (void)exchange("left", "");
      instead->give_back();
      std::erase(shared_, instead);
    }
    std::shared_ptr<SymmetricMemory> made =
        SymmetricMemory::create(options_.device, rank_, size_, nbytes, exchange, "", why);
    if (made != nullptr) shared_.push_back(made);
    return made;
  } catch (const Error& error) {
    const Status status{error.code(), named(error.what())};
    watch_->fail(status);
    throw Error(status);
  }
}

// Unmaps what is the others', and waits a little until they have unmapped what is this rank's.
// REQUIRES: mutex_ is held; nothing is under way.
void CudaEngine::leave_shared() {
  if (peers_ == nullptr && shared_.empty()) return;
  if (peers_ != nullptr && !peers_->leave()) return;
  for (const auto& memory : shared_) memory->leave();
  const auto until = Clock::now() + kLeave;
  try {
    options_.store->set("shared/left/" + std::to_string(rank_), "");
    for (int rank = 0; rank < size_; ++rank)
      while (!options_.store->peek("shared/left/" + std::to_string(rank))) {
        if (Clock::now() > until) return;
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
      }
    if (peers_ != nullptr) peers_->all_have_left();
    for (const auto& memory : shared_) memory->all_have_left();
  } catch (const Error&) {  // the store is gone: the memory stays
  }
}

}  // namespace pycomm::cuda
