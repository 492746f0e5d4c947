// Groups, collectives, sizes, types, messages, threads and asynchronous work, all at once and every
// result verified. Ranks are threads, so that the sanitizers see both ends. The seed decides what
// is called; PYCOMM_STRESS_SEED repeats a run, PYCOMM_STRESS_S says for how many seconds it goes
// on.
#include <algorithm>
#include <cstdlib>
#include <random>

#include "ranks.h"

using namespace pycomm;
using namespace pycomm::testing;

namespace {

constexpr auto kLimit = std::chrono::seconds(40);

uint64_t from_environment(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr ? std::strtoull(text, nullptr, 10) : otherwise;
}

// Small integers: exact in every type and in any order.
uint64_t value(uint64_t rank, uint64_t turn, uint64_t i) { return (i * 7 + rank * 3 + turn) % 5; }

// One operation of a group, as its script has it: the same on all ranks.
struct Turn {
  uint64_t number = 0;
  Collective collective = Collective::barrier;
  bool message = false;  // each rank sends to the next and receives from the one before
  bool asynchronous = false;
  uint64_t piece = 0;  // elements per rank, or of the whole
  int root = 0;
};

Turn next_turn(std::mt19937_64& rng, uint64_t number, int n, bool one_host) {
  constexpr Collective native[] = {
      Collective::all_reduce, Collective::all_to_all,     Collective::barrier,
      Collective::broadcast,  Collective::reduce_scatter, Collective::all_gather,
      Collective::reduce,     Collective::gather,         Collective::scatter};
  constexpr uint64_t limits[] = {2, 16, 3000, 20'000, 90'000};
  Turn turn;
  turn.number = number;
  turn.collective = native[rng() % (one_host ? 9 : 3)];  // the ring planner has no others
  turn.message = n > 1 && rng() % 5 == 0;
  turn.asynchronous = rng() % 2 == 0;
  turn.piece = rng() % limits[rng() % 5];
  turn.root = static_cast<int>(rng() % static_cast<uint64_t>(n));
  return turn;
}

// A turn under way on one rank, with its memory and what must come out.
template <class T>
struct Running {
  std::vector<T> input, output, expected;
  std::vector<std::shared_ptr<Work>> works;
  std::string what;

  void start(Group& group, DType dtype, const Turn& turn) {
    const auto n = static_cast<uint64_t>(group.size()), me = static_cast<uint64_t>(group.rank());
    const auto root = static_cast<uint64_t>(turn.root);
    const uint64_t piece = turn.piece;
    const auto fill = [&](std::vector<T>& to, uint64_t rank, uint64_t begin, uint64_t count) {
      for (uint64_t i = begin; i < begin + count; ++i)
        to.push_back(static_cast<T>(value(rank, turn.number, i)));
    };
    const auto sums = [&](uint64_t begin, uint64_t count) {
      for (uint64_t i = begin; i < begin + count; ++i) {
        uint64_t sum = 0;
        for (uint64_t r = 0; r < n; ++r) sum += value(r, turn.number, i);
        expected.push_back(static_cast<T>(sum));
      }
    };
    what = "group '" + group.name() + "' of " + std::to_string(n) + ", turn " +
           std::to_string(turn.number) + ", " + (turn.message ? "messages" : "collective ") +
           (turn.message ? "" : name_of(turn.collective)) + " of " + std::to_string(piece) + " " +
           name_of(dtype);
    if (turn.message) {
      fill(input, me, 0, piece);
      fill(expected, (me + n - 1) % n, 0, piece);
      output.resize(piece);
      const auto tag = static_cast<int64_t>(turn.number);
      const auto recv = [&] {
        works.push_back(group.recv(output.data(), piece * sizeof(T),
                                   tag % 3 == 0 ? -1 : static_cast<int>((me + n - 1) % n), tag, {},
                                   nullptr));
      };
      if (tag % 2 == 0) recv();
      works.push_back(group.send(input.data(), piece * sizeof(T), static_cast<int>((me + 1) % n),
                                 tag, {}, nullptr));
      if (tag % 2 != 0) recv();
      return;
    }
    Call call;
    call.collective = turn.collective;
    call.dtype = dtype;
    call.root = turn.root;
    call.numel = piece * n;
    switch (turn.collective) {
      case Collective::all_reduce:
      case Collective::reduce:
        call.numel = piece;
        fill(input, me, 0, piece);
        if (turn.collective == Collective::all_reduce || me == root) {
          output = input;
          sums(0, piece);
        }
        break;
      case Collective::broadcast:
        call.numel = piece;
        fill(output, me, 0, piece);
        fill(expected, root, 0, piece);
        break;
      case Collective::reduce_scatter:
        fill(input, me, 0, piece * n);
        sums(me * piece, piece);
        break;
      case Collective::all_gather:
      case Collective::gather:
        fill(input, me, 0, piece);
        if (turn.collective == Collective::all_gather || me == root)
          for (uint64_t r = 0; r < n; ++r) fill(expected, r, 0, piece);
        break;
      case Collective::scatter:
        if (me == root) fill(input, me, 0, piece * n);
        fill(expected, root, me * piece, piece);
        break;
      case Collective::all_to_all:
        fill(input, me, 0, piece * n);
        for (uint64_t r = 0; r < n; ++r) fill(expected, r, me * piece, piece);
        break;
      case Collective::barrier:
        call.numel = 0;
        break;
    }
    if (output.empty()) output.assign(expected.size(), static_cast<T>(99));
    const bool in_place = turn.collective == Collective::all_reduce ||
                          turn.collective == Collective::broadcast ||
                          (turn.collective == Collective::reduce && me == root);
    call.output = output.data();
    call.input = in_place ? output.data() : input.data();
    if (turn.asynchronous)
      works.push_back(group.start(call, nullptr));
    else
      group.run(call);
  }

  void finish() {
    for (const auto& work : works) work->wait(kLimit);
    if (output == expected) return;
    const auto [at, wanted] = std::mismatch(output.begin(), output.end(), expected.begin());
    ::testing::fail(__FILE__, __LINE__,
                    what + ": element " + std::to_string(at - output.begin()) + " is " +
                        std::to_string(static_cast<double>(*at)) + ", not " +
                        std::to_string(static_cast<double>(*wanted)));
  }
};

// A group's script as one of its ranks plays it: up to four turns are under way at once.
template <class T>
void play(Group& group, DType dtype, bool one_host, uint64_t seed, int turns) {
  std::mt19937_64 rng(seed), own(seed + 77 * static_cast<uint64_t>(group.rank()));
  std::vector<std::unique_ptr<Running<T>>> open;
  for (int number = 1; number <= turns; ++number) {
    const Turn turn = next_turn(rng, static_cast<uint64_t>(number), group.size(), one_host);
    open.push_back(std::make_unique<Running<T>>());
    open.back()->start(group, dtype, turn);
    // A message completes with its receive: whoever waits for one too early waits for himself.
    while (open.size() > 4 || (!open.empty() && own() % 3 == 0)) {
      open.front()->finish();
      open.erase(open.begin());
    }
  }
  for (const auto& running : open) running->finish();
}

void stress(const std::vector<std::string>& hosts, uint64_t seed) {
  std::mt19937_64 rng(seed);
  const int n = static_cast<int>(hosts.size()), n_groups = 1 + static_cast<int>(rng() % 4);
  const int turns = 20 + static_cast<int>(rng() % 40);
  std::vector<std::vector<int>> members;
  for (int g = 0; g < n_groups; ++g) {
    std::vector<int> all(static_cast<size_t>(n));
    for (int i = 0; i < n; ++i) all[static_cast<size_t>(i)] = i;
    std::shuffle(all.begin(), all.end(), rng);
    all.resize(2 + rng() % static_cast<uint64_t>(n - 1));
    members.push_back(std::move(all));
  }
  run_ranks(
      hosts,
      [&](Group& world, const std::shared_ptr<cpu::Endpoint>& endpoint, Store& store) {
        std::vector<std::thread> players;
        for (int g = 0; g < n_groups; ++g) {
          const auto& ranks = members[static_cast<size_t>(g)];
          const auto at = std::find(ranks.begin(), ranks.end(), world.rank());
          if (at == ranks.end()) continue;
          // A group has a thread of its own on each rank; so it is made in any order, too.
          players.emplace_back([&, g, rank = static_cast<int>(at - ranks.begin())] {
            try {
              const std::string name = "group" + std::to_string(g);
              const int size = static_cast<int>(ranks.size());
              auto own = std::make_shared<PrefixStore>(store, name + "/");
              Group group(name, rank, size,
                          cpu::CpuEngine::create(
                              endpoint, [own] { return own; }, name, name, ranks, kLimit),
                          ring_planner(size, rank), kLimit);
              const bool one_host = std::all_of(ranks.begin(), ranks.end(),
                                                [&](int r) { return endpoint->local(r); });
              const uint64_t script = seed * 31 + static_cast<uint64_t>(g);
              switch ((seed + static_cast<uint64_t>(g)) % 3) {
                case 0:
                  return play<float>(group, DType::float32, one_host, script, turns);
                case 1:
                  return play<uint8_t>(group, DType::uint8, one_host, script, turns);
                default:
                  return play<int64_t>(group, DType::int64, one_host, script, turns);
              }
            } catch (const std::exception& error) {
              ::testing::fail(name_of(DType::bytes), world.rank(), error.what());
            }
          });
        }
        const bool one_host =
            std::all_of(hosts.begin(), hosts.end(), [&](const auto& h) { return h == hosts[0]; });
        play<int32_t>(world, DType::int32, one_host, seed, turns);
        for (auto& player : players) player.join();
      },
      kLimit);
}

}  // namespace

TEST(everything_at_once) {
  const auto until = Clock::now() + std::chrono::seconds(from_environment("PYCOMM_STRESS_S", 3));
  uint64_t seed = from_environment("PYCOMM_STRESS_SEED", std::random_device{}());
  const std::vector<std::vector<std::string>> layouts = {
      {"a", "a"}, {"a", "a", "a", "a"}, {"a", "b"}, {"a", "a", "b"}, {"a", "b", "a", "b"}};
  int rounds = 0;
  for (; ::testing::failures == 0 && (rounds == 0 || Clock::now() < until); ++rounds, ++seed) {
    ::alarm(::testing::kDeadlineS);  // a round's
    stress(layouts[seed % layouts.size()], seed);
    if (::testing::failures != 0)
      std::fprintf(stderr, "repeat with PYCOMM_STRESS_SEED=%llu\n",
                   static_cast<unsigned long long>(seed));
  }
  std::printf("%d rounds\n", rounds);
}
