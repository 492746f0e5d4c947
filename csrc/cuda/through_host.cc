// Collectives and messages of a CudaEngine as a courier's jobs: what the host's groups do with
// copies of the tensors, whole or one call of a program (pycomm/calls.py).
#include <algorithm>

#include "cuda/places.h"
#include "cuda/reduction.h"

namespace pycomm::cuda {
namespace {

std::chrono::milliseconds left_until(Clock::time_point deadline) {
  return std::max(std::chrono::milliseconds(1),
                  std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()));
}

// The launch as a call of a host's group, but for its memory.
Call call_of(const Launch& launch, int size) {
  const Fingerprint& print = launch.fingerprint;
  Call call;
  call.collective = print.collective;
  call.dtype = print.dtype;
  call.op = launch.op;
  call.root = print.root;
  call.wire = print.wire;
  if (print.collective == Collective::barrier) return call;
  const uint64_t element = size_of(print.dtype);
  call.numel = std::max(print.numel, std::max(launch.input_nbytes, launch.output_nbytes) / element);
  if (!print.has_counts) return call;
  call.counts = launch.link_send_counts;
  call.recv_counts = launch.link_recv_counts;
  if (print.collective != Collective::all_to_all)
    for (int rank = 0; rank < size; ++rank)
      call.counts.push_back(launch.layout.nbytes(rank) / element);
  return call;
}

void run_on(Group& group, Call& call, const std::string& what, Clock::time_point deadline) {
  call.timeout = left_until(deadline);
  try {
    group.run(call);
  } catch (const Error& error) {
    throw Error(error.code(), what + ", through the host: " + error.what());
  }
}

void* writable(const void* memory) { return const_cast<void*>(memory); }

}  // namespace

// Whether a launch of several calls goes so, or whole: NCCL must have what is inside hosts, and a
// wire is of the whole.
bool CudaEngine::goes_in_parts(const Launch& launch) const {
  const Fingerprint& print = launch.fingerprint;
  const bool once = print.op == ReduceOp::avg && !is_floating(print.dtype);
  return across_ != nullptr && print.wire == Wire::none &&
         (!reduces(print.collective) || (reduction_of(print.dtype, print.op) && !once));
}

void CudaEngine::carry(const Launch& launch, const std::string& what, Device::Stream stream) {
  Call call = call_of(launch, size_);
  Courier::Job job;
  job.one_buffer = call.collective == Collective::broadcast;
  if (launch.input != nullptr) job.in.push_back({writable(launch.input), launch.input_nbytes});
  if (launch.output != nullptr) job.out.push_back({launch.output, launch.output_nbytes});
  if (launch.residual != nullptr) job.lost = {launch.residual, call.numel * sizeof(float)};
  const bool gives = launch.input != nullptr || job.one_buffer;
  const bool gets = launch.output != nullptr || job.one_buffer;
  const bool loses = launch.residual != nullptr;
  job.exchange = [group = everyone_, what, deadline = launch.deadline, call, gives, gets, loses](
                     std::byte* in, std::byte* out, std::byte* lost) mutable {
    call.input = gives ? in : nullptr;
    call.output = gets ? out : nullptr;
    call.residual = loses ? reinterpret_cast<float*>(lost) : nullptr;
    run_on(*group, call, what, deadline);
  };
  courier_->put(std::move(job), stream);
}

// One of a program's calls, among ranks of several hosts.
void CudaEngine::carry_call(const Launch& launch, const SubCall& sub, Places& places,
                            const std::string& what, Device::Stream stream) {
  PYCOMM_CHECK(std::equal(sub.ranks.begin(), sub.ranks.end(), rail_.begin(), rail_.end()),
               "calls across hosts are of the ranks of one place");
  const int me = place_in(sub, rank_);
  const bool whole = sub.collective == Collective::all_reduce;
  Courier::Job job;
  for (size_t i = 0; i < sub.chunks.size(); ++i) {
    const int chunk = sub.chunks[i];
    if (const int from = route(sub, i).from; from == -1 || from == me)
      job.in.push_back({writable(places.read(chunk)), places.nbytes(chunk)});
  }
  for (size_t i = 0; i < sub.chunks.size(); ++i) {
    const int chunk = sub.chunks[i];
    const int to = route(sub, i).to;
    if (to != -1 && to != me) continue;
    job.out.push_back({places.write(chunk), places.nbytes(chunk)});
    places.written[static_cast<size_t>(chunk)] = 1;
  }
  uint64_t in_nbytes = 0, out_nbytes = 0;
  for (const auto& piece : job.in) in_nbytes += piece.nbytes;
  for (const auto& piece : job.out) out_nbytes += piece.nbytes;
  if (whole && in_nbytes == 0) return;
  Call call;
  call.collective = sub.collective;
  call.dtype = launch.fingerprint.dtype;
  call.op = launch.op;
  call.numel = std::max(in_nbytes, out_nbytes) / size_of(call.dtype);
  job.exchange = [group = across_, what, deadline = launch.deadline, call](
                     std::byte* in, std::byte* out, std::byte*) mutable {
    call.input = in;
    call.output = out;
    run_on(*group, call, what, deadline);
  };
  courier_->put(std::move(job), stream);
}

void CudaEngine::carry(const std::vector<Message>& messages, const std::string& what,
                       const std::shared_ptr<Group>& host, Courier& courier,
                       Device::Stream stream) {
  Courier::Job job;
  for (const Message& message : messages)
    (message.is_send ? job.in : job.out).push_back({message.data, message.nbytes});
  const auto peer_of = [&](const Message& message) {  // in a group of two it is the other one
    return host->size() == size_ ? message.peer : 1 - host->rank();
  };
  struct One {
    bool is_send;
    uint64_t nbytes;
    int peer;
    Clock::time_point deadline;
  };
  std::vector<One> all;
  for (const Message& message : messages)
    all.push_back({message.is_send, message.nbytes, peer_of(message), message.deadline});
  job.exchange = [host, what, all](std::byte* in, std::byte* out, std::byte*) {
    std::vector<std::shared_ptr<Work>> works;
    for (const One& one : all) {
      std::byte*& at = one.is_send ? in : out;
      const auto timeout = left_until(one.deadline);
      works.push_back(one.is_send ? host->send(at, one.nbytes, one.peer, 0, timeout, nullptr)
                                  : host->recv(at, one.nbytes, one.peer, 0, timeout, nullptr));
      at += one.nbytes;
    }
    try {
      for (const auto& work : works) work->wait(std::chrono::hours(24 * 365));  // own deadlines
    } catch (const Error& error) {
      throw Error(error.code(), what + ", through the host: " + error.what());
    }
  };
  courier.put(std::move(job), stream);
}

}  // namespace pycomm::cuda
