#include "torch/sparse.h"

#include <ATen/ATen.h>

#include <condition_variable>
#include <cstring>
#include <mutex>
#include <sstream>

#include "torch/tensors.h"

namespace pycomm::torch_layer {
namespace {

using Milliseconds = std::chrono::milliseconds;
constexpr int64_t kFirstTag = std::numeric_limits<int64_t>::min() + 2;  // below any that c10d has
constexpr size_t kMaxDims = 28;
constexpr int64_t kAlign = 16;  // of the values behind the indices: the largest element

// What a rank has.
struct Header {
  int64_t n_values, dtype, sparse_dim, dims;
  int64_t sizes[kMaxDims];
  bool fits(const Header& other) const {
    return dtype == other.dtype && sparse_dim == other.sparse_dim && dims == other.dims &&
           std::equal(sizes, sizes + dims, other.sizes);
  }
  int64_t indices_nbytes() const {
    return (n_values * sparse_dim * 8 + kAlign - 1) / kAlign * kAlign;
  }
  std::string describe() const {
    std::ostringstream text;
    text << c10::toString(static_cast<at::ScalarType>(dtype)) << ", sizes [";
    for (int64_t i = 0; i < dims; ++i) text << (i == 0 ? "" : ", ") << sizes[i];
    text << "], " << sparse_dim << " of them sparse";
    return text.str();
  }
};

class SparseAllReduce final : public Work, public std::enable_shared_from_this<SparseAllReduce> {
 public:
  SparseAllReduce(std::shared_ptr<Group> group, at::Tensor tensor, int64_t number,
                  std::optional<Milliseconds> timeout)
      : group_(std::move(group)),
        tensor_(std::move(tensor)),
        mine_(tensor_.detach().coalesce()),
        tag_(kFirstTag + number),
        timeout_(timeout),
        headers_(static_cast<size_t>(group_->size())),
        parts_(static_cast<size_t>(group_->size())) {}

  void start() {
    Header header{mine_._nnz(),
                  static_cast<int64_t>(mine_.scalar_type()),
                  mine_.sparse_dim(),
                  mine_.dim(),
                  {}};
    std::copy(mine_.sizes().begin(), mine_.sizes().end(), header.sizes);
    own_ = header;
    Call call;
    call.collective = Collective::all_gather;
    call.dtype = DType::int64;
    call.numel = headers_.size() * sizeof(Header) / sizeof(int64_t);
    call.input = &own_;
    call.output = headers_.data();
    call.timeout = timeout_;
    const auto self = shared_from_this();
    auto work = group_->start(call, self);
    {
      std::lock_guard lock(mutex_);
      pending_ = {work};
    }
    work->on_done([self, work] { self->guarded([&] { self->exchange(work->status()); }); });
  }

  void wait(Milliseconds timeout) override {
    const auto until = Clock::now() + std::min(timeout, Milliseconds(std::chrono::hours(8760)));
    const auto left = [&] {
      return std::max(Milliseconds(0), std::chrono::ceil<Milliseconds>(until - Clock::now()));
    };
    while (!done()) {
      std::unique_lock lock(mutex_);
      const auto pending = pending_;
      lock.unlock();
      for (const auto& work : pending)  // whoever waits drives; how each ended is exchange()'s care
        if (!work->done()) try {
            work->wait(left());
          } catch (const Error&) {
            if (!work->done()) throw;  // the caller's own patience
          }
      lock.lock();  // the callback of the last of them may be on another thread
      changed_.wait_for(lock, left(), [&] { return done_ || pending_ != pending; });
      if (!done_ && left().count() == 0)
        throw Error(Code::timeout, "group '" + group_->name() + "': rank " +
                                       std::to_string(group_->rank()) + " waited " +
                                       std::to_string(timeout.count()) +
                                       " ms for a sparse all_reduce that is still under way");
    }
    if (const Status why = status(); !why.ok()) throw Error(why);
  }
  bool done() const override {
    std::lock_guard lock(mutex_);
    return done_;
  }
  Status status() const override {
    std::lock_guard lock(mutex_);
    return status_;
  }
  double duration_s() const override {
    std::lock_guard lock(mutex_);
    return done_ ? std::chrono::duration<double>(ended_ - started_).count() : 0;
  }
  void on_done(std::function<void()> callback) override {
    {
      std::lock_guard lock(mutex_);
      if (!done_) {
        callbacks_.push_back(std::move(callback));
        return;
      }
    }
    callback();
  }

 private:
  size_t n_ranks() const { return headers_.size(); }
  size_t rank() const { return static_cast<size_t>(group_->rank()); }

  template <class Step>
  void guarded(const Step& step) {
    try {
      step();
    } catch (const Error& error) {
      finish(error.status());
    } catch (const std::exception& error) {
      const Status why{Code::internal, std::string("sparse all_reduce: ") + error.what()};
      group_->engine().revoke(why);  // the others wait for what this rank will not send
      finish(why);
    }
  }

  // All counts are known: indices and values go to every rank, and come from it.
  void exchange(const Status& gathered) {
    if (!gathered.ok()) return finish(gathered);
    for (size_t peer = 0; peer < n_ranks(); ++peer)
      if (!headers_[peer].fits(own_))
        return finish({Code::mismatch, "group '" + group_->name() + "': sparse all_reduce: rank " +
                                           std::to_string(rank()) + " has " + own_.describe() +
                                           ", rank " + std::to_string(peer) + " has " +
                                           headers_[peer].describe() +
                                           "; all ranks must give tensors of one dtype and shape"});
    for (size_t peer = 0; peer < n_ranks(); ++peer)
      parts_[peer] = at::empty({bytes(headers_[peer])}, at::kByte);
    pack();
    std::vector<std::shared_ptr<Work>> works;
    const auto self = shared_from_this();
    for (size_t i = 1; i < n_ranks(); ++i) {
      const size_t to = (rank() + i) % n_ranks(), from = (rank() + n_ranks() - i) % n_ranks();
      works.push_back(group_->recv(parts_[from].data_ptr(),
                                   static_cast<uint64_t>(parts_[from].numel()),
                                   static_cast<int>(from), tag_, timeout_, self));
      works.push_back(group_->send(parts_[rank()].data_ptr(),
                                   static_cast<uint64_t>(parts_[rank()].numel()),
                                   static_cast<int>(to), tag_, timeout_, self));
    }
    {
      std::lock_guard lock(mutex_);
      pending_ = works;
    }
    changed_.notify_all();
    const auto left = std::make_shared<std::atomic<size_t>>(works.size() + 1);
    const auto one_less = [self, works, left] {
      if (left->fetch_sub(1) == 1) self->guarded([&] { self->add(works); });
    };
    for (const auto& work : works) work->on_done(one_less);
    one_less();  // with one rank there are no messages
  }

  void add(const std::vector<std::shared_ptr<Work>>& works) {
    for (const auto& work : works)
      if (const Status why = work->status(); !why.ok()) {
        group_->engine().revoke(why);  // a message alone may fail; this sum then fails everywhere
        return finish(why);
      }
    std::vector<at::Tensor> indices, values;
    for (size_t peer = 0; peer < n_ranks(); ++peer) {
      const int64_t n = headers_[peer].n_values, at = headers_[peer].indices_nbytes();
      indices.push_back(parts_[peer]
                            .narrow(0, 0, n * own_.sparse_dim * 8)
                            .view(at::kLong)
                            .view({own_.sparse_dim, n}));
      auto shape = mine_.values().sizes().vec();
      shape[0] = n;
      values.push_back(parts_[peer]
                           .narrow(0, at, parts_[peer].numel() - at)
                           .view(mine_.scalar_type())
                           .view(shape));
    }
    const at::Tensor total = at::sparse_coo_tensor(at::cat(indices, 1), at::cat(values, 0),
                                                   mine_.sizes(), mine_.options())
                                 .coalesce();  // in rank order: the same bits on all ranks
    at::NoGradGuard no_grad;
    tensor_.copy_(total);
    finish({});
  }

  void pack() {
    const at::Tensor indices = mine_.indices().contiguous(), values = mine_.values().contiguous();
    auto* to = static_cast<std::byte*>(parts_[rank()].data_ptr());
    if (indices.numel() > 0) std::memcpy(to, indices.data_ptr(), indices.nbytes());
    if (values.numel() > 0)
      std::memcpy(to + own_.indices_nbytes(), values.data_ptr(), values.nbytes());
  }

  int64_t bytes(const Header& header) const {
    int64_t value = static_cast<int64_t>(mine_.element_size());
    for (int64_t i = header.sparse_dim; i < header.dims; ++i) value *= header.sizes[i];
    return header.indices_nbytes() + header.n_values * value;
  }

  void finish(Status status) {
    std::vector<std::function<void()>> callbacks;
    {
      std::lock_guard lock(mutex_);
      status_ = std::move(status);
      ended_ = Clock::now();
      done_ = true;
      pending_.clear();
      callbacks.swap(callbacks_);
    }
    changed_.notify_all();
    for (const auto& callback : callbacks) callback();
  }

  const std::shared_ptr<Group> group_;
  at::Tensor tensor_;      // the caller's
  const at::Tensor mine_;  // its values as they were at the call
  const int64_t tag_;
  const std::optional<Milliseconds> timeout_;
  const Clock::time_point started_ = Clock::now();
  Header own_{};
  std::vector<Header> headers_;    // by rank
  std::vector<at::Tensor> parts_;  // by rank: the bytes of indices, then of values
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::shared_ptr<Work>> pending_;  // the step's operations
  bool done_ = false;
  Status status_;
  Clock::time_point ended_{};
  std::vector<std::function<void()>> callbacks_;
};

}  // namespace

std::shared_ptr<Work> start_sparse_all_reduce(const std::shared_ptr<Group>& group,
                                              const at::Tensor& tensor, int64_t number,
                                              std::optional<Milliseconds> timeout) {
  if (static_cast<size_t>(tensor.dim()) > kMaxDims)
    throw Error(Code::invalid_argument, "all_reduce in group '" + group->name() +
                                            "': a sparse tensor of " +
                                            std::to_string(tensor.dim()) + " dimensions; at most " +
                                            std::to_string(kMaxDims) + " are supported");
  auto work = std::make_shared<SparseAllReduce>(group, tensor, number, timeout);
  work->start();
  return work;
}

}  // namespace pycomm::torch_layer
