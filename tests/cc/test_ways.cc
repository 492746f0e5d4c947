// How a group finds the faster of two ways, on clocks that are made up here; and that both give the
// same results, ranks as threads.
#include <algorithm>

#include "cpu/ways.h"
#include "ranks.h"

using namespace pycomm;
using namespace pycomm::cpu;
using namespace pycomm::testing;

namespace {

// Calls whose cost is known to the test alone; how many went the dearer way.
struct Clockwork {
  Ways ways{2};
  uint64_t shared = 1, pulled = 1;  // per byte

  int dearer(int calls, uint64_t nbytes, int kind = 0) {
    int n = 0;
    for (int i = 0; i < calls; ++i) {
      const Way way = ways.choose(kind, nbytes);
      const uint64_t cost = way == Way::shared ? shared : pulled;
      ways.record(kind, nbytes, way, cost * nbytes);
      n += cost > std::min(shared, pulled);
    }
    return n;
  }
};

Call whole(Collective what, const std::vector<float>& in, std::vector<float>& out, int root = 0) {
  Call call;
  call.collective = what;
  call.dtype = DType::float32;
  call.root = root;
  call.input = in.data();
  call.output = out.data();
  call.numel = std::max(in.size(), out.size());
  return call;
}

}  // namespace

TEST(the_faster_way_is_found_and_kept) {
  for (const uint64_t nbytes : {uint64_t{128} << 10, uint64_t{3} << 20, uint64_t{1} << 30}) {
    Clockwork near{.shared = 2, .pulled = 3};
    EXPECT_TRUE(near.dearer(2000, nbytes) < 200);
    Clockwork far{.shared = 10, .pulled = 2};
    EXPECT_TRUE(far.dearer(100, nbytes) < 30);
    EXPECT_TRUE(far.dearer(2000, nbytes) < 300);
  }
}

TEST(both_ways_are_tried_within_the_first_calls) {
  Clockwork far{.shared = 10, .pulled = 2};
  EXPECT_TRUE(far.dearer(8, 1 << 20) < 8);
}

TEST(what_changes_is_noticed) {
  Clockwork machine{.shared = 2, .pulled = 3};
  machine.dearer(1000, 1 << 20);
  machine.shared = 12;  // its cores moved apart: seen by the calls themselves
  EXPECT_TRUE(machine.dearer(1000, 1 << 20) < 60);
  machine.shared = 2;  // and together: seen when it is tried next
  EXPECT_TRUE(machine.dearer(1000, 1 << 20) < 200);
}

TEST(what_was_found_before_cores_moved_holds_when_they_are_back) {
  Clockwork machine{.shared = 2, .pulled = 3};
  const auto moved = [&](uint64_t shared, uint64_t price) {
    machine.shared = shared;
    machine.ways.probed(price);
    machine.ways.probed(price);
  };
  moved(2, 100);
  machine.dearer(1000, 1 << 20);
  moved(12, 350);
  machine.dearer(1000, 1 << 20);
  moved(2, 110);
  machine.ways.probed(900);  // held up by something else
  EXPECT_TRUE(machine.dearer(20, 1 << 20) < 5);
  moved(12, 350);
  EXPECT_TRUE(machine.dearer(20, 1 << 20) < 5);
  EXPECT_EQ(machine.dearer(8, 16 << 20), 0);  // another size, while lines are as dear
}

TEST(one_size_tells_the_next_of_its_kind) {
  Clockwork far{.shared = 10, .pulled = 2};
  far.dearer(100, 1 << 20);
  EXPECT_EQ(far.dearer(8, 16 << 20), 0);
}

TEST(a_size_that_comes_rarely_is_tried_at_once) {
  Clockwork machine{.shared = 2, .pulled = 3};
  machine.dearer(1000, 1 << 20);
  machine.shared = 8;  // for large ones
  EXPECT_TRUE(machine.dearer(8, 256 << 20) <= 2);
}

TEST(what_is_asked_and_never_recorded_changes_nothing) {
  Clockwork far{.shared = 10, .pulled = 2};
  int dearer = 0;
  for (int i = 0; i < 100; ++i) {  // as calls on memory of the heap ask
    far.ways.choose(0, 1 << 20);
    dearer += far.dearer(1, 1 << 20);
  }
  EXPECT_TRUE(dearer < 30);
}

TEST(a_single_slow_call_changes_nothing) {
  Ways ways(1);
  const uint64_t nbytes = 1 << 20;
  for (int i = 0; i < 64; ++i) {
    const Way way = ways.choose(0, nbytes);
    ways.record(0, nbytes, way, way == Way::shared ? 100 : 200);
  }
  while (ways.choose(0, nbytes) == Way::pulled) ways.record(0, nbytes, Way::pulled, 200);
  ways.record(0, nbytes, Way::shared, 100000);
  EXPECT_TRUE(ways.choose(0, nbytes) == Way::shared);
}

TEST(those_who_record_alike_are_told_alike) {
  Ways one(3), other(3);
  uint64_t state = 1;
  for (int i = 0; i < 5000; ++i) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    const int kind = static_cast<int>(state >> 33) % 3;
    const uint64_t nbytes = Ways::kLeast << (state >> 40) % 8, time = 1 + (state >> 45) % 100000;
    const Way way = one.choose(kind, nbytes);
    EXPECT_TRUE(other.choose(kind, nbytes) == way);
    one.record(kind, nbytes, way, time);
    other.record(kind, nbytes, way, time);
  }
}

// Calls enough that each of the ways is taken, whatever the machine's state.
TEST(every_collective_gives_the_same_result_by_either_way) {
  constexpr int kRanks = 3, kCalls = 14;
  constexpr size_t kNumel = 300'000;
  run_ranks(std::vector<std::string>(kRanks, "a"), [&](Group& group, auto&, Store&) {
    const int rank = group.rank();
    std::vector<float> in(kNumel), out(kNumel), part(kNumel / kRanks);
    for (int call = 0; call < kCalls; ++call) {
      const auto value = [&](int r, size_t i) {
        return static_cast<float>(
            (static_cast<size_t>(r) * 31 + i * 7 + static_cast<size_t>(call)) % 1000);
      };
      const auto fill = [&](std::vector<float>& x) {
        for (size_t i = 0; i < x.size(); ++i) x[i] = value(rank, i);
      };
      const auto sum = [&](size_t i) {
        float total = 0;
        for (int r = 0; r < kRanks; ++r) total += value(r, i);
        return total;
      };
      const auto expect = [&](const char* what, const std::vector<float>& x, const auto& of) {
        for (size_t i = 0; i < x.size(); ++i)
          if (x[i] != of(i))
            return ::testing::fail(__FILE__, __LINE__,
                                   std::string(what) + ", call " + std::to_string(call) +
                                       ": element " + std::to_string(i));
      };
      const size_t n = part.size(), me = static_cast<size_t>(rank);
      fill(in);
      group.run(whole(Collective::all_reduce, in, in));
      expect("all_reduce", in, sum);
      fill(in);
      group.run(whole(Collective::reduce_scatter, in, part));
      expect("reduce_scatter", part, [&](size_t i) { return sum(me * n + i); });
      fill(part);
      group.run(whole(Collective::all_gather, part, out));
      expect("all_gather", out, [&](size_t i) { return value(static_cast<int>(i / n), i % n); });
      fill(in);
      group.run(whole(Collective::all_to_all, in, out));
      expect("all_to_all", out,
             [&](size_t i) { return value(static_cast<int>(i / n), me * n + i % n); });
      fill(in);
      group.run(whole(Collective::broadcast, in, in, 1));
      expect("broadcast", in, [&](size_t i) { return value(1, i); });
    }
  });
}
