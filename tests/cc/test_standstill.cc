// Circles of waits over plain memory, each rank a thread.
#include <functional>
#include <memory>
#include <thread>

#include "cpu/board.h"
#include "cpu/standstill.h"
#include "testing.h"

using namespace pycomm;
using namespace pycomm::cpu;

namespace {

// Two ranks, and a group in which nobody has entered anything.
struct Host {
  Host() {
    for (int i = 0; i < 2; ++i) {
      ranks[i].attach(i, {&lines[0], &lines[1]}, {4, 7});
      ranks[i].called_by(std::this_thread::get_id());
    }
  }
  StandstillLine lines[2] = {};
  Standstill ranks[2];
  std::unique_ptr<BoardEntry> entry = std::make_unique<BoardEntry>();
  std::function<bool()> missing() const {
    return [this] { return !may_have_entered(*entry, 1); };
  }
};

const std::string kCircle = "rank 4 waits in a for rank 7, which waits in b for rank 4";

}  // namespace

TEST(circle_is_found_and_told) {
  Host host;
  auto& [one, two] = host.ranks;
  ASSERT_TRUE(one.enter("a") && two.enter("b"));
  EXPECT_TRUE(one.wait_for(1, host.missing()));
  EXPECT_EQ(one.look(), "");
  EXPECT_TRUE(two.wait_for(0, host.missing()));
  EXPECT_EQ(two.look(), kCircle);
  two.leave();
  EXPECT_EQ(one.look(), "");
  EXPECT_EQ(one.verdict(), kCircle);
  EXPECT_EQ(two.verdict(), "");
  one.leave();
  ASSERT_TRUE(one.enter("c"));
  EXPECT_EQ(one.verdict(), "");  // of a wait that is over
}

TEST(who_entered_or_left_is_not_waited_for) {
  Host host;
  auto& [one, two] = host.ranks;
  EXPECT_TRUE(one.enter("a") && !one.wait_for(1, host.missing()));
  EXPECT_TRUE(two.enter("b") && one.wait_for(1, host.missing()));
  two.leave();
  EXPECT_TRUE(two.enter("c") && two.wait_for(0, host.missing()));
  EXPECT_EQ(two.look(), "");
}

TEST(second_thread_ends_it) {
  Host host;
  auto& [one, two] = host.ranks;
  ASSERT_TRUE(one.enter("a") && two.enter("b") && one.wait_for(1, host.missing()));
  std::thread([&] { host.ranks[1].called_by(std::this_thread::get_id()); }).join();
  EXPECT_TRUE(!one.wait_for(1, host.missing()));
  EXPECT_TRUE(!two.enter("b"));
}

TEST(a_call_from_within_a_wait_ends_what_it_said) {
  Host host;
  auto& [one, two] = host.ranks;
  ASSERT_TRUE(one.enter("a") && two.enter("b") && two.wait_for(0, host.missing()));
  one.called_by(std::this_thread::get_id());
  EXPECT_TRUE(!one.speaks() && !two.wait_for(0, host.missing()));
  EXPECT_TRUE(one.enter("c") && one.speaks());
}

// Both look at the same time, again and again: each finds the circle or is told, in whole words.
TEST(two_that_find_it_at_once) {
  StandstillLine lines[2] = {};
  const auto entry = std::make_unique<BoardEntry>();
  std::atomic<int> arrived{0};
  const auto rank = [&](int me) {
    Standstill mine;
    mine.attach(me, {&lines[0], &lines[1]}, {4, 7});
    mine.called_by(std::this_thread::get_id());
    for (int round = 1; round <= 200; ++round) {
      if (!mine.enter(me == 0 ? "a" : "b")) return ::testing::fail(__FILE__, __LINE__, "enter()");
      std::string circle;
      while (circle.empty()) {
        circle = mine.verdict();
        if (circle.empty() && mine.wait_for(1 - me, [&] { return !may_have_entered(*entry, 1); }))
          circle = mine.look();
        std::this_thread::yield();
      }
      EXPECT_EQ(circle, kCircle);
      mine.leave();
      ++arrived;
      while (arrived < 2 * round) std::this_thread::yield();
    }
  };
  std::thread other(rank, 1);
  rank(0);
  other.join();
}
