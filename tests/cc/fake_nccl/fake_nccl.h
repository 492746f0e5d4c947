// A library with NCCL's names whose ranks are threads or processes of one machine and whose device
// is host memory; for tests of what is built on NCCL where there is no GPU. Streams are threads
// (fake_device.cc), so that what runs before something it depends on is seen to.
//
// At compile time FAKE_VERSION is what it says it is, FAKE_WITHOUT_SPLIT leaves out a function that
// pycomm needs, FAKE_WITHOUT_NEWER what came after 2.18. At run time:
#pragma once

#include <cstddef>

extern "C" {
// The next call of this function in this process fails with this result and last error.
void fake_nccl_fail_next(const char* function, int result, const char* text);
// Operations of this rank, in this process, do not move until they are aborted; -1: all move.
void fake_nccl_hang(int rank);
// A communicator of this process gets this error in the background, as when a network card fails.
void fake_nccl_async_error(int rank, int result, const char* text);
// Set-up and splits take so many polls longer.
void fake_nccl_slow_init(int polls);
// What this thread makes from now on joins no rank that has said another host here: set-up fails,
// or where `hangs` never ends. nullptr: any; but FAKE_NCCL_NO_NETWORK=1 makes it PYCOMM_HOST_ID.
void fake_nccl_no_network(const char* host, bool hangs);
// Allocations of more than `above` bytes on devices with this id fail, device memory and pinned.
// nullptr: none does.
void fake_device_refuse(const char* id, size_t above);
// The device with this id maps no other's memory; nullptr: each does.
void fake_device_unshared(const char* id);
// Launches of the peer kernel in this process.
int fake_device_n_peer_launches();
// What is on a stream runs this much later.
void fake_device_delay(int microseconds);
// While it is true, a graph captures what this thread puts on streams. The fake runs it at once,
// but as on CUDA nobody may ask for an event that was captured, nor wait for it from outside, nor
// in the capture for one from outside.
void fake_device_capture(bool captures);
// A stream for a test in Python: made, given a memset to do in its turn, waited for, and freed.
void* fake_device_new_stream();
void fake_device_fill(void* stream, void* memory, int byte, size_t nbytes);
void fake_device_synchronize(void* stream);
void fake_device_free_stream(void* stream);
// Calls of ncclAlltoAll in this process.
int fake_nccl_n_all_to_alls();
// Communicators that exist in this process.
int fake_nccl_n_communicators();
// maxCTAs of the configuration that the last one was made with; INT_MIN: left to NCCL.
int fake_nccl_max_ctas();
}

// A stream, as NCCL's functions get it.
struct FakeStream {
  virtual void enqueue(void (*run)(void*), void* argument) = 0;

 protected:
  ~FakeStream() = default;
};
