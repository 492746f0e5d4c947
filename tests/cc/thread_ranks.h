// Ranks as threads of one process that share one device, a stream each: over a GPU and the real
// NCCL (gpu_threads.cc), and over the fake ones (test_thread_ranks.cc), by which these bodies
// themselves are tested.
//
// Freeing memory of a GPU waits for all its kernels, those too that wait for the rank that frees:
// so everything is allocated before the first collective, and freed once all ranks are done.
#pragma once

#include <barrier>
#include <random>

#include "cpu/reduce.h"
#include "cuda/engine.h"
#include "ranks.h"

namespace pycomm::testing {

struct Machine {
  std::shared_ptr<const cuda::NcclApi> api;               // nullptr: for what needs none
  std::function<std::shared_ptr<cuda::Device>()> device;  // of every rank, the same
};

constexpr auto kThreadTimeout = std::chrono::seconds(20);

// Arrays of one size on a device, in one allocation, each copied from and to the host.
class Arrays {
 public:
  Arrays(cuda::Device& device, size_t n, size_t nbytes)
      : device_(device),
        stride_((nbytes + 255) / 256 * 256),
        memory_(device.allocate(n * stride_)) {}
  ~Arrays() { device_.release(memory_); }
  Arrays(const Arrays&) = delete;
  Arrays& operator=(const Arrays&) = delete;
  void* at(size_t i) const { return static_cast<std::byte*>(memory_) + i * stride_; }
  void put(size_t i, const std::vector<char>& from, cuda::Device::Stream stream) const {
    device_.copy(at(i), from.data(), from.size(), stream);
    settle(device_, stream);
  }
  std::vector<char> get(size_t i, size_t nbytes, cuda::Device::Stream stream) const {
    return bytes_at(device_, at(i), nbytes, stream);
  }
  static std::vector<char> bytes_at(cuda::Device& device, const void* memory, size_t nbytes,
                                    cuda::Device::Stream stream) {
    std::vector<char> to(nbytes);
    device.copy(to.data(), memory, nbytes, stream);
    settle(device, stream);
    return to;
  }
  // Until the device has done what is on the stream.
  static void settle(cuda::Device& device, cuda::Device::Stream stream) {
    const auto event = device.new_event();
    device.record(event, stream);
    while (!device.passed(event)) std::this_thread::yield();
    device.free_event(event);
  }

 private:
  cuda::Device& device_;
  const size_t stride_;
  void* const memory_;
};

struct ThreadRank {
  int rank, n;
  std::shared_ptr<cuda::Device> device;
  cuda::Device::Stream stream;
  MemoryStore& store;
  std::barrier<>& meeting;  // of all threads
};

// Runs body on n threads; an exception of one fails the test, named.
inline void run_threads(const Machine& machine, int n,
                        const std::function<void(ThreadRank&)>& body) {
  MemoryStore store;
  std::barrier<> meeting(n);
  const auto device = machine.device();
  std::vector<std::thread> threads;
  for (int rank = 0; rank < n; ++rank)
    threads.emplace_back([&, rank] {
      try {
        device->adopt_thread();
        ThreadRank self{rank, n, device, device->new_stream(), store, meeting};
        body(self);
        meeting.arrive_and_wait();
        device->free_stream(self.stream);
      } catch (const std::exception& error) {
        ::testing::fail("rank", rank, error.what());
        meeting.arrive_and_drop();
      }
    });
  for (auto& thread : threads) thread.join();
}

inline std::vector<float> normal_values(size_t numel, int seed) {
  std::mt19937 random(static_cast<unsigned>(seed));
  std::normal_distribution<float> normal(0, 10);
  std::vector<float> made(numel);
  for (float& one : made) one = normal(random);
  return made;
}

template <class T>
std::vector<char> bytes_of(const std::vector<T>& values) {
  const auto* const first = reinterpret_cast<const char*>(values.data());
  return {first, first + values.size() * sizeof(T)};
}

// In rank order, as the peer kernel adds.
inline std::vector<float> sums_by_rank(size_t numel, int n, int seed) {
  std::vector<float> sum = normal_values(numel, seed);
  for (int rank = 1; rank < n; ++rank) {
    const auto other = normal_values(numel, seed + rank);
    for (size_t i = 0; i < numel; ++i) sum[i] += other[i];
  }
  return sum;
}

// The peer kernel alone, launches of many sizes under way at once: one shot, and two for the
// largest.
inline void check_peers(const Machine& machine, int n) {
  static constexpr size_t kNumels[] = {1, 3, 1000, 4097, 16384, 262144};
  constexpr int kTurns = 3;
  constexpr int64_t kCapacity = 1 << 20;
  run_threads(machine, n, [n](ThreadRank& self) {
    std::string why;
    auto peers = cuda::Peers::create(
        self.device, self.rank, n, kCapacity,
        [&](const std::string& name, const std::string& mine) {
          std::vector<std::string> keys;
          for (int rank = 0; rank < n; ++rank) keys.push_back(name + std::to_string(rank));
          self.store.set(keys[static_cast<size_t>(self.rank)], mine);
          return self.store.get_all(keys, kThreadTimeout);
        },
        &why);
    if (peers == nullptr) throw Error(Code::internal, "no peers: " + why);
    {
      const size_t n_arrays = std::size(kNumels) * kTurns;
      const Arrays arrays(*self.device, n_arrays, kCapacity);
      for (size_t i = 0; i < n_arrays; ++i)
        arrays.put(i,
                   bytes_of(normal_values(kNumels[i % std::size(kNumels)],
                                          static_cast<int>(100 * i) + self.rank)),
                   self.stream);
      self.meeting.arrive_and_wait();
      for (size_t i = 0; i < n_arrays; ++i) {
        Launch launch;
        launch.fingerprint.collective = Collective::all_reduce;
        launch.fingerprint.dtype = launch.dtype = DType::float32;
        launch.fingerprint.op = launch.op = ReduceOp::sum;
        launch.input = launch.output = arrays.at(i);
        launch.input_nbytes = launch.output_nbytes = kNumels[i % std::size(kNumels)] * 4;
        launch.deadline = Clock::now() + kThreadTimeout;
        EXPECT_TRUE(peers->takes(launch));
        peers->run(launch, static_cast<uint32_t>(i), self.stream);
      }
      for (size_t i = 0; i < n_arrays; ++i) {
        const size_t numel = kNumels[i % std::size(kNumels)];
        EXPECT_TRUE(arrays.get(i, numel * 4, self.stream) ==
                    bytes_of(sums_by_rank(numel, n, static_cast<int>(100 * i))));
      }
      EXPECT_TRUE(peers->status().ok());
      self.meeting.arrive_and_wait();
      peers->all_have_left();
    }
  });
}

struct ThreadGroup {
  std::shared_ptr<cuda::CudaEngine> engine;
  Group group;
  ThreadGroup(const Machine& machine, ThreadRank& self, const std::string& name,
              std::chrono::milliseconds timeout)
      : engine(make(machine, self, name)),
        group(name, self.rank, self.n, engine, Planner{}, timeout) {}

 private:
  static std::shared_ptr<cuda::CudaEngine> make(const Machine& machine, ThreadRank& self,
                                                const std::string& name) {
    cuda::EngineOptions options;
    options.api = machine.api;
    options.device = self.device;
    options.store = std::make_shared<PrefixStore>(self.store, name + "/");
    options.name = name;
    options.rank = self.rank;
    options.hosts = one_host(self.n);
    options.peer_nbytes = 65536;
    return cuda::CudaEngine::create(options);
  }
};

inline Call array_call(Collective collective, DType dtype, void* input, void* output,
                       uint64_t numel, cuda::Device::Stream stream) {
  Call call;
  call.collective = collective;
  call.dtype = dtype;
  call.input = input;
  call.output = output;
  call.numel = numel;
  call.stream = stream;
  return call;
}

// The whole engine: NCCL and the peer kernel in turn, in the order of the caller's stream and on
// the engine's own, with nothing that waits on the host in between.
inline void check_engine(const Machine& machine, int n) {
  static constexpr size_t kNumels[] = {1, 1000, 16384, 16385, 100003};
  run_threads(machine, n, [&machine, n](ThreadRank& self) {
    ThreadGroup ranks(machine, self, "world", kThreadTimeout);
    const size_t n_arrays = 2 * std::size(kNumels);
    const Arrays arrays(*self.device, n_arrays, size_t{100003} * 4);
    const Arrays whole(*self.device, 1, static_cast<size_t>(n) * 1000 * 4);
    const auto other = self.device->new_stream();
    for (size_t i = 0; i < n_arrays; ++i) {
      std::vector<int32_t> x(kNumels[i / 2], self.rank + static_cast<int>(i));
      arrays.put(i,
                 i % 2 == 0
                     ? bytes_of(normal_values(x.size(), static_cast<int>(100 * i) + self.rank))
                     : bytes_of(x),
                 self.stream);
    }
    std::vector<std::shared_ptr<Work>> works;
    self.meeting.arrive_and_wait();
    for (size_t i = 0; i < n_arrays; ++i) {
      Call call = array_call(Collective::all_reduce, i % 2 == 0 ? DType::float32 : DType::int32,
                             arrays.at(i), arrays.at(i), kNumels[i / 2], self.stream);
      if (i % 3 == 0) {
        works.push_back(ranks.group.start(call, nullptr));
        works.back()->order_before(other);
        works.back()->order_before(self.stream);
      } else {
        ranks.group.run(call);
      }
    }
    ranks.group.run(array_call(Collective::all_gather, DType::int32, arrays.at(3), whole.at(0),
                               static_cast<uint64_t>(n) * 1000, self.stream));
    for (size_t i = 0; i < n_arrays; ++i) {
      const size_t numel = kNumels[i / 2];
      const auto found = arrays.get(i, numel * 4, self.stream);
      if (i % 2 == 1) {
        const int sum = n * static_cast<int>(i) + n * (n - 1) / 2;
        EXPECT_TRUE(found == bytes_of(std::vector<int32_t>(numel, sum)));
      } else if (numel <= 16384) {
        EXPECT_TRUE(found == bytes_of(sums_by_rank(numel, n, static_cast<int>(100 * i))));
      }
    }
    EXPECT_TRUE(
        whole.get(0, static_cast<size_t>(n) * 4000, self.stream) ==
        bytes_of(std::vector<int32_t>(static_cast<size_t>(n) * 1000, 3 * n + n * (n - 1) / 2)));
    for (const auto& work : works) work->wait(kThreadTimeout);
    Call barrier;
    barrier.collective = Collective::barrier;
    ranks.group.run(barrier);
    self.meeting.arrive_and_wait();
    self.device->free_stream(other);
  });
}

// Memory that every rank reads of every other, in the order of its stream, and larger memory in its
// place. n_shared: pieces of such memory that the process has, where somebody counts.
inline void check_symmetric_memory(const Machine& machine, int n,
                                   const std::function<int()>& n_shared = {}) {
  const int before = n_shared ? n_shared() : 0;
  run_threads(machine, n, [&, n](ThreadRank& self) {
    ThreadGroup ranks(machine, self, "world", kThreadTimeout);
    const Arrays number(*self.device, 1, 4);
    // All have come to it.
    const Call met = array_call(Collective::all_reduce, DType::float32, number.at(0), number.at(0),
                                1, self.stream);
    std::shared_ptr<cuda::SymmetricMemory> memory;
    for (const int64_t nbytes : {int64_t{40}, int64_t{5} << 20}) {
      std::string why;
      memory = ranks.engine->share(nbytes, memory, Clock::now() + kThreadTimeout, &why);
      if (memory == nullptr) throw Error(Code::internal, "no memory: " + why);
      EXPECT_EQ(memory->nbytes(), nbytes);
      EXPECT_EQ(memory->n_on_device(), n);
      const auto size = static_cast<size_t>(nbytes);
      const Arrays arrays(*self.device, 1, size);
      self.meeting.arrive_and_wait();
      EXPECT_TRUE(Arrays::bytes_at(*self.device, memory->of(self.rank), size, self.stream) ==
                  std::vector<char>(size, 0));
      for (int turn = 1; turn < 4; ++turn) {
        arrays.put(0, std::vector<char>(size, static_cast<char>(10 * turn + self.rank)),
                   self.stream);
        self.device->copy(memory->of(self.rank), arrays.at(0), size, self.stream);
        ranks.group.run(met);
        for (int of = 0; of < n; ++of)
          EXPECT_TRUE(Arrays::bytes_at(*self.device, memory->of(of), size, self.stream) ==
                      std::vector<char>(size, static_cast<char>(10 * turn + of)));
        ranks.group.run(met);  // read: it may be written again
      }
      Arrays::settle(*self.device, self.stream);
      self.meeting.arrive_and_wait();
      // Each rank's, and where there are more than one its buffer of the peer kernel.
      if (n_shared) EXPECT_EQ(n_shared() - before, n == 1 ? 1 : 2 * n);
      self.meeting.arrive_and_wait();
    }
  });
}

// A rank that does not come is a timeout on the others, in the peer kernel and in NCCL; then the
// device is free, and a group made anew goes on.
inline void check_a_late_rank(const Machine& machine, int n) {
  run_threads(machine, n, [&machine, n](ThreadRank& self) {
    const Arrays arrays(*self.device, 1, 400000);
    for (const uint64_t numel : {uint64_t{100}, uint64_t{100000}}) {
      const std::string name = "of" + std::to_string(numel);
      ThreadGroup ranks(machine, self, name, std::chrono::milliseconds(1500));
      Call call = array_call(Collective::all_reduce, DType::float32, arrays.at(0), arrays.at(0),
                             numel, self.stream);
      call.timeout = kThreadTimeout;  // of the first, in which they meet
      ranks.group.run(call);
      Arrays::settle(*self.device, self.stream);
      self.meeting.arrive_and_wait();
      call.timeout.reset();
      if (self.rank != n - 1) {
        const auto work = ranks.group.start(call, nullptr);
        // It has not said that it waits in this one; of the first, which may take long, it may
        // have.
        const std::string late =
            "not done at its deadline: rank " + std::to_string(n - 1) + " (host ";
        EXPECT_THROWS(late.c_str(), work->wait(kThreadTimeout));
        EXPECT_EQ(work->status().code, Code::timeout);
      }
      self.meeting.arrive_and_wait();
    }
    Arrays::settle(*self.device, self.stream);
    ThreadGroup anew(machine, self, "anew", kThreadTimeout);
    const std::vector<int32_t> ones(100, 1);
    arrays.put(0, bytes_of(ones), self.stream);
    anew.group.run(array_call(Collective::all_reduce, DType::int32, arrays.at(0), arrays.at(0), 100,
                              self.stream));
    EXPECT_TRUE(arrays.get(0, 400, self.stream) == bytes_of(std::vector<int32_t>(100, n)));
    self.meeting.arrive_and_wait();
  });
}

}  // namespace pycomm::testing
