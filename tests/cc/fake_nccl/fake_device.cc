// A pycomm::cuda::Device of host memory: each stream is a thread that runs what is on it in turn,
// later by fake_device_delay(). A null stream is the host itself.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <thread>
#include <vector>

#include "core/status.h"
#include "cuda/device.h"
#include "fake_nccl/arithmetic.h"
#include "fake_nccl/fake_nccl.h"
#include "fake_nccl/peer_machine.h"

namespace {

std::atomic<int> delay_us{0};
std::mutex refusal_mutex;
std::string refusing_id;
size_t refused_above = SIZE_MAX;
std::string unshared_id;  // set before ranks begin
std::atomic<int> fake_peer_launches{0};
thread_local bool captures = false;

class ThreadStream final : public FakeStream {
 public:
  ThreadStream() : thread_([this] { loop(); }) {}
  ~ThreadStream() {
    {
      const std::lock_guard lock(mutex_);
      ending_ = true;
      changed_.notify_all();
    }
    thread_.join();
  }
  void enqueue(void (*run)(void*), void* argument) override {
    push([=] { run(argument); });
  }
  void push(std::function<void()> task) {
    const std::lock_guard lock(mutex_);
    tasks_.push_back(std::move(task));
    changed_.notify_all();
  }

 private:
  void loop() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return ending_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const auto task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      if (delay_us > 0) std::this_thread::sleep_for(std::chrono::microseconds(delay_us));
      task();
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  bool ending_ = false;
  std::thread thread_;
};

// One recording of an event; an event is the last one, as CUDA has it.
struct Mark {
  std::mutex mutex;
  std::condition_variable changed;
  bool passed = false;
  const bool captured = captures;
  std::chrono::steady_clock::time_point at;
  void pass() {
    const std::lock_guard lock(mutex);
    passed = true;
    at = std::chrono::steady_clock::now();
    changed.notify_all();
  }
  void wait() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [this] { return passed; });
  }
};
struct HostEvent {
  std::mutex mutex;
  std::shared_ptr<Mark> last;
};

class HostDevice final : public pycomm::cuda::Device {
 public:
  explicit HostDevice(std::string id) : id_(std::move(id)) {}
  std::string id() const override { return id_; }
  std::string name() const override { return "host memory " + id_; }
  bool is_host_memory() const override { return true; }
  Stream new_stream() override { return static_cast<FakeStream*>(new ThreadStream); }
  void free_stream(Stream stream) override { delete thread(stream); }
  Event new_event() override { return new HostEvent; }
  void free_event(Event event) override { delete as_event(event); }
  void record(Event event, Stream stream) override {
    auto mark = std::make_shared<Mark>();
    {
      const std::lock_guard lock(as_event(event)->mutex);
      as_event(event)->last = mark;
    }
    in_order(stream, [mark] { mark->pass(); });
  }
  void wait(Stream stream, Event event) override {
    const auto mark = last(event);
    if (mark->captured != captures)
      throw pycomm::Error(pycomm::Code::internal, "wait: an event across a capture's border");
    in_order(stream, [mark] { mark->wait(); });
  }
  void wait_value(Stream stream, const uint32_t* word, uint32_t value) override {
    in_order(stream, [=] {
      const std::atomic_ref<uint32_t> seen(*const_cast<uint32_t*>(word));
      while (static_cast<int32_t>(seen.load(std::memory_order_acquire) - value) < 0)
        std::this_thread::sleep_for(std::chrono::microseconds(20));
    });
  }
  void write_value(Stream stream, uint32_t* word, uint32_t value) override {
    in_order(stream, [=] { std::atomic_ref(*word).store(value); });
  }
  bool passed(Event event) override {
    const auto mark = last(event);
    if (mark->captured)
      throw pycomm::Error(pycomm::Code::internal, "passed: the event belongs to a graph");
    const std::lock_guard lock(mark->mutex);
    return mark->passed;
  }
  double elapsed_s(Event from, Event to) override {
    return std::chrono::duration<double>(last(to)->at - last(from)->at).count();
  }
  bool capturing(Stream) override { return captures; }
  void* allocate(size_t nbytes) override { return take(nbytes, "allocate"); }
  void release(void* memory) override { ::free(memory); }
  // A memfd, whose handle says of which process it is which file.
  void* allocate_shared(size_t nbytes) override {
    refuse_above(nbytes, "allocate_shared");
    const int fd = ::memfd_create("pycomm-fake-device", MFD_CLOEXEC);
    if (fd < 0 || ::ftruncate(fd, static_cast<off_t>(nbytes)) != 0)
      throw pycomm::Error(pycomm::Code::internal, "allocate_shared: no memory");
    void* const memory = map(fd, nbytes);
    const std::lock_guard lock(shared_mutex_);
    shared_[memory] = {fd, nbytes};
    return memory;
  }
  void release_shared(void* memory) override {
    const std::lock_guard lock(shared_mutex_);
    const auto [fd, nbytes] = shared_.extract(memory).mapped();
    ::munmap(memory, nbytes);
    ::close(fd);
  }
  std::string handle_of(void* shared) override {
    const std::lock_guard lock(shared_mutex_);
    const auto [fd, nbytes] = shared_.at(shared);
    return std::to_string(::getpid()) + "/fd/" + std::to_string(fd) + " " + std::to_string(nbytes);
  }
  void* map_shared(const std::string& handle) override {
    if (unshared_id == id_)
      throw pycomm::Error(pycomm::Code::internal, "map_shared: no way to that device's memory");
    const size_t space = handle.find(' ');
    const int fd = ::open(("/proc/" + handle.substr(0, space)).c_str(), O_RDWR | O_CLOEXEC);
    if (fd < 0) throw pycomm::Error(pycomm::Code::internal, "map_shared: no such memory");
    void* const memory = map(fd, std::stoul(handle.substr(space)));
    ::close(fd);
    return memory;
  }
  void unmap_shared(void* mapped, const std::string& handle) override {
    ::munmap(mapped, std::stoul(handle.substr(handle.find(' '))));
  }
  void* allocate_pinned(size_t nbytes) override { return take(nbytes, "allocate_pinned"); }
  void release_pinned(void* memory) override { ::free(memory); }
  void copy(void* dst, const void* src, size_t nbytes, Stream stream) override {
    in_order(stream, [=] { std::memmove(dst, src, nbytes); });
  }
  void zero(void* memory, size_t nbytes, Stream stream) override {
    in_order(stream, [=] { std::memset(memory, 0, nbytes); });
  }
  void quantise(void* dst, const void* src, size_t numel, pycomm::DType dtype,
                pycomm::BlockCode code, pycomm::Loss loss, Stream stream) override {
    in_order(stream, [=] {
      std::vector<float> values(numel);
      for (size_t i = 0; i < numel; ++i) values[i] = value(src, static_cast<int64_t>(i), dtype);
      code_values(dst, values, code, loss);
    });
  }
  void requantise_sum(void* dst, const void* src, int n_forms, int64_t stride_bytes, size_t numel,
                      pycomm::BlockCode code, float factor, pycomm::Loss loss,
                      Stream stream) override {
    in_order(stream, [=] {
      code_values(dst, sums(src, n_forms, stride_bytes, numel, code, factor), code, loss);
    });
  }
  void dequantise_sum(void* dst, const void* src, int n_forms, int64_t stride_bytes, size_t numel,
                      pycomm::DType dtype, pycomm::BlockCode code, float factor,
                      Stream stream) override {
    in_order(stream, [=] {
      const auto found = sums(src, n_forms, stride_bytes, numel, code, factor);
      for (size_t i = 0; i < numel; ++i) {
        if (dtype == pycomm::DType::float32)
          static_cast<float*>(dst)[i] = found[i];
        else
          static_cast<uint16_t*>(dst)[i] =
              fake::narrow(found[i], dtype == pycomm::DType::float16 ? 5 : 8);
      }
    });
  }
  void peer_all_reduce(const pycomm::cuda::PeerArguments& given, pycomm::DType dtype, bool two_shot,
                       int, Stream stream) override {
    in_order(stream, [=] {
      auto args = given;
      args.n_blocks = args.numel > 1000 ? 3 : 1;
      fake_peer_launches++;
      for (int block = 0; block < args.n_blocks; ++block) {
        fake::PeerMachine machine;
        uint32_t error;
        if (dtype == pycomm::DType::float32)
          error = peer_all_reduce_block<float>(args, block, two_shot, machine);
        else if (dtype == pycomm::DType::float16)
          error = peer_all_reduce_block<fake::Half>(args, block, two_shot, machine);
        else
          error = peer_all_reduce_block<fake::Bf16>(args, block, two_shot, machine);
        if (error != 0) std::atomic_ref(*args.failed).store(error);
      }
    });
  }
  void in_order(Stream stream, std::function<void()> work) override {
    if (stream == nullptr) return work();
    thread(stream)->push(std::move(work));
  }

 private:
  static void* map(int fd, size_t nbytes) {
    void* const memory = ::mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (memory == MAP_FAILED) throw pycomm::Error(pycomm::Code::internal, "mmap");
    return memory;
  }
  std::mutex shared_mutex_;
  std::map<void*, std::pair<int, size_t>> shared_;
  void refuse_above(size_t nbytes, const char* what) const {
    const std::lock_guard lock(refusal_mutex);
    if (nbytes > refused_above && id_ == refusing_id)
      throw pycomm::Error(pycomm::Code::internal, std::string(what) + ": out of memory");
  }
  void* take(size_t nbytes, const char* what) const {
    refuse_above(nbytes, what);
    return ::calloc(1, nbytes);
  }
  // By the CPU engine's functions of one value, in plain loops.
  static void code_values(void* dst, const std::vector<float>& values, pycomm::BlockCode code,
                          pycomm::Loss loss) {
    auto* const codes = static_cast<uint8_t*>(dst);
    const auto n = static_cast<int64_t>(values.size());
    for (int64_t first = 0; first < n; first += pycomm::kBlockNumel) {
      const auto at = [&](int64_t i) { return i < n ? values[static_cast<size_t>(i)] : 0.0f; };
      int32_t largest = 0;
      for (int64_t i = first; i < first + pycomm::kBlockNumel; ++i)
        largest = std::max(largest, pycomm::magnitude_bits(at(i)));
      const auto scale = pycomm::block_scale(largest, code);
      for (int64_t i = first; i < first + pycomm::kBlockNumel; ++i) {
        codes[i] = pycomm::encode(code, at(i), scale.to_code);
        if (loss.to != nullptr && i < n)
          loss.to[i] += loss.factor * (at(i) - pycomm::decode(code, codes[i], scale.to_value));
      }
      std::memcpy(codes + pycomm::scales_offset(n, code) + first / pycomm::kBlockNumel * 4,
                  &scale.to_value, 4);
    }
  }
  static std::vector<float> sums(const void* src, int n_forms, int64_t stride_bytes, size_t numel,
                                 pycomm::BlockCode code, float factor) {
    std::vector<float> found(numel, 0.0f);
    const auto n = static_cast<int64_t>(numel);
    for (int form = 0; form < n_forms; ++form) {
      const auto* const codes = static_cast<const uint8_t*>(src) + form * stride_bytes;
      for (int64_t i = 0; i < n; ++i) {
        float to_value;
        std::memcpy(&to_value, codes + pycomm::scales_offset(n, code) + i / pycomm::kBlockNumel * 4,
                    4);
        found[static_cast<size_t>(i)] += pycomm::decode(code, codes[i], to_value);
      }
    }
    for (float& one : found) one *= factor;
    return found;
  }
  static float value(const void* array, int64_t i, pycomm::DType dtype) {
    if (dtype == pycomm::DType::float32) return static_cast<const float*>(array)[i];
    return static_cast<float>(fake::widen(static_cast<const uint16_t*>(array)[i],
                                          dtype == pycomm::DType::float16 ? 5 : 8));
  }
  static ThreadStream* thread(Stream stream) {
    return static_cast<ThreadStream*>(static_cast<FakeStream*>(stream));
  }
  static HostEvent* as_event(Event event) { return static_cast<HostEvent*>(event); }
  static std::shared_ptr<Mark> last(Event event) {
    const std::lock_guard lock(as_event(event)->mutex);
    return as_event(event)->last;
  }
  const std::string id_;
};

}  // namespace

extern "C" {

void fake_device_refuse(const char* id, size_t above) {
  const std::lock_guard lock(refusal_mutex);
  refusing_id = id == nullptr ? "" : id;
  refused_above = id == nullptr ? SIZE_MAX : above;
}
void fake_device_unshared(const char* id) { unshared_id = id == nullptr ? "" : id; }
int fake_device_n_peer_launches() { return fake_peer_launches; }
void fake_device_capture(bool begin) { captures = begin; }
void fake_device_delay(int microseconds) { delay_us = microseconds; }
void* fake_device_new_stream() { return HostDevice("").new_stream(); }
void fake_device_fill(void* stream, void* memory, int byte, size_t nbytes) {
  HostDevice("").in_order(stream, [=] { std::memset(memory, byte, nbytes); });
}
void fake_device_synchronize(void* stream) {
  Mark mark;
  HostDevice("").in_order(stream, [&mark] { mark.pass(); });
  mark.wait();
}
void fake_device_free_stream(void* stream) { HostDevice("").free_stream(stream); }
}

// What PYCOMM_TEST_DEVICE names: csrc/torch asks a library for its device by this function.
// FAKE_DEVICE_ID=x: all ranks have the device x.
extern "C" pycomm::cuda::Device* pycomm_test_device(const char* id) {
  const char* const shared = std::getenv("FAKE_DEVICE_ID");
  return new HostDevice(shared != nullptr ? shared : id);
}
