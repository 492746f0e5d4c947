// What gpu_threads.cc runs on a GPU, on the fake device; and what becomes of memory there.
#include <filesystem>

#include "fake_device.h"
#include "thread_ranks.h"

using namespace pycomm;
using pycomm::testing::Machine;

namespace {

Machine fake() {
  ::setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1", 1);
  ::setenv("FAKE_NCCL_VERSION", "23003", 1);
  return {pycomm::testing::open_fake(),
          [] { return std::shared_ptr<cuda::Device>(pycomm_test_device("gpu0")); }};
}

// The fake device's, that others may map: each has a file of the process.
int n_shared() {
  int found = 0;
  for (const auto& each : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code closed;  // that of the iteration itself
    const auto file = std::filesystem::read_symlink(each.path(), closed);
    found += file.string().find("pycomm-fake-device") != std::string::npos;
  }
  return found;
}

}  // namespace

TEST(peers_of_2_to_8_threads_on_one_device) {
  for (const int n : {2, 3, 4, 8}) pycomm::testing::check_peers(fake(), n);
}

TEST(an_engine_for_each_of_2_to_8_threads_on_one_device) {
  for (const int n : {2, 4, 8}) pycomm::testing::check_engine(fake(), n);
}

TEST(memory_that_2_to_8_threads_on_one_device_read_of_each_other) {
  pycomm::testing::check_symmetric_memory(fake(), 1, n_shared);
  EXPECT_EQ(n_shared(),
            0);  // given back with the group; of more ranks, when they leave at about one time
  for (const int n : {2, 4, 8}) pycomm::testing::check_symmetric_memory(fake(), n, n_shared);
}

TEST(memory_that_one_rank_cannot_map_or_has_not_is_none_on_all) {
  for (const bool lacks_way : {true, false}) {
    const int before = n_shared();
    ::fake_device_unshared(lacks_way ? "gpu0" : nullptr);
    if (!lacks_way) ::fake_device_refuse("gpu0", size_t{1} << 20);
    const Machine machine = fake();
    pycomm::testing::run_threads(machine, 3, [&](pycomm::testing::ThreadRank& self) {
      pycomm::testing::ThreadGroup ranks(machine, self, "world", pycomm::testing::kThreadTimeout);
      std::string why;
      const auto deadline = Clock::now() + pycomm::testing::kThreadTimeout;
      EXPECT_TRUE(ranks.engine->share(100, nullptr, deadline, &why) == nullptr);
      EXPECT_TRUE(why.find(lacks_way ? "rank 0: map_shared: no way" : "rank 0: allocate_shared") ==
                  0);
      EXPECT_TRUE(ranks.engine->broken().ok());
      self.meeting.arrive_and_wait();
    });
    EXPECT_EQ(n_shared(), before);
    ::fake_device_unshared(nullptr);
    ::fake_device_refuse(nullptr, 0);
  }
}

TEST(memory_whose_rank_does_not_come_is_a_timeout) {
  const Machine machine = fake();
  pycomm::testing::run_threads(machine, 2, [&](pycomm::testing::ThreadRank& self) {
    pycomm::testing::ThreadGroup ranks(machine, self, "world", pycomm::testing::kThreadTimeout);
    std::string why;
    const auto soon = Clock::now() + std::chrono::milliseconds(600);
    if (self.rank == 0)
      EXPECT_THROWS("rank/1", (void)ranks.engine->share(100, nullptr, soon, &why));
    self.meeting.arrive_and_wait();
  });
}

TEST(a_thread_that_does_not_come_is_a_timeout_and_the_device_is_free_then) {
  pycomm::testing::check_a_late_rank(fake(), 3);
}
