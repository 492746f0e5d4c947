#include "cpu/engine.h"

#include <algorithm>

#include "cpu/as_float32.h"
#include "cpu/coding.h"
#include "cpu/failure.h"
#include "cpu/shm_channel.h"
#include "cpu/tcp_channel.h"

namespace pycomm::cpu {
namespace {

constexpr auto kForever = std::chrono::milliseconds(std::chrono::hours(24 * 365));
constexpr uint64_t kTileBytes = 128 * 1024;
constexpr uint64_t kSizeableBytes = 1024 * 1024;
constexpr uint64_t kUntimedBytes = 4096;  // of a message: its time is not worth a look at the clock
constexpr int kFirstSpins = 400;          // of a blocking call, with the lock held: some 20 us
constexpr int kSpinsUnseen = 20;          // of those, before it asks whether a peer wants its core
constexpr int kSpins = 200;               // of whoever waits on
constexpr int kSpinsOnSharedCore = 2;
constexpr int kSpinsBetweenHosts = 8;  // each a look at sockets, which costs what yielding does
constexpr auto kNap =
    std::chrono::milliseconds(5);  // the longest sleep between two looks at deadlines and peers

Status finite_status(const Launch& launch) {
  const DType dtype = launch.fingerprint.dtype;
  if (all_finite(launch.must_be_finite, launch.output_nbytes / size_of(launch.dtype), dtype))
    return {};
  return {Code::nonfinite, launch.fingerprint.describe() +
                               ": the result holds NaN or infinity, and wire_nonfinite is 'raise'. "
                               "It stands as it is, and the group can be used further."};
}

// A started operation, for whoever holds on to it. Keeps the engine alive, not the group open.
class CpuWork final : public Work {
 public:
  CpuWork(std::shared_ptr<CpuEngine> engine, std::shared_ptr<Op> op)
      : engine_(std::move(engine)), op_(std::move(op)) {}
  void wait(std::chrono::milliseconds timeout) override {
    engine_->wait_for(*op_, timeout);
    if (!op_->status.ok()) throw Error(op_->status);
  }
  bool done() const override { return op_->done(); }
  Status status() const override { return op_->done() ? op_->status : Status{}; }
  double duration_s() const override {
    return op_->done() ? std::chrono::duration<double>(op_->ended - op_->started).count() : 0;
  }
  int source() const override { return op_->done() ? op_->source : -1; }
  void on_done(std::function<void()> callback) override {
    engine_->set_callback(*op_, std::move(callback));
  }

 private:
  const std::shared_ptr<CpuEngine> engine_;
  const std::shared_ptr<Op> op_;
};

}  // namespace

CpuEngine::~CpuEngine() = default;

uint64_t CpuEngine::native_nbytes(Collective collective, bool even) const {
  if (!one_host_) return 0;
  if (collective == Collective::barrier) return even ? kBoardBytes : 0;
  return UINT64_MAX;
}

Path CpuEngine::path(const Launch& launch) const {
  if (launch.program != nullptr) return Path::program;
  const uint64_t nbytes = launch.fingerprint.numel * size_of(launch.dtype);
  return launch.fingerprint.has_counts || nbytes > kBoardBytes ? Path::large : Path::board;
}

Channel& CpuEngine::channel(int peer, Lane lane) {
  auto& slot = channels_[lane][static_cast<size_t>(peer)];
  if (slot) return *slot;
  const int to = ranks_[static_cast<size_t>(peer)];
  if (local(peer)) {
    slot =
        std::make_unique<ShmChannel>(segment_, local_index_[static_cast<size_t>(rank_)],
                                     local_index_[static_cast<size_t>(peer)], lane, *endpoint_, to);
  } else {
    const Member& member = endpoint_->member(to);
    slot = std::make_unique<TcpChannel>(
        TcpPeer{id_, rank_, peer, member.host, unpack_addresses(member.addresses), lane},
        *endpoint_);
  }
  return *slot;
}

// ---- submitting ----

void CpuEngine::require_sound() const {
  if (!broken_.ok())
    throw Error(Code::closed, "group '" + name_ + "' cannot be used any more: " + broken_.message);
}

void CpuEngine::note_caller() {
  const auto thread = std::this_thread::get_id();
  Standstill& standstill = endpoint_->standstill();
  if (thread == caller_ && !standstill.speaks()) [[likely]]
    return;
  caller_ = thread;
  standstill.called_by(thread);
}

void CpuEngine::submit(std::shared_ptr<CollectiveOp> op) {
  require_sound();
  note_caller();
  if (segment_.header().poisoned.load(std::memory_order_relaxed) != 0) [[unlikely]] {
    const Status why = settled_word();
    fail(why);
    throw Error(why);
  }
  op->submitted = op->timed ? Clock::now() : coarse_now();
  op->deadline = op->launch.deadline;
  op->sizeable = std::max(op->launch.input_nbytes, op->launch.output_nbytes) >= kSizeableBytes;
  next_deadline_ = std::min(next_deadline_, op->deadline);
  op->launch.fingerprint.sequence = sequence_++;
  queue_.push_back(std::move(op));
}

// Blocks until `op`, just submitted, is done. Most small operations end within the first spins,
// with one taking of the lock and no look at the clock.
void CpuEngine::run_to_end(Op& op, std::unique_lock<std::mutex> lock) {
  const int first_spins = one_host_ ? kFirstSpins : kSpinsBetweenHosts;
  for (int spins = 0; !op.done() && spins < first_spins; ++spins) {
    if (drive()) continue;
    if (spins == kSpinsUnseen && endpoint_->shares_core(local_ranks_)) break;
    cpu_relax();
  }
  if (!op.done()) {
    if (!std::exchange(op.timed, true)) {
      op.started = Clock::now();
      if (op.state.load(std::memory_order_relaxed) == Op::running && n_running_ == 1)
        running_since_ = op.started;
    }
    lock.unlock();
    try {
      wait_for(op, kForever);
    } catch (
        ...) {  // interrupted: nobody may use this frame, nor the caller's memory, from here on
      lock.lock();
      if (!op.done())
        fail({Code::closed,
              "rank " + std::to_string(rank_) + " was interrupted in a blocking call"});
      lock.unlock();
      run_callbacks();
      throw;
    }
  } else {
    lock.unlock();
    run_callbacks();
  }
  if (!op.status.ok()) throw Error(op.status);
}

void CpuEngine::run(Launch launch) {
  if (goes_as_float32(launch)) [[unlikely]]
    put_on_float32(launch);
  const Path taken = path(launch);
  CollectiveOp op(std::move(launch), taken);
  op.timed = taken != Path::board;
  std::unique_lock lock(mutex_);
  submit(std::shared_ptr<CollectiveOp>(std::shared_ptr<void>(),
                                       &op));  // on the stack: this call outlives it in the queue
  run_to_end(op, std::move(lock));
}

std::shared_ptr<Work> CpuEngine::start(Launch launch, std::shared_ptr<void> keep_alive) {
  if (goes_as_float32(launch)) [[unlikely]]
    put_on_float32(launch);
  const Path taken = path(launch);
  auto op = std::make_shared<CollectiveOp>(std::move(launch), taken);
  op->keep_alive = std::move(keep_alive);
  op->background = true;
  {
    std::lock_guard lock(mutex_);
    submit(op);
    background_.fetch_add(1, std::memory_order_relaxed);
    drive();
  }
  run_callbacks();
  if (!op->done()) endpoint_->progress().add(shared_from_this());
  return std::make_shared<CpuWork>(shared_from_this(), std::move(op));
}

void CpuEngine::submit(std::shared_ptr<MessageOp> op) {
  require_sound();
  note_caller();
  op->sizeable = op->nbytes >= kSizeableBytes;
  op->submitted = op->started = op->timed ? Clock::now() : coarse_now();
  op->state.store(Op::running, std::memory_order_relaxed);
  if (n_running_++ == 0) running_since_ = op->started;
  op->is_send ? messages_.send(std::move(op)) : messages_.recv(std::move(op));
}

std::shared_ptr<Work> CpuEngine::submit_message(bool is_send, std::byte* data, uint64_t nbytes,
                                                int peer, int64_t tag, Clock::time_point deadline,
                                                std::shared_ptr<void> keep_alive) {
  auto op = std::make_shared<MessageOp>(is_send, peer, tag, data, nbytes, deadline);
  op->keep_alive = std::move(keep_alive);
  op->background = true;
  {
    std::lock_guard lock(mutex_);
    submit(op);
    background_.fetch_add(1, std::memory_order_relaxed);
    drive();
  }
  run_callbacks();
  // Most callers wait for a message at once, and then drive it themselves: it may wait a little.
  if (!op->done()) endpoint_->progress().add(shared_from_this(), ProgressThread::When::soon);
  return std::make_shared<CpuWork>(shared_from_this(), std::move(op));
}

int CpuEngine::run_message(MessageOp& op) {
  op.timed = op.nbytes > kUntimedBytes;
  std::unique_lock lock(mutex_);
  submit(std::shared_ptr<MessageOp>(std::shared_ptr<void>(), &op));  // on the stack, as in run()
  run_to_end(op, std::move(lock));
  return op.source;
}

void CpuEngine::run_send(const void* data, uint64_t nbytes, int peer, int64_t tag,
                         Clock::time_point deadline) {
  MessageOp op(true, peer, tag, static_cast<std::byte*>(const_cast<void*>(data)), nbytes, deadline);
  run_message(op);
}

int CpuEngine::run_recv(void* data, uint64_t nbytes, int peer, int64_t tag,
                        Clock::time_point deadline) {
  MessageOp op(false, peer, tag, static_cast<std::byte*>(data), nbytes, deadline);
  return run_message(op);
}

std::shared_ptr<Work> CpuEngine::send(const void* data, uint64_t nbytes, int peer, int64_t tag,
                                      Clock::time_point deadline,
                                      std::shared_ptr<void> keep_alive) {
  return submit_message(true, static_cast<std::byte*>(const_cast<void*>(data)), nbytes, peer, tag,
                        deadline, std::move(keep_alive));
}

std::shared_ptr<Work> CpuEngine::recv(void* data, uint64_t nbytes, int peer, int64_t tag,
                                      Clock::time_point deadline,
                                      std::shared_ptr<void> keep_alive) {
  return submit_message(false, static_cast<std::byte*>(data), nbytes, peer, tag, deadline,
                        std::move(keep_alive));
}

// ---- progress ----

bool CpuEngine::advance_collectives() {
  bool moved = false;
  while (!queue_.empty()) {
    CollectiveOp& op = *queue_.front();
    const Launch& launch = op.launch;
    if (op.state.load(std::memory_order_relaxed) == Op::queued) {
      // The board counts on native collectives' numbers to follow each other.
      if (op.path == Path::program && one_host_ && !board_.settled(launch.fingerprint.sequence - 1))
        break;
      op.started = op.submitted;
      op.state.store(Op::running, std::memory_order_relaxed);
      if (n_running_++ == 0) running_since_ = op.started;
      announce(segment_.board(local_index_[static_cast<size_t>(rank_)]), launch.fingerprint);
      if (op.path == Path::program) {
        const bool tiled = one_host_ && launch.fingerprint.collective != Collective::all_to_all;
        interpreter_.begin(
            launch, [this](int peer) -> Channel& { return channel(peer, kCollectiveLane); },
            tiled ? kTileBytes : 0);
      } else if (op.path == Path::large) {
        large_.begin(launch);
        native_bytes_ += large_.sent_nbytes();
      } else {
        board_.prepare();
        native_bytes_ += launch.input_nbytes;
      }
      moved = true;
    }
    if (!advance(op, &moved)) break;
    if (launch.finish) launch.finish();
    const auto keep = queue_.front();
    queue_.pop_front();
    finish(op, launch.must_be_finite != nullptr ? finite_status(launch) : Status{});
  }
  return moved;
}

bool CpuEngine::advance(const CollectiveOp& op, bool* moved) {
  switch (op.path) {
    case Path::board:
      return board_.advance(op.launch, moved);
    case Path::large:
      return large_.advance(op.launch, moved);
    case Path::program:
      break;
  }
  return interpreter_.advance(op.launch, moved);
}

bool CpuEngine::drive() {
  if (!broken_.ok()) return false;
  bool at_collectives = true;
  try {
    bool moved = advance_collectives();
    at_collectives = false;
    if (!messages_.idle()) moved |= messages_.advance();
    return moved;
  } catch (const Error& error) {
    fail(cause(error.status(),
               at_collectives ? queue_.front()->launch.fingerprint.describe() : "a message"));
    return true;
  } catch (const std::exception& error) {  // no memory: the queue must not outlive the caller's
                                           // frame, nor a thread end here
    fail({Code::internal, error.what()});
    return true;
  }
}

void CpuEngine::finish(Op& op, Status status) {
  op.status = std::move(status);
  op.ended = op.timed ? Clock::now() : coarse_now();
  if (op.state.load(std::memory_order_relaxed) == Op::running && --n_running_ == 0)
    busy_ += op.ended - running_since_;
  ++n_ops_;
  if (op.callback ||
      op.keep_alive) {  // memory too is let go outside the lock: that may need the GIL
    callbacks_.push_back(
        [callback = std::move(op.callback), keep_alive = std::move(op.keep_alive)] {
          if (callback) callback();
        });
    has_callbacks_.store(true, std::memory_order_relaxed);
  }
  const bool background = op.background;
  if (background) background_.fetch_sub(1, std::memory_order_relaxed);
  op.state.store(Op::finished,
                 std::memory_order_release);  // publishes the result; the op may be gone after this
  if (background || waiters_.load(std::memory_order_relaxed) > 1) endpoint_->ring_self();
}

void CpuEngine::set_callback(Op& op, std::function<void()> callback) {
  {
    std::lock_guard lock(mutex_);
    if (!op.done()) {
      op.callback = !op.callback ? std::move(callback)
                                 : [first = std::move(op.callback), then = std::move(callback)] {
                                     first();
                                     then();
                                   };
      return;
    }
  }
  callback();
}

void CpuEngine::run_callbacks() {
  if (!has_callbacks_.load(std::memory_order_relaxed)) return;
  std::vector<std::function<void()>> ready;
  {
    std::lock_guard lock(mutex_);
    ready.swap(callbacks_);
    has_callbacks_.store(false, std::memory_order_relaxed);
    in_callbacks_.fetch_add(1, std::memory_order_relaxed);
  }
  for (auto& callback : ready) {
    callback();
    callback = nullptr;
  }
  in_callbacks_.fetch_sub(1, std::memory_order_release);
}

void CpuEngine::wait_for(Op& op, std::chrono::milliseconds limit) {
  const auto until = limit >= kForever ? Clock::time_point::max() : Clock::now() + limit;
  // While much is on its way between hosts the system needs the core to receive it.
  const bool shares_core = endpoint_->shares_core(local_ranks_);
  if (shares_core) endpoint_->leave_crowded_core();
  const int spins = !one_host_ ? kSpinsBetweenHosts : shares_core ? kSpinsOnSharedCore : kSpins;
  const bool receives_much = !one_host_ && op.sizeable;
  // A wait for much is long by its bytes, and says nothing of the peer.
  Waiter waiter(spins, receives_much ? Waiter::kBriefly : endpoint_->awake(),
                receives_much ? nullptr : &patience_);
  struct Counted {
    explicit Counted(std::atomic<int>& count) : count(count) {
      count.fetch_add(1, std::memory_order_relaxed);
    }
    ~Counted() { count.fetch_sub(1, std::memory_order_relaxed); }
    std::atomic<int>& count;
  };
  bool late = false;
  std::optional<Counted> waiting(waiters_);
  std::optional<InterruptCheck> interrupted;  // from the first slow look on
  struct Standing {  // what it says of this wait ends with it, on every way out
    Standstill& standstill;
    bool said = false;
    ~Standing() {
      if (said) standstill.leave();
    }
  } standing{endpoint_->standstill()};
  auto stands_since = Clock::time_point::max();
  const auto slow_look = [&] {
    const auto now = Clock::now();
    late = now >= until;
    if (!interrupted) interrupted.emplace();
    try {
      (*interrupted)(now);
    } catch (...) {  // what this caller drove is the progress thread's now
      waiting.reset();
      if (background_.load(std::memory_order_relaxed) > 0)
        endpoint_->progress().add(shared_from_this());
      throw;
    }
    if (until != Clock::time_point::max()) return;  // this caller may go on
    if (stands_since == Clock::time_point::max()) stands_since = now;
    if (now - stands_since < kStandstill) return;
    stands_since = now - kStandstill + kLookAgain;
    standing.said = true;
    look_for_standstill(op);
  };
  const auto round = [&](bool slow) {
    std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return false;
    const bool moved = drive();
    if (slow && !moved) look();
    return moved;
  };
  while (!op.done() && !late) {
    if (round(false)) {
      run_callbacks();
      waiter.moved();
      continue;
    }
    switch (waiter.idle()) {
      case Waiter::Next::again:
        break;
      case Waiter::Next::look:
        round(true);
        slow_look();
        break;
      case Waiter::Next::sleep: {
        endpoint_->prepare_sleep();
        const bool moved = round(true);
        std::vector<pollfd> sockets;
        if (!moved) add_waits(sockets);
        endpoint_->sleep(sockets, moved || op.done() ? std::chrono::milliseconds(0) : kNap);
        slow_look();
        break;
      }
    }
    run_callbacks();
  }
  if (op.done()) waiter.moved();
  waiting.reset();
  run_callbacks();
  // What this caller drove along the way is the progress thread's again.
  if (background_.load(std::memory_order_relaxed) > 0)
    endpoint_->progress().add(shared_from_this());
  if (late && !op.done())
    throw Error(Code::timeout,
                "group '" + name_ + "': rank " + std::to_string(rank_) + " waited " +
                    seconds_text(Clock::now() - op.submitted) +
                    " for an operation that is still under way; wait again, or raise the timeout");
}

bool CpuEngine::drive_background() {
  bool moved = false;
  if (waiters_.load(std::memory_order_relaxed) == 0) {
    std::unique_lock lock(mutex_, std::try_to_lock);
    if (lock) moved = drive();
  }
  run_callbacks();
  return moved;
}

bool CpuEngine::has_background() {
  return background_.load(std::memory_order_relaxed) > 0 &&
         waiters_.load(std::memory_order_relaxed) == 0;
}

void CpuEngine::check_background() {
  {
    std::unique_lock lock(mutex_, std::try_to_lock);
    if (lock) look();
  }
  run_callbacks();
}

void CpuEngine::add_waits(std::vector<pollfd>& sockets) {
  if (one_host_) return;
  std::lock_guard lock(mutex_);
  // What comes for an operation that is not under way would only keep a sleeper awake.
  const bool used[kLanes] = {!queue_.empty(), !messages_.idle()};
  for (int lane = 0; lane < kLanes; ++lane)
    for (const auto& channel : channels_[lane])
      if (channel && used[lane]) channel->add_waits(sockets);
}

// ---- leaving ----

void CpuEngine::close() {
  {
    std::lock_guard lock(mutex_);
    segment_.board(local_index_[static_cast<size_t>(rank_)])
        .closed.store(1, std::memory_order_release);
    if (one_host_) reach_.retire(kRetire);
    const bool broke = !broken_.ok();
    if (!broke) {
      broken_ = {Code::closed, "it was closed"};
      const Status why{Code::closed,
                       "group '" + name_ + "' was closed before this operation ended"};
      for (const auto& op : std::exchange(queue_, {})) finish(*op, why);
      messages_.fail_all(why);
    }
    endpoint_->ring_others(local_ranks_);
    for (size_t peer = 0; peer < ranks_.size(); ++peer)
      for (auto& lane : channels_) {
        if (!lane[peer]) continue;
        (local(static_cast<int>(peer)) ? closed_bytes_inside_ : closed_bytes_between_) +=
            lane[peer]->bytes_written();
        lane[peer].reset();  // a connection closes: the other side sees it
      }
    if (!std::exchange(closed_, true) && !one_host_) {  // for ranks that no connection joins yet
      endpoint_->listener().refuse(id_);
      store_word_->set("group/left/" + std::to_string(rank_), "",
                       broke ? kWordPatience : kStorePatience);  // behind the word of why
    }
  }
  run_callbacks();
  endpoint_->progress().remove(this);
  // Another thread's callbacks may need Python, which may end after this call. Not for ever: they
  // may wait for a lock of the caller's, or be the caller.
  for (const auto until = Clock::now() + kGrace;
       in_callbacks_.load(std::memory_order_acquire) > 0 && Clock::now() < until;)
    ::sched_yield();
}

// ---- numbers ----

Stats CpuEngine::stats() const {
  std::lock_guard lock(mutex_);
  Stats stats;
  stats.ops = n_ops_;
  stats.bytes_inside_hosts = native_bytes_ + rendezvous_.sent_nbytes() + closed_bytes_inside_;
  stats.bytes_between_hosts = closed_bytes_between_;
  for (const auto& lane : channels_)
    for (size_t peer = 0; peer < lane.size(); ++peer)
      if (lane[peer])
        (local(static_cast<int>(peer)) ? stats.bytes_inside_hosts : stats.bytes_between_hosts) +=
            lane[peer]->bytes_written();
  stats.busy_s = std::chrono::duration<double>(busy_).count();
  if (n_running_ > 0)
    stats.busy_s += std::chrono::duration<double>(Clock::now() - running_since_).count();
  return stats;
}

Status CpuEngine::broken() const {
  std::lock_guard lock(mutex_);
  return broken_;
}

uint64_t CpuEngine::sequence() const {
  std::lock_guard lock(mutex_);
  return sequence_;
}

}  // namespace pycomm::cpu
