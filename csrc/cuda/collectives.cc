// One collective as NCCL's calls: what NCCL has, and what is made of its reduces, broadcasts and
// messages because it has no such call, or none with uneven counts.
#include "cuda/engine.h"
#include "cuda/reduction.h"

namespace pycomm::cuda {
namespace {

const std::byte* input_of(const Launch& launch) {
  return static_cast<const std::byte*>(launch.input);
}
std::byte* output_of(const Launch& launch) { return static_cast<std::byte*>(launch.output); }

bool even(const Launch& launch) { return !launch.fingerprint.has_counts; }

bool goes_by_pieces(const Launch& launch) {
  const Collective collective = launch.fingerprint.collective;
  return collective == Collective::gather || collective == Collective::scatter ||
         collective == Collective::all_to_all || !even(launch);
}

// An all_to_all that NCCL has a call for, with this rank's own piece in it.
bool is_one_exchange(const Launch& launch, const NcclApi& api) {
  return api.all_to_all != nullptr && launch.fingerprint.collective == Collective::all_to_all &&
         even(launch) && launch.input != launch.output;
}

}  // namespace

void CudaEngine::require_no_capture(const std::string& what, Device::Stream stream) const {
  if (through_host_ && device_.capturing(stream))
    throw Error(Code::invalid_argument,
                me_ + ": " + what +
                    ": it goes through the host between hosts, which no graph can capture; see "
                    "PYCOMM_CUDA_BETWEEN_HOSTS in docs/cuda.md");
}

// The operation of a launch that NCCL can do, with its number. Throws before anything is sent.
std::shared_ptr<Operation> CudaEngine::describe(const Launch& launch) {
  require_sound();
  const Fingerprint& print = launch.fingerprint;
  const auto refuse = [&](const std::string& text) {
    throw Error(Code::invalid_argument,
                me_ + ": " + std::string(name_of(print.collective)) + ": " + text);
  };
  require_no_capture(name_of(print.collective), launch.stream);
  if (launch.wire != Wire::none && (print.collective != Collective::all_reduce ||
                                    (launch.wire != Wire::fp8 && launch.wire != Wire::int8) ||
                                    (print.op != ReduceOp::sum && print.op != ReduceOp::avg)))
    refuse(std::string("wire '") + name_of(launch.wire) +
           "': on devices sum and avg of all_reduce have a wire, fp8 or int8");
  if (launch.program != nullptr && launch.program->calls.empty())
    refuse("algorithm '" + launch.program->algorithm +
           "' is one of the CPU engine's; leave the choice to NCCL");
  if (!through_host_ && reduces(print.collective) && !reduction_of(print.dtype, print.op)) {
    const bool converts = size_of(print.dtype) == 2 || is_float8(print.dtype);
    refuse(std::string("NCCL has no ") + name_of(print.op) + " of " + name_of(print.dtype) +
           (converts && nccl_dtype(print.dtype) == std::nullopt
                ? "; convert it, to float32 or int32 for example"
                : "; use sum, avg, product, min or max"));
  }
  if (launch.program != nullptr && reduces(print.collective) && print.op == ReduceOp::avg &&
      !is_floating(print.dtype))
    refuse("the average of integers cannot be taken in two steps; use sum, or algorithm 'native'");
  auto operation = std::make_shared<Operation>();
  Fingerprint numbered = print;
  numbered.sequence = sequence_;
  operation->what = numbered.describe();
  operation->sequence = sequence_++;
  operation->deadline = launch.deadline;
  return operation;
}

NcclResult CudaEngine::enqueue(const Launch& launch, NcclComm* comm, Device::Stream stream) const {
  const NcclApi& api = *options_.api;
  const Fingerprint& print = launch.fingerprint;
  const auto reduction = reduction_of(print.dtype, print.op);
  const auto elements = [&](uint64_t nbytes) {
    return nbytes / size_of(print.dtype) * static_cast<uint64_t>(reduction->elements);
  };
  if (print.collective == Collective::barrier)
    return api.all_reduce(scratch_, scratch_, 1, NcclDType::int32, NcclOp::sum, comm, stream);
  if (print.numel == 0 && even(launch)) return NcclResult::success;
  if (is_one_exchange(launch, api))
    return api.all_to_all(launch.input, launch.output,
                          launch.input_nbytes / static_cast<uint64_t>(size_), NcclDType::uint8,
                          comm, stream);
  if (goes_by_pieces(launch)) return enqueue_pieces(launch, comm, stream);
  switch (print.collective) {
    case Collective::all_reduce:
      return api.all_reduce(launch.input, launch.output, elements(launch.input_nbytes),
                            reduction->dtype, reduction->op, comm, stream);
    case Collective::reduce:
      return api.reduce(launch.input, launch.output, elements(launch.input_nbytes),
                        reduction->dtype, reduction->op, print.root, comm, stream);
    case Collective::broadcast:
      return api.broadcast(launch.input != nullptr ? launch.input : launch.output, launch.output,
                           launch.output_nbytes, NcclDType::uint8, print.root, comm, stream);
    case Collective::all_gather:
      return api.all_gather(launch.input, launch.output, launch.input_nbytes, NcclDType::uint8,
                            comm, stream);
    case Collective::reduce_scatter:
      return api.reduce_scatter(launch.input, launch.output, elements(launch.output_nbytes),
                                reduction->dtype, reduction->op, comm, stream);
    default:
      return NcclResult::success;  // the others go by pieces
  }
}

// Piece by piece: what NCCL has no call for, or none with uneven counts.
NcclResult CudaEngine::enqueue_pieces(const Launch& launch, NcclComm* comm,
                                      Device::Stream stream) const {
  const NcclApi& api = *options_.api;
  const Fingerprint& print = launch.fingerprint;
  const Layout& layout = launch.layout;
  NcclResult result = NcclResult::success;
  const auto note = [&](NcclResult one) {
    if (one != NcclResult::success && one != NcclResult::in_progress) result = one;
  };
  const auto send = [&](const void* data, uint64_t nbytes, int to) {
    if (nbytes > 0) note(api.send(data, nbytes, NcclDType::uint8, to, comm, stream));
  };
  const auto recv = [&](void* data, uint64_t nbytes, int from) {
    if (nbytes > 0) note(api.recv(data, nbytes, NcclDType::uint8, from, comm, stream));
  };
  const uint64_t mine =
      layout.nbytes(print.collective == Collective::all_to_all ? rank_ * size_ + rank_ : rank_);
  for (int peer = 0; peer < size_; ++peer) {
    switch (print.collective) {
      case Collective::all_gather:
        if (const uint64_t nbytes = layout.nbytes(peer); nbytes > 0) {
          std::byte* const place = output_of(launch) + layout.output_offset(peer);
          note(api.broadcast(peer == rank_ ? launch.input : place, place, nbytes, NcclDType::uint8,
                             peer, comm, stream));
        }
        break;
      case Collective::reduce_scatter:
        if (const uint64_t nbytes = layout.nbytes(peer); nbytes > 0) {
          const auto reduction = *reduction_of(print.dtype, print.op);
          note(api.reduce(input_of(launch) + layout.input_offset(peer),
                          peer == rank_ ? launch.output : nullptr,
                          nbytes / size_of(print.dtype) * static_cast<uint64_t>(reduction.elements),
                          reduction.dtype, reduction.op, peer, comm, stream));
        }
        break;
      case Collective::gather:
        if (peer == rank_) break;
        if (rank_ == print.root)
          recv(output_of(launch) + layout.output_offset(peer), layout.nbytes(peer), peer);
        else if (peer == print.root)
          send(launch.input, mine, peer);
        break;
      case Collective::scatter:
        if (peer == rank_) break;
        if (rank_ == print.root)
          send(input_of(launch) + layout.input_offset(peer), layout.nbytes(peer), peer);
        else if (peer == print.root)
          recv(launch.output, mine, peer);
        break;
      case Collective::all_to_all:
        if (peer == rank_) break;
        send(input_of(launch) + layout.input_offset(rank_ * size_ + peer),
             layout.nbytes(rank_ * size_ + peer), peer);
        recv(output_of(launch) + layout.output_offset(peer * size_ + rank_),
             layout.nbytes(peer * size_ + rank_), peer);
        break;
      default:
        break;
    }
  }
  return result;
}

// What a rank gives itself.
void CudaEngine::copy_own(const Launch& launch, Device::Stream stream) const {
  const Fingerprint& print = launch.fingerprint;
  const Layout& layout = launch.layout;
  const bool exchange = print.collective == Collective::all_to_all;
  if (!exchange && print.collective != Collective::gather &&
      print.collective != Collective::scatter)
    return;
  if (!exchange && print.root != rank_) return;
  if (launch.program != nullptr || (print.numel == 0 && even(launch))) return;
  if (is_one_exchange(launch, *options_.api)) return;
  const int chunk = exchange ? rank_ * size_ + rank_ : rank_;
  const std::byte* const from = input_of(launch) + layout.input_offset(chunk);
  std::byte* const to = output_of(launch) + layout.output_offset(chunk);
  if (layout.nbytes(chunk) > 0 && from != to) device_.copy(to, from, layout.nbytes(chunk), stream);
}

}  // namespace pycomm::cuda
