// What joins hosts. NCCL is tried, and all ranks hear of all, so that they agree; where it fails on
// one, groups of host memory take its place between hosts, and NCCL has what is inside them. That
// must work there: what fails inside a host is an error.
#include <algorithm>

#include "cuda/engine.h"

namespace pycomm::cuda {
namespace {

// For NCCL to join hosts, of the time that there is: it may never say that it cannot.
constexpr auto kLongest = std::chrono::seconds(120);

Clock::time_point half_way_to(Clock::time_point deadline) {
  const auto now = Clock::now();
  return now + std::min<Clock::duration>((deadline - now) / 2, kLongest);
}

}  // namespace

// A communicator of these ranks, or why one of them has none: the same on all of them.
std::string CudaEngine::try_nccl(const std::string& key, const std::vector<int>& ranks,
                                 const std::string& who, std::shared_ptr<Communicator>* made,
                                 Clock::time_point deadline) {
  const auto key_of = [&](int rank) { return key + "/met/" + std::to_string(rank); };
  const std::string one_failed = key + "/failed";
  const auto check = [&] {
    look_for_word();
    if (const auto text = options_.store->peek(one_failed)) throw Error(Code::internal, *text);
  };
  std::string mine;
  try {
    *made = join(key + "/id", ranks, who, check, half_way_to(deadline));
  } catch (const Error& error) {
    look_for_word();
    mine = error.what();
    if (!options_.store->peek(one_failed)) options_.store->set(one_failed, mine);
  }
  options_.store->set(key_of(rank_), mine);
  std::vector<std::string> keys;
  for (const int rank : ranks) keys.push_back(key_of(rank));
  for (const std::string& why : await(keys, deadline))
    if (!why.empty()) {
      made->reset();
      return options_.store->peek(one_failed).value_or(why);
    }
  return "";
}

// By rank of a host, hosts in the order of their first ranks.
std::vector<std::vector<int>> CudaEngine::ranks_by_host() const {
  std::vector<std::string> hosts;
  std::vector<std::vector<int>> ranks;
  for (int rank = 0; rank < size_; ++rank) {
    const std::string& host = options_.hosts[static_cast<size_t>(rank)];
    const auto at = std::find(hosts.begin(), hosts.end(), host) - hosts.begin();
    if (at == static_cast<std::ptrdiff_t>(hosts.size())) {
      hosts.push_back(host);
      ranks.emplace_back();
    }
    ranks[static_cast<size_t>(at)].push_back(rank);
  }
  return ranks;
}

std::shared_ptr<Group> CudaEngine::host_group(const std::vector<int>& ranks,
                                              const std::string& name) {
  if (options_.host_group == nullptr)
    throw Error(Code::invalid_argument, me_ + ": this group has no way through the host");
  auto made = options_.host_group(ranks, name);
  const std::lock_guard lock(communicators_mutex_);
  return host_groups_.emplace_back(std::move(made));
}

std::shared_ptr<Courier> CudaEngine::new_courier() {
  return std::make_shared<Courier>(
      options_.device, [this](const Status& why) { watch_->fail({why.code, named(why.message)}); });
}

// inside: whether NCCL can be asked to join the ranks of each host.
void CudaEngine::go_through_host(const std::string& why, bool inside, Clock::time_point deadline) {
  const auto hosts = ranks_by_host();
  const auto& own = *std::find_if(hosts.begin(), hosts.end(), [&](const auto& ranks) {
    return std::find(ranks.begin(), ranks.end(), rank_) != ranks.end();
  });
  std::shared_ptr<Communicator> joined;
  if (inside && own.size() > 1)
    joined = join("inside/" + std::to_string(own[0]) + "/id", own, me_ + ", inside its host",
                  look_for_word_now_and_then(), deadline);
  // Only once all hosts have that.
  std::vector<std::string> ready;
  for (int rank = 0; rank < size_; ++rank) ready.push_back("inside/met/" + std::to_string(rank));
  options_.store->set(ready[static_cast<size_t>(rank_)], "");
  (void)await(ready, deadline);
  std::vector<int> all;
  for (int rank = 0; rank < size_; ++rank) all.push_back(rank);
  auto everyone = host_group(all, "all");
  std::shared_ptr<Group> across;
  std::vector<int> rail;
  if (inside && hosts[0].size() > 1 &&
      std::all_of(hosts.begin(), hosts.end(),
                  [&](const auto& ranks) { return ranks.size() == hosts[0].size(); })) {
    const auto place = std::find(own.begin(), own.end(), rank_) - own.begin();
    for (const auto& ranks : hosts) rail.push_back(ranks[static_cast<size_t>(place)]);
    across = host_group(rail, "across/" + std::to_string(place));
  }
  auto courier = new_courier();
  {
    const std::lock_guard lock(communicators_mutex_);
    inside_ = std::move(joined);
    everyone_ = std::move(everyone);
    across_ = std::move(across);
    rail_ = std::move(rail);
    courier_ = std::move(courier);
  }
  if (!through_host_.exchange(true) && options_.through_host) options_.through_host(why);
}

}  // namespace pycomm::cuda
