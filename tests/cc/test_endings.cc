// How groups end, ranks as threads: closed beside others that work on, dropped in the middle of
// operations, revoked, waiting for ranks that never come through a store that never answers.
#include "cpu/store_word.h"
#include "ranks.h"

using namespace pycomm;
using namespace pycomm::testing;

namespace {

constexpr auto kSoon = std::chrono::seconds(20);

// A second group over all ranks of `world`'s endpoint.
std::unique_ptr<Group> another(Group& world, const std::shared_ptr<cpu::Endpoint>& endpoint,
                               std::shared_ptr<Store> store, const std::string& name) {
  std::vector<int> ranks;
  for (int i = 0; i < world.size(); ++i) ranks.push_back(i);
  auto engine = cpu::CpuEngine::create(
      endpoint, [store = std::move(store)] { return store; }, name, name, ranks, kSoon);
  return std::make_unique<Group>(name, world.rank(), world.size(), std::move(engine),
                                 ring_planner(world.size(), world.rank()), kSoon);
}

std::unique_ptr<Group> another(Group& world, const std::shared_ptr<cpu::Endpoint>& endpoint,
                               Store& store, const std::string& name) {
  return another(world, endpoint, std::make_shared<PrefixStore>(store, name + "/"), name);
}

Call barrier() {
  Call call;
  call.collective = Collective::barrier;
  return call;
}

// A store whose server was stopped: once frozen, whoever asks waits until it is thawed. It holds
// what it freezes, since a thread that it held up may ask after its group and the test are gone.
class FreezingStore final : public Store {
 public:
  void set(const std::string& key, const std::string& value) override {
    wait();
    store_.set(key, value);
  }
  std::vector<std::string> get_all(const std::vector<std::string>& keys,
                                   std::chrono::milliseconds timeout) override {
    wait();
    return store_.get_all(keys, timeout);
  }
  std::optional<std::string> peek(const std::string& key) override {
    wait();
    return store_.peek(key);
  }
  void freeze(bool frozen) {
    std::lock_guard lock(mutex_);
    frozen_ = frozen;
    changed_.notify_all();
  }

 private:
  void wait() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return !frozen_; });
  }
  MemoryStore store_;
  std::mutex mutex_;
  std::condition_variable changed_;
  bool frozen_ = false;
};

const std::vector<std::vector<std::string>> kPairs = {{"a", "a"}, {"a", "b"}};

}  // namespace

TEST(a_barrier_waits_for_every_rank) {
  for (const auto& hosts : {one_host(3), std::vector<std::string>{"a", "b", "b", "b"},
                            std::vector<std::string>{"a", "b", "c", "a", "b"}}) {
    std::atomic<int> entered{0};
    run_ranks(hosts, [&](Group& group, auto&, Store&) {
      for (int round = 1; round <= 40; ++round) {
        if (round % group.size() == group.rank())  // late, when the others are there
          while (entered.load() < round * group.size() - 1) std::this_thread::yield();
        entered.fetch_add(1);
        group.run(barrier());
        EXPECT_TRUE(entered.load() >= round * group.size());
      }
    });
  }
}

TEST(closing_does_not_wait_for_another_groups_operations) {
  for (const auto& hosts : kPairs)
    run_ranks(hosts, [](Group& world, auto& endpoint, Store& store) {
      auto other = another(world, endpoint, store, "other");
      float value = 0;
      const int peer = 1 - world.rank();
      auto open = world.recv(&value, sizeof(value), peer, 1, {},
                             nullptr);  // the progress thread is at it from here on
      for (int i = 0; i < 20; ++i) other->run(barrier());
      other->engine().close();
      other.reset();
      const float sent = 5;
      world.send(&sent, sizeof(sent), peer, 1, {}, nullptr)->wait(kSoon);
      open->wait(kSoon);
      EXPECT_EQ(value, 5.0f);
    });
}

TEST(groups_dropped_in_the_middle_of_their_operations) {
  for (const auto& hosts : kPairs)
    run_ranks(hosts, [](Group& world, auto& endpoint, Store& store) {
      std::atomic<int> callbacks{0}, started{0};
      for (int i = 0; i < 30; ++i) {
        auto group = another(world, endpoint, store, "dropped" + std::to_string(i));
        std::vector<std::shared_ptr<Work>> works;
        for (int k = 0; k < 4; ++k) {
          auto data = std::make_shared<std::vector<float>>(30'000, 1.0f);
          works.push_back(group->start(all_reduce(data->data(), data->size()), data));
          works.back()->on_done([&] { callbacks.fetch_add(1); });
          ++started;
        }
        world.run(barrier());
        if (i % 3 == 0) works.clear();
        group.reset();
        for (auto& work : works) {
          EXPECT_TRUE(work->done());
          try {
            work->wait(kSoon);
          } catch (const Error& error) {
            EXPECT_TRUE(error.code() == Code::closed || error.code() == Code::peer_lost);
          }
        }
      }
      while (callbacks.load() < started.load()) std::this_thread::yield();
      world.run(barrier());
    });
}

TEST(close_and_revoke_end_what_other_threads_wait_for) {
  for (const auto& hosts : kPairs)
    for (const bool revoke : {false, true})
      run_ranks(hosts, [revoke](Group& world, auto& endpoint, Store& store) {
        auto group = another(world, endpoint, store, "ending");
        const int peer = 1 - world.rank();
        std::atomic<int> inside{0};
        std::vector<std::thread> threads;
        for (int kind = 0; kind < 4; ++kind)
          threads.emplace_back([&, kind] {
            std::vector<float> data(20'000, 1.0f);
            inside.fetch_add(1);
            EXPECT_THROWS(
                "group 'ending'", for (;;) {
                  if (kind < 2)
                    group->start(all_reduce(data.data(), data.size()), nullptr)->wait(kSoon);
                  else
                    group->recv(data.data(), 4, kind == 2 ? peer : -1, kind, {}, nullptr)
                        ->wait(kSoon);
                });
          });
        while (inside.load() < 4) std::this_thread::yield();
        world.run(barrier());
        if (world.rank() == 0) {
          if (revoke)
            group->engine().revoke({Code::closed, "enough"});
          else
            group->engine().close();
        }
        for (auto& thread : threads) thread.join();
        world.run(barrier());
      });
}

TEST(a_rank_that_closed_before_any_connection_is_named) {
  for (const auto& hosts : {std::vector<std::string>{"a", "b"}, std::vector<std::string>{"b", "a"}})
    for (const int leaver : {0, 1})
      run_ranks(hosts, [leaver](Group& world, auto& endpoint, Store& store) {
        auto group = another(world, endpoint, store, "left");
        if (world.rank() == leaver) {
          group->engine().close();
        } else {
          std::vector<float> data(10, 1.0f);
          EXPECT_THROWS("closed the group", group->run(all_reduce(data.data(), data.size())));
        }
        world.run(barrier());
      });
}

TEST(deadlines_hold_when_the_store_does_not_answer) {
  for (const auto& hosts :
       {std::vector<std::string>{"a", "b"}, std::vector<std::string>{"b", "a", "a"}}) {
    auto freezing = std::make_shared<FreezingStore>();
    std::atomic<int> ready{0}, through{0};
    run_ranks(hosts, [&](Group& world, auto& endpoint, Store&) {
      auto group = another(world, endpoint, freezing, "frozen");
      if (ready.fetch_add(1) + 1 == world.size()) freezing->freeze(true);
      while (ready.load() < world.size()) std::this_thread::yield();
      if (world.rank() == 0) {
        while (through.load() < world.size() - 1) std::this_thread::yield();
        freezing->freeze(false);
        return;
      }
      std::vector<float> data(1000, 1.0f);
      Call call = all_reduce(data.data(), data.size());
      call.timeout = std::chrono::milliseconds(400);
      const auto begin = Clock::now();
      EXPECT_THROWS("waited", group->run(call));
      EXPECT_THROWS("cannot be used any more", group->run(call));
      group.reset();
      EXPECT_TRUE(Clock::now() - begin < std::chrono::seconds(5));
      through.fetch_add(1);
    });
  }
}

TEST(a_queued_operation_keeps_its_own_deadline) {
  for (const auto& hosts : kPairs) {
    std::atomic<bool> over{false};
    run_ranks(hosts, [&](Group& group, auto&, Store&) {
      if (group.rank() == 1) {
        while (!over.load()) std::this_thread::yield();
        return;
      }
      std::vector<float> data(100'000, 1.0f);
      group.start(all_reduce(data.data(), data.size()), nullptr);
      Call call = barrier();
      call.timeout = std::chrono::milliseconds(200);
      const auto begin = Clock::now();
      EXPECT_THROWS("behind all_reduce #0", group.run(call));
      EXPECT_TRUE(Clock::now() - begin < std::chrono::seconds(3));
      over.store(true);
    });
  }
}

TEST(a_message_asked_for_while_it_is_set_aside_is_delivered) {
  for (const auto& hosts : kPairs)
    run_ranks(hosts, [](Group& group, auto&, Store&) {
      std::vector<int32_t> big(3'000'000), small(3);
      const auto nbytes = [](const auto& v) { return v.size() * sizeof(int32_t); };
      if (group.rank() == 0) {
        std::fill(big.begin(), big.end(), 6);
        auto first = group.send(big.data(), nbytes(big), 1, 1, {}, nullptr);
        auto second = group.send(small.data(), nbytes(small), 1, 2, {}, nullptr);
        group.run(barrier());
        first->wait(kSoon);
        second->wait(kSoon);
      } else {
        group.run(barrier());  // the ring, or the socket, is full of the first
        auto second = group.recv(small.data(), nbytes(small), 0, 2, {}, nullptr);
        auto first = group.recv(big.data(), nbytes(big), 0, 1, {}, nullptr);
        first->wait(kSoon);
        second->wait(kSoon);
        EXPECT_EQ(std::count(big.begin(), big.end(), 6), static_cast<std::ptrdiff_t>(big.size()));
      }
    });
}

TEST(word_in_the_store_is_found_and_said_once) {
  auto store = std::make_shared<MemoryStore>();
  const auto same = [store] { return store; };
  cpu::StoreWord one(same), two(same);
  EXPECT_TRUE(!one.found("why"));
  one.look({"why"}, kSoon);
  EXPECT_TRUE(!one.found("why"));
  two.set_first("why", "two says so", kSoon);
  one.set_first("why", "one says so", kSoon);
  one.look({"why", "who"}, kSoon);
  EXPECT_EQ(one.found("why").value_or(""), std::string("two says so"));
  two.set("why", "two again", kSoon);
  two.look({"why"}, kSoon);
  EXPECT_EQ(two.found("why").value_or(""), std::string("two again"));
}
