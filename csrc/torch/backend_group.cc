// What PycommBackend does with the group as a whole: the monitored barrier, groups made from it,
// its state and its end.
#include <algorithm>
#include <limits>

#include "torch/backend.h"
#include "torch/blocking.h"
#include "torch/tensors.h"

namespace pycomm::torch_layer {
namespace {

using Milliseconds = std::chrono::milliseconds;
constexpr auto kForever = Milliseconds(std::chrono::hours(24 * 365));
constexpr int64_t kMonitorTag =
    std::numeric_limits<int64_t>::min() + 1;  // no user's tag: c10d's are 32-bit
constexpr auto kSettle = Milliseconds(50);    // for what users hung on futures
constexpr auto kEcho = Milliseconds(250);

}  // namespace

// Rank 0 hears from every rank, then answers each: a rank that is missing can be named. The words
// of its errors are Gloo's, which programs look for.
void PycommBackend::monitoredBarrier(const c10d::BarrierOptions& opts, bool wait_all_ranks) {
  const auto timeout = limit_of(opts.timeout).value_or(group_->timeout());
  const std::string where = "monitored_barrier in group '" + group_->name() + "': ",
                    limit = std::to_string(timeout.count()) + " ms";
  const InterruptScope interruptible(check_signals, is_only_thread);
  uint8_t token = 0;
  if (getRank() != 0) {
    try {
      group_->run_send(&token, 1, 0, kMonitorTag, timeout);
      // Rank 0 may have entered later, and knows who is missing.
      group_->run_recv(&token, 1, 0, kMonitorTag, timeout + kEcho);
    } catch (const Error& error) {
      throw Error(error.code(), where + "Rank " + std::to_string(getRank()) +
                                    " successfully reached monitoredBarrier, but received errors "
                                    "while waiting for send/recv from rank 0: " +
                                    error.what());
    }
    return;
  }
  std::vector<uint8_t> tokens(static_cast<size_t>(getSize()));
  std::vector<std::shared_ptr<pycomm::Work>> arrivals(1);
  for (int rank = 1; rank < getSize(); ++rank)
    arrivals.push_back(
        group_->recv(&tokens[static_cast<size_t>(rank)], 1, rank, kMonitorTag, timeout, nullptr));
  std::vector<int> missing;
  for (int rank = 1; rank < getSize(); ++rank) {
    try {
      arrivals[static_cast<size_t>(rank)]->wait(kForever);
    } catch (const Error& error) {
      missing.push_back(rank);
      if (!wait_all_ranks) break;
    }
  }
  if (!missing.empty()) {
    std::string ranks;
    for (const int rank : missing) ranks += (ranks.empty() ? "" : ", ") + std::to_string(rank);
    const Status why{Code::timeout,
                     where + (missing.size() > 1 || wait_all_ranks ? "Ranks " : "Rank ") + ranks +
                         " failed to pass monitoredBarrier in " + limit +
                         (timeout.count() > 0 ? "" : " (Rank 0 timed out in monitoredBarrier)")};
    group_->engine().revoke(why);
    throw Error(why);
  }
  for (int rank = 1; rank < getSize(); ++rank)
    group_->run_send(&token, 1, rank, kMonitorTag, timeout);
}

c10::intrusive_ptr<c10d::Backend::Options> PycommBackend::getBackendOptions() {
  auto options = c10::make_intrusive<Options>("pycomm", group_->timeout());
  options->group_name = group_->name();
  return options;
}

bool PycommBackend::made_already(const std::string& name, BackendPtr* made) {
  if (name.empty() || name != last_made_name_) return false;
  last_made_name_.clear();
  *made = last_made_.lock();
  return *made != nullptr || last_made_none_;  // else it is gone, and this is another of its name
}

PycommBackend::BackendPtr PycommBackend::remember(const std::string& name, BackendPtr made) {
  last_made_name_ = name;
  last_made_none_ = made == nullptr;
  last_made_ = c10::weak_intrusive_ptr<c10d::Backend>(made);
  return made;
}

PycommBackend::BackendPtr PycommBackend::split(const StorePtr& store, const std::vector<int>& ranks,
                                               const c10::intrusive_ptr<Options>& opts) {
  const std::string name = opts ? "split " + opts->group_name : "";
  if (BackendPtr made; made_already(name, &made)) return made;
  const auto side = device_side();
  if (std::find(ranks.begin(), ranks.end(), getRank()) == ranks.end()) {
    if (side) (void)side->split(device_options_, ranks, nullptr);  // NCCL wants all ranks
    return remember(name, nullptr);
  }
  Makers makers = makers_;
  makers.split = [whole = makers_.split, ranks](const StorePtr& of, const std::vector<int>& some,
                                                const std::string& called) {
    std::vector<int> mapped;
    for (const int rank : some) mapped.push_back(ranks[static_cast<size_t>(rank)]);
    return whole(of, mapped, called);
  };
  DeviceSide::Options options = device_options_;
  options.part = makers.split;
  options.store = store;
  options.planner = device_options_.planner.select(ranks);
  options.hosts.clear();
  for (const int rank : ranks)
    options.hosts.push_back(device_options_.hosts[static_cast<size_t>(rank)]);
  auto group = makers_.split(store, ranks, opts ? opts->group_name : "split");
  if (opts) group->set_timeout(opts->timeout);
  auto made =
      c10::make_intrusive<PycommBackend>(group, endpoint_, std::move(options), std::move(makers));
  if (side) made->device_side_ = side->split(made->device_options_, ranks, group.get());
  return remember(name, std::move(made));
}

PycommBackend::BackendPtr PycommBackend::merge(const StorePtr& store,
                                               const c10::intrusive_ptr<Options>& opts,
                                               const int& rank, const int& size) {
  const std::string name = opts ? "merge " + opts->group_name : "";
  if (BackendPtr made; made_already(name, &made)) return made;
  const auto timeout = opts ? opts->timeout : group_->timeout();
  return remember(name, makers_.merge(store, rank, size, opts ? opts->group_name : "merged",
                                      std::chrono::duration<double>(timeout).count()));
}

uint64_t PycommBackend::getSequenceNumberForGroup() {
  const auto side = device_side();
  return group_->engine().sequence() + (side ? side->group().engine().sequence() : 0);
}

void PycommBackend::setTimeout(std::chrono::milliseconds timeout) {
  group_->set_timeout(timeout);
  if (const auto side = device_side()) side->group().set_timeout(timeout);
}

c10d::ErrorType PycommBackend::getError() {
  Status broken = group_->engine().broken();
  if (const auto side = device_side(); side && broken.ok())
    broken = side->group().engine().broken();
  switch (broken.code) {
    case Code::ok:
      return c10d::ErrorType::SUCCESS;
    case Code::timeout:
      return c10d::ErrorType::TIMEOUT;
    case Code::peer_lost:
      return c10d::ErrorType::REMOTE_ERROR;
    default:
      return c10d::ErrorType::COMM_ERROR;
  }
}

at::Tensor PycommBackend::allocateTensor(long numel, at::TensorOptions options) {
  if (!options.device().is_cpu())
    refuse("allocate_tensor", "allocates on cpu, not on " + options.device().str());
  return empty_in_peer_memory(endpoint_, {numel}, c10::typeMetaToScalarType(options.dtype()));
}

void PycommBackend::abort() {
  const Status why{Code::closed, "rank " + std::to_string(getRank()) + " called abort()"};
  if (const auto side = device_side()) side->group().engine().revoke(why);
  group_->engine().revoke(why);
}

void PycommBackend::shutdown() {
  if (const auto side = device_side()) side->group().engine().close();
  group_->engine().close();
  future_threads_->settle(kSettle);
}

}  // namespace pycomm::torch_layer
