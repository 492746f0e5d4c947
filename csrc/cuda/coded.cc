// A coded all_reduce across hosts: each rank cuts its host's sums into a piece for each rank, codes
// them, and gives each rank its piece; that adds what all have given it, in rank order and in fp32,
// codes the sum, and all get all sums' codes. So every value is coded twice, whatever the number of
// hosts, and all ranks end with the same bits.
//
// What is lost goes to the launch's residual, in the units of what ranks give: where a rank coded
// its host's sum, and where it coded a result.
// Source: Tang et al., DoubleSqueeze, ICML 2019 (both codings fed back).
#include "cuda/places.h"

namespace pycomm::cuda {
namespace {

// A chunk as pieces of whole blocks, one for each rank of a call; the last ones shorter, or empty.
struct Pieces {
  uint64_t numel, each, form_nbytes;
  size_t element;

  Pieces(const Launch& launch, const SubCall& call, int chunk) {
    element = size_of(launch.fingerprint.dtype);
    numel = launch.layout.nbytes(chunk) / element;
    const auto blocks = static_cast<uint64_t>(n_blocks(static_cast<int64_t>(numel)));
    each = (blocks + call.ranks.size() - 1) / call.ranks.size() * kBlockNumel;
    const auto nbytes = static_cast<uint64_t>(
        quantised_nbytes(static_cast<int64_t>(each), block_code(launch.wire)));
    form_nbytes = (nbytes + 15) / 16 * 16;
  }
  uint64_t begin(size_t piece) const { return std::min(numel, piece * each); }
  uint64_t numel_of(size_t piece) const { return begin(piece + 1) - begin(piece); }
};

}  // namespace

// For each chunk this rank's codes by piece, in whose place come the sums' codes; then its own
// piece's codes, by rank.
uint64_t CudaEngine::forms_nbytes(const Launch& launch, const SubCall& call) const {
  uint64_t nbytes = 0;
  for (const int chunk : call.chunks)
    nbytes += 2 * call.ranks.size() * Pieces(launch, call, chunk).form_nbytes;
  return nbytes;
}

void CudaEngine::run_coded(const Launch& launch, const SubCall& call, Places& places,
                           std::byte* forms, Layer& on, const std::string& what) const {
  const NcclApi& api = *options_.api;
  const BlockCode code = block_code(launch.wire);
  const size_t n = call.ranks.size();
  const auto me = static_cast<size_t>(place_in(call, rank_));
  // The sums inside hosts are averages already; a residual is of what ranks give.
  const bool average = launch.op == ReduceOp::avg;
  const auto factor_of = [&](size_t ranks) { return average ? static_cast<float>(ranks) : 1.0f; };
  const float of_host = factor_of(static_cast<size_t>(size_) / n);
  const float of_result = factor_of(static_cast<size_t>(size_));
  const auto loss = [&](int chunk, uint64_t first, float factor) -> Loss {
    if (launch.residual == nullptr) return {};
    return {launch.residual + launch.layout.output_offset(chunk) / sizeof(float) + first, factor};
  };
  const auto each_chunk = [&](auto&& does) {
    std::byte* at = forms;
    for (const int chunk : call.chunks) {
      const Pieces pieces(launch, call, chunk);
      if (pieces.numel > 0) does(chunk, pieces, at, at + n * pieces.form_nbytes);
      at += 2 * n * pieces.form_nbytes;
    }
  };
  const auto run = [&](auto&& calls) {
    on.communicator->run(
        [&] { return what; }, look_for_word_now_and_then(), launch.deadline,
        [&](NcclComm* comm) {
          NcclResult result = NcclResult::success;
          each_chunk([&](int, const Pieces& pieces, std::byte* own, std::byte* given) {
            calls(comm, pieces, own, given, [&](NcclResult one) {
              if (one != NcclResult::success && one != NcclResult::in_progress) result = one;
            });
          });
          return result;
        });
  };

  each_chunk([&](int chunk, const Pieces& pieces, std::byte* own, std::byte* given) {
    for (size_t piece = 0; piece < n; ++piece) {
      const uint64_t first = pieces.begin(piece);
      std::byte* const to = (piece == me ? given : own) + piece * pieces.form_nbytes;
      device_.quantise(to, places.read(chunk) + first * pieces.element, pieces.numel_of(piece),
                       launch.fingerprint.dtype, code, loss(chunk, first, of_host), on.stream);
    }
  });
  run([&](NcclComm* comm, const Pieces& pieces, std::byte* own, std::byte* given, auto&& note) {
    const uint64_t nbytes = pieces.form_nbytes;
    for (size_t peer = 0; peer < n; ++peer) {
      if (peer == me) continue;
      note(api.send(own + peer * nbytes, nbytes, NcclDType::uint8, static_cast<int>(peer), comm,
                    on.stream));
      note(api.recv(given + peer * nbytes, nbytes, NcclDType::uint8, static_cast<int>(peer), comm,
                    on.stream));
    }
  });
  each_chunk([&](int chunk, const Pieces& pieces, std::byte* own, std::byte* given) {
    device_.requantise_sum(own + me * pieces.form_nbytes, given, static_cast<int>(n),
                           static_cast<int64_t>(pieces.form_nbytes), pieces.numel_of(me), code,
                           average ? 1.0f / static_cast<float>(n) : 1.0f,
                           loss(chunk, pieces.begin(me), of_result), on.stream);
  });
  run([&](NcclComm* comm, const Pieces& pieces, std::byte* own, std::byte*, auto&& note) {
    const uint64_t nbytes = pieces.form_nbytes;
    note(api.all_gather(own + me * nbytes, own, nbytes, NcclDType::uint8, comm, on.stream));
  });
  each_chunk([&](int chunk, const Pieces& pieces, std::byte* own, std::byte*) {
    for (size_t piece = 0; piece < n; ++piece)
      device_.dequantise_sum(places.write(chunk) + pieces.begin(piece) * pieces.element,
                             own + piece * pieces.form_nbytes, 1, 0, pieces.numel_of(piece),
                             launch.fingerprint.dtype, code, 1.0f, on.stream);
  });
  for (const int chunk : call.chunks) places.written[static_cast<size_t>(chunk)] = 1;
}

}  // namespace pycomm::cuda
