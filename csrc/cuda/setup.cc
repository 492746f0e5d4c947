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

constexpr auto kSlice = std::chrono::milliseconds(250);  // of waiting, between looks for bad word

std::string encoded(const NcclUniqueId& id) { return {id.bytes, sizeof(id.bytes)}; }

NcclUniqueId decoded(const std::string& text) {
  NcclUniqueId id{};
  PYCOMM_CHECK(text.size() == sizeof(id.bytes), "a unique id has 128 bytes");
  std::memcpy(id.bytes, text.data(), sizeof(id.bytes));
  return id;
}

// The first NCCL with NCCL_MULTI_RANK_GPU_ENABLE.
constexpr int kManyRanksADevice = 23003;

// NCCL tells devices apart by their host and their place on its bus; this names the host.
std::string nccl_host() {
  const char* const told = std::getenv("NCCL_HOSTID");
  return told == nullptr || *told == '\0' ? "" : std::string("@") + told;
}

// What a rank tells the others of itself before NCCL hears of them.
struct Introduction {
  int version;            // 0: it has no NCCL
  std::string device_id;  // as NCCL knows it
  std::string device_name, no_nccl;
};

std::string encoded(const Introduction& rank) {
  return std::to_string(rank.version) + "\n" + rank.device_id + "\n" + rank.device_name + "\n" +
         rank.no_nccl;
}

Introduction introduction(const std::string& text) {
  const size_t first = text.find('\n'), second = text.find('\n', first + 1);
  PYCOMM_CHECK(second != std::string::npos, "a rank introduces itself in three lines or more");
  const size_t third = std::min(text.find('\n', second + 1), text.size());
  return {std::stoi(text.substr(0, first)), text.substr(first + 1, second - first - 1),
          text.substr(second + 1, third - second - 1),
          third < text.size() ? text.substr(third + 1) : ""};
}

}  // namespace

std::string CudaEngine::who(int rank) const {
  return "rank " + std::to_string(rank) + " (host " + options_.hosts[static_cast<size_t>(rank)] +
         ")";
}

// What is under the keys, once all are there; unless the group is broken meanwhile.
std::vector<std::string> CudaEngine::await(const std::vector<std::string>& keys,
                                           Clock::time_point deadline) {
  const auto began = Clock::now();
  InterruptCheck interrupted;
  for (;;) {
    const auto slice = std::min(left_until(deadline), kSlice);
    try {
      return options_.store->get_all(keys, slice);
    } catch (const Error& error) {
      if (error.code() != Code::timeout) throw;
      look_for_word();
      const auto now = Clock::now();
      interrupted(now);
      if (now < deadline) continue;
      std::string missing;
      for (const auto& key : keys)
        if (!options_.store->peek(key)) missing += (missing.empty() ? "'" : ", '") + key + "'";
      throw Error(Code::timeout,
                  me_ + ": set-up waited " +
                      std::to_string(std::chrono::duration<double>(now - began).count()) +
                      " s for " + missing +
                      " in the store: did every rank start, and call this, and does each reach the "
                      "store?");
    }
  }
}

// A communicator of these ranks of the group, who all call it with a key of theirs: the first makes
// the id, the store hands it on.
std::shared_ptr<Communicator> CudaEngine::join(const std::string& key,
                                               const std::vector<int>& ranks,
                                               const std::string& who,
                                               const Communicator::Check& check,
                                               Clock::time_point deadline) {
  if (options_.api == nullptr) throw Error(Code::invalid_argument, who + ": " + options_.no_nccl);
  const auto at = std::find(ranks.begin(), ranks.end(), rank_) - ranks.begin();
  NcclUniqueId id{};
  if (at == 0) {
    const NcclResult result = options_.api->get_unique_id(&id);
    const std::string failed = result == NcclResult::success
                                   ? ""
                                   : "ncclGetUniqueId: " + options_.api->describe(result, nullptr);
    options_.store->set(key, failed.empty() ? encoded(id) : "!" + failed);
    if (!failed.empty()) throw Error(Code::internal, who + ": " + failed);
  } else {
    const std::string told = await({key}, deadline)[0];
    if (told.starts_with('!') && told.size() != sizeof(id.bytes))
      throw Error(Code::internal, who + ": " + this->who(ranks[0]) + ": " + told.substr(1));
    id = decoded(told);
  }
  return Communicator::create(options_.api, id, static_cast<int>(at),
                              static_cast<int>(ranks.size()), options_.max_ctas, who, check,
                              deadline);
}

// Versions and devices: NCCL itself would hang, or fail without a name.
CudaEngine::Comparison CudaEngine::compare_ranks(Clock::time_point deadline) {
  options_.store->set(
      "rank/" + std::to_string(rank_),
      encoded(Introduction{options_.api == nullptr ? 0 : options_.api->version(),
                           device_.id() + nccl_host(), device_.name(), options_.no_nccl}));
  std::vector<std::string> keys;
  for (int rank = 0; rank < size_; ++rank) keys.push_back("rank/" + std::to_string(rank));
  std::vector<Introduction> ranks;
  for (const auto& text : await(keys, deadline)) ranks.push_back(introduction(text));

  Comparison found;
  const bool by_nccl = !spans_hosts_ || options_.between == Between::nccl;
  // What rules NCCL out: an error where it is needed, or nothing else would do.
  const auto object = [&](bool falls_back, bool inside, const std::string& text) {
    if (by_nccl || !falls_back) throw Error(Code::invalid_argument, me_ + ": " + text);
    if (found.no_nccl.empty()) found.no_nccl = text;
    found.inside = found.inside && !inside;
  };
  const auto of = [&](int rank) -> const Introduction& { return ranks[static_cast<size_t>(rank)]; };
  const auto together = [&](int a, int b) {
    return options_.hosts[static_cast<size_t>(a)] == options_.hosts[static_cast<size_t>(b)];
  };
  for (int rank = 0; rank < size_; ++rank)
    if (of(rank).version == 0) object(true, true, who(rank) + ": " + of(rank).no_nccl);
  // NCCL refuses a device that serves two ranks of a communicator, unless a newer one is told to.
  const char* const allowed = std::getenv("NCCL_MULTI_RANK_GPU_ENABLE");
  const bool may_share = allowed != nullptr && std::strcmp(allowed, "1") == 0;
  for (int rank = 0; rank < size_; ++rank)
    for (int other = 0; other < rank; ++other) {
      const bool inside = together(other, rank);
      if (of(rank).version != of(other).version && of(rank).version != 0 &&
          of(other).version != 0 && (options_.between != Between::tcp || inside))
        throw Error(
            Code::invalid_argument,
            me_ + ": " + who(other) + " has NCCL " + nccl_version_name(of(other).version) + ", " +
                who(rank) + " has NCCL " + nccl_version_name(of(rank).version) +
                "; all ranks need the same: install one nvidia-nccl wheel everywhere, or set "
                "PYCOMM_NCCL_LIB");
      if (!(may_share && of(rank).version >= kManyRanksADevice) &&
          of(rank).device_id == of(other).device_id)
        object(options_.between == Between::tcp || !inside, inside,
               who(other) + " and " + who(rank) + " use one device, " + of(rank).device_name +
                   "; NCCL " + nccl_version_name(of(rank).version) +
                   " takes one rank per device (2.30.3 and newer more, with "
                   "NCCL_MULTI_RANK_GPU_ENABLE=1 and NCCL_NVLS_ENABLE=0). Call "
                   "torch.cuda.set_device(local_rank) first");
    }
  return found;
}

// Once, by all ranks: those of one host over NCCL, of several hosts as options_.between says.
// REQUIRES: mutex_ is held.
void CudaEngine::meet(Clock::time_point deadline) {
  if (communicator_ != nullptr || courier_ != nullptr) return;
  try {
    const Comparison found = compare_ranks(deadline);
    std::vector<int> all;
    for (int rank = 0; rank < size_; ++rank) all.push_back(rank);
    if (!spans_hosts_)
      return set_communicator(join("id", all, me_, look_for_word_now_and_then(), deadline));
    std::string why = options_.between == Between::tcp ? "it is set" : found.no_nccl;
    std::shared_ptr<Communicator> made;
    if (why.empty()) why = try_nccl("id", all, me_, &made, deadline);
    if (why.empty()) return set_communicator(std::move(made));
    if (options_.between == Between::nccl)
      throw Error(Code::internal,
                  why +
                      ". Where NCCL cannot connect hosts, PYCOMM_CUDA_BETWEEN_HOSTS=auto or tcp "
                      "goes through the host instead.");
    go_through_host(why, found.inside, deadline);
  } catch (const Error& error) {
    const Status why{error.code(), named(error.what())};
    watch_->fail(why);
    throw Error(why);
  }
}

void CudaEngine::set_communicator(std::shared_ptr<Communicator> made) {
  const std::lock_guard lock(communicators_mutex_);
  communicator_ = std::move(made);
}

// REQUIRES: mutex_ is held. The two ranks of the pair meet; others need not be there.
CudaEngine::Pair& CudaEngine::pair(int peer, Clock::time_point deadline) {
  const auto found = pairs_.find(peer);
  if (found != pairs_.end()) return found->second;
  const std::vector<int> both{std::min(rank_, peer), std::max(rank_, peer)};
  const std::string key = "pair/" + std::to_string(both[0]) + "/" + std::to_string(both[1]);
  const std::string name = me_ + ", with " + who(peer);
  const bool far =
      options_.hosts[static_cast<size_t>(peer)] != options_.hosts[static_cast<size_t>(rank_)];
  const bool without = through_host_ && (courier_ ? inside_ == nullptr : options_.api == nullptr);
  try {
    Pair made{};
    std::string why = (far && through_host_) || without ? "the group does" : "";
    if (why.empty() && far && options_.between == Between::automatic)
      why = try_nccl(key, both, name, &made.communicator, deadline);
    else if (why.empty())
      made.communicator = join(key + "/id", both, name, look_for_word_now_and_then(), deadline);
    if (!why.empty()) {
      made.host = host_group(both, key);
      made.courier = new_courier();
    }
    made.stream = device_.new_stream();
    const std::lock_guard lock(communicators_mutex_);
    return pairs_.emplace(peer, std::move(made)).first->second;
  } catch (const Error& error) {
    const Error told(error.code(), me_ + ": first message with " + who(peer) + ": " + error.what());
    watch_->fail(told.status());
    throw told;
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
    meet(deadline);
    if (communicator_ == nullptr)
      throw Error(
          Code::invalid_argument,
          me_ + ": split: no communicator of NCCL's has all ranks; make a group of its own");
    auto part =
        communicator_->split(color, key, made ? made->options_.max_ctas : std::nullopt,
                             made ? made->me_ : me_, look_for_word_now_and_then(), deadline);
    if (made) made->set_communicator(std::move(part));
  } catch (const Error& error) {
    watch_->fail(error.status());
    throw;
  }
  return made;
}

std::shared_ptr<CudaEngine> CudaEngine::shrink(const std::vector<int>& excluded,
                                               EngineOptions options, Clock::time_point deadline) {
  if (options_.api == nullptr || through_host_)
    throw Error(Code::invalid_argument,
                me_ + ": shrink: " +
                    (options_.api == nullptr ? options_.no_nccl
                                             : "no communicator of NCCL's has all ranks") +
                    "; make a new group of the ranks that are left");
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
  {
    const std::lock_guard lock(communicators_mutex_);
    if (communicator_ == nullptr)
      throw Error(Code::invalid_argument, me_ + ": shrink: the group has not communicated yet");
  }
  const bool hangs = !broken().ok();
  watch_->fail({Code::closed, me_ + ": the group was shrunk; use the new one"});
  const std::lock_guard lock(mutex_);
  auto made = create(std::move(options));
  made->set_communicator(
      communicator_->shrink(excluded, hangs, made->options_.max_ctas, made->me_, deadline));
  return made;
}

}  // namespace pycomm::cuda
