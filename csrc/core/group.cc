#include "core/group.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace pycomm {
namespace {

std::vector<uint64_t> even_counts(uint64_t numel, int size) {
  return std::vector<uint64_t>(static_cast<size_t>(size), numel / static_cast<uint64_t>(size));
}

uint64_t sum(const std::vector<uint64_t>& counts) {
  uint64_t total = 0;
  for (const uint64_t count : counts) total += count;
  return total;
}

constexpr std::string_view kNative = "native";

bool splits(Collective collective) {
  return collective == Collective::reduce_scatter || collective == Collective::all_gather ||
         collective == Collective::gather || collective == Collective::scatter ||
         collective == Collective::all_to_all;
}

}  // namespace

Group::Group(std::string name, int rank, int size, std::shared_ptr<Engine> engine, Planner planner,
             std::chrono::milliseconds timeout)
    : name_(std::move(name)),
      rank_(rank),
      size_(size),
      engine_(std::move(engine)),
      planner_(std::move(planner)),
      timeout_(timeout) {}

Group::~Group() { engine_->close(); }

Clock::time_point Group::deadline(std::optional<std::chrono::milliseconds> timeout) const {
  const auto limit = timeout.value_or(timeout_);
  // A caller's "for ever" (c10d uses years) must not overflow the clock.
  return coarse_now() + coarse_lag() +
         std::min<std::chrono::milliseconds>(limit, std::chrono::hours(24 * 365));
}

void Group::check(const Call& call) const {
  const auto refuse = [&](const std::string& text) {
    throw Error(Code::invalid_argument,
                std::string(name_of(call.collective)) + " in group '" + name_ + "': " + text);
  };
  if (rooted(call.collective) && (call.root < 0 || call.root >= size_))
    refuse("root " + std::to_string(call.root) + " is not a rank of a group of " +
           std::to_string(size_));
  if (splits(call.collective)) {
    const auto n = static_cast<size_t>(size_);
    for (const auto* counts : {&call.counts, &call.recv_counts})
      if (!counts->empty() && counts->size() != n)
        refuse(std::to_string(counts->size()) + " counts for " + std::to_string(size_) +
               " ranks; give one per rank");
    for (const auto* counts : {&call.counts, &call.recv_counts})
      for (const uint64_t count : *counts)  // a sum of larger ones may wrap around
        if (count > call.numel)
          refuse("a count is " + std::to_string(count) + " elements, the tensor has " +
                 std::to_string(call.numel));
    if (call.counts.empty() && call.numel % n != 0)
      refuse(std::to_string(call.numel) + " elements do not divide by " + std::to_string(size_) +
             " ranks; pad the tensor, or give counts");
    if (!call.counts.empty() && call.collective != Collective::all_to_all &&
        sum(call.counts) != call.numel)
      refuse("counts add up to " + std::to_string(sum(call.counts)) + " elements, the tensor has " +
             std::to_string(call.numel));
    if (call.collective == Collective::all_to_all &&
        call.counts.empty() != call.recv_counts.empty())
      refuse("give both input and output counts, or neither");
    if (call.collective == Collective::all_to_all && !call.counts.empty() &&
        call.counts[static_cast<size_t>(rank_)] != call.recv_counts[static_cast<size_t>(rank_)])
      refuse("rank " + std::to_string(rank_) + " sends itself " +
             std::to_string(call.counts[static_cast<size_t>(rank_)]) + " elements and expects " +
             std::to_string(call.recv_counts[static_cast<size_t>(rank_)]) + " from itself");
  }
  if (reduces(call.collective)) {
    const bool complex = call.dtype == DType::complex64 || call.dtype == DType::complex128;
    const bool floating = call.dtype == DType::float16 || call.dtype == DType::bfloat16 ||
                          call.dtype == DType::float32 || call.dtype == DType::float64 ||
                          is_float8(call.dtype);
    const bool bitwise =
        call.op == ReduceOp::band || call.op == ReduceOp::bor || call.op == ReduceOp::bxor;
    if ((floating && bitwise) ||
        (complex && call.op != ReduceOp::sum && call.op != ReduceOp::avg) ||
        call.dtype == DType::bytes || (call.dtype == DType::boolean && call.op == ReduceOp::avg))
      refuse(std::string("op ") + name_of(call.op) + " has no meaning for " + name_of(call.dtype));
  }
}

void Group::check_wire(const Call& call) const {
  const auto refuse = [&](const std::string& text) {
    throw Error(Code::invalid_argument, std::string(name_of(call.collective)) + " in group '" +
                                            name_ + "' with wire '" + name_of(call.wire) +
                                            "': " + text);
  };
  if (call.collective != Collective::all_reduce && call.collective != Collective::reduce_scatter &&
      call.collective != Collective::all_gather && call.collective != Collective::all_to_all)
    refuse("all_reduce, reduce_scatter, all_gather and all_to_all have a wire, others do not");
  if (call.dtype != DType::float32 && call.dtype != DType::bfloat16 && call.dtype != DType::float16)
    refuse(std::string("it codes float32, bfloat16 and float16, not ") + name_of(call.dtype) +
           "; leave the wire out");
  if (call.wire == Wire::bf16 && call.dtype == DType::float16)
    refuse("it would lose digits of float16 and save no byte; leave the wire out");
  if (reduces(call.collective) && call.op == ReduceOp::product)
    refuse("the error of a product has no bound; leave the wire out");
  if (call.residual == nullptr) return;
  if (call.collective != Collective::all_reduce || call.dtype != DType::float32)
    refuse("a residual belongs to an all_reduce of float32");
  if (call.op != ReduceOp::sum && call.op != ReduceOp::avg)
    refuse(std::string("a residual has no meaning for ") + name_of(call.op) + "; use sum or avg");
}

const std::string& Group::choose(const Call& call, uint64_t nbytes, bool coded) {
  if (!call.algorithm.empty()) return call.algorithm;
  const auto key = std::make_tuple(call.collective, rooted(call.collective) ? call.root : 0, coded,
                                   n_choices_.load());
  std::unique_lock lock(cache_mutex_);
  auto found = choices_.find(key);
  if (found == choices_.end()) {
    lock.unlock();
    Choices planned{planner_.choices(call.collective, std::get<1>(key), coded)};
    PYCOMM_CHECK(!planned.table.empty(), "the choice table is empty");
    lock.lock();
    found = choices_.emplace(key, std::move(planned)).first;
  }
  for (const auto& [max_nbytes, algorithm] : found->second.table)
    if (nbytes <= max_nbytes) return algorithm;
  return found->second.table.back().second;
}

const Program* Group::program(Collective collective, const std::string& algorithm, int root,
                              bool coded) {
  const auto key = std::make_tuple(collective, algorithm, rooted(collective) ? root : 0, coded);
  std::unique_lock lock(cache_mutex_);
  auto found = programs_.find(key);
  if (found == programs_.end()) {
    lock.unlock();
    auto planned =
        std::make_unique<Program>(planner_.program(collective, algorithm, std::get<2>(key), coded));
    planned->finish();
    PYCOMM_CHECK(planned->rank == rank_ && planned->n_ranks == size_,
                 "a program of another rank or group");
    lock.lock();
    found = programs_.emplace(key, std::move(planned)).first;
  }
  return found->second.get();
}

Launch Group::bind(const Call& call) {
  check(call);
  if (call.wire != Wire::none) check_wire(call);
  const bool on_device = engine_->on_device();
  if (on_device && call.must_be_finite)
    throw Error(Code::invalid_argument, std::string(name_of(call.collective)) + " in group '" +
                                            name_ +
                                            "': wire_nonfinite is of CPU tensors; leave it out");
  const bool crosses_coded = call.wire != Wire::none && engine_->spans_hosts();
  const bool coded = crosses_coded && !on_device;  // a device's engine codes by itself
  // Engines on host memory convert fp8; a device's reduces what it is given, or refuses.
  const bool widens = reduces(call.collective) && !on_device;
  const DType dtype = coded ? DType::float32 : widens ? reduced_as(call.dtype) : call.dtype;
  const size_t element = size_of(dtype);
  const bool exchange = call.collective == Collective::all_to_all;
  const bool uneven = !call.counts.empty();
  Launch launch;
  launch.dtype = dtype;
  if (on_device) launch.residual = call.residual;
  if (crosses_coded && on_device) {
    launch.wire = call.wire;
  } else if (coded) {
    launch.wire = call.wire;
    launch.residual = call.residual;
  } else if (call.residual != nullptr && !on_device) {
    std::fill_n(call.residual, call.numel, 0.0f);
  }
  if (call.must_be_finite) launch.must_be_finite = call.output;
  launch.op = call.op;
  launch.input = call.input;
  launch.output = call.output;
  launch.deadline = deadline(call.timeout);
  launch.stream = call.stream;
  launch.finish = call.finish;

  Fingerprint& print = launch.fingerprint;
  print.rank = rank_;
  print.collective = call.collective;
  print.dtype = call.dtype;
  print.op = reduces(call.collective) ? call.op : ReduceOp::sum;
  print.root = rooted(call.collective) ? call.root : 0;
  print.numel = exchange && uneven ? 0 : call.numel;
  print.has_counts = uneven;
  print.wire = call.wire;
  if (uneven && !exchange)
    print.counts_hash = fnv1a(call.counts.data(), call.counts.size() * sizeof(uint64_t));

  const uint64_t nbytes = call.numel * element;
  const uint64_t native_limit = engine_->native_nbytes(call.collective, !uneven);
  if (call.algorithm == kNative && nbytes > native_limit && !on_device)
    throw Error(Code::invalid_argument, std::string("the native path of ") +
                                            name_of(call.collective) + " takes at most " +
                                            std::to_string(native_limit) + " bytes" +
                                            (uneven ? " with uneven counts" : "") +
                                            " in this group; leave the algorithm to the group");
  bool native = (size_ > 1 || on_device) && !(on_device && crosses_coded) && native_limit > 0 &&
                nbytes <= native_limit && (call.algorithm.empty() || call.algorithm == kNative);
  if (!native && on_device && !crosses_coded) {
    // A device's engine does any size natively; where it has another way the planner chooses. An
    // average of integers has no other: it is rounded once.
    const bool once = call.algorithm.empty() && reduces(call.collective) &&
                      call.op == ReduceOp::avg && !is_floating(call.dtype);
    native = once || choose(call, nbytes, false) == kNative;
  }
  if (!native && call.collective != Collective::barrier) {
    // Uneven all_to_all goes pairwise: only its two ends know a piece's size, so nobody could
    // forward it.
    const std::string& algorithm = exchange && uneven && call.algorithm.empty()
                                       ? "pairwise"
                                       : choose(call, nbytes, crosses_coded);
    if (exchange && uneven && algorithm != "pairwise")
      throw Error(Code::invalid_argument,
                  "all_to_all with uneven counts runs 'pairwise', not '" + algorithm +
                      "': a rank in between does not know the size of what it forwards");
    launch.program = program(call.collective, algorithm, call.root, coded);
  } else if (!native) {
    // A barrier across hosts is an all_reduce of one byte: to have it, every rank must have given
    // it. (Of no bytes at all a rank would be done with the word of its neighbours.)
    Call one_byte;
    one_byte.collective = Collective::all_reduce;
    launch.program = program(Collective::all_reduce, choose(one_byte, 1, false), 0, false);
    launch.dtype = DType::uint8;
    launch.input = launch.output = &barrier_byte_;
  }
  if (launch.program) {
    const std::string& algorithm = launch.program->algorithm;
    print.algorithm_hash = fnv1a(algorithm.data(), algorithm.size());
    std::memcpy(print.algorithm, algorithm.data(),
                std::min(algorithm.size(), sizeof(print.algorithm)));
  } else {
    static const uint64_t hash = fnv1a(kNative.data(), kNative.size());
    print.algorithm_hash = hash;
    std::memcpy(print.algorithm, kNative.data(), kNative.size());
  }

  switch (call.collective) {
    case Collective::all_reduce:
    case Collective::reduce:
    case Collective::broadcast:
      launch.input_nbytes = launch.output_nbytes = nbytes;
      if (launch.program)
        launch.layout = (launch.program->calls.empty() ? Layout::cut : Layout::cut_alike)(
            call.numel, element, launch.program->n_chunks);
      break;
    case Collective::barrier:
      if (!launch.program) break;
      launch.input_nbytes = launch.output_nbytes = 1;
      launch.layout = Layout::cut(1, 1, launch.program->n_chunks);
      break;
    case Collective::reduce_scatter:
    case Collective::scatter:
    case Collective::all_gather:
    case Collective::gather: {
      const bool whole_input =
          call.collective == Collective::reduce_scatter || call.collective == Collective::scatter;
      const uint64_t piece = uneven ? call.counts[static_cast<size_t>(rank_)] * element
                                    : nbytes / static_cast<uint64_t>(size_);
      launch.input_nbytes = whole_input ? nbytes : piece;
      launch.output_nbytes = whole_input ? piece : nbytes;
      if (launch.program || uneven || engine_->on_device()) {
        const auto counts = uneven ? call.counts : even_counts(call.numel, size_);
        launch.layout = Layout::pieces(counts, element, rank_, whole_input, !whole_input);
      }
      break;
    }
    case Collective::all_to_all: {
      launch.input_nbytes = uneven ? sum(call.counts) * element : nbytes;
      launch.output_nbytes = uneven ? sum(call.recv_counts) * element : nbytes;
      if (!launch.program && !uneven && !engine_->on_device()) break;
      const auto send = uneven ? call.counts : even_counts(call.numel, size_);
      const auto recv = uneven ? call.recv_counts : send;
      launch.layout = Layout::exchange(send, recv, element, rank_);
      if (uneven) {
        launch.link_send_counts = send;
        launch.link_recv_counts = recv;
      }
      break;
    }
  }
  return launch;
}

void Group::run(const Call& call) { engine_->run(bind(call)); }

std::shared_ptr<Work> Group::start(const Call& call, std::shared_ptr<void> keep_alive) {
  return engine_->start(bind(call), std::move(keep_alive));
}

std::shared_ptr<Work> Group::start_together(const std::vector<Call>& calls,
                                            std::vector<Message> messages,
                                            std::optional<std::chrono::milliseconds> timeout,
                                            std::shared_ptr<void> keep_alive) {
  std::vector<Launch> launches;
  for (const Call& call : calls) launches.push_back(bind(call));
  for (Message& message : messages) {
    check_peer(message.is_send ? "send" : "recv", message.is_send ? "to" : "from", message.peer, 0);
    message.deadline = deadline(timeout);
  }
  return engine_->start_together(std::move(launches), std::move(messages), std::move(keep_alive));
}

void Group::check_peer(const char* what, const char* towards, int peer, int least) const {
  if (peer < least || peer >= size_ || peer == rank_)
    throw Error(Code::invalid_argument,
                std::string(what) + " in group '" + name_ + "': rank " + std::to_string(rank_) +
                    " cannot " + (least < 0 ? "receive " : "send ") + towards + " rank " +
                    std::to_string(peer) + " in a group of " + std::to_string(size_));
}

std::shared_ptr<Work> Group::send(const void* data, uint64_t nbytes, int peer, int64_t tag,
                                  std::optional<std::chrono::milliseconds> timeout,
                                  std::shared_ptr<void> keep_alive) {
  check_peer("send", "to", peer, 0);
  return engine_->send(data, nbytes, peer, tag, deadline(timeout), std::move(keep_alive));
}

std::shared_ptr<Work> Group::recv(void* data, uint64_t nbytes, int peer, int64_t tag,
                                  std::optional<std::chrono::milliseconds> timeout,
                                  std::shared_ptr<void> keep_alive) {
  check_peer("recv", "from", peer, -1);
  return engine_->recv(data, nbytes, peer, tag, deadline(timeout), std::move(keep_alive));
}

void Group::run_send(const void* data, uint64_t nbytes, int peer, int64_t tag,
                     std::optional<std::chrono::milliseconds> timeout) {
  check_peer("send", "to", peer, 0);
  engine_->run_send(data, nbytes, peer, tag, deadline(timeout));
}

int Group::run_recv(void* data, uint64_t nbytes, int peer, int64_t tag,
                    std::optional<std::chrono::milliseconds> timeout) {
  check_peer("recv", "from", peer, -1);
  return engine_->run_recv(data, nbytes, peer, tag, deadline(timeout));
}

}  // namespace pycomm
