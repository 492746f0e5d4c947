// The CUDA engine over the fake NCCL: what it computes, in which order of streams, and what becomes
// of ranks that are late, lost, mistaken or told an error by NCCL. Streams run 200 us late, so that
// an order that is not asked for does not come about by itself.
#include <numeric>

#include "fake_device.h"
#include "ranks.h"

using namespace pycomm;
using cuda::CudaEngine;
using cuda::EngineOptions;
using pycomm::testing::all_reduce;
using pycomm::testing::fake_library;
using pycomm::testing::MemoryStore;
using pycomm::testing::open_fake;
using pycomm::testing::PrefixStore;
using std::chrono::milliseconds;

namespace {

constexpr auto kTimeout = std::chrono::seconds(20);

struct Rank {
  Group& group;
  std::shared_ptr<CudaEngine> engine;
  std::shared_ptr<cuda::Device> device;
  EngineOptions options;
  Store& store;
};

// Runs body on n ranks; a rank's exception fails the test, named. devices: by rank.
void run_ranks(int n, const std::function<void(Rank&)>& body, milliseconds timeout = kTimeout,
               std::vector<std::string> devices = {}) {
  MemoryStore store;
  const auto api = open_fake();
  ::fake_device_delay(200);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < n; ++rank)
    threads.emplace_back([&, rank] {
      try {
        const std::string id =
            devices.empty() ? "gpu" + std::to_string(rank) : devices[static_cast<size_t>(rank)];
        EngineOptions options;
        options.api = api;
        options.device.reset(pycomm_test_device(id.c_str()));
        options.store = std::make_shared<PrefixStore>(store, "world/");
        options.name = "world";
        options.rank = rank;
        options.hosts.assign(static_cast<size_t>(n), "a");
        auto engine = CudaEngine::create(options);
        Group group("world", rank, n, engine, Planner{}, timeout);
        Rank self{group, engine, options.device, options, store};
        body(self);
      } catch (const std::exception& error) {
        ::testing::fail("rank", rank, error.what());
      }
    });
  for (auto& thread : threads) thread.join();
  ::fake_device_delay(0);
  EXPECT_EQ(::fake_nccl_n_communicators(), 0);
}

template <class T>
Call call_of(Collective collective, DType dtype, std::vector<T>& input, std::vector<T>& output) {
  Call call;
  call.collective = collective;
  call.dtype = dtype;
  call.input = input.data();
  call.output = output.data();
  call.numel = std::max(input.size(), output.size());
  return call;
}

std::vector<int32_t> filled(uint64_t n, int start) {
  std::vector<int32_t> values(n);
  std::iota(values.begin(), values.end(), start);
  return values;
}

}  // namespace

namespace {

void check_every_collective(int n) {
  run_ranks(n, [n](Rank& rank) {
    Group& group = rank.group;
    const int me = group.rank();
    const auto size = static_cast<size_t>(n);
    for (const uint64_t numel : {uint64_t{0}, uint64_t{1}, uint64_t{7}, uint64_t{40001}}) {
      // all_reduce, reduce, broadcast
      auto x = filled(numel, me);
      group.run(call_of(Collective::all_reduce, DType::int32, x, x));
      for (uint64_t i = 0; i < numel; ++i)
        if (x[i] != static_cast<int>(i) * n + n * (n - 1) / 2) return EXPECT_TRUE(false);
      x = filled(numel, me);
      std::vector<int32_t> out(numel, -1);
      Call reduce = call_of(Collective::reduce, DType::int32, x, out);
      reduce.root = n - 1;
      reduce.op = ReduceOp::max;
      if (me != n - 1) reduce.output = nullptr;
      group.run(reduce);
      EXPECT_EQ(out, me == n - 1 ? filled(numel, n - 1) : std::vector<int32_t>(numel, -1));
      x = filled(numel, 10 * me);
      Call broadcast = call_of(Collective::broadcast, DType::int32, x, x);
      broadcast.root = n / 2;
      group.run(broadcast);
      EXPECT_EQ(x, filled(numel, 10 * (n / 2)));
      // all_gather, gather, scatter, reduce_scatter, all_to_all, even
      auto piece = filled(numel, 100 * me);
      std::vector<int32_t> whole(numel * size, -1), expected;
      for (int r = 0; r < n; ++r)
        for (const int value : filled(numel, 100 * r)) expected.push_back(value);
      group.run(call_of(Collective::all_gather, DType::int32, piece, whole));
      EXPECT_EQ(whole, expected);
      std::fill(whole.begin(), whole.end(), -1);
      Call gather = call_of(Collective::gather, DType::int32, piece, whole);
      if (me != 0) gather.output = nullptr;
      gather.numel = numel * size;
      group.run(gather);
      if (me == 0) EXPECT_EQ(whole, expected);
      std::vector<int32_t> got(numel, -1);
      Call scatter = call_of(Collective::scatter, DType::int32, expected, got);
      if (me != 0) scatter.input = nullptr;
      scatter.numel = numel * size;
      group.run(scatter);
      EXPECT_EQ(got, piece);
      group.run(call_of(Collective::reduce_scatter, DType::int32, expected, got));
      for (uint64_t i = 0; i < numel; ++i) EXPECT_EQ(got[i], n * piece[i]);
      std::vector<int32_t> sent, received(numel * size, -1), due;
      for (int r = 0; r < n; ++r) {
        for (const int value : filled(numel, 1000 * me + 10 * r)) sent.push_back(value);
        for (const int value : filled(numel, 1000 * r + 10 * me)) due.push_back(value);
      }
      group.run(call_of(Collective::all_to_all, DType::int32, sent, received));
      EXPECT_EQ(received, due);
    }
    // Uneven: rank r has r + 1 elements, rank 0 none.
    std::vector<uint64_t> counts;
    uint64_t total = 0;
    for (int r = 0; r < n; ++r) total += counts.emplace_back(r == 0 ? 0 : r + 1);
    auto piece = filled(counts[static_cast<size_t>(me)], 7 * me);
    std::vector<int32_t> whole(total), expected;
    for (int r = 0; r < n; ++r)
      for (const int value : filled(counts[static_cast<size_t>(r)], 7 * r))
        expected.push_back(value);
    Call gather = call_of(Collective::all_gather, DType::int32, piece, whole);
    gather.counts = counts;
    gather.numel = total;
    group.run(gather);
    EXPECT_EQ(whole, expected);
    Call scatter = call_of(Collective::reduce_scatter, DType::int32, expected, piece);
    scatter.counts = counts;
    scatter.numel = total;
    group.run(scatter);
    for (uint64_t i = 0; i < piece.size(); ++i)
      EXPECT_EQ(piece[i], n * (7 * me + static_cast<int>(i)));
    // all_to_all where i sends j i + 2 j elements
    Call uneven = call_of(Collective::all_to_all, DType::int32, piece, whole);
    for (int r = 0; r < n; ++r) {
      uneven.counts.push_back(static_cast<uint64_t>(me + 2 * r));
      uneven.recv_counts.push_back(static_cast<uint64_t>(r + 2 * me));
    }
    std::vector<int32_t> sent, due;
    for (int r = 0; r < n; ++r) {
      for (int i = 0; i < me + 2 * r; ++i) sent.push_back(100 * me + 10 * r + i);
      for (int i = 0; i < r + 2 * me; ++i) due.push_back(100 * r + 10 * me + i);
    }
    std::vector<int32_t> received(due.size(), -1);
    uneven.input = sent.data();
    uneven.output = received.data();
    uneven.numel = std::max(sent.size(), due.size());
    group.run(uneven);
    EXPECT_EQ(received, due);
    Call barrier;
    barrier.collective = Collective::barrier;
    group.run(barrier);
  });
}

}  // namespace

TEST(every_collective_gives_what_it_promises) {
  const int before = ::fake_nccl_n_all_to_alls();
  for (const int n : {1, 2, 3, 4}) check_every_collective(n);
  EXPECT_EQ(::fake_nccl_n_all_to_alls() - before, (1 + 2 + 3 + 4) * 3);  // the even ones
}

TEST(without_ncclAlltoAll_pieces_do_the_same) {
  fake_library = FAKE_NCCL_OLDEST;
  for (const int n : {2, 3}) check_every_collective(n);
  fake_library = FAKE_NCCL;
}

TEST(dtypes_and_operations_that_nccl_lacks_are_refused_before_anything_is_sent) {
  run_ranks(2, [](Rank& rank) {
    std::vector<int16_t> small{1, 2};
    EXPECT_THROWS("NCCL has no sum of int16; convert it",
                  rank.group.run(call_of(Collective::all_reduce, DType::int16, small, small)));
    std::vector<int32_t> x{5, 6};
    Call bits = call_of(Collective::all_reduce, DType::int32, x, x);
    bits.op = ReduceOp::bxor;
    EXPECT_THROWS("NCCL has no bxor of int32; use sum, avg, product, min or max",
                  rank.group.run(bits));
    std::vector<float> y{5, 6};
    Call named = all_reduce(y.data(), y.size());
    named.wire = Wire::fp8;
    named.must_be_finite = true;
    EXPECT_THROWS("wire_nonfinite is of CPU tensors", rank.group.run(named));
    EXPECT_EQ(rank.engine->sequence(), 0u);
    // Both kinds still move, and logic of bools works.
    Call moved = call_of(Collective::broadcast, DType::int16, small, small);
    rank.group.run(moved);
    std::vector<uint8_t> flags{uint8_t(rank.group.rank() == 0), 1, 0};
    Call any = call_of(Collective::all_reduce, DType::boolean, flags, flags);
    any.op = ReduceOp::bor;
    rank.group.run(any);
    EXPECT_EQ(flags, (std::vector<uint8_t>{1, 1, 0}));
  });
}

TEST(operations_keep_the_order_of_the_callers_stream) {
  run_ranks(2, [](Rank& rank) {
    cuda::Device& device = *rank.device;
    const auto mine = device.new_stream(), other = device.new_stream();
    const auto event = device.new_event();
    std::vector<float> x(1000), seen(1000);
    for (int turn = 0; turn < 20; ++turn) {
      const auto value = static_cast<float>(turn + rank.group.rank());
      // The producer is on the caller's stream, late; the consumer on another one.
      device.in_order(mine, [&x, value] {
        std::this_thread::sleep_for(milliseconds(1));
        std::fill(x.begin(), x.end(), value);
      });
      Call call = all_reduce(x.data(), x.size());
      call.stream = mine;
      if (turn % 2 == 0) {
        rank.group.run(call);  // returns at once, in the order of `mine`
        device.record(event, mine);
        device.wait(other, event);
      } else {
        const auto held = std::make_shared<int>(1);
        const std::weak_ptr<int> memory = held;
        const auto work = rank.group.start(call, held);
        work->order_before(other);
        work->order_before(mine);
      }
      device.copy(seen.data(), x.data(), x.size() * sizeof(float), other);
      const auto copied = device.new_event();
      device.record(copied, other);
      while (!device.passed(copied)) std::this_thread::yield();
      device.free_event(copied);
      for (const float each : seen)
        if (each != 2 * static_cast<float>(turn) + 1) return EXPECT_EQ(each, 2.0f * turn + 1);
    }
    Call barrier;
    barrier.collective = Collective::barrier;
    rank.group.run(barrier);
    device.free_event(event);
    device.free_stream(mine);
    device.free_stream(other);
  });
}

TEST(memory_is_kept_until_the_operation_is_done_or_a_stream_waits_for_it) {
  run_ranks(2, [](Rank& rank) {
    std::vector<float> x(100, 1.0f);
    auto held = std::make_shared<int>(1);
    const std::weak_ptr<int> memory = held;
    const auto mine = rank.device->new_stream();
    Call call = all_reduce(x.data(), x.size());
    call.stream = mine;
    std::atomic<bool> told{false};
    {
      ::fake_nccl_hang(0);  // the operation cannot be done yet
      const auto work = rank.group.start(call, std::move(held));
      EXPECT_TRUE(!memory.expired());
      EXPECT_TRUE(!work->done());
      work->on_done([&told] { told = true; });
      work->order_before(mine);
      EXPECT_TRUE(memory.expired());
      ::fake_nccl_hang(-1);
      work->wait(kTimeout);
      EXPECT_TRUE(work->status().ok());
      EXPECT_TRUE(work->duration_s() > 0);
    }
    EXPECT_EQ(x[99], 2.0f);
    const auto dropped = std::make_shared<int>(1);
    const std::weak_ptr<int> unwaited = dropped;
    {
      (void)rank.group.start(call, std::make_shared<std::shared_ptr<int>>(dropped));
    }
    Call barrier;
    barrier.collective = Collective::barrier;
    rank.group.run(barrier);
    EXPECT_EQ(x[99], 4.0f);  // it ran to its end without a Work
    while (dropped.use_count() > 1) std::this_thread::yield();
    EXPECT_TRUE(told.load());
    rank.device->free_stream(mine);
  });
}

TEST(operations_on_a_captured_stream_are_recorded_and_not_watched) {
  run_ranks(2, [](Rank& rank) {
    const int other = 1 - rank.group.rank();
    const auto mine = rank.device->new_stream();
    std::vector<float> x(10, 1.0f);
    std::vector<int32_t> out(3, rank.group.rank()), in(3, -1);
    Call call = all_reduce(x.data(), x.size());
    call.stream = mine;
    const std::vector<Message> messages{{true, out.data(), 12, other, mine, {}},
                                        {false, in.data(), 12, other, mine, {}}};
    // Twice in a graph, each time between calls that are none of its.
    for (int turn = 0; turn < 2; ++turn) {
      std::fill(x.begin(), x.end(), 1.0f);
      std::fill(in.begin(), in.end(), -1);
      rank.group.start(call, nullptr)->wait(kTimeout);
      const uint64_t n_watched = rank.engine->stats().ops;
      ::fake_device_capture(true);
      rank.group.run(call);
      const auto started = rank.group.start(call, nullptr);
      started->order_before(mine);
      const auto together = rank.group.start_together({}, messages, std::nullopt, nullptr);
      together->order_before(mine);
      EXPECT_TRUE(started->done() && together->done());
      ::fake_device_capture(false);
      ::fake_device_synchronize(mine);
      EXPECT_EQ(rank.engine->stats().ops, n_watched);
      EXPECT_EQ(x[9], 8.0f);
      EXPECT_EQ(in, std::vector<int32_t>(3, other));
    }
    rank.group.start(call, nullptr)->wait(kTimeout);
    EXPECT_EQ(x[9], 16.0f);
    EXPECT_TRUE(rank.engine->broken().ok());
    rank.device->free_stream(mine);
  });
}

TEST(messages_alone_and_together) {
  run_ranks(3, [](Rank& rank) {
    const int me = rank.group.rank(), next = (me + 1) % 3, before = (me + 2) % 3;
    std::vector<int32_t> out = filled(5000, me), in(5000, -1);
    // A ring of messages that start together does not wait in itself, whatever their size.
    const auto work =
        rank.group.start_together({},
                                  {{true, out.data(), out.size() * 4, next, nullptr, {}},
                                   {false, in.data(), in.size() * 4, before, nullptr, {}}},
                                  std::nullopt, nullptr);
    work->wait(kTimeout);
    EXPECT_EQ(in, filled(5000, before));
    // Two ranks alone; the third is not needed.
    if (me < 2) {
      std::vector<int32_t> message = filled(3, 50 + me);
      if (me == 0) rank.group.run_send(message.data(), 12, 1, 0, std::nullopt);
      if (me == 1) EXPECT_EQ(rank.group.run_recv(message.data(), 12, 0, 0, std::nullopt), 0);
      EXPECT_EQ(message, filled(3, 50));
    }
    EXPECT_THROWS("have no tag", rank.group.run_send(out.data(), 4, next, 5, std::nullopt));
    EXPECT_THROWS("name the source", rank.group.run_recv(in.data(), 4, -1, 0, std::nullopt));
    // Collectives together are one operation.
    std::vector<float> a(10, 1.0f), b(20, 2.0f);
    rank.group
        .start_together({all_reduce(a.data(), a.size()), all_reduce(b.data(), b.size())}, {},
                        std::nullopt, nullptr)
        ->wait(kTimeout);
    EXPECT_EQ(a[9], 3.0f);
    EXPECT_EQ(b[19], 6.0f);
  });
}

TEST(groups_by_split_and_those_that_take_no_part) {
  ::fake_nccl_slow_init(20);
  run_ranks(4, [](Rank& rank) {
    const int me = rank.group.rank();
    const auto deadline = Clock::now() + kTimeout;
    EngineOptions options = rank.options;
    options.name = "part";
    options.store = std::make_shared<PrefixStore>(rank.store, "part" + std::to_string(me % 2));
    const std::vector<int> ranks = me % 2 == 0 ? std::vector<int>{2, 0} : std::vector<int>{1, 3};
    const int key = static_cast<int>(std::find(ranks.begin(), ranks.end(), me) - ranks.begin());
    auto part = rank.engine->split(me % 2, key, ranks, options, deadline);
    Group group("part", key, 2, part, Planner{}, kTimeout);
    std::vector<int32_t> mine{me}, both(2);
    group.run(call_of(Collective::all_gather, DType::int32, mine, both));
    EXPECT_EQ(both, ranks);
    auto none =
        rank.engine->split(me == 3 ? cuda::kNcclNoColor : 0, me, {0, 1, 2}, options, deadline);
    EXPECT_EQ(none == nullptr, me == 3);
  });
  ::fake_nccl_slow_init(0);
}

TEST(a_rank_that_does_not_come_is_a_timeout_on_the_others_and_names_itself) {
  run_ranks(
      3,
      [](Rank& rank) {
        std::vector<float> x(10, 1.0f);
        rank.group.run(all_reduce(x.data(), x.size()));  // all meet
        if (rank.group.rank() == 2) {
          std::this_thread::sleep_for(milliseconds(1500));
          EXPECT_THROWS("cannot be used any more", {
            for (int turn = 0; turn < 2; ++turn) rank.group.run(all_reduce(x.data(), x.size()));
          });
          return;
        }
        const auto work = rank.group.start(all_reduce(x.data(), x.size()), nullptr);
        EXPECT_THROWS("not done at its deadline: rank 2 (host a) ", work->wait(kTimeout));
        EXPECT_THROWS("all_reduce #1 (sum, float32, 10 elements", work->wait(kTimeout));
        EXPECT_EQ(work->status().code, Code::timeout);
        EXPECT_THROWS("the group cannot be used any more",
                      rank.group.run(all_reduce(x.data(), x.size())));
      },
      milliseconds(800));
}

TEST(ranks_that_call_different_collectives_are_told_both) {
  run_ranks(2, [](Rank& rank) {
    std::vector<float> x(10, 1.0f);
    Call call = all_reduce(x.data(), rank.group.rank() == 0 ? 10u : 9u);
    EXPECT_THROWS("collective mismatch", rank.group.run(call));
    EXPECT_EQ(rank.engine->broken().code, Code::mismatch);
    EXPECT_TRUE(rank.engine->broken().message.find("9 elements") != std::string::npos);
    EXPECT_TRUE(rank.engine->broken().message.find("10 elements") != std::string::npos);
  });
}

TEST(an_error_in_the_background_reaches_every_rank_with_nccls_text) {
  run_ranks(2, [](Rank& rank) {
    std::vector<float> x(10, 1.0f);
    rank.group.run(all_reduce(x.data(), x.size()));
    if (rank.group.rank() == 1) {
      EXPECT_THROWS("connection closed by peer 1", rank.group.run(all_reduce(x.data(), x.size())));
      return;
    }
    ::fake_nccl_hang(0);
    const auto work = rank.group.start(all_reduce(x.data(), x.size()), nullptr);
    ::fake_nccl_async_error(0, 6, "NET/Socket: connection closed by peer 1");
    EXPECT_THROWS(
        "remote process exited or there was a network error (NET/Socket: connection "
        "closed by peer 1)",
        work->wait(kTimeout));
    EXPECT_EQ(work->status().code, Code::peer_lost);
    ::fake_nccl_hang(-1);
  });
}

TEST(an_error_at_a_call_breaks_the_group_on_every_rank) {
  std::atomic<bool> armed{false};
  run_ranks(2, [&armed](Rank& rank) {
    std::vector<float> x(10, 1.0f);
    rank.group.run(all_reduce(x.data(), x.size()));
    if (rank.group.rank() == 0) {
      ::fake_nccl_fail_next("ncclAllReduce", 1, "out of memory");
      armed = true;
      EXPECT_THROWS("unhandled cuda error (out of memory)",
                    rank.group.run(all_reduce(x.data(), x.size())));
      return;
    }
    while (!armed || rank.engine->broken().ok()) {
      if (armed && rank.engine->broken().ok()) {
        std::this_thread::sleep_for(milliseconds(50));
        EXPECT_THROWS("out of memory", rank.group.run(all_reduce(x.data(), x.size())));
        break;
      }
      std::this_thread::yield();
    }
  });
}

TEST(set_up_has_a_deadline_and_compares_versions_and_devices) {
  const auto began = Clock::now();
  run_ranks(
      2,
      [](Rank& rank) {
        if (rank.group.rank() == 1) return;  // never comes
        std::vector<float> x(10, 1.0f);
        EXPECT_THROWS("rank/1", rank.group.run(all_reduce(x.data(), x.size())));
      },
      milliseconds(300));
  run_ranks(
      2,
      [](Rank& rank) {  // meets in the store, then not in NCCL
        if (rank.group.rank() == 1) {
          rank.options.store->set("rank/1", "22905\ngpu1\nhost memory gpu1");
          return std::this_thread::sleep_for(milliseconds(600));
        }
        std::vector<float> x(10, 1.0f);
        EXPECT_THROWS("NCCL is still waiting for other ranks at the deadline",
                      rank.group.run(all_reduce(x.data(), x.size())));
      },
      milliseconds(300));
  EXPECT_TRUE(Clock::now() - began < std::chrono::seconds(20));
  run_ranks(2,
            [](Rank& rank) {
              std::vector<float> x(10, 1.0f);
              EXPECT_THROWS("rank 0 (host a) and rank 1 (host a) use one device, host memory same",
                            rank.group.run(all_reduce(x.data(), x.size())));
            },
            kTimeout, {"same", "same"});
  run_ranks(2, [](Rank& rank) {
    std::vector<float> x(10, 1.0f);
    if (rank.group.rank() == 1)
      return rank.options.store->set("rank/1", "22804\ngpu1\nhost memory gpu1");
    EXPECT_THROWS("rank 0 (host a) has NCCL 2.29.5, rank 1 (host a) has NCCL 2.28.4",
                  rank.group.run(all_reduce(x.data(), x.size())));
  });
}

TEST(ranks_that_are_left_go_on_in_a_shrunk_group) {
  run_ranks(
      3,
      [](Rank& rank) {
        std::vector<float> x(10, 1.0f);
        rank.group.run(all_reduce(x.data(), x.size()));
        const int me = rank.group.rank();
        if (me == 1) return;  // lost
        EXPECT_THROWS("rank 1", rank.group.run(all_reduce(x.data(), x.size())));
        EngineOptions options = rank.options;
        options.name = "left";
        options.store = std::make_shared<PrefixStore>(rank.store, "left/");
        auto left = rank.engine->shrink({1}, options, Clock::now() + kTimeout);
        Group group("left", me / 2, 2, left, Planner{}, kTimeout);
        std::vector<int32_t> mine{me}, both(2);
        group.run(call_of(Collective::all_gather, DType::int32, mine, both));
        EXPECT_EQ(both, (std::vector<int32_t>{0, 2}));
      },
      milliseconds(700));
}
