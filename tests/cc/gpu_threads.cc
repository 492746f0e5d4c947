// Ranks as threads on one GPU: the peer kernel and the engine over the real NCCL. `make test-gpu`
// runs it; `make test` compiles it, and runs the same bodies on the fake device
// (test_thread_ranks.cc).
#include "cuda/cuda.h"
#include "gpu_memory.h"
#include "thread_ranks.h"

using namespace pycomm;
using pycomm::testing::Machine;

namespace {

constexpr int kManyRanksADevice = 23003;

Machine gpu(bool with_nccl) {
  // Streams that share a way to the device wait for each other, so each gets one of its own.
  ::setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
  ::setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1", 1);
  ::setenv("NCCL_NVLS_ENABLE", "0", 1);
  require(cudaSetDevice(0));
  Machine machine;
  machine.device = [] { return cuda::cuda_device(0); };
  if (!with_nccl) return machine;
  require(cuda::NcclApi::open("", &machine.api));
  if (machine.api->version() < kManyRanksADevice)
    throw ::testing::NotRun{"NCCL " + cuda::nccl_version_name(machine.api->version()) + " (" +
                            machine.api->path() +
                            ") takes one rank per device in a process; 2.30.3 and newer take more"};
  return machine;
}

}  // namespace

TEST(peers_of_2_to_8_threads_on_one_gpu) {
  for (const int n : {2, 3, 4, 8}) pycomm::testing::check_peers(gpu(false), n);
}

TEST(an_engine_for_each_of_2_to_8_threads_on_one_gpu) {
  for (const int n : {2, 4, 8}) pycomm::testing::check_engine(gpu(true), n);
}

TEST(memory_that_2_to_8_threads_on_one_gpu_read_of_each_other) {
  for (const int n : {2, 4, 8}) pycomm::testing::check_symmetric_memory(gpu(true), n);
}

TEST(a_thread_that_does_not_come_is_a_timeout_and_the_gpu_is_free_then) {
  pycomm::testing::check_a_late_rank(gpu(true), 3);
}

// One thread that launches for all, small tensors in two shots too.
// PYCOMM_TEST_SMALL: one rank, which waits for none; under compute-sanitizer kernels may run one
// after the other.
TEST(all_reduce_of_peers_on_one_device) {
  const bool small = std::getenv("PYCOMM_TEST_SMALL") != nullptr;
  for (const int n : small ? std::vector{1} : std::vector{2, 4})
    for (const bool two_shot : {false, true})
      for (const int64_t numel : {1, 1001, 16384}) {
        const int64_t capacity = (numel * 4 + 15) / 16 * 16;
        std::vector<std::unique_ptr<Memory>> buffers, tensors;
        std::vector<cudaStream_t> streams(static_cast<size_t>(n));
        cuda::PeerArguments args{};
        args.n_ranks = n;
        args.capacity = capacity;
        args.numel = numel;
        args.op = ReduceOp::sum;
        args.timeout_ns = 5'000'000'000;
        for (int rank = 0; rank < n; ++rank) {
          buffers.push_back(
              std::make_unique<Memory>(static_cast<size_t>(cuda::peer_buffer_nbytes(capacity))));
          args.buffers[rank] = buffers.back()->data();
          require(cudaMemset(args.buffers[rank], 0,
                             static_cast<size_t>(cuda::peer_buffer_nbytes(capacity))));
          require(cudaStreamCreateWithFlags(&streams[static_cast<size_t>(rank)],
                                            cudaStreamNonBlocking));
        }
        require(cudaDeviceSynchronize());
        for (uint32_t epoch = 1; epoch <= 4; ++epoch) {
          tensors.clear();
          std::vector<char> expected;
          for (int rank = 0; rank < n; ++rank) {
            const auto x = values(static_cast<size_t>(numel), DType::float32,
                                  epoch * 10 + static_cast<unsigned>(rank));
            tensors.push_back(std::make_unique<Memory>(x, 0));
            if (rank == 0)
              expected = x;
            else
              cpu::reduce(expected.data(), expected.data(), x.data(), static_cast<size_t>(numel),
                          DType::float32, ReduceOp::sum);
          }
          for (int rank = 0; rank < n; ++rank) {
            args.rank = rank;
            args.epoch = epoch;
            args.input = args.output = tensors[static_cast<size_t>(rank)]->data();
            require(cuda::peer_all_reduce(args, DType::float32, two_shot, n,
                                          streams[static_cast<size_t>(rank)]));
          }
          require(cudaDeviceSynchronize());
          for (const auto& tensor : tensors) EXPECT_TRUE(tensor->read() == expected);
        }
        for (const auto stream : streams) require(cudaStreamDestroy(stream));
      }
}
