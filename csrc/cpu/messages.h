// Messages: point-to-point over each pair's message lane. Sends to a peer leave in order; a receive
// takes the first message of its tag. A message nobody has asked for waits in the channel, and is
// set aside in memory only while a receive of another tag wants what comes behind it. Of a message
// to a rank of this host that is better taken from where it lies only the offer goes over the lane,
// and the send completes when that is received (rendezvous.h): a large one out of the heap, or
// larger than the ring, or whose receive is posted already. Thread safety: none; the engine's lock
// guards it.
#pragma once

#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cpu/channel.h"
#include "cpu/op.h"
#include "cpu/rendezvous.h"

namespace pycomm::cpu {

class Messages {
 public:
  using ChannelOf = std::function<Channel&(int peer)>;
  using Finish = std::function<void(const std::shared_ptr<MessageOp>&, Status)>;
  Messages(int n_ranks, int rank, ChannelOf channel_of, Finish finish);
  // `peer` is a rank of this host: large messages from the heap go through it from now on. Both
  // sides must say so.
  void use_rendezvous(int peer, Rendezvous& rendezvous);
  void send(std::shared_ptr<MessageOp> op);
  void recv(std::shared_ptr<MessageOp> op);
  bool idle() const { return n_open_ == 0; }
  // Moves what will move; true if anything did. Throws what channels throw.
  bool advance();
  // Ends every operation whose deadline passed. One that had not begun ends alone; true with
  // *broken set where a stream was cut in the middle, which breaks the group.
  bool expire(Clock::time_point now, Status* broken);
  void fail_all(const Status& why);
  std::vector<int> blocked_on() const;  // ranks that a send or a receive names
  bool waits_for_any() const;
  bool gone(int peer) const { return peers_[static_cast<size_t>(peer)].gone; }
  Clock::time_point waiting_since()
      const;  // the oldest operation's start; max() where there is none

 private:
  struct Header {
    uint64_t magic;
    int64_t tag;
    uint64_t nbytes;
    uint64_t use;  // of a transfer record, 0: the bytes follow
    Place place;   // known where the receiver is on this host and the message is large
    uint32_t slot;
    uint32_t probed;  // 1: lines are written whose price tells which way is the faster
  };
  struct SetAside {
    int64_t tag;
    std::vector<std::byte> data;
    Transit transit;  // with use != 0: an offer, and no data
    uint64_t nbytes() const { return transit.use != 0 ? transit.nbytes : data.size(); }
  };
  struct Moving {  // accepted, or offered
    std::shared_ptr<MessageOp> op;
    Transit transit;
  };
  struct Peer {
    std::deque<std::shared_ptr<MessageOp>> sends;
    Header out{};
    size_t out_bytes = 0;  // of the header of sends.front()
    Header in{};
    size_t in_bytes = 0;  // of the incoming header
    bool gone = false;    // its connection ended while only receives from any rank wanted it
    bool chosen = false;  // where the payload goes is decided: target, or else aside
    std::shared_ptr<MessageOp> target;
    SetAside aside;
    uint64_t payload = 0;
    bool timed = false;  // its way over the ring, since then
    Clock::time_point in_since{};
    std::list<SetAside> waiting;
    Rendezvous* rendezvous = nullptr;
    Transit offer;  // of sends.front(), while its header is on its way
    std::list<Moving> sending, receiving;
  };
  bool advance_rendezvous(Peer& state);
  // Ends a receive with what was set aside or offered. False where that was withdrawn.
  bool take(const std::shared_ptr<MessageOp>& op, int source, const SetAside& aside);
  static uint64_t segment_bytes(const Peer& state);  // of an ordinary message, moved at once
  bool advance_send(int peer, Peer& state);
  bool advance_recv(int peer, Peer& state);
  bool wanted(int peer) const;  // a receive would take a message of this rank
  bool asked(int peer) const;   // a receive names it
  std::shared_ptr<MessageOp> match(int peer, int64_t tag);
  void deliver(const std::shared_ptr<MessageOp>& op, int source, uint64_t sent_nbytes);
  void end(const std::shared_ptr<MessageOp>& op, Status status);
  std::string describe(const MessageOp& op) const;

  const int rank_;
  const ChannelOf channel_of_;
  const Finish finish_;
  std::vector<Peer> peers_;
  std::list<std::shared_ptr<MessageOp>> receives_;  // posted and not yet matched, oldest first
  size_t n_open_ = 0;
};

}  // namespace pycomm::cpu
