// The CUDA engine where NCCL (the fake one) cannot connect hosts, or memory is refused: the way
// through the host that all ranks take together, what stays an error, and who is told. Hosts are
// those of the CPU engine's tests, joined by TCP over loopback.
#include <atomic>
#include <latch>

#include "fake_device.h"
#include "ranks.h"

using namespace pycomm;
using cuda::Between;
using cuda::CudaEngine;
using cuda::EngineOptions;
using pycomm::testing::all_reduce;
using pycomm::testing::open_fake;
using pycomm::testing::PrefixStore;
using pycomm::testing::ring_planner;
using std::chrono::milliseconds;

namespace {

constexpr auto kTimeout = std::chrono::seconds(30);

struct Rank {
  int rank;
  std::string host;
  EngineOptions options;
  std::vector<std::string> told;  // by through_host
  std::shared_ptr<CudaEngine> engine;
  std::shared_ptr<Group> group;
  // Whose engine is not made yet.
  void make(milliseconds timeout) {
    engine = CudaEngine::create(options);
    group = std::make_shared<Group>("world", rank, static_cast<int>(options.hosts.size()), engine,
                                    Planner{}, timeout);
  }
  float sum(float value, uint64_t numel = 3) {
    std::vector<float> x(numel, value);
    group->run(native(all_reduce(x.data(), x.size())));
    return x[numel - 1];
  }
  static Call native(Call call) {
    call.algorithm = "native";
    return call;
  }
};

// Runs body on a rank of each host in turn; devices are gpu0, gpu1, ..
void run_ranks(const std::vector<std::string>& hosts, const std::function<void(Rank&)>& body,
               Between between = Between::automatic, milliseconds timeout = kTimeout) {
  const auto api = open_fake();
  ::fake_device_delay(100);
  pycomm::testing::run_ranks(
      hosts,
      [&](Group& host, const std::shared_ptr<cpu::Endpoint>& endpoint, Store& store) {
        Rank self{host.rank(), hosts[static_cast<size_t>(host.rank())], {}, {}, {}, {}};
        EngineOptions& options = self.options;
        options.api = api;
        options.device.reset(pycomm_test_device(("gpu" + std::to_string(self.rank)).c_str()));
        options.store = std::make_shared<PrefixStore>(store, "device/");
        options.name = "world";
        options.rank = self.rank;
        options.hosts = hosts;
        options.between = between;
        options.through_host = [&self](const std::string& why) { self.told.push_back(why); };
        options.host_group = [&, timeout](const std::vector<int>& ranks, const std::string& name) {
          auto own = std::make_shared<PrefixStore>(store, name + "/");
          const auto at = std::find(ranks.begin(), ranks.end(), self.rank) - ranks.begin();
          const auto n = static_cast<int>(ranks.size()), place = static_cast<int>(at);
          return std::make_shared<Group>(
              name, place, n,
              cpu::CpuEngine::create(
                  endpoint, [own] { return own; }, name, name, ranks, timeout),
              ring_planner(n, place), timeout);
        };
        body(self);
        ::fake_nccl_no_network(nullptr, false);
      },
      timeout);
  ::fake_device_delay(0);
  EXPECT_EQ(::fake_nccl_n_communicators(), 0);
}

}  // namespace

TEST(where_nccl_cannot_connect_hosts_all_ranks_go_through_them) {
  for (const bool hangs : {false, true})
    run_ranks({"a", "b", "a"}, [hangs](Rank& rank) {
      ::fake_nccl_no_network(rank.host.c_str(), hangs);
      rank.make(hangs ? milliseconds(6000) : milliseconds(kTimeout));
      EXPECT_EQ(rank.sum(static_cast<float>(rank.rank)), 3.0f);
      EXPECT_EQ(rank.told.size(), 1u);
      if (!hangs) EXPECT_TRUE(rank.told[0].find("no route to host") != std::string::npos);
      EXPECT_TRUE(!rank.engine->has_communicator() && !rank.engine->spans_hosts());
      for (const uint64_t numel : {uint64_t{0}, uint64_t{1}, uint64_t{70001}})
        if (numel > 0) EXPECT_EQ(rank.sum(1.0f, numel), 3.0f);
      EXPECT_EQ(rank.told.size(), 1u);  // once
      EXPECT_TRUE(rank.engine->stats().bytes_between_hosts > 0);
      // Messages, far and near, alone and together.
      const int next = (rank.rank + 1) % 3, before = (rank.rank + 2) % 3;
      std::vector<int32_t> out(5000, rank.rank), in(5000, -1);
      rank.group
          ->start_together({},
                           {{true, out.data(), out.size() * 4, next, nullptr, {}},
                            {false, in.data(), in.size() * 4, before, nullptr, {}}},
                           std::nullopt, nullptr)
          ->wait(kTimeout);
      EXPECT_EQ(in, std::vector<int32_t>(5000, before));
      for (const auto& [from, to] : {std::pair(0, 1), std::pair(2, 0)}) {
        if (rank.rank == from) rank.group->run_send(out.data(), 400, to, 0, std::nullopt);
        if (rank.rank == to) {
          EXPECT_EQ(rank.group->run_recv(in.data(), 400, from, 0, std::nullopt), from);
          EXPECT_EQ(in[99], from);
        }
      }
      Call barrier;
      barrier.collective = Collective::barrier;
      rank.group->run(barrier);
    });
}

TEST(what_goes_through_the_host_keeps_the_order_of_streams_and_blocks_no_caller) {
  std::latch started(1);
  run_ranks(
      {"a", "b"},
      [&started](Rank& rank) {
        rank.make(kTimeout);
        EXPECT_EQ(rank.sum(1.0f), 2.0f);
        cuda::Device& device = *rank.options.device;
        const auto mine = device.new_stream();
        std::vector<float> x(1000, -1.0f), seen(1000);
        if (rank.rank == 1) started.wait();  // rank 0 has started before this one has begun
        device.in_order(mine, [&x, &rank] {
          std::this_thread::sleep_for(milliseconds(20));
          std::fill(x.begin(), x.end(), static_cast<float>(rank.rank + 1));
        });
        Call call = Rank::native(all_reduce(x.data(), x.size()));
        call.stream = mine;
        auto held = std::make_shared<int>(1);
        const std::weak_ptr<int> memory = held;
        const auto work = rank.group->start(call, std::move(held));
        if (rank.rank == 0) {
          EXPECT_TRUE(!work->done() && !memory.expired());
          started.count_down();
        }
        work->order_before(mine);
        rank.group->run(call);  // returns at once as well, in the order of `mine`
        device.copy(seen.data(), x.data(), x.size() * sizeof(float), mine);
        const auto copied = device.new_event();
        device.record(copied, mine);
        work->wait(kTimeout);
        EXPECT_TRUE(work->status().ok() && work->duration_s() > 0);
        while (!device.passed(copied)) std::this_thread::yield();
        EXPECT_EQ(seen, std::vector<float>(1000, 6.0f));
        device.free_event(copied);
        device.free_stream(mine);
      },
      Between::tcp);
}

TEST(what_goes_through_the_host_cannot_be_captured_and_breaks_nothing) {
  for (const auto between : {Between::tcp, Between::automatic})
    run_ranks(
        {"a", "b"},
        [between](Rank& rank) {
          const auto refused = [&rank] {
            const int other = 1 - rank.rank;
            std::vector<int32_t> out(3), in(3);
            const std::vector<Message> messages{{true, out.data(), 12, other, nullptr, {}},
                                                {false, in.data(), 12, other, nullptr, {}}};
            ::fake_device_capture(true);
            EXPECT_THROWS("no graph can capture", rank.sum(1.0f));
            EXPECT_THROWS("no graph can capture",
                          rank.group->start_together({}, messages, std::nullopt, nullptr));
            EXPECT_THROWS("no graph can capture",
                          rank.group->run_send(out.data(), 12, other, 0, std::nullopt));
            ::fake_device_capture(false);
          };
          ::fake_nccl_no_network(rank.host.c_str(), false);
          rank.make(kTimeout);
          if (between == Between::automatic) {  // where only the first call shows it
            ::fake_device_capture(true);
            EXPECT_THROWS("no graph can capture", rank.sum(1.0f));
            ::fake_device_capture(false);
          }
          refused();
          EXPECT_EQ(rank.sum(1.0f), 2.0f);
          refused();
          EXPECT_EQ(rank.sum(2.0f), 4.0f);
        },
        between);
}

TEST(what_fails_inside_a_host_is_an_error_on_every_rank) {
  run_ranks({"a", "a", "b"}, [](Rank& rank) {
    ::fake_nccl_no_network(("host of rank " + std::to_string(rank.rank)).c_str(), false);
    rank.make(kTimeout);
    EXPECT_THROWS("inside its host", rank.sum(1.0f));
    EXPECT_TRUE(rank.engine->broken().code != Code::timeout);
    EXPECT_TRUE(rank.told.empty());
  });
  run_ranks({"a", "a"}, [](Rank& rank) {
    ::fake_nccl_no_network(("host of rank " + std::to_string(rank.rank)).c_str(), false);
    rank.make(kTimeout);
    EXPECT_THROWS("no route to host", rank.sum(1.0f));
    EXPECT_TRUE(rank.told.empty());
  });
  // So it is between hosts, where it is wanted so.
  run_ranks(
      {"a", "b"},
      [](Rank& rank) {
        ::fake_nccl_no_network(rank.host.c_str(), false);
        rank.make(kTimeout);
        EXPECT_THROWS("PYCOMM_CUDA_BETWEEN_HOSTS=auto or tcp", rank.sum(1.0f));
      },
      Between::nccl);
}

TEST(without_nccl_all_goes_through_the_host_between_hosts_and_is_an_error_on_one) {
  const auto none = [](Rank& rank) {
    if (rank.rank != 1) return;
    rank.options.api = nullptr;
    rank.options.no_nccl = "no libnccl.so.2 here";
  };
  run_ranks({"a", "a", "b", "b"}, [none](Rank& rank) {
    none(rank);
    rank.make(kTimeout);
    EXPECT_EQ(rank.sum(1.0f), 4.0f);
    EXPECT_TRUE(rank.told.at(0).find("rank 1 (host a): no libnccl.so.2") != std::string::npos);
  });
  run_ranks({"a", "a"}, [none](Rank& rank) {
    none(rank);
    rank.make(kTimeout);
    EXPECT_THROWS("rank 1 (host a): no libnccl.so.2", rank.sum(1.0f));
  });
}

TEST(a_group_through_the_host_cannot_be_shrunk_and_goes_on) {
  run_ranks({"a", "b"}, [](Rank& rank) {
    if (rank.rank == 1) {
      rank.options.api = nullptr;
      rank.options.no_nccl = "no libnccl.so.2 here";
    }
    rank.make(kTimeout);
    const auto shrink = [&rank] {
      rank.engine->shrink({1 - rank.rank}, rank.options, Clock::now() + kTimeout);
    };
    EXPECT_THROWS(rank.rank == 1 ? "no libnccl.so.2 here" : "has not communicated yet", shrink());
    EXPECT_EQ(rank.sum(1.0f), 2.0f);
    EXPECT_THROWS(rank.rank == 1 ? "no libnccl.so.2 here" : "no communicator of NCCL's", shrink());
    EXPECT_EQ(rank.sum(1.0f), 2.0f);
  });
}

TEST(a_late_rank_on_the_way_through_the_host_is_a_timeout_that_ends_the_group) {
  std::latch late(2);
  run_ranks(
      {"a", "b", "b"},
      [&late](Rank& rank) {
        rank.make(milliseconds(4000));
        EXPECT_EQ(rank.sum(1.0f), 3.0f);
        if (rank.rank == 1) {
          late.wait();
          EXPECT_THROWS("rank 1", rank.sum(1.0f));
          EXPECT_THROWS("cannot be used any more", rank.sum(1.0f));
          return;
        }
        std::vector<float> x(3);
        Call call = Rank::native(all_reduce(x.data(), x.size()));
        call.timeout = milliseconds(500);
        const auto work = rank.group->start(call, nullptr);
        EXPECT_THROWS("all_reduce #1", work->wait(kTimeout));
        EXPECT_EQ(work->status().code, Code::timeout);
        EXPECT_TRUE(work->status().message.find("rank 1") != std::string::npos);
        EXPECT_THROWS("cannot be used any more", rank.sum(1.0f));
        late.count_down();
      },
      Between::tcp);
}

TEST(memory_that_one_rank_does_not_get_is_an_error_on_all_and_nobody_waits) {
  // In a call that goes through the host: pinned memory.
  run_ranks(
      {"a", "b", "b"},
      [](Rank& rank) {
        rank.make(kTimeout);
        EXPECT_EQ(rank.sum(1.0f), 3.0f);
        if (rank.rank == 2) ::fake_device_refuse("gpu2", 1 << 16);
        EXPECT_THROWS("out of memory", rank.sum(1.0f, 100000));
        const Status why = rank.engine->broken();
        EXPECT_TRUE(why.code != Code::timeout);
        EXPECT_TRUE(why.message.find("rank 2 of 3") != std::string::npos);
        EXPECT_TRUE(why.message.find("of pinned host memory") != std::string::npos);
      },
      Between::tcp);
  // Before a rank has an engine at all.
  ::fake_device_refuse("gpu1", 0);
  run_ranks({"a", "a"}, [](Rank& rank) {
    if (rank.rank == 1) {
      EXPECT_THROWS("no device memory to begin with: allocate: out of memory", rank.make(kTimeout));
      return;
    }
    rank.make(kTimeout);
    EXPECT_THROWS("rank 1 of 2", rank.sum(1.0f));
    EXPECT_TRUE(rank.engine->broken().message.find("out of memory") != std::string::npos);
  });
  ::fake_device_refuse(nullptr, 0);
}

TEST(small_all_reduces_on_one_host_are_the_peer_kernels_and_all_else_nccls) {
  // A rank that cannot map another's memory, or has none to share, leaves all to NCCL.
  for (const std::string lacks : {"", "way", "memory"}) {
    ::fake_device_unshared(lacks == "way" ? "gpu1" : nullptr);
    if (lacks == "memory") ::fake_device_refuse("gpu1", size_t{1} << 20);
    const int before = ::fake_device_n_peer_launches();
    run_ranks({"a", "a", "a"}, [](Rank& rank) {
      rank.options.peer_nbytes = 4096;
      rank.make(kTimeout);
      cuda::Device& device = *rank.options.device;
      const auto mine = device.new_stream();
      // Interleaved with NCCL's, on two streams; in place, and not aligned.
      for (const uint64_t numel : {1, 7, 1000, 1025, 1024, 5000}) {
        std::vector<float> x(numel + 1);
        for (uint64_t i = 0; i < numel; ++i)
          x[i + 1] = static_cast<float>(i % 100) + static_cast<float>(rank.rank);
        Call call = Rank::native(all_reduce(x.data() + 1, numel));
        call.stream = mine;
        rank.group->run(call);
        const auto work = rank.group->start(call, nullptr);
        work->wait(kTimeout);
        for (uint64_t i = 0; i < numel; ++i)
          if (x[i + 1] != 9 * static_cast<float>(i % 100) + 9) return EXPECT_EQ(x[i + 1], -1.0f);
      }
      std::vector<int32_t> counts(3, rank.rank);
      Call ints = Rank::native(all_reduce(nullptr, 3));
      ints.dtype = DType::int32;
      ints.input = ints.output = counts.data();
      rank.group->run(ints);
      EXPECT_EQ(counts, std::vector<int32_t>(3, 3));
      Call barrier;
      barrier.collective = Collective::barrier;
      rank.group->run(barrier);
      device.free_stream(mine);
    });
    EXPECT_EQ(::fake_device_n_peer_launches() - before, lacks.empty() ? 3 * 2 * 4 : 0);
  }
  ::fake_device_unshared(nullptr);
  ::fake_device_refuse(nullptr, 0);
  // A graph's launches would all have one epoch.
  const int before = ::fake_device_n_peer_launches();
  run_ranks({"a", "a"}, [](Rank& rank) {
    rank.options.peer_nbytes = 4096;
    rank.make(kTimeout);
    EXPECT_EQ(rank.sum(1.0f), 2.0f);
    const auto mine = rank.options.device->new_stream();
    std::vector<float> x(3, 1.0f);
    Call call = Rank::native(all_reduce(x.data(), x.size()));
    call.stream = mine;
    ::fake_device_capture(true);
    rank.group->run(call);
    ::fake_device_capture(false);
    ::fake_device_synchronize(mine);
    EXPECT_EQ(x[2], 2.0f);
    rank.options.device->free_stream(mine);
  });
  EXPECT_EQ(::fake_device_n_peer_launches() - before, 2);
}

TEST(a_peer_that_is_late_or_mistaken_is_an_error_on_all_ranks) {
  std::latch late(2);
  run_ranks({"a", "a", "a"}, [&late](Rank& rank) {
    rank.options.peer_nbytes = 4096;
    rank.make(kTimeout);
    EXPECT_EQ(rank.sum(1.0f), 3.0f);
    if (rank.rank == 1) {
      late.wait();
      EXPECT_THROWS("not done at its deadline: rank 1 (host a) ", {
        for (int turn = 0; turn < 2; ++turn) rank.sum(1.0f);
      });
      return;
    }
    std::vector<float> x(3);
    Call call = Rank::native(all_reduce(x.data(), x.size()));
    call.timeout = milliseconds(600);
    EXPECT_THROWS("not done at its deadline: rank 1 (host a) ", rank.group->run(call));
    EXPECT_EQ(rank.engine->broken().code, Code::timeout);
    late.count_down();
  });
  run_ranks({"a", "a"}, [](Rank& rank) {
    rank.options.peer_nbytes = 4096;
    rank.make(kTimeout);
    EXPECT_EQ(rank.sum(1.0f), 2.0f);
    EXPECT_THROWS("collective mismatch", rank.sum(1.0f, rank.rank == 0 ? 3 : 4));
    EXPECT_THROWS("cannot be used any more", {
      for (int turn = 0; turn < 2; ++turn) rank.sum(1.0f);
    });
  });
}
