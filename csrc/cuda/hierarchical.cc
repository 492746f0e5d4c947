// Collectives of several calls (pycomm/calls.py): each partition of the ranks has a communicator,
// made by split when it is first used, and a stream; a call waits for the calls before it that
// touched its chunks, and for no others, so that tiles are under way at once. All ranks start the
// calls in one order.
//
// A chunk's value lies in the input until a call writes it, then in the output if it belongs to
// this rank's result, else in memory of the engine's.
#include <algorithm>

#include "cuda/engine.h"
#include "cuda/reduction.h"

namespace pycomm::cuda {

// Where each chunk's value is during one launch.
struct CudaEngine::Places {
  const Launch& launch;
  const int rank;
  std::byte* const partial;
  std::vector<bool> written;
  std::vector<uint64_t> partial_offset;  // of chunks that are not in the result

  bool in_result(int chunk) const {
    return launch.program->collective != Collective::reduce_scatter || chunk == rank;
  }
  uint64_t nbytes(int chunk) const { return launch.layout.nbytes(chunk); }
  const std::byte* read(int chunk) const {
    return written[static_cast<size_t>(chunk)]
               ? write(chunk)
               : static_cast<const std::byte*>(launch.input) + launch.layout.input_offset(chunk);
  }
  std::byte* write(int chunk) const {
    return in_result(chunk)
               ? static_cast<std::byte*>(launch.output) + launch.layout.output_offset(chunk)
               : partial + partial_offset[static_cast<size_t>(chunk)];
  }
};

namespace {

// What crosses hosts: in these schedules all_reduce and nothing else.
bool is_coded(const Launch& launch, const SubCall& call) {
  return launch.wire != Wire::none && call.collective == Collective::all_reduce &&
         call.ranks.size() > 1;
}

uint64_t numel_of(const Launch& launch, int chunk) {
  return launch.layout.nbytes(chunk) / size_of(launch.fingerprint.dtype);
}

uint64_t form_nbytes(const Launch& launch, int chunk) {
  const auto nbytes = static_cast<uint64_t>(
      quantised_nbytes(static_cast<int64_t>(numel_of(launch, chunk)), block_code(launch.wire)));
  return (nbytes + 15) / 16 * 16;
}

}  // namespace

// A coded all_reduce of a chunk: each rank codes its sum, all get all codes, and each adds what
// they stand for, its own too, in rank order: so all ranks end with the same bits. `forms`: this
// rank's own, then all ranks', for each chunk.
void CudaEngine::code(const Launch& launch, const SubCall& call, const Places& places,
                      std::byte* forms, Device::Stream stream) const {
  for (const int chunk : call.chunks) {
    device_.quantise(forms, places.read(chunk), numel_of(launch, chunk), launch.fingerprint.dtype,
                     block_code(launch.wire), stream);
    forms += form_nbytes(launch, chunk) * (call.ranks.size() + 1);
  }
}

NcclResult CudaEngine::exchange_forms(const Launch& launch, const SubCall& call, std::byte* forms,
                                      NcclComm* comm, Device::Stream stream) const {
  NcclResult result = NcclResult::success;
  for (const int chunk : call.chunks) {
    const uint64_t nbytes = form_nbytes(launch, chunk);
    if (nbytes > 0) {
      const NcclResult one =
          options_.api->all_gather(forms, forms + nbytes, nbytes, NcclDType::uint8, comm, stream);
      if (one != NcclResult::success && one != NcclResult::in_progress) result = one;
    }
    forms += nbytes * (call.ranks.size() + 1);
  }
  return result;
}

void CudaEngine::sum_forms(const Launch& launch, const SubCall& call, Places& places,
                           std::byte* forms, Device::Stream stream) const {
  const auto n = static_cast<int>(call.ranks.size());
  // The sums inside hosts are averages already.
  const float factor = launch.op == ReduceOp::avg ? 1.0f / static_cast<float>(n) : 1.0f;
  for (const int chunk : call.chunks) {
    const uint64_t nbytes = form_nbytes(launch, chunk);
    device_.dequantise_sum(places.write(chunk), forms + nbytes, n, static_cast<int64_t>(nbytes),
                           numel_of(launch, chunk), launch.fingerprint.dtype,
                           block_code(launch.wire), factor, stream);
    places.written[static_cast<size_t>(chunk)] = true;
    forms += nbytes * (call.ranks.size() + 1);
  }
}

uint64_t CudaEngine::native_nbytes(Collective collective, bool even) const {
  const bool planned = collective == Collective::all_reduce ||
                       collective == Collective::reduce_scatter ||
                       collective == Collective::all_gather;
  if (!planned || !even || !spans_hosts_ || options_.planned_nbytes == UINT64_MAX)
    return UINT64_MAX;
  return std::max<uint64_t>(options_.planned_nbytes, 1) - 1;
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
  auto made = communicator(deadline)->split(color, key, me_ + ", among ranks " + ranks, deadline);
  const auto stream = device_.new_stream();
  const std::lock_guard lock(communicators_mutex_);
  return layers_.emplace(partition, Layer{std::move(made), stream}).first->second;
}

void CudaEngine::run_program(const Launch& launch, const std::shared_ptr<Operation>& operation,
                             Device::Stream stream) {
  const Program& program = *launch.program;
  Places places{launch, rank_, nullptr,
                std::vector<bool>(static_cast<size_t>(program.n_chunks), false),
                std::vector<uint64_t>(static_cast<size_t>(program.n_chunks), 0)};
  uint64_t needed = 0;
  const auto take = [&](uint64_t nbytes) {
    return std::exchange(needed, needed + (nbytes + 15) / 16 * 16);
  };
  for (int chunk = 0; chunk < program.n_chunks; ++chunk) {
    if (places.in_result(chunk)) continue;
    places.partial_offset[static_cast<size_t>(chunk)] = take(places.nbytes(chunk));
  }
  std::vector<uint64_t> forms_offset;  // by step, of those whose values are coded
  for (const Step& step : program.steps) {
    const SubCall& call = program.calls[static_cast<size_t>(step.call)];
    uint64_t nbytes = 0;
    if (is_coded(launch, call))
      for (const int chunk : call.chunks)
        nbytes += form_nbytes(launch, chunk) * (call.ranks.size() + 1);
    forms_offset.push_back(take(nbytes));
  }
  if (needed > partial_nbytes_) {
    // What is under way still uses the old one, which stays.
    partial_nbytes_ = std::max(needed, 2 * partial_nbytes_);
    partials_.push_back(device_.allocate(partial_nbytes_));
  }
  Places at{launch, rank_, static_cast<std::byte*>(partials_.empty() ? nullptr : partials_.back()),
            std::move(places.written), std::move(places.partial_offset)};

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
    std::byte* const forms =
        static_cast<std::byte*>(partials_.empty() ? nullptr : partials_.back()) + forms_offset[i];
    const bool coded = is_coded(launch, call);
    if (coded) code(launch, call, at, forms, on.stream);
    on.communicator->run(operation->what + ", step " + std::to_string(i) + " of " +
                             std::to_string(program.steps.size()) + " (" +
                             name_of(call.collective) + ")",
                         operation->deadline, [&](NcclComm* comm) {
                           return coded ? exchange_forms(launch, call, forms, comm, on.stream)
                                        : enqueue_call(launch, call, at, comm, on.stream);
                         });
    if (coded) sum_forms(launch, call, at, forms, on.stream);
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
  const auto me = static_cast<size_t>(std::find(call.ranks.begin(), call.ranks.end(), rank_) -
                                      call.ranks.begin());
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
  if (call.collective == Collective::all_reduce) {
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
    if (call.collective != Collective::reduce_scatter || i / each == me)
      places.written[static_cast<size_t>(call.chunks[i])] = true;
  return result;
}

}  // namespace pycomm::cuda
