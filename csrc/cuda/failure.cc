// How a CudaEngine finds that something is wrong, tells the other ranks, and ends. Ranks whose
// operation takes a while say in the store which it is; so two that called different things find
// out, and who is past a deadline can say who is not there.
#include "cuda/engine.h"

namespace pycomm::cuda {
namespace {

constexpr auto kLeave = std::chrono::seconds(2);  // for what a courier is in the middle of

std::string word_of(const Operation& operation) {
  return std::to_string(operation.sequence) + "\n" + operation.what;
}

std::string at_key(int rank) { return "at/" + std::to_string(rank); }

}  // namespace

void CudaEngine::require_sound() const {
  if (const Status why = broken(); !why.ok())
    throw Error(Code::closed, me_ + ": the group cannot be used any more: " + why.message);
  if (closed_) throw Error(Code::closed, me_ + ": the group is closed");
}

// `text`, beginning with who says it.
std::string CudaEngine::named(const std::string& text) const {
  return text.starts_with("group '") ? text : me_ + ": " + text;
}

// What NCCL says of its background work.
Status CudaEngine::look() {
  std::vector<std::shared_ptr<Communicator>> all;
  {
    const std::lock_guard lock(communicators_mutex_);
    if (communicator_) all.push_back(communicator_);
    for (const auto& [peer, pair] : pairs_)
      if (pair.communicator) all.push_back(pair.communicator);
    for (const auto& [partition, layer] : layers_)
      if (layer.communicator) all.push_back(layer.communicator);
  }
  for (const auto& communicator : all)
    if (const Status status = communicator->status(); !status.ok()) return status;
  return {};
}

// Throws what another rank broke the group with.
void CudaEngine::look_for_word() const {
  const auto broken = options_.store->peek("broken");
  if (!broken) return;
  const size_t end = broken->find('\n');
  PYCOMM_CHECK(end != std::string::npos, "a code, and the text");
  throw Error(static_cast<Code>(std::stoi(broken->substr(0, end))), broken->substr(end + 1));
}

// Throws that, or that another rank is in another collective.
void CudaEngine::look_at_others(const Operation& operation) {
  look_for_word();
  if (operation.peer >= 0) return;  // its two ranks need not be in step with others
  const std::string mine = word_of(operation);
  {
    const std::lock_guard lock(words_mutex_);
    if (own_word_ != mine) options_.store->set(at_key(rank_), own_word_ = mine);
  }
  if (operation.what.starts_with("together")) return;  // ranks have messages of their own in it
  for (int rank = 0; rank < size_; ++rank) {
    if (rank == rank_) continue;
    const auto theirs = options_.store->peek(at_key(rank));
    if (!theirs || *theirs == mine) continue;
    const size_t end = theirs->find('\n');
    if (theirs->substr(0, end) != std::to_string(operation.sequence)) continue;
    if (theirs->compare(end + 1, 8, "together") == 0) continue;
    throw Error(Code::mismatch, me_ + ": collective mismatch: rank " + std::to_string(rank_) +
                                    " called " + operation.what + ", " + who(rank) + " called " +
                                    theirs->substr(end + 1) +
                                    ". Every rank must make the same calls in the same order; the "
                                    "group cannot be used any more.");
  }
}

Status CudaEngine::too_late(const Operation& operation) {
  std::string others;
  if (operation.peer >= 0) {
    others = who(operation.peer) + " has not " +
             (operation.what.starts_with("send") ? "received" : "sent") + " it";
  } else {
    try {
      for (int rank = 0; rank < size_; ++rank) {
        if (rank == rank_) continue;
        const auto word = options_.store->peek(at_key(rank));
        if (word && *word == word_of(operation)) continue;  // waits in it as well
        others += (others.empty() ? "" : ", ") + who(rank);
        others += word ? " last waited in " + word->substr(word->find('\n') + 1)
                       : " has not said that it waits in it";
      }
    } catch (const Error& error) {
      others = std::string("the store does not answer (") + error.what() + ")";
    }
    if (others.empty()) others = "all ranks wait in it: a link or a device does not move";
  }
  return {Code::timeout, me_ + ": " + operation.what + " is not done at its deadline: " + others +
                             ". Its device operations were aborted, and the group cannot be used "
                             "any more. NCCL_DEBUG=INFO shows what NCCL did."};
}

// Called once, by the watch.
void CudaEngine::end_all(const Status& why) {
  if (why.code != Code::closed) tell(*options_.store, why);
  std::shared_ptr<Communicator> of_group;
  std::vector<std::shared_ptr<Communicator>> others;
  std::vector<std::shared_ptr<Group>> groups;
  {
    const std::lock_guard lock(communicators_mutex_);
    of_group = communicator_;
    groups = host_groups_;
    if (inside_) others.push_back(inside_);
    for (const auto& [peer, pair] : pairs_)
      if (pair.communicator) others.push_back(pair.communicator);
    for (const auto& [partition, layer] : layers_)
      if (layer.communicator) others.push_back(layer.communicator);
  }
  if (Peers* peers = peers_in_use_; peers != nullptr) peers->end();
  for (const auto& group : groups) group->engine().revoke(why);
  if (of_group) of_group->revoke();  // a new one may be made from it
  for (const auto& communicator : others) communicator->abort();
  for (const auto& courier : couriers()) courier->end(kLeave);
}

void CudaEngine::tell(Store& store, const Status& why) {
  try {
    if (!store.peek("broken"))
      store.set("broken", std::to_string(static_cast<int>(why.code)) + "\n" + why.message);
  } catch (const Error&) {  // without a store the others have their deadlines
  }
}

}  // namespace pycomm::cuda
