// How fast the kernels of an expert exchange are (gpu_timing.h): 4096 tokens of a prefill and 128
// of a decode, 7168 wide in bfloat16, each to 8 of 256 experts, which are on 8 ranks. Rows are
// expanded into experts' order, combined back, and coded in fp8 into a buffer for each rank. Bytes:
// each token's row is read, or written, once, each expert's row once.
#include <numeric>
#include <random>

#include "core/wire.h"
#include "cuda/moe.h"
#include "gpu_timing.h"

using namespace pycomm;

namespace {

constexpr int64_t kWidth = 7168, kChoices = 8, kExperts = 256, kRanks = 8;

template <class T>
T* on_device(const std::vector<T>& from) {
  void* memory = nullptr;
  require(cudaMalloc(&memory, from.size() * sizeof(T)));
  require(cudaMemcpy(memory, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
  return static_cast<T*>(memory);
}

// Which token each expert's row is of; by expert, those of one in the order of tokens. And of each
// token's slots, which row and where on its rank.
struct Routing {
  std::vector<int64_t> token, buffer, to, row_of_slot, offsets;
  std::vector<float> weights;
  explicit Routing(int64_t n_tokens) {
    std::mt19937 random(std::random_device{}());
    std::vector<std::vector<int64_t>> slots(kExperts);
    std::vector<int64_t> experts(kExperts);
    std::iota(experts.begin(), experts.end(), 0);
    for (int64_t t = 0; t < n_tokens; ++t) {
      std::shuffle(experts.begin(), experts.end(), random);
      for (int64_t k = 0; k < kChoices; ++k)
        slots[static_cast<size_t>(experts[static_cast<size_t>(k)])].push_back(t * kChoices + k);
    }
    for (auto* of_slots : {&row_of_slot, &buffer, &to})
      of_slots->resize(static_cast<size_t>(n_tokens * kChoices));
    std::vector<int64_t> filled(kRanks, 0);
    for (int64_t expert = 0; expert < kExperts; ++expert)
      for (const int64_t slot : slots[static_cast<size_t>(expert)]) {
        const int64_t rank = expert / (kExperts / kRanks);
        row_of_slot[static_cast<size_t>(slot)] = static_cast<int64_t>(token.size());
        token.push_back(slot / kChoices);
        buffer[static_cast<size_t>(slot)] = rank;
        to[static_cast<size_t>(slot)] = filled[static_cast<size_t>(rank)]++;
      }
    for (int64_t t = 0; t <= n_tokens; ++t) offsets.push_back(t * kChoices);
    weights.assign(row_of_slot.size(), 1.0f / kChoices);
  }
};

// Rows of tokens and rows of experts; by turn.
struct Buffers {
  std::vector<char*> tokens, rows;
};

void add_tasks(std::vector<Task>& tasks, int64_t n_tokens, const Buffers& in, const Buffers& out) {
  const Routing routing(n_tokens);
  const auto n = static_cast<int64_t>(routing.token.size());
  const auto *token = on_device(routing.token), *buffer = on_device(routing.buffer),
             *to = on_device(routing.to), *row_of_slot = on_device(routing.row_of_slot),
             *offsets = on_device(routing.offsets);
  const float* weights = on_device(routing.weights);
  const auto row_nbytes = static_cast<size_t>(kWidth) * 2;
  const auto coded_nbytes = static_cast<size_t>(pycomm::coded_nbytes(Wire::fp8, kWidth));
  const size_t numel = static_cast<size_t>(n * kWidth);
  const size_t of_tokens = static_cast<size_t>(n_tokens) * row_nbytes;
  const size_t of_rows = static_cast<size_t>(n) * row_nbytes;
  const std::string suffix = " T=" + std::to_string(n_tokens);
  tasks.push_back({"moe expand" + suffix, numel, of_tokens + of_rows, [=, &in, &out](int turn) {
                     const void* const source = in.tokens[static_cast<size_t>(turn)];
                     return cuda::expand_rows(out.rows[static_cast<size_t>(turn)],
                                              std::span(&source, 1), nullptr, token, nullptr, n,
                                              kWidth, DType::bfloat16, nullptr);
                   }});
  tasks.push_back(
      {"moe combine-reduce" + suffix, numel, of_tokens + of_rows, [=, &in, &out](int turn) {
         const void* const source = in.rows[static_cast<size_t>(turn)];
         return cuda::combine_rows(out.tokens[static_cast<size_t>(turn)], DType::bfloat16,
                                   std::span(&source, 1), DType::bfloat16, nullptr, row_of_slot,
                                   offsets, weights, n_tokens, kWidth, nullptr);
       }});
  // A buffer for each rank, one after the other, as long as its rows.
  std::vector<int64_t> rows_of(kRanks, 0);
  for (const int64_t rank : routing.buffer) ++rows_of[static_cast<size_t>(rank)];
  tasks.push_back({"moe quantise+pack fp8" + suffix, numel,
                   of_tokens + static_cast<size_t>(n) * coded_nbytes, [=, &in, &out](int turn) {
                     std::vector<void*> buffers;
                     char* at = out.rows[static_cast<size_t>(turn)];
                     for (const int64_t n_rows : rows_of) {
                       buffers.push_back(at);
                       at += (static_cast<size_t>(n_rows) * coded_nbytes + 15) / 16 * 16;
                     }
                     return cuda::encode_rows(buffers, offsets, buffer, to,
                                              in.tokens[static_cast<size_t>(turn)], n_tokens,
                                              kWidth, DType::bfloat16, nullptr);
                   }});
}

}  // namespace

int main() try {
  constexpr int64_t kMostTokens = 4096;
  const size_t of_tokens = static_cast<size_t>(kMostTokens * kWidth) * 2;
  const int n_turns = turns_past_l2(static_cast<size_t>(128 * kWidth * 2 * kChoices));
  std::vector<uint16_t> values(of_tokens / 2);
  std::mt19937 random(std::random_device{}());
  for (uint16_t& value : values)  // signs and mantissas at random, magnitudes of 0.5 to 2
    value = static_cast<uint16_t>((random() & 0x80ff) | 0x3f00);
  Buffers in, out;
  for (int turn = 0; turn < n_turns; ++turn)
    for (auto* list : {&in.tokens, &in.rows, &out.tokens, &out.rows}) {
      const size_t times = list == &in.rows || list == &out.rows ? kChoices : 1;
      void* memory = nullptr;
      require(cudaMalloc(&memory, of_tokens * times + 16 * kRanks));
      for (size_t i = 0; i < times; ++i)
        require(cudaMemcpy(static_cast<char*>(memory) + i * of_tokens, values.data(), of_tokens,
                           cudaMemcpyHostToDevice));
      list->push_back(static_cast<char*>(memory));
    }
  std::vector<Task> tasks;
  for (const int64_t n_tokens : {kMostTokens, int64_t{128}}) add_tasks(tasks, n_tokens, in, out);
  measure(tasks, n_turns, [&](const Task&, int turn) {
    require(cudaMemset(out.tokens[static_cast<size_t>(turn)], 0xa5, of_tokens));
    require(cudaMemset(out.rows[static_cast<size_t>(turn)], 0xa5, of_tokens * kChoices));
  });
} catch (const std::exception& error) {
  std::fprintf(stderr, "gpu_moe: %s\n", error.what());
  return 1;
}
