// CpuEngine: collectives and messages on CPU memory for one rank of one group. Inside a host over
// the group's Segment, between hosts over TCP. Whoever waits drives: the caller in run() and
// wait(), the endpoint's progress thread for the rest. Thread safety: all public members. One lock
// guards queue, channels and interpreter; it is held for one round of progress at a time, never
// while waiting.
#pragma once

#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "core/engine.h"
#include "core/store.h"
#include "cpu/board.h"
#include "cpu/channel.h"
#include "cpu/endpoint.h"
#include "cpu/interpreter.h"
#include "cpu/large.h"
#include "cpu/messages.h"
#include "cpu/op.h"
#include "cpu/segment.h"
#include "cpu/store_word.h"
#include "cpu/waiter.h"

namespace pycomm::cpu {

class CpuEngine final : public Engine,
                        public Driven,
                        public std::enable_shared_from_this<CpuEngine> {
 public:
  // Collective over `ranks` (endpoint ranks, in group order), which all give the same `key`. Waits
  // for the host's first rank of the group, and for nobody else. store: the group's own, for word
  // of a group that broke; asked for when a group of several hosts needs it.
  // Errors: Error(timeout) naming a rank that does not make the group; Error(mismatch) where one
  // makes it of other ranks.
  using MakeStore = StoreWord::MakeStore;
  static std::shared_ptr<CpuEngine> create(std::shared_ptr<Endpoint> endpoint, MakeStore store,
                                           const std::string& name, const std::string& key,
                                           const std::vector<int>& ranks,
                                           std::chrono::milliseconds timeout);
  ~CpuEngine() override;

  uint64_t native_nbytes(Collective collective, bool even) const override;
  bool spans_hosts() const override { return !one_host_; }
  void run(Launch launch) override;
  std::shared_ptr<Work> start(Launch launch, std::shared_ptr<void> keep_alive) override;
  std::shared_ptr<Work> send(const void* data, uint64_t nbytes, int peer, int64_t tag,
                             Clock::time_point deadline, std::shared_ptr<void> keep_alive) override;
  std::shared_ptr<Work> recv(void* data, uint64_t nbytes, int peer, int64_t tag,
                             Clock::time_point deadline, std::shared_ptr<void> keep_alive) override;
  void run_send(const void* data, uint64_t nbytes, int peer, int64_t tag,
                Clock::time_point deadline) override;
  int run_recv(void* data, uint64_t nbytes, int peer, int64_t tag,
               Clock::time_point deadline) override;
  Stats stats() const override;
  uint64_t sequence() const override;
  Status broken() const override;
  void revoke(const Status& why) override;
  void close() override;

  // Blocks until op is done, or until `limit` has passed (Error(timeout), the op goes on).
  void wait_for(Op& op, std::chrono::milliseconds limit);
  void set_callback(Op& op, std::function<void()> callback);

  bool drive_background() override;
  bool has_background() override;
  void check_background() override;
  void add_waits(std::vector<pollfd>& sockets) override;

 private:
  CpuEngine(std::shared_ptr<Endpoint> endpoint, MakeStore store, std::string name,
            const std::string& key, std::vector<int> ranks);
  // engine_setup.cc, with create() and the constructor
  void share_segment(Clock::time_point deadline);
  void look_for_other_ranks();
  [[noreturn]] void refuse_other_ranks(const Mailbox::Letter& letter);

  void submit(std::shared_ptr<CollectiveOp> op);
  void submit(std::shared_ptr<MessageOp> op);
  int run_message(MessageOp& op);
  void run_to_end(Op& op, std::unique_lock<std::mutex> lock);
  std::shared_ptr<Work> submit_message(bool is_send, std::byte* data, uint64_t nbytes, int peer,
                                       int64_t tag, Clock::time_point deadline,
                                       std::shared_ptr<void> keep_alive);
  bool drive();  // one round under the lock; errors end in fail()
  bool advance_collectives();
  bool advance(const CollectiveOp& op, bool* moved);  // true when it is done
  void finish(Op& op, Status status);
  void run_callbacks();
  void require_sound() const;
  void note_caller();
  Channel& channel(int peer, Lane lane);
  bool local(int rank) const { return local_index_[static_cast<size_t>(rank)] >= 0; }
  Path path(const Launch& launch) const;  // which of them runs it

  // failure.cc
  void look();  // under the lock: word of a broken group, mismatches, deadlines, lost peers
  void look_for_mismatch();
  void look_for_lost_peers();
  void fail(Status why);
  Status word()
      const;  // why the group is broken, as another rank of this host says; ok() where none does
  Status settled_word() const;
  Status word_from_store(std::chrono::milliseconds patience);  // likewise any rank; with patience
                                                               // after a look at the store
  Status cause(Status why, const std::string& during = {});
  void publish(const Status& why);
  const CollectiveOp* late_collective(Clock::time_point now);
  void ask_about_remote_peers(Clock::time_point now, bool last);
  std::vector<int> blocked_on() const;
  void look_for_verdict();
  void look_for_standstill(const Op& op);
  std::string describe_front_wait(Clock::time_point now) const;

  const std::shared_ptr<Endpoint> endpoint_;
  std::optional<StoreWord> store_word_;  // where ranks stand on several hosts
  const std::string name_;
  const std::vector<int> ranks_;  // group rank -> endpoint rank
  int rank_ = 0;
  std::vector<int> local_index_;  // by group rank: index in the segment, -1 on other hosts
  std::vector<int> local_ranks_;  // by index in the segment: endpoint rank
  bool one_host_ = true;
  const uint64_t key_;  // tells this group's letters from others', by all that call it theirs
  const uint64_t id_;   // tells its connections from others'; its ranks are in it too
  Segment segment_;
  Board board_;
  Reach reach_;
  Large large_;

  mutable std::mutex mutex_;
  std::vector<std::unique_ptr<Channel>> channels_[kLanes];
  Interpreter interpreter_;
  Rendezvous rendezvous_;
  Messages messages_;
  std::deque<std::shared_ptr<CollectiveOp>> queue_;  // only the first one runs
  uint64_t sequence_ = 0;
  Status broken_;
  bool closed_ = false;
  Clock::time_point next_deadline_ =
      Clock::time_point::max();  // no collective in the queue ends before it
  Clock::time_point asked_store_{};
  size_t standstill_turn_ = 0;
  std::thread::id caller_;  // of the last collective or message
  uint64_t native_bytes_ = 0;
  uint64_t closed_bytes_inside_ = 0, closed_bytes_between_ = 0;  // of channels that are gone
  uint64_t n_ops_ = 0;
  int n_running_ = 0;
  Clock::time_point running_since_{};
  Clock::duration busy_{};
  std::vector<std::function<void()>> callbacks_;
  std::atomic<bool> has_callbacks_{false};
  std::atomic<int> in_callbacks_{0};  // threads that run some
  std::atomic<int> waiters_{0};       // callers that drive
  Patience patience_;                 // theirs
  std::atomic<int> background_{0};    // unfinished operations that no caller may be waiting for
};

}  // namespace pycomm::cpu
