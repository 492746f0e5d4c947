// Endpoint: one rank's place in a job: who the other ranks are, which share its host, how to wake
// them, how to see them end, and where other hosts connect. Made once with the first group;
// sub-groups share it. Thread safety: all members.
#pragma once

#include <poll.h>

#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/engine.h"
#include "core/siphash.h"
#include "core/store.h"
#include "cpu/mailbox.h"
#include "cpu/peer_memory.h"
#include "cpu/posix.h"
#include "cpu/progress.h"
#include "cpu/standstill.h"
#include "cpu/tcp_listener.h"

namespace pycomm::cpu {

struct Member {
  std::string host;     // ranks with the same host share memory
  std::string label;    // what it was given as, or the machine's name
  std::string machine;  // boot id and network namespace: what must be equal for sharing to work
  std::string boot_id;  // ranks with the same one share cores
  std::string pid_namespace;
  int pid = 0;
  std::string addresses;   // where its TcpListener listens, packed
  std::string mailbox;     // address of its Mailbox
  uint64_t file_size = 0;  // its limit on file sizes, and so on shared memory
  std::string refused;     // why it shares no memory, and stands as a host of its own; or empty
};

struct EndpointOptions {
  std::string host_id;  // label of an emulated host; empty: the machine and its network namespace
  std::string address = "127.0.0.1";  // of this host, one per NIC; see TcpListener
  std::chrono::milliseconds timeout{30000};
};

class Endpoint {
 public:
  // Collective over all `size` ranks of the store.
  // A rank that the system keeps from sharing memory becomes a host of its own (warnings()).
  // Errors: Error(timeout) naming a rank that did not come; Error(peer_lost) with the reason where
  // another could not; Error(invalid_argument) where labels contradict the machines.
  static std::shared_ptr<Endpoint> create(Store& store, int rank, int size,
                                          const EndpointOptions& options);
  ~Endpoint();

  int rank() const { return rank_; }
  int size() const { return static_cast<int>(members_.size()); }
  const Member& member(int rank) const { return members_[static_cast<size_t>(rank)]; }
  std::string whereabouts(int rank) const;  // "host a, pid 123"
  bool local(int rank) const { return place(rank) >= 0; }
  // Index among the ranks of this host, in rank order; -1 on other hosts.
  int place(int rank) const { return local_index_[static_cast<size_t>(rank)]; }
  // By place.
  PeerMemory& peer_memory() { return peer_memory_; }
  // What the system refused, and what is used instead: one text per refusal and host, given to the
  // first of the ranks it concerns.
  const std::vector<std::string>& warnings() const { return warnings_; }
  Mailbox& mailbox() { return *mailbox_; }  // REQUIRES: another rank of this host
  // A number that all ranks get for their n-th use of `name`, and nobody else can guess.
  uint64_t agree(const std::string& name);
  uint64_t keyed(std::string text) const;  // hash of text under the job's secret
  // More ranks than cores on this machine: whoever waits must let others run.
  bool oversubscribed() const { return oversubscribed_; }
  // How long a waiter stays awake for an answer before it sleeps: see waiter.h.
  std::chrono::microseconds awake() const;
  const Secret& secret() const { return secret_; }

  // Wakes `rank` of this host if it sleeps. Call after publishing what it may wait for.
  void ring(int rank);
  void ring_others(const std::vector<int>& ranks);  // likewise all of them but this one
  void ring_self() { ring(rank_); }
  // Announces that this rank is about to sleep; what is published after it is followed by ring().
  // Re-check, then sleep().
  void prepare_sleep();
  // Sleeps until rung, a socket is ready, a local rank ended, or the time is over. Ends
  // prepare_sleep().
  void sleep(const std::vector<pollfd>& sockets, std::chrono::milliseconds limit);
  // Whether one of `ranks`, all of this host, last waited on the core that this thread is on: then
  // it cannot answer while this one spins. Says where this one waits, too.
  bool shares_core(const std::vector<int>& ranks);
  // Call where shares_core(): moves this thread where the ranks of this host stand unevenly on the
  // cores it may use, and have done so for a while. The system evens that out too, a fifth of a
  // second later.
  void leave_crowded_core();
  // Whether the process of a rank of this host has ended.
  bool ended(int rank) const;
  // Whether process_vm_readv(2) gets at memory of `rank`. Writing takes the same permission.
  bool reaches_memory_of(int rank) const {
    return local(rank) && reached_[static_cast<size_t>(place(rank))];
  }

  Standstill& standstill() { return standstill_; }
  TcpListener& listener() { return *listener_; }
  ProgressThread& progress() { return progress_; }

 private:
  struct alignas(64) Sleeper {
    std::atomic<uint32_t> sleepers{0};
    std::atomic<int64_t> rung_at{
        0};  // when it was rung last, on the clock that a host has in common
  };
  static constexpr size_t kProblemBytes = 240;  // of a text in shared memory, with its end
  struct HostLine {
    Sleeper sleeper;
    alignas(64) std::atomic<int> core{-1};  // where the rank waited last; written when it moves
    PeerMemoryLine memory;
    StandstillLine standstill;
    uint64_t landmark;  // address of the rank's own copy of the secret
    // 1 once the rank has all the others' doorbells, 2 once it has tried to read their memory;
    // publishes the texts.
    std::atomic<uint32_t> attached{0};
    char memory_instead[kProblemBytes];  // of a memfd: what is used, and why; or empty
    char watch_refused[kProblemBytes];   // why it has no pidfds, or empty
    char reach_refused[kProblemBytes];   // why it cannot read the others' memory, or empty
  };
  Endpoint() = default;
  Member describe_self(const EndpointOptions& options);
  void find_places();
  void share_host(Clock::time_point deadline);
  void exchange(Clock::time_point deadline);
  void await_host(uint32_t stage, Clock::time_point deadline);
  static void admit_siblings();
  void look_at_memory(Clock::time_point deadline);
  bool finds_landmark(int rank) const;
  void collect_warnings();
  HostLine& host_line(int rank) const;
  Sleeper& sleeper(int rank) const { return host_line(rank).sleeper; }
  void ring_sleeper(int rank);
  void woken(Clock::time_point since);
  int freer_core() const;  // than the one this thread is on, by two ranks at least; or -1

  int rank_ = 0;
  std::vector<Member> members_;
  std::vector<int> local_ranks_;
  std::vector<int> local_index_;  // by rank; -1 on other hosts
  bool oversubscribed_ = false;
  std::atomic<int64_t> wake_up_ns_{0};  // from ring() to the end of the sleep, averaged
  // Of leave_crowded_core(): the next look, whether the last one found a freer core, the last move,
  // and how long to stay after it.
  std::atomic<Clock::duration> next_look_{};
  std::atomic<bool> crowded_{false};
  std::atomic<Clock::duration> moved_{};
  std::atomic<Clock::duration> stay_{};
  Secret secret_{};
  std::unique_ptr<Mailbox> mailbox_;
  std::vector<std::string> warnings_;
  std::mutex uses_mutex_;
  std::map<std::string, uint64_t> uses_;  // of agree(), by name
  Mapping host_page_;                     // a HostLine per local rank
  std::vector<UniqueFd> doorbells_;       // eventfd per local rank
  std::vector<UniqueFd> processes_;       // pidfd per local rank; none for ranks of this process
  std::vector<std::string> births_;  // where there are no pidfds: per local rank, when it started
  std::vector<bool> reached_;        // by place; see reaches_memory_of()
  PeerMemory peer_memory_;
  Standstill standstill_;
  std::unique_ptr<TcpListener> listener_;
  ProgressThread progress_{*this};
};

}  // namespace pycomm::cpu
