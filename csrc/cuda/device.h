// Device: the streams, events and memory of one GPU, as the engine needs them. The real one stands
// on the CUDA runtime (cuda_device.cc); tests put one of host memory and threads in its place.
// Thread safety: all members. Each throws Error(internal) with the runtime's own text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "core/block_format.h"
#include "core/dtype.h"
#include "cuda/peer_protocol.h"

namespace pycomm::cuda {

class Device {
 public:
  // Opaque: of CUDA a cudaStream_t and a cudaEvent_t.
  using Stream = void*;
  using Event = void*;

  virtual ~Device() = default;
  virtual std::string id() const = 0;    // the same for every process that uses this very device
  virtual std::string name() const = 0;  // for people
  virtual bool is_host_memory() const { return false; }

  virtual Stream new_stream() = 0;
  virtual void free_stream(Stream stream) = 0;
  virtual Event new_event() = 0;
  virtual void free_event(Event event) = 0;

  virtual void record(Event event, Stream stream) = 0;  // the event passes when the stream is there
  virtual void wait(Stream stream, Event event) = 0;    // what is next on the stream comes after it
  // What is next on the stream comes after the host has set *word, of allocate_pinned(), to `value`
  // or beyond it, counted around.
  virtual void wait_value(Stream stream, const uint32_t* word, uint32_t value) = 0;
  // And the other way: sets a word of the device's, seen by what runs there.
  virtual void write_value(Stream stream, uint32_t* word, uint32_t value) = 0;
  virtual bool passed(Event event) = 0;
  virtual double elapsed_s(Event from, Event to) = 0;  // REQUIRES: both have passed
  virtual bool capturing(Stream stream) = 0;  // into a graph: nothing on it can be asked for
  // For a thread of the engine's own: makes the device current, and lets what it asks not disturb
  // another thread's capture.
  virtual void adopt_thread() {}

  virtual void* allocate(size_t nbytes) = 0;
  virtual void release(void* memory) = 0;
  // Memory of the device that others map, in this process and elsewhere on the machine, by a
  // handle.
  virtual void* allocate_shared(size_t nbytes) = 0;
  virtual void release_shared(void* memory) = 0;
  virtual std::string handle_of(void* shared) = 0;
  virtual void* map_shared(const std::string& handle) = 0;
  virtual void unmap_shared(void* mapped, const std::string& handle) = 0;
  // Memory of the host that the device copies to and from by itself.
  virtual void* allocate_pinned(size_t nbytes) = 0;
  virtual void release_pinned(void* memory) = 0;
  virtual void copy(void* dst, const void* src, size_t nbytes, Stream stream) = 0;
  virtual void zero(void* memory, size_t nbytes, Stream stream) = 0;
  // What cuda.h's functions of these names do.
  virtual void quantise(void* dst, const void* src, size_t numel, DType dtype, BlockCode code,
                        Loss loss, Stream stream) = 0;
  virtual void requantise_sum(void* dst, const void* src, int n_forms, int64_t stride_bytes,
                              size_t numel, BlockCode code, float factor, Loss loss,
                              Stream stream) = 0;
  virtual void dequantise_sum(void* dst, const void* src, int n_forms, int64_t stride_bytes,
                              size_t numel, DType dtype, BlockCode code, float factor,
                              Stream stream) = 0;
  virtual void peer_all_reduce(const PeerArguments& args, DType dtype, bool two_shot,
                               int n_ranks_on_device, Stream stream) = 0;
  // Runs `work`, which does something to the memory after what is on the stream. It enqueues that
  // itself; a device of host memory calls it in its turn.
  virtual void in_order(Stream stream, std::function<void()> work) = 0;
};

// The CUDA device with this index, made current by each of its members. Errors: Error(internal)
// where there is no such device or no driver.
std::shared_ptr<Device> cuda_device(int index);

// The index of the device whose memory this is; the current one's for nullptr. Errors:
// Error(invalid_argument) for memory of the host, Error(internal) without a driver.
int device_index_of(const void* memory);

}  // namespace pycomm::cuda
