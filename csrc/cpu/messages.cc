#include "cpu/messages.h"

#include <algorithm>
#include <cstring>

#include "cpu/copy.h"

namespace pycomm::cpu {
namespace {
constexpr uint64_t kMagic = 0x70636f6d6d6d7367ull;
constexpr uint64_t kSegmentBytes = 64 * 1024;
constexpr uint64_t kLocalSegmentBytes = 16 * 1024;  // one is read while the next is written
constexpr uint64_t kTogether = 464;                 // with its header, eight lines
constexpr uint64_t kBudget = 2 << 20;  // bytes moved before the engine's lock is let go
}  // namespace

Messages::Messages(int n_ranks, int rank, ChannelOf channel_of, Finish finish)
    : rank_(rank),
      channel_of_(std::move(channel_of)),
      finish_(std::move(finish)),
      peers_(static_cast<size_t>(n_ranks)) {}

void Messages::use_rendezvous(int peer, Rendezvous& rendezvous) {
  peers_[static_cast<size_t>(peer)].rendezvous = &rendezvous;
}

std::string Messages::describe(const MessageOp& op) const {
  return std::string(op.is_send ? "send to " : "recv from ") +
         (op.peer < 0 ? "any rank" : "rank " + std::to_string(op.peer)) + " (tag " +
         std::to_string(op.tag) + ", " + std::to_string(op.nbytes) + " bytes) of rank " +
         std::to_string(rank_);
}

void Messages::end(const std::shared_ptr<MessageOp>& op, Status status) {
  --n_open_;
  finish_(op, std::move(status));
}

void Messages::send(std::shared_ptr<MessageOp> op) {
  ++n_open_;
  Peer& state = peers_[static_cast<size_t>(op->peer)];
  if (state.rendezvous != nullptr) op->nth = state.rendezvous->count_send(op->peer, op->tag);
  state.sends.push_back(std::move(op));
}

void Messages::recv(std::shared_ptr<MessageOp> op) {
  ++n_open_;
  const auto take_from = [&](int peer) {
    auto& waiting = peers_[static_cast<size_t>(peer)].waiting;
    for (auto at = waiting.begin(); at != waiting.end();) {
      if (at->tag != op->tag) {
        ++at;
        continue;
      }
      const SetAside aside = std::move(*at);
      at = waiting.erase(at);
      if (take(op, peer, aside)) return true;
    }
    return false;
  };
  if (op->peer >= 0) {
    Peer& state = peers_[static_cast<size_t>(op->peer)];
    if (state.rendezvous != nullptr) state.rendezvous->count_receive(op->peer, op->tag);
    if (take_from(op->peer)) return;
  } else {
    for (int peer = 0; peer < static_cast<int>(peers_.size()); ++peer)
      if (take_from(peer)) return;
  }
  receives_.push_back(std::move(op));
}

bool Messages::take(const std::shared_ptr<MessageOp>& op, int source, const SetAside& aside) {
  const bool fits = aside.nbytes() == op->nbytes;
  if (aside.transit.use != 0) {
    Peer& state = peers_[static_cast<size_t>(source)];
    if (!state.rendezvous->accept(aside.transit, fits ? op->data : nullptr)) return false;
    if (fits) {
      op->source = source;
      state.receiving.push_back({op, aside.transit});
      state.receiving.back().transit.here = op->data;
      state.receiving.back().transit.accepted = Clock::now();
      return true;
    }
  } else if (fits && op->nbytes > 0) {
    std::memcpy(op->data, aside.data.data(), op->nbytes);
  }
  deliver(op, source, aside.nbytes());
  return true;
}

void Messages::deliver(const std::shared_ptr<MessageOp>& op, int source, uint64_t sent_nbytes) {
  op->source = source;
  Status status;
  if (sent_nbytes != op->nbytes)
    status = {Code::invalid_argument, describe(*op) + ": rank " + std::to_string(source) +
                                          " sent " + std::to_string(sent_nbytes) +
                                          " bytes. Both sides must give tensors of one size."};
  end(op, std::move(status));
}

bool Messages::wanted(int peer) const {
  return std::any_of(receives_.begin(), receives_.end(),
                     [peer](const auto& op) { return op->peer == peer || op->peer < 0; });
}

std::shared_ptr<MessageOp> Messages::match(int peer, int64_t tag) {
  const auto found = std::find_if(receives_.begin(), receives_.end(), [&](const auto& op) {
    return op->tag == tag && (op->peer == peer || op->peer < 0);
  });
  if (found == receives_.end()) return nullptr;
  auto op = *found;
  receives_.erase(found);
  op->source = peer;
  return op;
}

uint64_t Messages::segment_bytes(const Peer& state) {
  return state.rendezvous != nullptr ? kLocalSegmentBytes : kSegmentBytes;
}

bool Messages::advance_send(int peer, Peer& state) {
  Channel& channel = channel_of_(peer);
  bool moved = false;
  uint64_t spent = 0;
  while (!state.sends.empty()) {
    const auto op = state.sends.front();
    bool offers = state.out.use != 0;
    if (state.out_bytes == 0) {
      state.out = {kMagic, op->tag, op->nbytes, 0, {}, 0, 0};
      offers = false;
      if (state.rendezvous != nullptr && op->nbytes >= Ways::kLeast) {
        state.out.place = state.rendezvous->place(op->data);
        state.out.probed = state.rendezvous->writes_probe(op->nbytes);
        offers = state.rendezvous->offers(peer, state.out.place, op->nbytes, op->tag, op->nth);
      }
      if (offers) {
        const auto offer = state.rendezvous->offer(peer, op->data, op->nbytes);
        if (!offer) break;  // a message before it has to arrive first
        state.offer = *offer;
        state.out.use = offer->use;
        state.out.slot = offer->slot;
      }
    }
    if (state.out_bytes == 0 && !offers && op->moved == 0 && op->nbytes <= kTogether) {
      std::byte both[sizeof(Header) + kTogether];  // so that the peer sees it all at once
      std::memcpy(both, &state.out, sizeof(Header));
      if (op->nbytes > 0) std::memcpy(both + sizeof(Header), op->data, op->nbytes);
      const size_t n = channel.write(both, sizeof(Header) + op->nbytes);
      state.out_bytes = std::min(n, sizeof(Header));
      op->moved = n - state.out_bytes;
      moved |= n > 0;
      if (state.out_bytes < sizeof(Header)) break;
    }
    if (state.out_bytes < sizeof(Header)) {
      const size_t n =
          channel.write(reinterpret_cast<const std::byte*>(&state.out) + state.out_bytes,
                        sizeof(Header) - state.out_bytes);
      state.out_bytes += n;
      moved |= n > 0;
      if (state.out_bytes == 0 && offers) state.rendezvous->unmake(state.offer);
      if (state.out_bytes < sizeof(Header)) break;
    }
    if (offers) {
      channel.align_write();
      state.out_bytes = 0;
      state.sending.push_back({op, state.offer});
      state.sends.pop_front();
      continue;
    }
    if (op->moved < op->nbytes) {
      const uint64_t segment =
          state.rendezvous != nullptr ? kLocalSegmentBytes : channel.segment_nbytes();
      const size_t n =
          channel.write(op->data + op->moved, std::min(op->nbytes - op->moved, segment));
      op->moved += n;
      spent += n;
      moved |= n > 0;
      if (n == 0 || spent > kBudget) break;
    }
    if (op->moved == op->nbytes) {
      channel.flush();
      if (!channel.flushed()) break;
      channel.align_write();
      state.out_bytes = 0;
      state.sends.pop_front();
      end(op, {});
      moved = true;
    }
  }
  channel.flush();
  return moved;
}

bool Messages::advance_recv(int peer, Peer& state) {
  Channel& channel = channel_of_(peer);
  bool moved = false;
  uint64_t spent = 0;
  for (;;) {
    if (state.in_bytes < sizeof(Header)) {
      if (state.in_bytes == 0 && !wanted(peer)) break;  // what nobody asks for waits in the channel
      size_t n = 0;
      try {
        n = channel.read(reinterpret_cast<std::byte*>(&state.in) + state.in_bytes,
                         sizeof(Header) - state.in_bytes);
      } catch (const Error& error) {
        if (error.code() != Code::peer_lost || state.in_bytes > 0 || asked(peer)) throw;
        state.gone = true;  // a receive from any rank goes on with the others
        break;
      }
      state.in_bytes += n;
      moved |= n > 0;
      if (state.in_bytes < sizeof(Header)) break;
      if (state.in.magic != kMagic)
        throw Error(Code::internal, "rank " + std::to_string(peer) + "'s messages are out of step");
      if (state.in.probed != 0) state.rendezvous->read_probe(peer);
    }
    if (state.in.use != 0) {
      if (!wanted(peer)) break;
      SetAside aside{
          state.in.tag,
          {},
          {peer, state.in.slot, state.in.use, state.in.nbytes, nullptr, state.in.place, false, {}}};
      channel.align_read();
      state.in_bytes = 0;
      moved = true;
      const auto target = match(peer, aside.tag);
      if (!target)
        state.waiting.push_back(std::move(aside));
      else if (!take(target, peer, aside))
        receives_.push_front(target);  // withdrawn: the next of its tag is for it
      continue;
    }
    if (!state.chosen) {
      state.target = match(peer, state.in.tag);
      if (!state.target && !wanted(peer)) break;
      state.chosen = true;
      state.payload = 0;
      // A message of another size than asked for is read past, so that the stream stays whole.
      if (!state.target || state.target->nbytes != state.in.nbytes) {
        state.aside.tag = state.in.tag;
        state.aside.data.resize(state.in.nbytes);
      }
    }
    if (state.payload < state.in.nbytes) {
      const bool direct = state.target && state.target->nbytes == state.in.nbytes;
      std::byte* to = direct ? state.target->data : state.aside.data.data();
      const size_t left = std::min(state.in.nbytes - state.payload, segment_bytes(state));
      size_t n = 0;
      if (state.rendezvous != nullptr) {
        const auto here = channel.readable();
        n = std::min(here.size(), left);
        if (n > 0 && state.payload == 0) {
          // Whatever lay here as a whole was written before anybody watched the clock.
          state.timed = state.in.nbytes >= Ways::kLeast &&
                        (state.in.place.in_heap || here.size() < state.in.nbytes);
          if (state.timed) state.in_since = Clock::now();
        }
        // Most likely the host's others send as much.
        copy(to + state.payload, here.data(), n,
             exceeds_cache(2 * peers_.size() * state.in.nbytes));
        if (n > 0) channel.consume(n);
      } else {
        n = channel.read(to + state.payload, left);
      }
      state.payload += n;
      spent += n;
      moved |= n > 0;
      if (n == 0 || spent > kBudget) break;
    }
    if (state.payload == state.in.nbytes) {
      if (std::exchange(state.timed, false))
        state.rendezvous->came_over_ring(peer, state.in.place, state.in.nbytes, state.in_since);
      channel.align_read();
      const auto target = std::exchange(state.target, nullptr);
      SetAside aside = std::exchange(state.aside, {});
      state.chosen = false;
      state.in_bytes = 0;
      if (target)
        deliver(target, peer, state.in.nbytes);
      else if (const auto late = match(peer, aside.tag))  // asked for while it was being set aside
        take(late, peer, aside);
      else
        state.waiting.push_back(std::move(aside));
      moved = true;
    }
  }
  channel.flush();
  return moved;
}

bool Messages::advance_rendezvous(Peer& state) {
  bool moved = false;
  const auto drive = [&](std::list<Moving>& list, auto advance) {
    for (auto at = list.begin(); at != list.end();) {
      if (!(state.rendezvous->*advance)(at->transit, &moved)) {
        ++at;
        continue;
      }
      const auto op = std::move(at->op);
      at = list.erase(at);
      end(op, {});
    }
  };
  drive(state.sending, &Rendezvous::advance_send);
  drive(state.receiving, &Rendezvous::advance_recv);
  return moved;
}

bool Messages::advance() {
  if (n_open_ == 0) return false;
  bool moved = false;
  for (int peer = 0; peer < static_cast<int>(peers_.size()); ++peer) {
    if (peer == rank_) continue;
    Peer& state = peers_[static_cast<size_t>(peer)];
    if (!state.sends.empty()) moved |= advance_send(peer, state);
    if (state.in_bytes > 0 || (state.gone ? asked(peer) : wanted(peer)))
      moved |= advance_recv(peer, state);
    if (!state.sending.empty() || !state.receiving.empty()) moved |= advance_rendezvous(state);
  }
  return moved;
}

bool Messages::expire(Clock::time_point now, Status* broken) {
  const auto late = [&](const MessageOp& op) { return now >= op.deadline; };
  const auto complaint = [&](const MessageOp& op) {
    const double waited = std::chrono::duration<double>(now - op.submitted).count();
    return Status{Code::timeout, describe(op) + " waited " + std::to_string(waited).substr(0, 6) +
                                     " s for its peer. Is the other side's call missing, or its "
                                     "tag another? Else raise the timeout."};
  };
  for (auto at = receives_.begin(); at != receives_.end();) {
    const auto op = *at;
    if (!late(*op)) {
      ++at;
      continue;
    }
    at = receives_.erase(at);
    if (op->peer >= 0) {
      Peer& state = peers_[static_cast<size_t>(op->peer)];
      if (state.rendezvous != nullptr) state.rendezvous->uncount_receive(op->peer, op->tag);
    }
    end(op, complaint(*op));
  }
  for (Peer& state : peers_) {
    const MessageOp* cut = state.target && late(*state.target) ? state.target.get() : nullptr;
    if (!state.sends.empty() && state.out_bytes > 0 && late(*state.sends.front()))
      cut = state.sends.front().get();
    for (auto at = state.sending.begin(); cut == nullptr && at != state.sending.end();) {
      const auto op = at->op;
      if (!late(*op)) {
        ++at;
      } else if (state.rendezvous->withdraw(at->transit)) {
        at = state.sending.erase(at);
        end(op, complaint(*op));
      } else {
        cut = op.get();
      }
    }
    for (const Moving& receive : state.receiving)
      if (cut == nullptr && late(*receive.op)) cut = receive.op.get();
    if (cut != nullptr) {
      *broken = complaint(*cut);
      return true;
    }
    for (auto at = state.sends.begin(); at != state.sends.end();) {
      const auto op = *at;
      if (!late(*op) || (state.out_bytes > 0 && at == state.sends.begin())) {
        ++at;
        continue;
      }
      at = state.sends.erase(at);
      end(op, complaint(*op));
    }
  }
  return false;
}

void Messages::fail_all(const Status& why) {
  for (const auto& op : std::exchange(receives_, {})) end(op, why);
  for (Peer& state : peers_) {
    for (const auto& op : std::exchange(state.sends, {})) end(op, why);
    if (state.target) end(std::exchange(state.target, nullptr), why);
    for (auto* list : {&state.sending, &state.receiving})
      for (const Moving& moving : std::exchange(*list, {})) end(moving.op, why);
  }
}

Clock::time_point Messages::waiting_since() const {
  auto since = Clock::time_point::max();
  for (const auto& op : receives_) since = std::min(since, op->submitted);
  for (const Peer& state : peers_) {
    if (!state.sends.empty()) since = std::min(since, state.sends.front()->submitted);
    if (state.target) since = std::min(since, state.target->submitted);
    for (const auto* list : {&state.sending, &state.receiving})
      for (const Moving& moving : *list) since = std::min(since, moving.op->submitted);
  }
  return since;
}

std::vector<int> Messages::blocked_on() const {
  std::vector<int> ranks;
  for (int peer = 0; peer < static_cast<int>(peers_.size()); ++peer) {
    const Peer& state = peers_[static_cast<size_t>(peer)];
    if (peer != rank_ && (!state.sends.empty() || state.target || !state.sending.empty() ||
                          !state.receiving.empty() || asked(peer)))
      ranks.push_back(peer);
  }
  return ranks;
}

bool Messages::asked(int peer) const {
  return std::any_of(receives_.begin(), receives_.end(),
                     [peer](const auto& op) { return op->peer == peer; });
}

bool Messages::waits_for_any() const { return asked(-1); }

}  // namespace pycomm::cpu
