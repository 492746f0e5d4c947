// One-shot and two-shot all_reduce of ranks that are threads on one GPU, a stream each, beside NCCL
// on the same device and memory. Prints a line per measurement: what, ranks, bytes of float32, then
// seconds an operation in each round: of a batch that each rank launches on its stream, the longest
// rank's by events. Inputs are fresh, and rotated past the L2 from 64 KiB on; outputs are poisoned
// before.
#include <barrier>
#include <cstdlib>
#include <random>
#include <thread>

#include "cuda/cuda.h"
#include "gpu_timing.h"

using namespace pycomm;

namespace {

constexpr int kBatch = 20, kMostSets = 512;
constexpr int64_t kSizes[] = {256, 4096, 16384, 65536, 262144, 1048576};
constexpr int kManyRanksADevice = 23003;

void require_ok(const Status& status) {
  if (!status.ok()) throw Error(status);
}

struct Rank {
  cudaStream_t stream;
  cudaEvent_t begin, end;
  char *buffer, *input, *output;
  cuda::NcclComm* comm = nullptr;
  float milliseconds = 0;
};

struct Machine {
  int n;
  int64_t nbytes;
  int n_sets;
  const cuda::NcclApi* api;  // nullptr: without NCCL
  std::vector<Rank> ranks;
  uint32_t* failed;
  uint32_t epoch = 0;
};

void launch(Machine& machine, int rank, const std::string& what, int at, uint32_t epoch) {
  Rank& self = machine.ranks[static_cast<size_t>(rank)];
  char* const input = self.input + at % machine.n_sets * machine.nbytes;
  char* const output = self.output + at % machine.n_sets * machine.nbytes;
  const int64_t numel = machine.nbytes / 4;
  if (what == "nccl") {
    const auto result =
        machine.api->all_reduce(input, output, static_cast<size_t>(numel), cuda::NcclDType::float32,
                                cuda::NcclOp::sum, self.comm, self.stream);
    if (result != cuda::NcclResult::success)
      throw std::runtime_error(machine.api->describe(result, self.comm));
    return;
  }
  cuda::PeerArguments args{};
  for (int peer = 0; peer < machine.n; ++peer)
    args.buffers[peer] = machine.ranks[static_cast<size_t>(peer)].buffer;
  args.rank = rank;
  args.n_ranks = machine.n;
  args.epoch = epoch;
  args.capacity = machine.nbytes;
  args.input = input;
  args.output = output;
  args.numel = numel;
  args.op = ReduceOp::sum;
  args.timeout_ns = 5'000'000'000;
  args.failed = machine.failed;
  require_ok(
      cuda::peer_all_reduce(args, DType::float32, what == "two-shot", machine.n, self.stream));
}

// One thread a rank; each launches the batches of all rounds.
void time_one(Machine& machine, const std::string& what) {
  std::barrier<> meeting(machine.n + 1);
  std::vector<std::thread> threads;
  std::vector<std::string> errors(static_cast<size_t>(machine.n));
  for (int rank = 0; rank < machine.n; ++rank)
    threads.emplace_back([&, rank] {
      Rank& self = machine.ranks[static_cast<size_t>(rank)];
      for (int round = 0; round < kWarmUps + kRounds; ++round) {
        meeting.arrive_and_wait();
        try {
          require(cudaEventRecord(self.begin, self.stream));
          for (int i = 0; i < kBatch; ++i)
            launch(machine, rank, what, round * kBatch + i,
                   machine.epoch + static_cast<uint32_t>(round * kBatch + i + 1));
          require(cudaEventRecord(self.end, self.stream));
          require(cudaEventSynchronize(self.end));
          require(cudaEventElapsedTime(&self.milliseconds, self.begin, self.end));
        } catch (const std::exception& error) {
          errors[static_cast<size_t>(rank)] = error.what();
        }
        meeting.arrive_and_wait();
      }
    });
  std::printf("%s\t%d\t%lld", what.c_str(), machine.n, static_cast<long long>(machine.nbytes));
  for (int round = 0; round < kWarmUps + kRounds; ++round) {
    for (const Rank& rank : machine.ranks)
      require(cudaMemset(rank.output, 0xa5, static_cast<size_t>(machine.n_sets * machine.nbytes)));
    require(cudaDeviceSynchronize());
    meeting.arrive_and_wait();
    meeting.arrive_and_wait();
    float longest = 0;
    for (const Rank& rank : machine.ranks) longest = std::max(longest, rank.milliseconds);
    if (round >= kWarmUps) std::printf("\t%.9f", static_cast<double>(longest) * 1e-3 / kBatch);
  }
  std::printf("\n");
  for (auto& thread : threads) thread.join();
  machine.epoch += (kWarmUps + kRounds) * kBatch;
  for (const auto& error : errors)
    if (!error.empty()) throw std::runtime_error(what + ": " + error);
  if (*machine.failed != 0)
    throw std::runtime_error(what + ": the kernel gave up, error word " +
                             std::to_string(*machine.failed));
}

void join_nccl(Machine& machine) {
  cuda::NcclUniqueId id;
  if (machine.api->get_unique_id(&id) != cuda::NcclResult::success)
    throw std::runtime_error("ncclGetUniqueId failed");
  std::vector<std::thread> threads;
  std::vector<cuda::NcclResult> results(static_cast<size_t>(machine.n), cuda::NcclResult::success);
  for (int rank = 0; rank < machine.n; ++rank)
    threads.emplace_back([&, rank] {
      (void)cudaSetDevice(0);
      results[static_cast<size_t>(rank)] = machine.api->comm_init_rank_config(
          &machine.ranks[static_cast<size_t>(rank)].comm, machine.n, id, rank, nullptr);
    });
  for (auto& thread : threads) thread.join();
  for (const cuda::NcclResult result : results)
    if (result != cuda::NcclResult::success)
      throw std::runtime_error(machine.api->describe(result, nullptr));
}

void measure_ranks(int n, const cuda::NcclApi* api) {
  std::mt19937 random(std::random_device{}());
  std::normal_distribution<float> normal;
  std::vector<cuda::NcclComm*> comms(static_cast<size_t>(n), nullptr);
  for (const int64_t nbytes : kSizes) {
    Machine machine{n, nbytes, 0, api, std::vector<Rank>(static_cast<size_t>(n)), nullptr};
    machine.n_sets = std::min(
        kMostSets, turns_past_l2(static_cast<size_t>(2 * n) * static_cast<size_t>(nbytes)));
    const auto of_sets = static_cast<size_t>(machine.n_sets * nbytes);
    require(cudaHostAlloc(reinterpret_cast<void**>(&machine.failed), sizeof(uint32_t), 0));
    *machine.failed = 0;
    std::vector<float> values(of_sets / 4);
    for (size_t i = 0; i < machine.ranks.size(); ++i) {
      Rank& rank = machine.ranks[i];
      rank.comm = comms[i];
      require(cudaStreamCreateWithFlags(&rank.stream, cudaStreamNonBlocking));
      require(cudaEventCreate(&rank.begin));
      require(cudaEventCreate(&rank.end));
      const auto nbytes_of_buffer = static_cast<size_t>(cuda::peer_buffer_nbytes(nbytes));
      require(cudaMalloc(reinterpret_cast<void**>(&rank.buffer), nbytes_of_buffer));
      require(cudaMemset(rank.buffer, 0, nbytes_of_buffer));
      require(cudaMalloc(reinterpret_cast<void**>(&rank.input), of_sets));
      require(cudaMalloc(reinterpret_cast<void**>(&rank.output), of_sets));
      for (float& value : values) value = normal(random);
      require(cudaMemcpy(rank.input, values.data(), of_sets, cudaMemcpyHostToDevice));
    }
    require(cudaDeviceSynchronize());
    if (api != nullptr && comms[0] == nullptr) {
      join_nccl(machine);
      for (size_t i = 0; i < comms.size(); ++i) comms[i] = machine.ranks[i].comm;
    }
    time_one(machine, "one-shot");
    time_one(machine, "two-shot");
    if (api != nullptr) time_one(machine, "nccl");
    std::fflush(stdout);
    require(cudaDeviceSynchronize());
    for (Rank& rank : machine.ranks) {
      for (char* const memory : {rank.buffer, rank.input, rank.output}) require(cudaFree(memory));
      require(cudaEventDestroy(rank.begin));
      require(cudaEventDestroy(rank.end));
      require(cudaStreamDestroy(rank.stream));
    }
    require(cudaFreeHost(machine.failed));
  }
  for (cuda::NcclComm* const comm : comms)
    if (comm != nullptr) (void)api->comm_abort(comm);
}

}  // namespace

int main() try {
  ::setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);  // a way to the device for each stream
  ::setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1", 1);
  ::setenv("NCCL_NVLS_ENABLE", "0", 1);
  std::shared_ptr<const cuda::NcclApi> api;
  const Status opened = cuda::NcclApi::open("", &api);
  if (!opened.ok())
    std::printf("without\tnccl\t%s\n", opened.message.c_str());
  else if (api->version() < kManyRanksADevice)
    std::printf("without\tnccl\tNCCL %s takes one rank per device in a process\n",
                cuda::nccl_version_name(api->version()).c_str());
  const bool with_nccl = opened.ok() && api->version() >= kManyRanksADevice;
  for (const int n : {2, 4}) measure_ranks(n, with_nccl ? api.get() : nullptr);
} catch (const std::exception& error) {
  std::fprintf(stderr, "gpu_peers: %s\n", error.what());
  return 1;
}
