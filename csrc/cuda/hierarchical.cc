// Collectives of several calls (pycomm/calls.py): each partition of the ranks has a communicator,
// made by split when it is first used, or a way through the host, and a stream; a call waits for
// the calls before it that touched its chunks, and for no others, so that tiles are under way at
// once. All ranks start the calls in one order.
#include <algorithm>

#include "cuda/places.h"
#include "cuda/reduction.h"

namespace pycomm::cuda {

namespace {

// What crosses hosts: in these schedules all_reduce and nothing else.
bool is_coded(const Launch& launch, const SubCall& call) {
  return launch.wire != Wire::none && call.collective == Collective::all_reduce &&
         call.ranks.size() > 1;
}

}  // namespace

uint64_t CudaEngine::native_nbytes(Collective collective, bool even) const {
  const bool planned = collective == Collective::all_reduce ||
                       collective == Collective::reduce_scatter ||
                       collective == Collective::all_gather || collective == Collective::all_to_all;
  return planned && even && spans_hosts_ ? 0 : UINT64_MAX;
}

// REQUIRES: mutex_ is held. All ranks of the group call it, for the same partition.
CudaEngine::Layer& CudaEngine::layer(const Partition& partition, const std::vector<int32_t>& part,
                                     Clock::time_point deadline) {
  const auto found = layers_.find(partition);
  if (found != layers_.end()) return found->second;
  std::string ranks;
  for (const int32_t rank : part) ranks += (ranks.empty() ? "" : ", ") + std::to_string(rank);
  const int color =
      static_cast<int>(std::find(partition.begin(), partition.end(), part) - partition.begin());
  const int key = static_cast<int>(std::find(part.begin(), part.end(), rank_) - part.begin());
  std::shared_ptr<Communicator> made;
  if (courier_ == nullptr)
    made = communicator_->split(color, key, options_.max_ctas, me_ + ", among ranks " + ranks,
                                look_for_word_now_and_then(), deadline);
  else if (!std::equal(part.begin(), part.end(), rail_.begin(), rail_.end()))
    made = inside_;
  const auto stream = device_.new_stream();
  const std::lock_guard lock(communicators_mutex_);
  return layers_.emplace(partition, Layer{std::move(made), stream}).first->second;
}

// Memory for what passes this rank. REQUIRES: mutex_ is held.
std::byte* CudaEngine::partial_memory(uint64_t nbytes) {
  if (nbytes > partial_nbytes_) {
    // What is under way still uses the old one, which stays.
    const uint64_t larger = std::max(nbytes, 2 * partial_nbytes_);
    try {
      partials_.push_back(device_.allocate(larger));
    } catch (const Error& error) {
      throw Error(error.code(), me_ + ": " + std::to_string(larger >> 10) +
                                    " KiB of device memory for values on their way through this "
                                    "rank: " +
                                    error.what() +
                                    "; leave room, or leave smaller tensors to NCCL with "
                                    "PYCOMM_CUDA_HIERARCHICAL_BYTES");
    }
    partial_nbytes_ = larger;
  }
  return static_cast<std::byte*>(partials_.empty() ? nullptr : partials_.back());
}

void CudaEngine::run_program(const Launch& launch, const std::shared_ptr<Operation>& operation,
                             Device::Stream stream) {
  const Program& program = *launch.program;
  Places at{launch, rank_, nullptr, {}, {}};
  uint64_t needed = 0;
  const auto take = [&](uint64_t nbytes) { return std::exchange(needed, needed + nbytes); };
  at.place(take);
  std::vector<uint64_t> forms_offset;  // by step, of those whose values are coded
  for (const Step& step : program.steps) {
    const SubCall& call = program.calls[static_cast<size_t>(step.call)];
    needed = (needed + 15) / 16 * 16;
    forms_offset.push_back(take(is_coded(launch, call) ? forms_nbytes(launch, call) : 0));
  }
  at.partial = partial_memory(needed);

  const auto mark = [&](Device::Stream on) {
    const auto event = operation->inner.emplace_back(watch_->event());
    device_.record(event, on);
    return event;
  };
  const auto begun = mark(stream);
  std::vector<std::pair<Device::Event, Device::Stream>> ends(program.steps.size());
  std::vector<Device::Stream> entered;
  for (size_t i = 0; i < program.steps.size(); ++i) {
    const Step& step = program.steps[i];
    const SubCall& call = program.calls[static_cast<size_t>(step.call)];
    Layer& on = layer(program.partitions[static_cast<size_t>(call.partition)], call.ranks,
                      operation->deadline);
    if (std::find(entered.begin(), entered.end(), on.stream) == entered.end()) {
      device_.wait(on.stream, begun);
      entered.push_back(on.stream);
    }
    for (int32_t d = 0; d < step.dep_count; ++d) {
      const auto& [event, of] = ends[static_cast<size_t>(program.deps[step.dep_begin + d])];
      if (of != on.stream) device_.wait(on.stream, event);
    }
    const std::string what = operation->what + ", step " + std::to_string(i) + " of " +
                             std::to_string(program.steps.size()) + " (" +
                             name_of(call.collective) + ")";
    if (on.communicator == nullptr)
      carry_call(launch, call, at, what, on.stream);
    else if (is_coded(launch, call))
      run_coded(launch, call, at, at.partial + forms_offset[i], on, what);
    else
      on.communicator->run(
          what, look_for_word_now_and_then(), operation->deadline,
          [&](NcclComm* comm) { return enqueue_call(launch, call, at, comm, on.stream); });
    ends[i] = {mark(on.stream), on.stream};
  }
  for (const Device::Stream on : entered) device_.wait(stream, mark(on));
}

NcclResult CudaEngine::enqueue_call(const Launch& launch, const SubCall& call, Places& places,
                                    NcclComm* comm, Device::Stream stream) const {
  const NcclApi& api = *options_.api;
  const Fingerprint& print = launch.fingerprint;
  const auto reduction = reduces(print.collective) ? reduction_of(print.dtype, print.op)
                                                   : Reduction{NcclDType::uint8, NcclOp::sum, 1};
  const auto elements = [&](uint64_t nbytes) {
    return reduces(print.collective)
               ? nbytes / size_of(print.dtype) * static_cast<uint64_t>(reduction->elements)
               : nbytes;
  };
  NcclResult result = NcclResult::success;
  const auto note = [&](NcclResult one) {
    if (one != NcclResult::success && one != NcclResult::in_progress) result = one;
  };
  const auto n = call.ranks.size(), each = call.chunks.size() / n;
  const auto me = static_cast<size_t>(place_in(call, rank_));
  // One call of NCCL's where the chunks lie one after the other and are as long as each other.
  const auto regular = [&](auto&& place) {
    for (size_t i = 1; i < call.chunks.size(); ++i)
      if (place(call.chunks[i]) != place(call.chunks[i - 1]) + places.nbytes(call.chunks[0]) ||
          places.nbytes(call.chunks[i]) != places.nbytes(call.chunks[0]))
        return false;
    return true;
  };
  const auto read = [&](int chunk) { return places.read(chunk); };
  const auto write = [&](int chunk) -> const std::byte* { return places.write(chunk); };
  const int first = call.chunks[0];
  const uint64_t run = places.nbytes(first) * each;
  if (call.collective == Collective::all_to_all) {
    note(enqueue_exchange(call, places, comm, stream));
  } else if (call.collective == Collective::all_reduce) {
    for (const int chunk : call.chunks)
      if (places.nbytes(chunk) > 0)
        note(api.all_reduce(places.read(chunk), places.write(chunk), elements(places.nbytes(chunk)),
                            reduction->dtype, reduction->op, comm, stream));
  } else if (call.collective == Collective::reduce_scatter && each == 1 && regular(read)) {
    if (run > 0)
      note(api.reduce_scatter(places.read(first), places.write(call.chunks[me]), elements(run),
                              reduction->dtype, reduction->op, comm, stream));
  } else if (call.collective == Collective::all_gather && each == 1 && regular(write)) {
    if (run > 0)
      note(api.all_gather(places.read(call.chunks[me]), places.write(first), run, NcclDType::uint8,
                          comm, stream));
  } else {
    for (size_t i = 0; i < call.chunks.size(); ++i) {
      const int chunk = call.chunks[i];
      const size_t owner = i / each;
      const uint64_t nbytes = places.nbytes(chunk);
      if (nbytes == 0) continue;
      if (call.collective == Collective::reduce_scatter)
        note(api.reduce(places.read(chunk), owner == me ? places.write(chunk) : nullptr,
                        elements(nbytes), reduction->dtype, reduction->op, static_cast<int>(owner),
                        comm, stream));
      else
        note(api.broadcast(owner == me ? places.read(chunk) : places.write(chunk),
                           places.write(chunk), nbytes, NcclDType::uint8, static_cast<int>(owner),
                           comm, stream));
    }
  }
  for (size_t i = 0; i < call.chunks.size(); ++i)
    if (const int to = route(call, i).to; to == -1 || to == static_cast<int>(me))
      places.written.insert(call.chunks[i]);
  return result;
}

// What one rank gives another of a call's chunks: those for one destination of the whole collective
// as one message, since they lie together at both ends; any others one by one.
NcclResult CudaEngine::enqueue_exchange(const SubCall& call, const Places& places, NcclComm* comm,
                                        Device::Stream stream) const {
  const NcclApi& api = *options_.api;
  NcclResult result = NcclResult::success;
  const auto note = [&](NcclResult one) {
    if (one != NcclResult::success && one != NcclResult::in_progress) result = one;
  };
  const int me = place_in(call, rank_);
  for (size_t i = 0, end; i < call.chunks.size(); i = end) {
    const Route along = route(call, i);
    const int first = call.chunks[i];
    uint64_t nbytes = places.nbytes(first);
    // The sources follow one another, as their pieces in the destination's output.
    for (end = i + 1; end < call.chunks.size() && route(call, end) == along &&
                      call.chunks[end] == call.chunks[end - 1] + size_;
         ++end) {
      if (along.from == me)
        PYCOMM_CHECK(places.read(call.chunks[end]) == places.read(first) + nbytes,
                     "what goes on together lies together");
      nbytes += places.nbytes(call.chunks[end]);
    }
    if (nbytes == 0 || (along.from != me && along.to != me)) continue;
    if (along.from == along.to) {
      if (places.read(first) != places.write(first))
        device_.copy(places.write(first), places.read(first), nbytes, stream);
    } else if (along.from == me) {
      note(api.send(places.read(first), nbytes, NcclDType::uint8, along.to, comm, stream));
    } else {
      note(api.recv(places.write(first), nbytes, NcclDType::uint8, along.from, comm, stream));
    }
  }
  return result;
}

}  // namespace pycomm::cuda
