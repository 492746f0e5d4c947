// What hierarchical.cc and coded.cc know of a launch of several calls: which way a call's chunks
// go, and where each chunk's value is.
//
// A chunk's value lies in the input until a call writes it, then in the output if it belongs to
// this rank's result, else in memory of the engine's.
#pragma once

#include <algorithm>
#include <functional>
#include <unordered_map>
#include <unordered_set>

#include "cuda/engine.h"

namespace pycomm::cuda {

// Which of a call's ranks give and get its i-th chunk, as indices into them; -1: all.
struct Route {
  int from, to;
  bool operator==(const Route&) const = default;
};

inline Route route(const SubCall& call, size_t i) {
  const size_t n = call.ranks.size();
  switch (call.collective) {
    case Collective::reduce_scatter:
      return {-1, static_cast<int>(i / (call.chunks.size() / n))};
    case Collective::all_gather:
      return {static_cast<int>(i / (call.chunks.size() / n)), -1};
    case Collective::all_to_all: {
      const size_t run = i / (call.chunks.size() / (n * n));
      return {static_cast<int>(run / n), static_cast<int>(run % n)};
    }
    default:
      return {-1, -1};
  }
}

inline int place_in(const SubCall& call, int rank) {
  return static_cast<int>(std::find(call.ranks.begin(), call.ranks.end(), rank) -
                          call.ranks.begin());
}

// Where each chunk's value is during one launch.
struct CudaEngine::Places {
  const Launch& launch;
  const int rank;
  std::byte* partial = nullptr;
  std::unordered_map<int, uint64_t> partial_offset;  // of chunks that only pass this rank
  std::vector<char> written;                         // by chunk

  bool in_result(int chunk) const {
    const Program& program = *launch.program;
    if (program.collective == Collective::all_to_all) return chunk % program.n_ranks == rank;
    return program.collective != Collective::reduce_scatter || chunk == rank;
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
               : partial + partial_offset.at(chunk);
  }

  // Gives each chunk that is written here and read by a later call a place, in that call's order:
  // so that what goes on together lies together. take(nbytes): an offset.
  void place(const std::function<uint64_t(uint64_t)>& take) {
    std::unordered_set<int> passing;
    for (const Step& step : launch.program->steps) {
      const SubCall& call = launch.program->calls[static_cast<size_t>(step.call)];
      const int me = place_in(call, rank);
      for (size_t i = 0; i < call.chunks.size(); ++i) {
        const int chunk = call.chunks[i];
        const auto [from, to] = route(call, i);
        if ((from == -1 || from == me) && passing.contains(chunk) &&
            !partial_offset.contains(chunk))
          partial_offset.emplace(chunk, take(nbytes(chunk)));
        if ((to == -1 || to == me) && !in_result(chunk)) passing.insert(chunk);
      }
    }
  }
};

}  // namespace pycomm::cuda
