// How a CpuEngine comes to be: the host's ranks of the group meet over its segment.
#include <algorithm>

#include "cpu/engine.h"
#include "cpu/failure.h"
#include "cpu/shared_memory.h"

namespace pycomm::cpu {
namespace {

std::string list_of(const std::vector<int>& ranks) {
  std::string text = "[";
  for (size_t i = 0; i < ranks.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(ranks[i]);
  return text + "]";
}

}  // namespace

CpuEngine::CpuEngine(std::shared_ptr<Endpoint> endpoint, MakeStore store, std::string name,
                     const std::string& key, std::vector<int> ranks)
    : endpoint_(std::move(endpoint)),
      name_(std::move(name)),
      ranks_(std::move(ranks)),
      rank_(static_cast<int>(std::find(ranks_.begin(), ranks_.end(), endpoint_->rank()) -
                             ranks_.begin())),
      key_(endpoint_->agree(key)),
      id_(endpoint_->keyed(std::to_string(key_) + list_of(ranks_))),
      segment_(static_cast<int>(
          std::count_if(ranks_.begin(), ranks_.end(), [&](int r) { return endpoint_->local(r); }))),
      board_(segment_, *endpoint_, ranks_, rank_),
      reach_(segment_, *endpoint_, ranks_, rank_),
      large_(segment_, board_, reach_, *endpoint_, ranks_, rank_),
      rendezvous_(segment_, reach_, *endpoint_, ranks_, local_index_, rank_),
      messages_(
          static_cast<int>(ranks_.size()), rank_,
          [this](int peer) -> Channel& { return channel(peer, kMessageLane); },
          [this](const std::shared_ptr<MessageOp>& op, Status status) {
            finish(*op, std::move(status));
          }) {
  for (const int rank : ranks_) {
    const bool here = endpoint_->local(rank);
    local_index_.push_back(here ? static_cast<int>(local_ranks_.size()) : -1);
    if (here) local_ranks_.push_back(rank);
  }
  one_host_ = local_ranks_.size() == ranks_.size();
  if (!one_host_) store_word_.emplace(std::move(store));
  for (auto& lane : channels_) lane.resize(ranks_.size());
}

std::shared_ptr<CpuEngine> CpuEngine::create(std::shared_ptr<Endpoint> endpoint, MakeStore store,
                                             const std::string& name, const std::string& key,
                                             const std::vector<int>& ranks,
                                             std::chrono::milliseconds timeout) {
  PYCOMM_CHECK(std::find(ranks.begin(), ranks.end(), endpoint->rank()) != ranks.end(),
               "this rank is not in the group");
  std::shared_ptr<CpuEngine> self(
      new CpuEngine(std::move(endpoint), std::move(store), name, key, ranks));
  self->share_segment(Clock::now() + timeout);
  if (self->one_host_)
    for (int peer = 0; peer < static_cast<int>(ranks.size()); ++peer)
      self->messages_.use_rendezvous(peer, self->rendezvous_);
  return self;
}

// The host's first rank of the group makes the segment and hands it to the others.
void CpuEngine::share_segment(Clock::time_point deadline) {
  const size_t nbytes = segment_.nbytes();
  const int leader = local_ranks_[0], me = endpoint_->rank();
  if (local_ranks_.size() == 1) return segment_.attach(map_own(nbytes));
  Mailbox& mailbox = endpoint_->mailbox();
  if (me == leader) {
    const SharedMemory memory = make_shared_memory("pycomm-group", nbytes);
    segment_.attach(map_shared(memory.fd.get(), nbytes));
    for (const int rank : local_ranks_)
      if (rank != me)
        mailbox.send(endpoint_->member(rank).mailbox, key_, me,
                     std::to_string(id_) + " " + list_of(ranks_), {memory.fd.get()}, deadline);
    look_for_other_ranks();
    return;
  }
  const auto letter = mailbox.take(key_, -1, deadline);
  if (!letter)
    throw Error(Code::timeout, "group '" + name_ + "': rank " + std::to_string(me) +
                                   " waits for rank " + std::to_string(leader) + " (" +
                                   endpoint_->whereabouts(leader) +
                                   ") to make the group; does that rank call this too, in the same "
                                   "order, and is it running?");
  PYCOMM_CHECK(letter->fds.size() == 1, "a group has one segment per host");
  if (letter->text.rfind(std::to_string(id_) + " ", 0) != 0) refuse_other_ranks(*letter);
  segment_.attach(map_shared(letter->fds[0].get(), nbytes));
}

// A rank of this host may have taken this rank into a group of the same key and other ranks.
void CpuEngine::look_for_other_ranks() {
  if (local_ranks_.size() == 1) return;
  if (const auto letter = endpoint_->mailbox().take(key_, -1, Clock::time_point{}))
    refuse_other_ranks(*letter);
}

// Breaks the group that the letter hands over, as seen by those who are in it. Throws.
void CpuEngine::refuse_other_ranks(const Mailbox::Letter& letter) {
  const Status why{
      Code::mismatch,
      "group '" + name_ + "': rank " + std::to_string(endpoint_->rank()) + " makes it of " +
          list_of(ranks_) + ", rank " + std::to_string(letter.from) + " of " +
          letter.text.substr(letter.text.find(' ') + 1) +
          " (ranks of the job). Every rank must make the same groups in the same order."};
  if (letter.fds.size() == 1) {
    const Mapping theirs = map_shared(letter.fds[0].get(), sizeof(SegmentHeader));
    poison(*reinterpret_cast<SegmentHeader*>(theirs.data()), why);
  }
  throw Error(why);
}

}  // namespace pycomm::cpu
