// Heap: a rank's memory that the other ranks of its host can map (pycomm.empty()). One sparse memfd
// per endpoint, mapped at the first allocation; pages cost memory while they are allocated. Thread
// safety: all members.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>

#include "cpu/shared_memory.h"

namespace pycomm::cpu {

class Heap {
 public:
  explicit Heap(size_t capacity);
  // From here on others can map it. REQUIRES: nothing was allocated. Errors: as
  // make_shared_memory(); the heap is the rank's own then.
  void share();
  int fd() const { return memory_.fd.get(); }                     // -1 before share()
  const std::string& instead() const { return memory_.instead; }  // of a memfd
  size_t capacity() const { return capacity_; }

  // Page-aligned, from 2 MiB on in huge pages where the kernel gives them; pages are reserved here,
  // so that a host out of memory shows as an Error and not as a SIGBUS later. Contents are zero the
  // first time, then anything. nbytes 0 takes a page too.
  std::byte* allocate(size_t nbytes);
  void release(std::byte* data);  // REQUIRES: from allocate()
  std::byte* base() const;        // nullptr before the first allocation
  bool holds(const void* data) const;

 private:
  void use_huge_pages(size_t offset, size_t nbytes);

  SharedMemory memory_;
  const size_t capacity_;
  mutable std::mutex mutex_;
  Mapping mapping_;
  std::map<size_t, size_t> free_;  // offset -> bytes; neighbours are joined
  std::map<size_t, size_t> used_;
};

}  // namespace pycomm::cpu
