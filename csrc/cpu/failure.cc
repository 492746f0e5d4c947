// How an engine fails. The slow look of whoever waits: word of a broken group, mismatches,
// deadlines, lost peers; and how the first rank to find one breaks the group for all.
#include "cpu/failure.h"

#include <sched.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "cpu/engine.h"

namespace pycomm::cpu {
namespace {

constexpr Clock::duration kAskStore = std::chrono::milliseconds(250);
constexpr Clock::duration kAskFirst =
    std::chrono::milliseconds(20);  // while no connection could bring word from a rank we need
constexpr auto kEcho =
    std::chrono::milliseconds(250);  // how much longer a rank waits whose peers wait as well

constexpr auto kMeant = std::chrono::seconds(
    5);  // a shorter deadline may be meant to pass: its caller then comes to the others

const std::string kBroken = "group/broken";

Status in_circle(const std::string& circle) {
  return {Code::mismatch, circle +
                              " (ranks of the job): none can go on. Every rank must make its "
                              "calls in the same order, across groups too; the group cannot "
                              "be used any more."};
}

}  // namespace

std::string seconds_text(Clock::duration duration) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f s", std::chrono::duration<double>(duration).count());
  return text;
}

void poison(SegmentHeader& header, const Status& why) {
  uint32_t sound = 0;
  if (!header.poisoned.compare_exchange_strong(sound, 1, std::memory_order_acq_rel)) return;
  header.code = static_cast<int32_t>(why.code);
  const size_t n = std::min(why.message.size(), sizeof(header.text) - 1);
  std::memcpy(header.text, why.message.data(), n);
  header.text[n] = '\0';
  header.poisoned.store(2, std::memory_order_release);
}

void CpuEngine::look() {
  if (!broken_.ok()) return;
  try {
    if (const Status why = word(); !why.ok()) throw Error(why);
    if (n_ops_ == 0) look_for_other_ranks();
    look_for_verdict();
    look_for_mismatch();
    const auto now = Clock::now();
    const CollectiveOp* late = late_collective(now);
    if (!one_host_) {
      ask_about_remote_peers(now, late != nullptr);
      if (!broken_.ok()) return;
    }
    Status cut;
    if (messages_.expire(now, &cut)) throw Error(cut);
    late = late_collective(now);
    if (late != nullptr) {
      const CollectiveOp* front = queue_.front().get();
      throw Error(Code::timeout,
                  late->launch.fingerprint.describe() +
                      (late == front ? "" : ", behind " + front->launch.fingerprint.describe()) +
                      ": " + describe_front_wait(now));
    }
    look_for_lost_peers();
  } catch (const Error& error) {
    fail(error.status());
  } catch (const std::exception& error) {
    fail({Code::internal, error.what()});
  }
}

// The first collective whose deadline has passed; it may stand behind one that has longer.
const CollectiveOp* CpuEngine::late_collective(Clock::time_point now) {
  if (now < next_deadline_) return nullptr;
  auto next = Clock::time_point::max();
  for (const auto& op : queue_) {
    // Where all our peers are in it, one of them waits for the rank that is missing: it is to name
    // it.
    const bool running =
        op == queue_.front() && op->state.load(std::memory_order_relaxed) == Op::running;
    const bool echo = running && op->path == Path::program && interpreter_.all_entered();
    if (now >= op->deadline + (echo ? kEcho : Clock::duration(0))) return op.get();
    next = std::min(next, op->deadline);
  }
  next_deadline_ = next;
  return nullptr;
}

// What shows only when asked for: ranks of other hosts that went, or broke the group, before a
// connection joined us.
void CpuEngine::ask_about_remote_peers(Clock::time_point now, bool last) {
  if (const Status why = word_from_store({}); !why.ok()) throw Error(why);
  std::vector<std::pair<int, Lane>> needed;
  for (const int peer : messages_.blocked_on()) needed.emplace_back(peer, kMessageLane);
  for (const int peer : blocked_on()) needed.emplace_back(peer, kCollectiveLane);
  std::erase_if(needed, [this](const auto& need) { return local(need.first); });
  const bool joined = std::all_of(needed.begin(), needed.end(), [this](const auto& need) {
    return channel(need.first, need.second).joined();
  });
  const auto since = std::min(queue_.empty() ? Clock::time_point::max() : queue_.front()->submitted,
                              messages_.waiting_since());
  // Once it waits, and then each time it has waited as long again.
  const auto first = joined ? kAskStore : kAskFirst;
  const auto waited = now - std::min(since, now);
  const bool due =
      waited >= first && now - asked_store_ >= std::clamp(waited / 2, first, kAskStore);
  if (!due && !last) return;
  asked_store_ = now;
  const auto left = [](int peer) { return "group/left/" + std::to_string(peer); };
  std::vector<std::string> keys{kBroken};
  for (const auto& [peer, lane] : needed) keys.push_back(left(peer));
  store_word_->look(keys, last ? kStorePatience : std::chrono::milliseconds(0));
  if (const Status why = word_from_store({}); !why.ok()) throw Error(why);
  for (const auto& [peer, lane] : needed) {
    try {
      channel(peer, lane).probe();
    } catch (const Error& error) {
      throw Error(cause(error.status()));
    }
    if (channel(peer, lane).joined() || !store_word_->found(left(peer))) continue;
    throw Error(
        cause({Code::peer_lost, "rank " + std::to_string(rank_) + " needs rank " +
                                    std::to_string(peer) + " (" + channel(peer, lane).describe() +
                                    "), which closed the group. See that rank's output for why; "
                                    "the others must form a new group."}));
  }
}

// Ranks that the first collective waits for.
std::vector<int> CpuEngine::blocked_on() const {
  if (queue_.empty()) return {};
  const Launch& launch = queue_.front()->launch;
  if (queue_.front()->state.load(std::memory_order_relaxed) != Op::running)
    return one_host_ ? board_.blocked_on() : std::vector<int>{};  // of those before it
  switch (queue_.front()->path) {
    case Path::board:
      return board_.blocked_on();
    case Path::large:
      return large_.blocked_on();
    case Path::program:
      break;
  }
  return interpreter_.blocked_on(launch);
}

std::string CpuEngine::describe_front_wait(Clock::time_point now) const {
  const CollectiveOp& op = *queue_.front();
  std::string text =
      "rank " + std::to_string(rank_) + " waited " + seconds_text(now - op.submitted) + " for ";
  const std::vector<int> blocked = blocked_on();
  if (op.launch.program != nullptr && op.state.load(std::memory_order_relaxed) == Op::running) {
    text += interpreter_.describe_wait(op.launch);
  } else {
    for (size_t i = 0; i < blocked.size(); ++i)
      text += (i > 0 ? ", rank " : "rank ") + std::to_string(blocked[i]);
    const bool entered = op.path == Path::large && large_.all_entered();
    text += blocked.size() == 1 ? ", which has" : ", which have";
    text += entered ? " not finished its part of this collective" : " not entered this collective";
  }
  for (const int peer : blocked) {
    if (!local(peer)) continue;
    Fingerprint last;
    const auto& entry = segment_.board(local_index_[static_cast<size_t>(peer)]);
    const uint64_t sequence = op.launch.fingerprint.sequence;
    if (sequence > 0 && read_announcement(entry, sequence - 1, &last))
      text += "; rank " + std::to_string(peer) + " was last seen in " + last.describe();
  }
  return text + ". Raise the timeout of the call, or find out what that rank is doing instead.";
}

void CpuEngine::look_for_mismatch() {
  if (queue_.empty() || queue_.front()->state.load(std::memory_order_relaxed) != Op::running)
    return;
  const Fingerprint& mine = queue_.front()->launch.fingerprint;
  for (int peer = 0; peer < static_cast<int>(ranks_.size()); ++peer) {
    if (peer == rank_) continue;
    Fingerprint theirs;
    if (local(peer)) {
      if (!read_announcement(segment_.board(local_index_[static_cast<size_t>(peer)]), mine.sequence,
                             &theirs))
        continue;
      if (!theirs.matches(mine)) throw Error(Code::mismatch, describe_mismatch(mine, theirs));
    } else if (queue_.front()->launch.program == nullptr || !interpreter_.talks_to(peer)) {
      // Nothing may come from a rank this collective has no link with: a hello there belongs to
      // another call.
      if (channels_[kCollectiveLane][static_cast<size_t>(peer)] == nullptr && peer > rank_)
        continue;
      std::span<const std::byte> here;
      try {
        here = channel(peer, kCollectiveLane).readable(sizeof(Fingerprint));
      } catch (const Error& error) {
        if (error.code() == Code::peer_lost)
          continue;  // not needed now; whoever needs it will say so
        throw;
      }
      if (here.size() < sizeof(theirs)) continue;
      std::memcpy(&theirs, here.data(), sizeof(theirs));
      if (theirs.magic == Fingerprint::kMagic && theirs.sequence <= mine.sequence)
        throw Error(Code::mismatch, describe_mismatch(mine, theirs));
    }
  }
}

// Whether another rank has found a circle that this one's wait is in.
void CpuEngine::look_for_verdict() {
  if (queue_.empty()) return;
  if (const std::string circle = endpoint_->standstill().verdict(); !circle.empty())
    throw Error(in_circle(circle));
}

// Ranks that wait for each other in different groups. Called by the thread that waits for op,
// without the lock: alone() may need Python's.
void CpuEngine::look_for_standstill(const Op& op) {
  Standstill& standstill = endpoint_->standstill();
  const bool only_thread = alone == nullptr || alone();
  std::unique_lock lock(mutex_);
  // Other work may be what the others wait for; and a caller with a near deadline may mean to go
  // on.
  const auto now = Clock::now();
  const bool stands = only_thread && broken_.ok() && messages_.idle() && queue_.size() == 1 &&
                      queue_.front().get() == &op &&
                      op.state.load(std::memory_order_relaxed) == Op::running &&
                      op.deadline - now >= kMeant && endpoint_->progress().idle();
  if (!stands) return standstill.leave();
  const Fingerprint& mine = queue_.front()->launch.fingerprint;
  if (!standstill.enter(mine.describe() + " of group '" + name_ + "'")) return;
  auto blocked = blocked_on();
  std::erase_if(blocked, [this](int peer) { return !local(peer); });
  // One that stands still too; of several each in turn, for whoever follows these words.
  if (!blocked.empty())
    std::rotate(blocked.begin(),
                blocked.begin() + static_cast<long>(standstill_turn_++ % blocked.size()),
                blocked.end());
  const bool known = std::any_of(blocked.begin(), blocked.end(), [&](int peer) {
    return standstill.wait_for(endpoint_->place(ranks_[static_cast<size_t>(peer)]), [&] {
      const auto still = blocked_on();
      return std::find(still.begin(), still.end(), peer) != still.end() &&
             !may_have_entered(segment_.board(local_index_[static_cast<size_t>(peer)]),
                               mine.sequence);
    });
  });
  if (const std::string circle = known ? standstill.look() : ""; !circle.empty())
    fail(in_circle(circle));
  if (has_callbacks_.load(std::memory_order_relaxed)) standstill.leave();
  lock.unlock();
  run_callbacks();
}

void CpuEngine::look_for_lost_peers() {
  auto blocked = messages_.blocked_on();
  const auto more = blocked_on();
  blocked.insert(blocked.end(), more.begin(), more.end());
  const auto ended = [this](int peer) {
    return endpoint_->ended(ranks_[static_cast<size_t>(peer)]);
  };
  const auto left = [this](int peer) {
    return segment_.board(local_index_[static_cast<size_t>(peer)])
               .closed.load(std::memory_order_acquire) != 0;
  };
  const auto gone = [&](int peer) {
    return peer == rank_ || (local(peer) ? ended(peer) || left(peer) : messages_.gone(peer));
  };
  if (messages_.waits_for_any()) {
    int peer = 0;
    while (peer < static_cast<int>(ranks_.size()) && gone(peer)) ++peer;
    if (peer == static_cast<int>(ranks_.size()) && !drive())
      throw Error(Code::peer_lost, "rank " + std::to_string(rank_) +
                                       " waits for a message from any rank, and all others have "
                                       "ended or closed the group");
  }
  for (const int peer : blocked) {
    if (!local(peer) || !gone(peer)) continue;  // another host's: its connection tells
    if (drive()) return;                        // what it sent before it went may be all we need
    // It may have gone because the group broke: then it said why before.
    if (segment_.header().poisoned.load(std::memory_order_acquire) != 0)
      throw Error(settled_word());
    look_for_verdict();
    const std::string what =
        !queue_.empty() ? queue_.front()->launch.fingerprint.describe() : "a message";
    throw Error(Code::peer_lost,
                what + ": rank " + std::to_string(rank_) + " needs rank " + std::to_string(peer) +
                    " (" + endpoint_->whereabouts(ranks_[static_cast<size_t>(peer)]) + "), " +
                    (ended(peer) ? "whose process ended" : "which closed the group") +
                    ". See that rank's output for why; the others must form a new group.");
  }
}

// Why the group broke, of which `why` may be the echo: a link that breaks is often what another
// rank knows better.
Status CpuEngine::cause(Status why, const std::string& during) {
  if (why.code != Code::peer_lost) return why;
  Status reason;
  for (const auto until = Clock::now() + kGrace; reason.ok() && Clock::now() < until;) {
    reason = word();
    ::sched_yield();
  }
  if (reason.ok()) reason = word_from_store(kWordPatience);
  if (!reason.ok()) return reason;
  if (!during.empty()) why.message = during + ": " + why.message;
  return why;
}

void CpuEngine::fail(Status why) {
  if (!broken_.ok()) return;
  const std::string prefix = "group '" + name_ + "': ";
  if (why.message.rfind("group '", 0) != 0) why.message = prefix + why.message;
  publish(why);
  // Only in a group of one host do ranks write into each other's memory.
  if (const int writer = one_host_ ? reach_.retire(kRetire) : -1; writer >= 0)
    why.message +=
        " Rank " + std::to_string(writer) +
        " stands still in the middle of writing into this rank's tensors: what they hold "
        "may still change.";
  broken_ = why;
  for (auto& lane : channels_)
    for (auto& channel : lane)
      if (channel) channel->poison(why);
  endpoint_->ring_others(local_ranks_);
  for (const auto& op : std::exchange(queue_, {})) finish(*op, why);
  messages_.fail_all(why);
}

// The first rank of a host to find out tells the others, and the store, for ranks that no
// connection can tell: those whose link is to break must find it there. Then word goes over every
// connection that can carry it.
void CpuEngine::publish(const Status& why) {
  poison(segment_.header(), why);
  if (one_host_) return;
  bool all_hear = true;
  for (const auto& lane : channels_)
    for (const auto& channel : lane) all_hear &= !channel || channel->can_say_why();
  store_word_->set_first(kBroken, std::to_string(static_cast<int>(why.code)) + " " + why.message,
                         all_hear ? kStorePatience : kWordPatience);
}

Status CpuEngine::word() const {
  const SegmentHeader& header = segment_.header();
  if (header.poisoned.load(std::memory_order_acquire) != 2) return {};
  return {static_cast<Code>(header.code),
          std::string(header.text, strnlen(header.text, sizeof(header.text)))};
}

// word(), where it is known that a rank has begun to say it. One that is killed over it never ends.
Status CpuEngine::settled_word() const {
  Status why = word();
  for (const auto until = Clock::now() + kGrace; why.ok() && Clock::now() < until; why = word())
    ::sched_yield();
  if (why.ok())
    why = {Code::peer_lost,
           "a rank of this host ended while it told the others why the group broke"};
  return why;
}

Status CpuEngine::word_from_store(std::chrono::milliseconds patience) {
  if (one_host_) return {};
  if (patience.count() > 0) store_word_->look({kBroken}, patience);
  const auto text = store_word_->found(kBroken);
  if (!text) return {};
  return {static_cast<Code>(std::atoi(text->c_str())), text->substr(text->find(' ') + 1)};
}

void CpuEngine::revoke(const Status& why) {
  {
    std::lock_guard lock(mutex_);
    fail(why);
  }
  run_callbacks();
}

}  // namespace pycomm::cpu
