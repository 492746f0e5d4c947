// The interpreter over channels that stutter: one byte at a time, nothing for a while, ranks that
// get their turn in any order. Whatever the timing, results are exact.
#include <algorithm>
#include <numeric>
#include <random>

#include "cpu/interpreter.h"
#include "ranks.h"

using namespace pycomm;
using namespace pycomm::testing;

namespace {

constexpr size_t kAlign = 64;

// One direction between two ranks: every byte that was ever written, aligned as the shared rings
// are.
struct Pipe {
  std::vector<std::max_align_t> memory;
  size_t head = 0, tail = 0;
  explicit Pipe(size_t capacity) : memory((capacity + kAlign) / sizeof(std::max_align_t)) {}
  size_t begin() const {
    return (kAlign - reinterpret_cast<uintptr_t>(memory.data()) % kAlign) % kAlign;
  }
  std::byte* at(size_t position) {
    return reinterpret_cast<std::byte*>(memory.data()) + begin() + position;
  }
};
constexpr size_t kSmall = 64 << 10, kLarge = 4 << 20;  // more than a test writes

struct Faults {
  size_t most_bytes = SIZE_MAX;  // in one call
  unsigned refusals = 0;         // of 16 calls, this many do nothing
  size_t lost_after = SIZE_MAX;  // the link breaks once this many bytes were written
  size_t flipped = SIZE_MAX;     // the byte written at this position arrives wrong
};

class FaultyChannel final : public cpu::Channel {
 public:
  FaultyChannel(Pipe& out, Pipe& in, const Faults& faults, uint64_t seed)
      : out_(out), in_(in), faults_(faults), rng_(seed) {}
  size_t write(const void* data, size_t nbytes) override {
    if (bytes_written_ >= faults_.lost_after) throw Error(Code::peer_lost, "the link broke");
    const size_t n = some(nbytes);
    std::memcpy(out_.at(out_.tail), data, n);
    if (faults_.flipped - bytes_written_ < n)
      *out_.at(out_.tail + faults_.flipped - bytes_written_) ^= std::byte{0xff};
    out_.tail += n;
    bytes_written_ += n;
    return n;
  }
  std::span<const std::byte> readable(size_t at_least) override {
    const size_t here = in_.tail - std::min(in_.tail, in_.head);
    if (here == 0 || refuses()) return {};
    return {in_.at(in_.head), std::clamp(some(here), std::min(at_least, here), here)};
  }
  void consume(size_t nbytes) override { in_.head += nbytes; }
  size_t read(void* data, size_t nbytes) override {
    const size_t n = some(std::min(nbytes, in_.tail - std::min(in_.tail, in_.head)));
    std::memcpy(data, in_.at(in_.head), n);
    in_.head += n;
    return n;
  }
  void align_write() override { out_.tail = (out_.tail + kAlign - 1) / kAlign * kAlign; }
  void align_read() override { in_.head = (in_.head + kAlign - 1) / kAlign * kAlign; }
  void flush() override { flushed_ = !refuses(); }
  bool flushed() const override { return flushed_; }
  void poison(const Status&) override {}
  size_t segment_nbytes() const override { return kSmall; }
  std::string describe() const override { return "a faulty link"; }

 private:
  bool refuses() { return rng_() % 16 < faults_.refusals; }
  size_t some(size_t nbytes) {
    if (nbytes == 0 || refuses()) return 0;
    return 1 + rng_() % std::min(nbytes, faults_.most_bytes);
  }
  Pipe& out_;
  Pipe& in_;
  const Faults faults_;
  std::mt19937_64 rng_;
  bool flushed_ = true;
};

// All ranks of a group in one thread, each with its interpreter.
class Ranks {
 public:
  Ranks(int n, const Faults& faults, uint64_t seed, size_t capacity = kSmall)
      : n_(n), rng_(seed), interpreters_(static_cast<size_t>(n)) {
    pipes_.assign(static_cast<size_t>(n * n), Pipe(capacity));
    for (int from = 0; from < n; ++from)
      for (int to = 0; to < n; ++to)
        channels_.push_back(
            std::make_unique<FaultyChannel>(pipe(from, to), pipe(to, from), faults, rng_()));
  }
  // Runs launches[i] as rank i, until all are done; false where nobody gets on any more.
  bool run(const std::vector<Launch>& launches, uint64_t tile_nbytes) {
    std::vector<bool> done(static_cast<size_t>(n_), false);
    // A late rank finds what the others sent meanwhile.
    for (int rank = 0; rank < n_; ++rank)
      interpreters_[static_cast<size_t>(rank)].begin(
          launches[static_cast<size_t>(rank)],
          [this, rank](int peer) -> cpu::Channel& {
            return *channels_[static_cast<size_t>(rank * n_ + peer)];
          },
          tile_nbytes);
    for (int idle = 0; idle < 20'000;) {
      if (std::all_of(done.begin(), done.end(), [](bool d) { return d; })) return true;
      const size_t rank = rng_() % static_cast<size_t>(n_);
      if (done[rank]) continue;
      bool moved = false;
      done[rank] = interpreters_[rank].advance(launches[rank], &moved);
      idle = moved || done[rank] ? 0 : idle + 1;
    }
    return false;
  }
  const cpu::Interpreter& interpreter(int rank) const {
    return interpreters_[static_cast<size_t>(rank)];
  }

 private:
  Pipe& pipe(int from, int to) { return pipes_[static_cast<size_t>(from * n_ + to)]; }
  const int n_;
  std::mt19937_64 rng_;
  std::vector<Pipe> pipes_;
  std::vector<std::unique_ptr<FaultyChannel>> channels_;
  std::vector<cpu::Interpreter> interpreters_;
};

Launch launch_of(const Program& program, DType dtype, ReduceOp op, uint64_t numel, void* data) {
  Launch launch;
  launch.program = &program;
  launch.dtype = dtype;
  launch.op = op;
  launch.input = launch.output = data;
  launch.input_nbytes = launch.output_nbytes = numel * size_of(dtype);
  launch.layout = Layout::cut(numel, size_of(dtype), program.n_chunks);
  launch.fingerprint.collective = program.collective;
  launch.fingerprint.dtype = dtype;
  launch.fingerprint.op = op;
  launch.fingerprint.numel = numel;
  launch.fingerprint.rank = program.rank;
  return launch;
}

std::vector<Program> programs_of(Collective collective, int n) {
  std::vector<Program> programs;
  for (int rank = 0; rank < n; ++rank) {
    programs.push_back(ring_program(collective, n, rank));
    programs.back().finish();
  }
  return programs;
}

// T's values are small integers: exact in any order.
template <class T>
void check_all_reduce(DType dtype, int n, uint64_t numel, const Faults& faults,
                      uint64_t tile_nbytes, uint64_t seed) {
  const auto programs = programs_of(Collective::all_reduce, n);
  const size_t parts = size_of(dtype) / sizeof(T);
  std::vector<std::vector<T>> data(static_cast<size_t>(n));
  std::vector<Launch> launches;
  for (int rank = 0; rank < n; ++rank) {
    auto& mine = data[static_cast<size_t>(rank)];
    for (uint64_t i = 0; i < numel * parts; ++i)
      mine.push_back(static_cast<T>((i * 3 + static_cast<uint64_t>(rank)) % 11));
    launches.push_back(
        launch_of(programs[static_cast<size_t>(rank)], dtype, ReduceOp::sum, numel, mine.data()));
  }
  Ranks ranks(n, faults, seed, numel > 1000 ? kLarge : kSmall);
  const std::string what = std::to_string(n) + " ranks, " + std::to_string(numel) + " " +
                           name_of(dtype) + ", tiles of " + std::to_string(tile_nbytes) +
                           ", seed " + std::to_string(seed);
  if (!ranks.run(launches, tile_nbytes))
    return ::testing::fail(__FILE__, __LINE__, "stuck: " + what);
  for (const auto& mine : data)
    for (uint64_t i = 0; i < numel * parts; ++i) {
      T expected = 0;
      for (int rank = 0; rank < n; ++rank)
        expected =
            static_cast<T>(expected + static_cast<T>((i * 3 + static_cast<uint64_t>(rank)) % 11));
      if (mine[i] != expected)
        return ::testing::fail(__FILE__, __LINE__, "element " + std::to_string(i) + ": " + what);
    }
}

}  // namespace

TEST(all_reduce_is_exact_byte_by_byte_and_out_of_turn) {
  uint64_t seed = 0;
  for (const Faults& faults :
       {Faults{}, Faults{.most_bytes = 1, .refusals = 4}, Faults{.most_bytes = 7, .refusals = 8},
        Faults{.most_bytes = 5000, .refusals = 12}})
    for (const int n : {1, 2, 3, 5})
      for (const uint64_t tile : {0, 64, 256, 4096})
        for (const uint64_t numel : {0, 1, 4, 5, 63, 64, 65, 700}) {
          check_all_reduce<float>(DType::float32, n, numel, faults, tile, ++seed);
          check_all_reduce<uint8_t>(DType::uint8, n, numel, faults, tile, ++seed);
          check_all_reduce<double>(DType::complex128, n, numel, faults, tile, ++seed);
        }
}

TEST(large_pieces_flow_through_in_segments) {
  for (const uint64_t tile : {0, 128 * 1024})
    for (const int n : {2, 3})
      check_all_reduce<int32_t>(DType::int32, n, 200'001, {.most_bytes = 30'000, .refusals = 6},
                                tile, 9);
}

TEST(one_interpreter_runs_one_program_after_another) {
  const int n = 3;
  const auto reduce = programs_of(Collective::all_reduce, n),
             exchange = programs_of(Collective::all_to_all, n);
  Ranks ranks(n, {.most_bytes = 20, .refusals = 6}, 5);
  for (int repeat = 0; repeat < 10; ++repeat) {
    const uint64_t numel = 17 * static_cast<uint64_t>(repeat);
    std::vector<std::vector<int32_t>> data(n, std::vector<int32_t>(numel, repeat));
    std::vector<Launch> launches;
    for (int rank = 0; rank < n; ++rank)
      launches.push_back(
          launch_of(reduce[rank], DType::int32, ReduceOp::sum, numel, data[rank].data()));
    ASSERT_TRUE(ranks.run(launches, 64));
    for (const auto& mine : data) EXPECT_TRUE(mine == std::vector<int32_t>(numel, n * repeat));

    // all_to_all with uneven counts, some of them 0: as many tiles as a rank's own pieces need,
    // which differ between ranks.
    const auto count = [&](uint64_t from, uint64_t to) {
      return (from * 5 + to * 3 + static_cast<uint64_t>(repeat)) % 4 * 37;
    };
    std::vector<std::vector<int32_t>> inputs(n), outputs(n), expected(n);
    launches.clear();
    for (uint64_t me = 0; me < n; ++me) {
      std::vector<uint64_t> sends, recvs;
      for (uint64_t peer = 0; peer < n; ++peer) {
        sends.push_back(count(me, peer));
        recvs.push_back(count(peer, me));
        for (uint64_t i = 0; i < count(me, peer); ++i)
          inputs[me].push_back(static_cast<int32_t>(me * 10'000 + peer * 1000 + i));
        for (uint64_t i = 0; i < count(peer, me); ++i)
          expected[me].push_back(static_cast<int32_t>(peer * 10'000 + me * 1000 + i));
      }
      outputs[me].assign(expected[me].size(), -1);
      Launch launch = launch_of(exchange[me], DType::int32, ReduceOp::sum, 0, nullptr);
      launch.input = inputs[me].data();
      launch.output = outputs[me].data();
      launch.layout = Layout::exchange(sends, recvs, 4, static_cast<int>(me));
      launch.link_send_counts = sends;
      launch.link_recv_counts = recvs;
      launches.push_back(std::move(launch));
    }
    ASSERT_TRUE(ranks.run(launches, 64));
    EXPECT_TRUE(outputs == expected);
  }
}

TEST(a_link_that_breaks_at_any_byte_is_an_error) {
  const int n = 3;
  const auto programs = programs_of(Collective::all_reduce, n);
  for (size_t lost_after = 0; lost_after < 64 + 2 * 2 * 400; lost_after += 37) {
    std::vector<std::vector<float>> data(n, std::vector<float>(300, 1));
    std::vector<Launch> launches;
    for (int rank = 0; rank < n; ++rank)
      launches.push_back(
          launch_of(programs[rank], DType::float32, ReduceOp::sum, 300, data[rank].data()));
    Ranks ranks(n, {.most_bytes = 50, .refusals = 3, .lost_after = lost_after}, lost_after);
    EXPECT_THROWS("the link broke", ranks.run(launches, 0));
  }
}

TEST(a_peer_that_says_something_else_is_a_mismatch) {
  const auto programs = programs_of(Collective::all_reduce, 2);
  for (const size_t flipped :
       {8, 16, 17, 18, 20, 24, 40}) {  // sequence, collective, dtype, op, root, numel, algorithm
    std::vector<std::vector<float>> data(2, std::vector<float>(10, 1));
    std::vector<Launch> launches;
    for (int rank = 0; rank < 2; ++rank)
      launches.push_back(
          launch_of(programs[rank], DType::float32, ReduceOp::sum, 10, data[rank].data()));
    Ranks ranks(2, {.most_bytes = 9, .flipped = flipped}, flipped);
    EXPECT_THROWS("collective mismatch: rank ", ranks.run(launches, 0));
  }
}

TEST(a_rank_says_for_whom_it_waits_and_for_nobody_else) {
  const int n = 4;
  const auto programs = programs_of(Collective::all_reduce, n);
  std::vector<std::vector<float>> data(n, std::vector<float>(100, 1));
  std::vector<Launch> launches;
  for (int rank = 0; rank < n; ++rank)
    launches.push_back(
        launch_of(programs[rank], DType::float32, ReduceOp::sum, 100, data[rank].data()));
  // Rank 0 never comes: in the end everybody waits for the rank before it in the ring.
  std::vector<Pipe> pipes(n * n, Pipe(kSmall));
  std::vector<std::unique_ptr<FaultyChannel>> channels;
  for (int from = 0; from < n; ++from)
    for (int to = 0; to < n; ++to)
      channels.push_back(
          std::make_unique<FaultyChannel>(pipes[from * n + to], pipes[to * n + from], Faults{}, 1));
  std::vector<cpu::Interpreter> interpreters(n);
  for (int rank = 1; rank < n; ++rank)
    interpreters[rank].begin(
        launches[rank], [&](int peer) -> cpu::Channel& { return *channels[rank * n + peer]; }, 0);
  for (int turn = 0; turn < 1000; ++turn)
    for (int rank = 1; rank < n; ++rank) {
      bool moved = false;
      EXPECT_TRUE(!interpreters[rank].advance(launches[rank], &moved));
    }
  EXPECT_TRUE(interpreters[1].blocked_on(launches[1]) == std::vector<int>{0});
  EXPECT_TRUE(interpreters[2].blocked_on(launches[2]) == std::vector<int>{1});
  EXPECT_TRUE(interpreters[3].blocked_on(launches[3]) == (std::vector<int>{0, 2}));
  EXPECT_TRUE(!interpreters[1].all_entered() && interpreters[2].all_entered());
  EXPECT_TRUE(interpreters[1]
                  .describe_wait(launches[1])
                  .find("rank 0 (a faulty link), which has not entered") == 0);
}
