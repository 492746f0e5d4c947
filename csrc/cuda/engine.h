// CudaEngine: collectives and messages on device memory for one rank of one group, by NCCL.
//
// Streams. An operation reads and writes its memory in the order of the caller's stream
// (Launch::stream). run() puts it on that very stream and returns at once; start() puts it on the
// engine's own stream, behind what the caller's holds, and Work::order_before() makes a stream
// wait for it. Memory handed to start() is kept until the operation is done or a stream was made to
// wait for it. On a stream that is being captured into a graph, operations are recorded, not
// watched.
//
// Waiting. Nothing waits for ever: set-up has the operation's deadline, and a watch (watch.h) ends
// the group's operations on this rank, and on all others through the store, once one is past its
// deadline or NCCL has an error. The process lives on; what stood on the device ends, and every
// later call throws the reason. Results of operations that did not end are undefined.
//
// Order. All ranks submit the same collectives in the same order. A message alone goes over a
// communicator of its two ranks, on a stream of that pair; those that start together go over the
// group's, so that its ranks start them in their order of collectives.
//
// Between hosts. Where NCCL does not join them, what it would put on a stream a courier does
// (courier.h); all that stands above holds for it as well, but nothing can be captured.
#pragma once

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "core/group.h"
#include "core/store.h"
#include "cuda/communicator.h"
#include "cuda/courier.h"
#include "cuda/device.h"
#include "cuda/peers.h"
#include "cuda/symmetric_memory.h"
#include "cuda/watch.h"

namespace pycomm::cuda {

// What joins hosts: NCCL; the host's groups, by TCP (between.cc); or the latter where NCCL cannot.
enum class Between { automatic, nccl, tcp };

struct EngineOptions {
  std::shared_ptr<const NcclApi> api;  // nullptr where there is none
  std::string no_nccl;                 // and why
  std::shared_ptr<Device> device;
  std::shared_ptr<Store> store;  // the group's own
  std::string name;
  int rank = 0;
  std::vector<std::string> hosts;  // by rank: which host it is on
  void* stream = nullptr;          // for start(); the engine makes one where there is none
  // Up to that many bytes an all_reduce on one host is the peer kernel's, where it has it
  // (peers.h).
  uint64_t peer_nbytes = 0;
  std::optional<int> max_ctas;  // multiprocessors that one operation takes at most; NCCL's choice
  Between between = Between::nccl;
  // A group of host memory of these ranks, with this name; all of them ask. Where not all is
  // NCCL's.
  std::function<std::shared_ptr<Group>(const std::vector<int>& ranks, const std::string& name)>
      host_group;
  // Told once on every rank: that `automatic` is tcp from now on, and why.
  std::function<void(const std::string& why)> through_host;
};

class CudaEngine final : public Engine, public std::enable_shared_from_this<CudaEngine> {
 public:
  // Local: ranks meet in the first collective, or when two exchange their first message.
  static std::shared_ptr<CudaEngine> create(EngineOptions options);
  ~CudaEngine() override;

  // 0 where ranks stand on several hosts and the collective can go inside them and across in turn
  // (hierarchical.cc): then the planner's choices say which sizes are "native", NCCL's as a whole.
  uint64_t native_nbytes(Collective collective, bool even) const override;
  bool on_device() const override { return true; }
  // Where the host's groups join hosts, a wire is theirs.
  bool spans_hosts() const override { return spans_hosts_ && !through_host_; }
  void run(Launch launch) override;
  std::shared_ptr<Work> start(Launch launch, std::shared_ptr<void> keep_alive) override;
  std::shared_ptr<Work> start_together(std::vector<Launch> launches, std::vector<Message> messages,
                                       std::shared_ptr<void> keep_alive) override;
  // On the device's default stream. The tag must be 0: NCCL's messages come in order, without one.
  std::shared_ptr<Work> send(const void* data, uint64_t nbytes, int peer, int64_t tag,
                             Clock::time_point deadline, std::shared_ptr<void> keep_alive) override;
  std::shared_ptr<Work> recv(void* data, uint64_t nbytes, int peer, int64_t tag,
                             Clock::time_point deadline, std::shared_ptr<void> keep_alive) override;
  void run_send(const void* data, uint64_t nbytes, int peer, int64_t tag,
                Clock::time_point deadline) override;
  int run_recv(void* data, uint64_t nbytes, int peer, int64_t tag,
               Clock::time_point deadline) override;
  // Bytes are those that went through the host: which rank sends what else is NCCL's choice.
  Stats stats() const override;
  uint64_t sequence() const override;
  Status broken() const override { return watch_->broken(); }
  void revoke(const Status& why) override;
  void close() override;

  // The engine of those ranks of this group that give the same color, ordered by key; nullptr with
  // kNcclNoColor. Every rank of this group calls it. `ranks`: those ranks, in that order.
  std::shared_ptr<CudaEngine> split(int color, int key, const std::vector<int>& ranks,
                                    EngineOptions options, Clock::time_point deadline);
  // Of the ranks that are left; this engine's operations end. Every rank but `excluded` calls it.
  // Errors: Error(invalid_argument) where NCCL is older than 2.27.
  std::shared_ptr<CudaEngine> shrink(const std::vector<int>& excluded, EngineOptions options,
                                     Clock::time_point deadline);
  bool has_communicator() const;  // one of all ranks
  // Memory of each rank of one host, nbytes on all, until the group closes; nullptr, on all ranks,
  // where one cannot map another's, and `why` says which. All ranks call it. instead: given up for
  // it. REQUIRES: the device does nothing more with `instead`, nor after close() with any; what
  // reads another rank's memory comes before a later collective of the group. Errors:
  // Error(invalid_argument) in a group of several hosts; others break the group.
  std::shared_ptr<SymmetricMemory> share(int64_t nbytes,
                                         const std::shared_ptr<SymmetricMemory>& instead,
                                         Clock::time_point deadline, std::string* why);
  // Says in a group's store why it is broken, for ranks that wait in it, unless that has been said.
  static void tell(Store& store, const Status& why);

 private:
  friend class CudaWork;
  struct Places;
  struct Pair {
    std::shared_ptr<Communicator> communicator;  // or, through the host:
    std::shared_ptr<Group> host;
    std::shared_ptr<Courier> courier;
    Device::Stream stream;
  };
  // The communicator of this rank's part of a partition, and what stands on its stream. nullptr: of
  // ranks on several hosts, through the host.
  struct Layer {
    std::shared_ptr<Communicator> communicator;
    Device::Stream stream;
  };
  struct Comparison {
    std::string no_nccl;  // why not between hosts
    bool inside = true;   // whether NCCL could join the ranks of each host
  };
  explicit CudaEngine(EngineOptions options);
  bool on_own_thread() const;
  // setup.cc
  void meet(Clock::time_point deadline);
  Pair& pair(int peer, Clock::time_point deadline);
  std::vector<std::string> await(const std::vector<std::string>& keys, Clock::time_point deadline);
  std::shared_ptr<Communicator> join(const std::string& key, const std::vector<int>& ranks,
                                     const std::string& who, const Communicator::Check& check,
                                     Clock::time_point deadline);
  Comparison compare_ranks(Clock::time_point deadline);

  // sharing.cc
  SymmetricMemory::Exchange exchange_for(const std::string& purpose, Clock::time_point deadline);
  Peers* peers_for(const Launch& launch, Device::Stream stream);
  void leave_shared();

  // between.cc
  std::string try_nccl(const std::string& key, const std::vector<int>& ranks,
                       const std::string& who, std::shared_ptr<Communicator>* made,
                       Clock::time_point deadline);
  void go_through_host(const std::string& why, bool inside, Clock::time_point deadline);
  std::vector<std::vector<int>> ranks_by_host() const;
  std::shared_ptr<Group> host_group(const std::vector<int>& ranks, const std::string& name);
  std::shared_ptr<Courier> new_courier();

  // through_host.cc
  bool goes_in_parts(const Launch& launch) const;
  void carry(const Launch& launch, const std::string& what, Device::Stream stream);
  void carry(const std::vector<Message>& messages, const std::string& what,
             const std::shared_ptr<Group>& host, Courier& courier, Device::Stream stream);
  void carry_call(const Launch& launch, const SubCall& call, Places& places,
                  const std::string& what, Device::Stream stream);

  // failure.cc
  void require_sound() const;
  void look_for_word() const;
  Communicator::Check look_for_word_now_and_then() const {
    return [this] { look_for_word(); };
  }
  Status look();
  void look_at_others(const Operation& operation);
  Status too_late(const Operation& operation);
  void end_all(const Status& why);
  std::string named(const std::string& text) const;

  // collectives.cc, engine.cc
  std::shared_ptr<Operation> describe(const Launch& launch);
  // Throws where the group goes through the host and a graph is being captured on the stream.
  void require_no_capture(const std::string& what, Device::Stream stream) const;
  void submit(const std::shared_ptr<Operation>& operation, bool of_group, Device::Stream stream,
              Device::Stream callers, const std::function<void()>& enqueue,
              std::span<const Launch> launches);
  void put(const Launch& launch, const std::shared_ptr<Operation>& operation,
           Device::Stream stream);
  NcclResult enqueue(const Launch& launch, NcclComm* comm, Device::Stream stream) const;
  NcclResult enqueue_pieces(const Launch& launch, NcclComm* comm, Device::Stream stream) const;
  void copy_own(const Launch& launch, Device::Stream stream) const;
  // hierarchical.cc
  Layer& layer(const Partition& partition, const std::vector<int32_t>& part,
               Clock::time_point deadline);
  void run_program(const Launch& launch, const std::shared_ptr<Operation>& operation,
                   Device::Stream stream);
  std::byte* partial_memory(uint64_t nbytes);
  NcclResult enqueue_exchange(const SubCall& call, const Places& places, NcclComm* comm,
                              Device::Stream stream) const;
  NcclResult enqueue_call(const Launch& launch, const SubCall& call, Places& places, NcclComm* comm,
                          Device::Stream stream) const;
  // coded.cc
  uint64_t forms_nbytes(const Launch& launch, const SubCall& call) const;
  void run_coded(const Launch& launch, const SubCall& call, Places& places, std::byte* forms,
                 Layer& on, const std::string& what) const;
  // messages.cc
  std::shared_ptr<Work> start_message(const Message& message, std::shared_ptr<void> keep_alive);
  void set_communicator(std::shared_ptr<Communicator> made);
  std::vector<std::shared_ptr<Courier>> couriers() const;
  std::string who(int rank) const;  // "rank 2 (host b)"

  const EngineOptions options_;
  const int rank_, size_;
  const bool spans_hosts_;
  const std::string me_;  // what every message begins with
  Device& device_;
  const bool makes_stream_;
  Device::Stream stream_ = nullptr;
  void* scratch_ = nullptr;  // one element, for barriers

  mutable std::mutex mutex_;  // one submission at a time
  // The watch ends them while a caller that holds the first lock waits in one, so these change
  // under both locks, and are read under either.
  mutable std::mutex communicators_mutex_;
  std::shared_ptr<Communicator> communicator_;
  std::map<int, Pair> pairs_;
  std::map<Partition, Layer> layers_;
  std::vector<std::shared_ptr<Group>> host_groups_;
  // Through the host: of this host's ranks, nullptr where it has one; of all ranks, and of those
  // with one place on their hosts, nullptr where that is no way.
  std::shared_ptr<Communicator> inside_;
  std::shared_ptr<Group> everyone_, across_;
  std::vector<int> rail_;  // across_'s ranks
  std::shared_ptr<Courier> courier_;
  std::atomic<bool> through_host_;
  std::vector<void*> partials_;  // for sums on their way; the last one is in use
  uint64_t partial_nbytes_ = 0;
  std::unique_ptr<Peers> peers_;
  std::atomic<Peers*> peers_in_use_{nullptr};  // those, for the watch
  bool peers_asked_ = false;
  std::vector<std::shared_ptr<SymmetricMemory>> shared_;  // for callers
  uint64_t n_shared_ = 0;
  uint64_t sequence_ = 0;
  uint64_t n_messages_ = 0;
  Device::Event last_ = nullptr;  // the end of the last operation on the group's communicator
  Device::Stream last_stream_ = nullptr;
  bool has_last_ = false;
  std::atomic<bool> closed_{false};
  std::mutex words_mutex_;
  std::string own_word_;
  std::unique_ptr<Watch> watch_;  // the first to go: its thread uses all of the above
};

}  // namespace pycomm::cuda
