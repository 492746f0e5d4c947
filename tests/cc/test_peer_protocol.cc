// The all_reduce of peers (cuda/peer_protocol.h) on the CPU: each block of each rank is a thread,
// flags are atomics. Results are the CPU engine's kernels' bits, in rank order; who waits for a
// rank that is not there leaves at the deadline, and so does everyone.
#include <array>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <thread>

#include "cpu/reduce.h"
#include "fake_nccl/peer_machine.h"
#include "testing.h"

using namespace pycomm;
using namespace pycomm::cuda;
using fake::Bf16;
using HostMachine = fake::PeerMachine;

namespace {

struct Buffers {
  Buffers(int n, int64_t capacity) : capacity(capacity) {
    for (int rank = 0; rank < n; ++rank)
      memory.emplace_back(static_cast<char*>(std::aligned_alloc(
          256, static_cast<size_t>(peer_buffer_nbytes(capacity)) / 256 * 256 + 256)));
    for (char* each : memory)
      std::memset(each, 0, static_cast<size_t>(peer_buffer_nbytes(capacity)));
  }
  ~Buffers() {
    for (char* each : memory) std::free(each);
  }
  std::vector<char*> memory;
  const int64_t capacity;
};

template <class T>
void run_rank(const Buffers& buffers, int rank, int n_blocks, bool two_shot, uint32_t epoch,
              const T* in, T* out, int64_t numel, ReduceOp op, uint64_t timeout_ns = 20'000'000'000,
              uint32_t tag = 7) {
  PeerArguments args{};
  for (size_t r = 0; r < buffers.memory.size(); ++r) args.buffers[r] = buffers.memory[r];
  args.rank = rank;
  args.n_ranks = static_cast<int>(buffers.memory.size());
  args.n_blocks = n_blocks;
  args.epoch = epoch;
  args.tag = tag;
  args.capacity = buffers.capacity;
  args.input = in;
  args.output = out;
  args.numel = numel;
  args.op = op;
  args.timeout_ns = timeout_ns;
  std::vector<std::thread> blocks;
  for (int block = 0; block < n_blocks; ++block)
    blocks.emplace_back([&args, block, two_shot, rank, epoch] {
      HostMachine machine{static_cast<int>((rank * 37 + epoch * 11 + block) % 5) * 20};
      peer_all_reduce_block<T>(args, block, two_shot, machine);
    });
  for (auto& block : blocks) block.join();
}

template <class T>
void check_all() {
  for (const int n : {1, 2, 3, 8})
    for (const bool two_shot : {false, true})
      for (const int64_t numel : {1, 7, 8, 9, 1000}) {
        const Buffers buffers(n, 4096);
        const int n_blocks = numel > 100 ? 3 : 1;
        std::vector<std::thread> ranks;
        std::atomic<int> wrong{0};
        for (int rank = 0; rank < n; ++rank)
          ranks.emplace_back([&, rank] {
            for (uint32_t epoch = 1; epoch <= 6; ++epoch) {  // areas are used again
              const auto op = static_cast<ReduceOp>(
                  std::array{ReduceOp::sum, ReduceOp::max, ReduceOp::product}[epoch % 3]);
              const auto value = [&](int of, int64_t i) {
                return static_cast<float>((of * 7 + i * 3 + epoch) % 11) * 0.37f - 1.7f;
              };
              const auto fill = [&](int of, std::vector<T>& x) {
                for (int64_t i = 0; i < numel; ++i)
                  x[static_cast<size_t>(i)] = HostMachine().narrow<T>(value(of, i));
              };
              std::vector<T> mine(static_cast<size_t>(numel)), expected(mine.size());
              std::vector<float> sum(mine.size());
              for (int of = 0; of < n; ++of) {
                fill(of, mine);
                std::vector<float> wide(mine.size());
                for (size_t i = 0; i < mine.size(); ++i) wide[i] = HostMachine().widen(mine[i]);
                if (of == 0)
                  sum = wide;
                else
                  cpu::reduce(sum.data(), sum.data(), wide.data(), sum.size(), DType::float32, op);
              }
              for (size_t i = 0; i < sum.size(); ++i) expected[i] = HostMachine().narrow<T>(sum[i]);
              fill(rank, mine);
              // Odd epochs off their 16 bytes, and in place.
              std::vector<T> buffer(mine.size() + 1);
              T* const at = buffer.data() + epoch % 2;
              std::memcpy(at, mine.data(), mine.size() * sizeof(T));
              run_rank(buffers, rank, n_blocks, two_shot, epoch, at, at, numel, op);
              wrong += std::memcmp(at, expected.data(), expected.size() * sizeof(T)) != 0;
            }
          });
        for (auto& rank : ranks) rank.join();
        EXPECT_EQ(wrong.load(), 0);
        EXPECT_EQ(buffers.memory.size(), static_cast<size_t>(n));
      }
}

}  // namespace

TEST(parts_cover_a_range_once) {
  for (int64_t length : {0, 1, 5, 64, 1001})
    for (int n : {1, 2, 3, 8, 64}) {
      int64_t at = 10;
      for (int i = 0; i < n; ++i) {
        const Range part = part_of({10, 10 + length}, n, i);
        EXPECT_EQ(part.begin, std::min(at, 10 + length));
        at = part.end;
      }
      EXPECT_EQ(at, 10 + length);
    }
}

TEST(one_and_two_shot_give_the_cpu_kernels_bits_in_rank_order) {
  check_all<float>();
  check_all<Bf16>();
}

TEST(ranks_fit_on_a_device_only_where_all_their_blocks_do_at_once) {
  EXPECT_TRUE(peers_fit(1, 64, 64));
  EXPECT_TRUE(!peers_fit(1, 64, 63));
  EXPECT_TRUE(peers_fit(kMaxPeers, kMaxPeerBlocks, kMaxPeers * kMaxPeerBlocks));
  EXPECT_TRUE(!peers_fit(kMaxPeers, kMaxPeerBlocks, kMaxPeers * kMaxPeerBlocks - 1));
}

TEST(a_rank_that_is_not_there_ends_the_launch_of_all_others) {
  const Buffers buffers(3, 4096);
  const auto began = std::chrono::steady_clock::now();
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < 2; ++rank)
    ranks.emplace_back([&, rank] {
      float x[4] = {1, 2, 3, 4};
      // Rank 1 would wait much longer: it is told by rank 0.
      run_rank(buffers, rank, 1, true, 1, x, x, 4, ReduceOp::sum,
               rank == 0 ? 50'000'000 : 30'000'000'000);
    });
  for (auto& rank : ranks) rank.join();
  EXPECT_TRUE(std::chrono::steady_clock::now() - began < std::chrono::seconds(10));
  for (char* memory : buffers.memory)
    EXPECT_EQ(reinterpret_cast<PeerControl*>(memory)->error, kPeerTimedOut);
}

TEST(ranks_that_make_different_calls_are_all_told) {
  for (const bool two_shot : {false, true}) {
    const Buffers buffers(3, 4096);
    std::vector<std::thread> ranks;
    for (int rank = 0; rank < 3; ++rank)
      ranks.emplace_back([&, rank] {
        float x[4] = {1, 2, 3, 4};
        const auto tag = static_cast<uint32_t>(rank == 1 ? 5 : 7);
        run_rank(buffers, rank, 1, two_shot, 1, x, x, 4, ReduceOp::sum, 30'000'000'000, tag);
      });
    for (auto& rank : ranks) rank.join();
    for (char* memory : buffers.memory)
      EXPECT_EQ(reinterpret_cast<PeerControl*>(memory)->error, kPeerMismatch);
  }
}
