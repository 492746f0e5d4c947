// What gpu_threads.cc runs on a GPU, on the fake device.
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

}  // namespace

TEST(peers_of_2_to_8_threads_on_one_device) {
  for (const int n : {2, 3, 4, 8}) pycomm::testing::check_peers(fake(), n);
}

TEST(an_engine_for_each_of_2_to_8_threads_on_one_device) {
  for (const int n : {2, 4, 8}) pycomm::testing::check_engine(fake(), n);
}

TEST(a_thread_that_does_not_come_is_a_timeout_and_the_device_is_free_then) {
  pycomm::testing::check_a_late_rank(fake(), 3);
}
