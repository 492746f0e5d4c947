// The CPU engine end to end, ranks as threads: shared memory, TCP, both, and what happens when
// ranks disagree, stall or leave.
#include "ranks.h"

using namespace pycomm;
using namespace pycomm::testing;

namespace {

const std::vector<std::vector<std::string>> kHosts = {
    {"a"},      {"a", "a"},           {"a", "a", "a"},
    {"a", "b"}, {"a", "a", "b", "b"}, {"a", "b", "a", "b", "b"}};

void check_all_reduce(Group& group, uint64_t numel) {
  std::vector<float> data(numel);
  for (uint64_t i = 0; i < numel; ++i)
    data[i] = static_cast<float>((i + static_cast<uint64_t>(group.rank())) % 97);
  group.run(all_reduce(data.data(), numel));
  for (uint64_t i = 0; i < numel; ++i) {
    float expected = 0;
    for (int r = 0; r < group.size(); ++r)
      expected += static_cast<float>((i + static_cast<uint64_t>(r)) % 97);
    if (data[i] != expected) {
      EXPECT_EQ(data[i], expected);
      return;
    }
  }
}

}  // namespace

TEST(all_reduce_is_exact_on_every_layout_and_size) {
  for (const auto& hosts : kHosts)
    run_ranks(hosts, [](Group& group, auto&, Store&) {
      for (const uint64_t numel :
           {0ul, 1ul, 2ul, 12ul, 13ul, 1000ul, 8192ul, 8193ul, 300001ul, 1000003ul})
        for (int repeat = 0; repeat < 3; ++repeat) check_all_reduce(group, numel);
    });
}

TEST(small_calls_keep_their_order_over_many_rounds) {
  run_ranks(one_host(3), [](Group& group, auto&, Store&) {
    for (int i = 0; i < 3000; ++i) check_all_reduce(group, 1 + static_cast<uint64_t>(i % 40));
  });
}

TEST(all_to_all_with_uneven_counts_moves_each_piece_to_its_place) {
  for (const auto& hosts : kHosts)
    run_ranks(hosts, [](Group& group, auto&, Store&) {
      const auto n = static_cast<uint64_t>(group.size()), me = static_cast<uint64_t>(group.rank());
      const auto count = [](uint64_t from, uint64_t to) { return (from * 7 + to * 3) % 5 * 1000; };
      Call call;
      call.collective = Collective::all_to_all;
      call.dtype = DType::int32;
      std::vector<int32_t> input, expected;
      for (uint64_t j = 0; j < n; ++j) {
        call.counts.push_back(count(me, j));
        call.recv_counts.push_back(count(j, me));
        for (uint64_t k = 0; k < count(me, j); ++k)
          input.push_back(static_cast<int32_t>(me * 1000000 + j * 10000 + k));
        for (uint64_t k = 0; k < count(j, me); ++k)
          expected.push_back(static_cast<int32_t>(j * 1000000 + me * 10000 + k));
      }
      std::vector<int32_t> output(expected.size(), -1);
      call.input = input.data();
      call.output = output.data();
      call.numel = std::max(input.size(), output.size());
      group.run(call);
      EXPECT_TRUE(output == expected);
    });
}

TEST(asynchronous_work_runs_in_order_while_the_caller_does_something_else) {
  for (const auto& hosts :
       {one_host(2), std::vector<std::string>{"a", "b"}, std::vector<std::string>{"a", "a", "b"}})
    run_ranks(hosts, [](Group& group, auto&, Store&) {
      constexpr uint64_t kNumel = 50000;
      std::vector<std::vector<float>> data(
          8, std::vector<float>(kNumel, 1.0f + static_cast<float>(group.rank())));
      std::vector<std::shared_ptr<Work>> works;
      std::atomic<int> called{0};
      for (auto& tensor : data) {
        works.push_back(group.start(all_reduce(tensor.data(), kNumel), nullptr));
        works.back()->on_done([&] { called.fetch_add(1); });
      }
      while (!works[3]->done()) std::this_thread::yield();  // the progress thread moves it
      for (auto& work : works) work->wait(std::chrono::seconds(20));
      const auto n = static_cast<float>(group.size());
      for (auto& tensor : data) EXPECT_EQ(tensor[kNumel - 1], n * (n + 1) / 2);
      while (called.load() < 8) std::this_thread::yield();
    });
}

TEST(messages_find_their_receive_by_tag_in_any_order) {
  for (const auto& hosts : {one_host(2), std::vector<std::string>{"a", "b"}})
    run_ranks(hosts, [](Group& group, auto&, Store&) {
      std::vector<float> big(700000, 7), small(3, 5);
      const auto nbytes = [](const std::vector<float>& v) { return v.size() * sizeof(float); };
      if (group.rank() == 0) {
        auto first = group.send(big.data(), nbytes(big), 1, 10, {}, nullptr);
        auto second = group.send(small.data(), nbytes(small), 1, 20, {}, nullptr);
        first->wait(std::chrono::seconds(20));
        second->wait(std::chrono::seconds(20));
      } else {
        std::vector<float> got_big(700000), got_small(3);
        auto second = group.recv(got_small.data(), nbytes(small), -1, 20, {}, nullptr);
        second->wait(std::chrono::seconds(20));
        EXPECT_EQ(second->source(), 0);
        group.recv(got_big.data(), nbytes(big), 0, 10, {}, nullptr)->wait(std::chrono::seconds(20));
        EXPECT_TRUE(got_big == big && got_small == small);
      }
    });
}

// Asked for before they are sent they may go either way; then one that nobody asks for any more.
TEST(a_send_that_the_ring_holds_leaves_unasked_whatever_came_before) {
  constexpr size_t kNumel = 100'000;
  for (const int source : {0, -1}) {
    std::atomic<int> posted{0}, left{0};
    const auto await = [](const std::atomic<int>& word, int value) {
      while (word.load() < value) std::this_thread::yield();
    };
    run_ranks(one_host(2), [&](Group& group, auto&, Store&) {
      std::vector<float> data(kNumel);
      const uint64_t nbytes = kNumel * sizeof(float);
      const auto limit = std::chrono::seconds(20);
      const auto value = [](int call, size_t i) {
        return static_cast<float>((static_cast<size_t>(call) * 7 + i) % 1009);
      };
      const auto fill = [&](int call) {
        for (size_t i = 0; i < kNumel; ++i) data[i] = value(call, i);
      };
      const auto expect = [&](int call) {
        for (size_t i = 0; i < kNumel; ++i)
          if (data[i] != value(call, i)) return EXPECT_EQ(data[i], value(call, i));
      };
      for (int call = 0; call < 300; ++call) {
        const bool unasked = call % 30 == 20;
        if (group.rank() == 0) {
          fill(call);
          await(posted, call + 1);
          group.run_send(data.data(), nbytes, 1, 0, limit);
          left = call + 1;
        } else {
          if (unasked) {
            EXPECT_THROWS("waited",
                          group.run_recv(data.data(), nbytes, 0, 0, std::chrono::milliseconds(1)));
            posted = call + 1;
            await(left, call + 1);
          }
          auto work =
              group.recv(data.data(), nbytes, call % 5 == 4 ? source : 0, 0, limit, nullptr);
          posted = call + 1;
          work->wait(limit);
          expect(call);
        }
      }
    });
  }
}

TEST(a_mismatched_call_raises_on_every_rank_and_names_both_sides) {
  for (const auto& hosts :
       {one_host(3), std::vector<std::string>{"a", "b"}, std::vector<std::string>{"a", "a", "b"}})
    for (const uint64_t numel : {4ul, 100000ul})
      run_ranks(hosts, [numel](Group& group, auto&, Store&) {
        std::vector<float> data(numel + 2, 1);
        const bool odd = group.rank() == group.size() - 1;
        EXPECT_THROWS("called all_reduce #0 (sum",
                      group.run(all_reduce(data.data(), numel + (odd ? 1 : 0))));
        EXPECT_THROWS("cannot be used any more", group.run(all_reduce(data.data(), numel)));
      });
}

TEST(a_rank_that_never_calls_is_named_at_the_deadline) {
  for (const auto& hosts : {one_host(2), std::vector<std::string>{"a", "b"}})
    for (const uint64_t numel : {4ul, 100000ul})
      run_ranks(hosts, [numel](Group& group, auto&, Store& store) {
        std::vector<float> data(numel, 1);
        Call call = all_reduce(data.data(), numel);
        call.timeout = std::chrono::milliseconds(200);
        if (group.rank() == 0) {
          EXPECT_THROWS("rank 0 waited 0.2 s for rank 1", group.run(call));
          store.set("told", "");
        } else {
          store.get_all({"told"}, std::chrono::seconds(20));
          EXPECT_THROWS("rank 0 waited", group.run(call));
        }
      });
}

TEST(a_rank_that_leaves_is_named_at_once) {
  for (const auto& hosts : {one_host(2), std::vector<std::string>{"a", "b"}})
    run_ranks(hosts, [](Group& group, auto&, Store&) {
      std::vector<float> data(100000, 1);
      check_all_reduce(group, 100000);
      if (group.rank() == 1) return group.engine().close();
      EXPECT_THROWS("rank 1", group.run(all_reduce(data.data(), data.size())));
    });
}

TEST(several_groups_over_the_same_ranks_do_not_wait_for_each_other) {
  run_ranks({"a", "a", "b", "b"}, [](Group& world, auto& endpoint, Store& store) {
    const bool first = world.rank() % 2 == 0;  // two groups, each with one rank per host
    const std::vector<int> ranks = first ? std::vector<int>{0, 2} : std::vector<int>{1, 3};
    const int rank = world.rank() / 2;
    auto own = std::make_shared<PrefixStore>(store, first ? "even/" : "odd/");
    Group group(
        "half", rank, 2,
        cpu::CpuEngine::create(
            endpoint, [own] { return own; }, "half", "half", ranks, std::chrono::seconds(20)),
        ring_planner(2, rank), std::chrono::seconds(20));
    std::vector<float> ours(200000, 1), all(200000, 1);
    // Started in another order on odd ranks: each group has a queue of its own.
    std::shared_ptr<Work> a, b;
    if (first) {
      a = world.start(all_reduce(all.data(), all.size()), nullptr);
      b = group.start(all_reduce(ours.data(), ours.size()), nullptr);
    } else {
      b = group.start(all_reduce(ours.data(), ours.size()), nullptr);
      b->wait(std::chrono::seconds(20));
      a = world.start(all_reduce(all.data(), all.size()), nullptr);
    }
    a->wait(std::chrono::seconds(20));
    b->wait(std::chrono::seconds(20));
    EXPECT_EQ(ours[199999], 2.0f);
    EXPECT_EQ(all[0], 4.0f);
  });
}

TEST(bytes_between_hosts_are_counted) {
  run_ranks({"a", "b"}, [](Group& group, auto&, Store&) {
    std::vector<float> data(1 << 20, 1);
    group.run(all_reduce(data.data(), data.size()));
    const Stats stats = group.engine().stats();
    const double wanted = 4.0 * (1 << 20);  // 2(n-1)/n of the tensor, n = 2
    EXPECT_TRUE(static_cast<double>(stats.bytes_between_hosts) >= wanted &&
                static_cast<double>(stats.bytes_between_hosts) < wanted * 1.001);
    EXPECT_EQ(stats.bytes_inside_hosts, 0ul);
    EXPECT_TRUE(stats.busy_s > 0);
  });
}
