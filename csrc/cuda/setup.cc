// How a CudaEngine's ranks meet: communicators, and what is compared before there is one.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "cuda/engine.h"

namespace pycomm::cuda {
namespace {

std::chrono::milliseconds left_until(Clock::time_point deadline) {
  return std::max(std::chrono::milliseconds(1),
                  std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()));
}

std::string encoded(const NcclUniqueId& id) { return {id.bytes, sizeof(id.bytes)}; }

NcclUniqueId decoded(const std::string& text) {
  NcclUniqueId id{};
  PYCOMM_CHECK(text.size() == sizeof(id.bytes), "a unique id has 128 bytes");
  std::memcpy(id.bytes, text.data(), sizeof(id.bytes));
  return id;
}

// What a rank tells the others of itself before NCCL hears of them.
struct Introduction {
  int version;
  std::string device_id, device_name;
};

std::string encoded(const Introduction& rank) {
  return std::to_string(rank.version) + "\n" + rank.device_id + "\n" + rank.device_name;
}

Introduction introduction(const std::string& text) {
  const size_t first = text.find('\n'), second = text.find('\n', first + 1);
  PYCOMM_CHECK(second != std::string::npos, "a rank introduces itself in three lines");
  return {std::stoi(text.substr(0, first)), text.substr(first + 1, second - first - 1),
          text.substr(second + 1)};
}

}  // namespace

std::string CudaEngine::who(int rank) const {
  return "rank " + std::to_string(rank) + " (host " + options_.hosts[static_cast<size_t>(rank)] +
         ")";
}

// The same id on all ranks that ask for this key: one makes it, the store hands it on.
NcclUniqueId CudaEngine::exchange_id(const std::string& key, bool creates,
                                     Clock::time_point deadline) {
  if (creates) {
    NcclUniqueId id{};
    const NcclResult result = options_.api->get_unique_id(&id);
    if (result != NcclResult::success)
      throw Error(Code::internal,
                  me_ + ": ncclGetUniqueId: " + options_.api->describe(result, nullptr));
    options_.store->set(key, encoded(id));
    return id;
  }
  return decoded(options_.store->get_all({key}, left_until(deadline))[0]);
}

// Versions and devices: NCCL itself would hang, or fail without a name.
void CudaEngine::compare_ranks(Clock::time_point deadline) {
  options_.store->set("rank/" + std::to_string(rank_),
                      encoded(Introduction{options_.api->version(), device_.id(), device_.name()}));
  std::vector<std::string> keys;
  for (int rank = 0; rank < size_; ++rank) keys.push_back("rank/" + std::to_string(rank));
  std::vector<Introduction> ranks;
  for (const auto& text : options_.store->get_all(keys, left_until(deadline)))
    ranks.push_back(introduction(text));
  for (int rank = 1; rank < size_; ++rank)
    if (const int version = ranks[static_cast<size_t>(rank)].version; version != ranks[0].version)
      throw Error(Code::invalid_argument,
                  me_ + ": " + who(0) + " has NCCL " + nccl_version_name(ranks[0].version) + ", " +
                      who(rank) + " has NCCL " + nccl_version_name(version) +
                      "; all ranks need the same: install one nvidia-nccl wheel everywhere, or set "
                      "PYCOMM_NCCL_LIB");
  // NCCL refuses a device that serves two ranks of a communicator, unless a newer one is told to.
  if (const char* allowed = std::getenv("NCCL_MULTI_RANK_GPU_ENABLE");
      allowed != nullptr && std::strcmp(allowed, "1") == 0)
    return;
  for (int rank = 0; rank < size_; ++rank)
    for (int other = 0; other < rank; ++other)
      if (ranks[static_cast<size_t>(rank)].device_id == ranks[static_cast<size_t>(other)].device_id)
        throw Error(
            Code::invalid_argument,
            me_ + ": " + who(other) + " and " + who(rank) + " use one device, " +
                ranks[static_cast<size_t>(rank)].device_name + "; NCCL " +
                nccl_version_name(ranks[0].version) +
                " takes one rank per device (newer versions more, with "
                "NCCL_MULTI_RANK_GPU_ENABLE=1). Call torch.cuda.set_device(local_rank) first");
}

// REQUIRES: mutex_ is held.
std::shared_ptr<Communicator> CudaEngine::communicator(Clock::time_point deadline) {
  if (communicator_ == nullptr) {
    try {
      compare_ranks(deadline);
      const NcclUniqueId id = exchange_id("id", rank_ == 0, deadline);
      set_communicator(Communicator::create(options_.api, id, rank_, size_, me_, deadline));
    } catch (const Error& error) {
      const std::string remedy =
          spans_hosts_ && error.code() != Code::invalid_argument
              ? " Where NCCL cannot connect hosts, PYCOMM_CUDA_BETWEEN_HOSTS=tcp goes through the "
                "host instead."
              : "";
      const Error told(error.code(), error.what() + remedy);
      watch_->fail(told.status());
      throw told;
    }
  }
  return communicator_;
}

void CudaEngine::set_communicator(std::shared_ptr<Communicator> made) {
  const std::lock_guard lock(communicators_mutex_);
  communicator_ = std::move(made);
}

// REQUIRES: mutex_ is held. The two ranks of the pair meet; others need not be there.
CudaEngine::Pair& CudaEngine::pair(int peer, Clock::time_point deadline) {
  const auto found = pairs_.find(peer);
  if (found != pairs_.end()) return found->second;
  const int low = std::min(rank_, peer), high = std::max(rank_, peer);
  try {
    const NcclUniqueId id = exchange_id(
        "pair/" + std::to_string(low) + "/" + std::to_string(high) + "/id", rank_ == low, deadline);
    auto made = Communicator::create(options_.api, id, rank_ == low ? 0 : 1, 2,
                                     me_ + ", with " + who(peer), deadline);
    const auto stream = device_.new_stream();
    const std::lock_guard lock(communicators_mutex_);
    return pairs_.emplace(peer, Pair{std::move(made), stream}).first->second;
  } catch (const Error& error) {
    const Error named(error.code(),
                      me_ + ": first message with " + who(peer) + ": " + error.what());
    watch_->fail(named.status());
    throw named;
  }
}

std::shared_ptr<CudaEngine> CudaEngine::split(int color, int key, const std::vector<int>& ranks,
                                              EngineOptions options, Clock::time_point deadline) {
  const std::lock_guard lock(mutex_);
  require_sound();
  std::shared_ptr<CudaEngine> made;
  options.hosts.clear();
  for (const int rank : ranks) options.hosts.push_back(options_.hosts[static_cast<size_t>(rank)]);
  if (color != kNcclNoColor) {
    options.rank = static_cast<int>(std::find(ranks.begin(), ranks.end(), rank_) - ranks.begin());
    made = create(std::move(options));
  }
  try {
    auto part = communicator(deadline)->split(color, key, made ? made->me_ : me_, deadline);
    if (made) made->set_communicator(std::move(part));
  } catch (const Error& error) {
    watch_->fail(error.status());
    throw;
  }
  return made;
}

std::shared_ptr<CudaEngine> CudaEngine::shrink(const std::vector<int>& excluded,
                                               EngineOptions options, Clock::time_point deadline) {
  if (options_.api->comm_shrink == nullptr)
    throw Error(Code::invalid_argument,
                me_ + ": NCCL " + nccl_version_name(options_.api->version()) +
                    " cannot shrink a communicator (2.27 and newer can); make a new group of the "
                    "ranks that are left");
  if (std::find(excluded.begin(), excluded.end(), rank_) != excluded.end())
    throw Error(Code::invalid_argument, me_ + ": shrink: a rank cannot exclude itself");
  options.hosts.clear();
  options.rank = 0;
  for (int rank = 0; rank < size_; ++rank) {
    if (std::find(excluded.begin(), excluded.end(), rank) != excluded.end()) continue;
    if (rank == rank_) options.rank = static_cast<int>(options.hosts.size());
    options.hosts.push_back(options_.hosts[static_cast<size_t>(rank)]);
  }
  const bool hangs = !broken().ok();
  watch_->fail({Code::closed, me_ + ": the group was shrunk; use the new one"});
  const std::lock_guard lock(mutex_);
  if (communicator_ == nullptr)
    throw Error(Code::invalid_argument, me_ + ": shrink: the group has not communicated yet");
  auto made = create(std::move(options));
  made->set_communicator(communicator_->shrink(excluded, hangs, made->me_, deadline));
  return made;
}

}  // namespace pycomm::cuda
