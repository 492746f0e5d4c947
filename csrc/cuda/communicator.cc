#include "cuda/communicator.h"

#include <thread>

namespace pycomm::cuda {
namespace {

constexpr auto kPoll = std::chrono::microseconds(100);
constexpr auto kCheck = std::chrono::milliseconds(100);
constexpr auto kRevoke = std::chrono::seconds(5);  // no rank waits for another in it
constexpr const char* kGone = "the communicator was aborted";

// Calls a check now and then.
class Turns {
 public:
  explicit Turns(const Communicator::Check& check) : check_(check) {}
  void operator()(Clock::time_point now) {
    if (!check_ || now - last_ < kCheck) return;
    check_();
    last_ = Clock::now();
  }

 private:
  const Communicator::Check& check_;
  Clock::time_point last_ = Clock::now();
};

NcclConfig config_of(std::optional<int> max_ctas) {
  NcclConfig config;
  if (max_ctas) config.max_ctas = *max_ctas;
  return config;
}

}  // namespace

Status Communicator::result(NcclResult result, const std::string& what) const {
  if (result == NcclResult::success || result == NcclResult::in_progress) return {};
  const Code code = result == NcclResult::remote_error       ? Code::peer_lost
                    : result == NcclResult::invalid_argument ? Code::invalid_argument
                                                             : Code::internal;
  return {code, who_ + ": " + what + ": " + api_->describe(result, comm_)};
}

// Until NCCL has done in the background what it was told.
void Communicator::settle(const std::string& what, const Check& check, Clock::time_point deadline) {
  InterruptCheck interrupted;
  Turns turns(check);
  for (;;) {
    {
      const std::lock_guard lock(mutex_);
      if (comm_ == nullptr) throw Error(Code::closed, who_ + ": " + what + ": " + kGone);
      NcclResult state = NcclResult::success;
      const NcclResult asked = api_->comm_get_async_error(comm_, &state);
      for (const NcclResult each : {asked, state})
        if (const Status status = result(each, what); !status.ok()) throw Error(status);
      if (state == NcclResult::success) return;
    }
    const auto now = Clock::now();
    if (now >= deadline)
      throw Error(Code::timeout, who_ + ": " + what +
                                     ": NCCL is still waiting for other ranks at the deadline; did "
                                     "every rank of the group call this?");
    interrupted(now);
    turns(now);
    std::this_thread::sleep_for(kPoll);
  }
}

std::shared_ptr<Communicator> Communicator::create(std::shared_ptr<const NcclApi> api,
                                                   const NcclUniqueId& id, int rank, int size,
                                                   std::optional<int> max_ctas,
                                                   const std::string& who, const Check& check,
                                                   Clock::time_point deadline) {
  NcclConfig config = config_of(max_ctas);
  NcclComm* comm = nullptr;
  std::shared_ptr<Communicator> self(new Communicator(std::move(api), nullptr, who));
  const NcclResult begun =
      self->api_->comm_init_rank_config(&comm, size, id, rank, static_cast<void*>(&config));
  self->comm_ = comm;
  constexpr const char* kWhat = "set-up of the communicator";
  if (const Status status = self->result(begun, kWhat); !status.ok()) throw Error(status);
  PYCOMM_CHECK(comm != nullptr, "NCCL gave no communicator and no error");
  self->settle(kWhat, check, deadline);  // where it throws, the destructor aborts
  return self;
}

std::shared_ptr<Communicator> Communicator::split(int color, int key, std::optional<int> max_ctas,
                                                  const std::string& who, const Check& check,
                                                  Clock::time_point deadline) {
  return derive("split of the communicator", max_ctas, who, color == kNcclNoColor, false, check,
                deadline, [&](NcclComm* parent, NcclComm** child, void* config) {
                  return api_->comm_split(parent, color, key, child, config);
                });
}

std::shared_ptr<Communicator> Communicator::shrink(std::vector<int> excluded, bool hangs,
                                                   std::optional<int> max_ctas,
                                                   const std::string& who,
                                                   Clock::time_point deadline) {
  if (api_->comm_shrink == nullptr)
    throw Error(Code::invalid_argument, who_ + ": NCCL " + nccl_version_name(api_->version()) +
                                            " cannot shrink a communicator; that came with 2.27");
  return derive("shrink of the communicator", max_ctas, who, false, hangs, nullptr, deadline,
                [&](NcclComm* parent, NcclComm** child, void* config) {
                  return api_->comm_shrink(parent, excluded.data(),
                                           static_cast<int>(excluded.size()), child, config,
                                           hangs ? kNcclShrinkAbort : 0);
                });
}

std::shared_ptr<Communicator> Communicator::derive(
    const char* what, std::optional<int> max_ctas, const std::string& who, bool without_child,
    bool parent_is_broken, const Check& check, Clock::time_point deadline,
    const std::function<NcclResult(NcclComm*, NcclComm**, void*)>& call) {
  NcclConfig config = config_of(max_ctas);
  // NCCL may fill it in from a thread of its own, after a deadline that made us leave.
  const auto child = std::make_shared<std::atomic<NcclComm*>>(nullptr);
  {
    const std::lock_guard lock(mutex_);
    if (comm_ == nullptr) throw Error(Code::closed, who_ + ": " + what + ": " + kGone);
    children_.push_back(child);
    static_assert(sizeof(*child) == sizeof(NcclComm*));
    const NcclResult begun = call(comm_, reinterpret_cast<NcclComm**>(child.get()), &config);
    if (const Status status = result(begun, what); !status.ok()) throw Error(status);
  }
  // A broken parent keeps the error that is the reason to leave it.
  if (!parent_is_broken) settle(what, check, deadline);
  if (without_child) return nullptr;
  Turns turns(check);
  while (child->load() == nullptr) {
    const auto now = Clock::now();
    turns(now);
    if (now >= deadline)
      throw Error(Code::timeout, who_ + ": " + what + ": no communicator at the deadline");
    std::this_thread::sleep_for(kPoll);
  }
  std::shared_ptr<Communicator> made(new Communicator(api_, child->load(), who));
  made->settle(what, check, deadline);
  return made;
}

Communicator::~Communicator() { abort(); }

void Communicator::run(const std::string& what, const Check& check, Clock::time_point deadline,
                       const Calls& calls) {
  {
    const std::lock_guard lock(mutex_);
    if (comm_ == nullptr || revoked_) throw Error(Code::closed, who_ + ": " + what + ": " + kGone);
    NcclResult first = api_->group_start();
    if (first == NcclResult::success) {
      first = calls(comm_);
      const NcclResult ended =
          api_->group_end();  // also after an error: the thread leaves the group
      if (first == NcclResult::success || first == NcclResult::in_progress) first = ended;
    }
    if (const Status status = result(first, what); !status.ok()) throw Error(status);
    if (first == NcclResult::success) return;
  }
  settle(what, check, deadline);
}

Status Communicator::status() {
  const std::lock_guard lock(mutex_);
  if (comm_ == nullptr) return {Code::closed, who_ + ": " + kGone};
  NcclResult state = NcclResult::success;
  const NcclResult asked = api_->comm_get_async_error(comm_, &state);
  const Status status = result(asked, "state of the communicator");
  return status.ok() ? result(state, "NCCL's background work") : status;
}

void Communicator::revoke() {
  {
    const std::lock_guard lock(mutex_);
    if (comm_ == nullptr || revoked_) return;
    revoked_ = api_->comm_revoke != nullptr && result(api_->comm_revoke(comm_, 0), "revoke").ok();
  }
  if (!revoked_) return abort();
  try {
    settle("revoke", nullptr,
           Clock::now() + kRevoke);  // until nothing on the device uses the memory
  } catch (const Error&) {
    abort();
  }
}

void Communicator::abort() {
  const std::lock_guard lock(mutex_);
  if (comm_ == nullptr) return;
  (void)api_->comm_abort(std::exchange(comm_, nullptr));  // frees, whatever it says
}

void Communicator::finish(Clock::time_point deadline) {
  {
    const std::lock_guard lock(mutex_);
    if (comm_ == nullptr) return;
    const NcclResult begun = revoked_ ? NcclResult::success : api_->comm_finalize(comm_);
    if (!result(begun, "").ok()) deadline = Clock::time_point::min();
  }
  try {
    if (deadline == Clock::time_point::min()) throw Error(Code::internal, "");
    settle("finalize", nullptr, deadline);
  } catch (const Error&) {  // a rank is gone, or does not finish: this rank's end needs neither
    abort();
    return;
  }
  const std::lock_guard lock(mutex_);
  if (comm_ != nullptr) (void)api_->comm_destroy(std::exchange(comm_, nullptr));
}

}  // namespace pycomm::cuda
