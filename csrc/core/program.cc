#include "core/program.h"

#include <algorithm>
#include <map>

namespace pycomm {

void Program::finish() {
  std::map<int, PeerSteps> by_peer;
  copies.clear();
  n_rounds = 0;
  for (size_t i = 0; i < steps.size(); ++i) {
    const Step& step = steps[i];
    const std::string where =
        "step " + std::to_string(i) + " of " + name_of(collective) + " '" + algorithm + "'";
    PYCOMM_CHECK(step.chunk >= 0 && step.chunk < n_chunks, where);
    PYCOMM_CHECK(step.scratch_slot < n_scratch, where);
    PYCOMM_CHECK(step.dep_begin >= 0 && step.dep_count >= 0 &&
                     static_cast<size_t>(step.dep_begin) + static_cast<size_t>(step.dep_count) <=
                         deps.size(),
                 where);
    for (int32_t d = 0; d < step.dep_count; ++d) {
      const int32_t dep = deps[step.dep_begin + d];
      PYCOMM_CHECK(dep >= 0 && dep < static_cast<int32_t>(i), where);
      PYCOMM_CHECK(step.kind == StepKind::call || steps[dep].chunk == step.chunk, where);
    }
    const bool reads = step.kind != StepKind::recv, writes = step.kind != StepKind::send;
    const bool scratch = (reads && step.source == Buffer::scratch) ||
                         (writes && step.destination == Buffer::scratch);
    PYCOMM_CHECK(!scratch || step.scratch_slot >= 0, where);
    PYCOMM_CHECK((step.flags & kCoded) == 0 || step.kind != StepKind::copy, where);
    PYCOMM_CHECK(step.flags != kSealed || step.kind != StepKind::send, where);
    n_rounds = std::max(n_rounds, step.round + 1);
    const auto index = static_cast<int32_t>(i);
    switch (step.kind) {
      case StepKind::copy:
        copies.push_back(index);
        break;
      case StepKind::send:
      case StepKind::recv:
      case StepKind::recv_reduce: {
        PYCOMM_CHECK(step.peer >= 0 && step.peer < n_ranks && step.peer != rank, where);
        PeerSteps& peer = by_peer[step.peer];
        peer.peer = step.peer;
        (step.kind == StepKind::send ? peer.sends : peer.recvs).push_back(index);
        break;
      }
      case StepKind::call: {
        PYCOMM_CHECK(step.call >= 0 && step.call < static_cast<int32_t>(calls.size()), where);
        const SubCall& call = calls[static_cast<size_t>(step.call)];
        PYCOMM_CHECK(call.partition >= 0 && call.partition < static_cast<int>(partitions.size()) &&
                         !call.ranks.empty(),
                     where);
        const size_t n = call.ranks.size();
        const size_t runs = call.collective == Collective::all_reduce   ? 1
                            : call.collective == Collective::all_to_all ? n * n
                                                                        : n;
        PYCOMM_CHECK(!call.chunks.empty() && call.chunks.size() % runs == 0, where);
        for (const int32_t chunk : call.chunks) PYCOMM_CHECK(chunk >= 0 && chunk < n_chunks, where);
        break;
      }
    }
  }
  peers.clear();
  for (auto& [peer, lists] : by_peer) peers.push_back(std::move(lists));
}

Layout Layout::cut(uint64_t numel, size_t element_bytes, int n_chunks) {
  Layout layout;
  const auto k = static_cast<uint64_t>(n_chunks);
  layout.starts_.resize(k + 1);
  for (uint64_t i = 0; i <= k; ++i)
    layout.starts_[i] = (numel / k * i + std::min(i, numel % k)) * element_bytes;
  layout.max_nbytes_ = layout.starts_[1];
  return layout;
}

Layout Layout::cut_alike(uint64_t numel, size_t element_bytes, int n_chunks) {
  const uint64_t block = std::max<uint64_t>(1, 16 / element_bytes),
                 k = static_cast<uint64_t>(n_chunks);
  const uint64_t piece = ((numel + k - 1) / k + block - 1) / block * block;
  Layout layout;
  layout.starts_.resize(k + 1);
  for (uint64_t i = 0; i <= k; ++i) layout.starts_[i] = std::min(i * piece, numel) * element_bytes;
  layout.max_nbytes_ = layout.starts_[1];
  return layout;
}

namespace {
std::vector<uint64_t> prefix_sums(const std::vector<uint64_t>& counts, size_t element_bytes) {
  std::vector<uint64_t> sums(counts.size() + 1, 0);
  for (size_t i = 0; i < counts.size(); ++i) sums[i + 1] = sums[i] + counts[i] * element_bytes;
  return sums;
}
uint64_t largest(const std::vector<uint64_t>& counts) {
  return counts.empty() ? 0 : *std::max_element(counts.begin(), counts.end());
}
}  // namespace

Layout Layout::pieces(const std::vector<uint64_t>& counts, size_t element_bytes, int rank,
                      bool whole_input, bool whole_output) {
  Layout layout;
  layout.starts_ = prefix_sums(counts, element_bytes);
  layout.max_nbytes_ = largest(counts) * element_bytes;
  layout.rank_ = rank;
  layout.whole_input_ = whole_input;
  layout.whole_output_ = whole_output;
  return layout;
}

Layout Layout::exchange(const std::vector<uint64_t>& send_counts,
                        const std::vector<uint64_t>& recv_counts, size_t element_bytes, int rank) {
  Layout layout;
  layout.starts_ = prefix_sums(send_counts, element_bytes);
  layout.ends_ = prefix_sums(recv_counts, element_bytes);
  layout.transit_bytes_ = send_counts.empty() ? 0 : send_counts[0] * element_bytes;
  layout.max_nbytes_ = std::max(largest(send_counts), largest(recv_counts)) * element_bytes;
  layout.n_ = static_cast<int>(send_counts.size());
  layout.rank_ = rank;
  return layout;
}

}  // namespace pycomm
