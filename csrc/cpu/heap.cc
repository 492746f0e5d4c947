#include "cpu/heap.h"

#include <fcntl.h>
#include <sys/mman.h>

#include <algorithm>
#include <iterator>

namespace pycomm::cpu {
namespace {
constexpr size_t kPage = 4096;
constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers lack
}  // namespace

Heap::Heap(size_t capacity) : capacity_(capacity), free_{{0, capacity}} {}

void Heap::share() { memory_ = make_shared_memory("pycomm-heap", capacity_, false); }

std::byte* Heap::base() const {
  std::lock_guard lock(mutex_);
  return mapping_.data();
}

bool Heap::holds(const void* data) const {
  const std::byte* base = this->base();
  const auto* at = static_cast<const std::byte*>(data);
  return base != nullptr && at >= base && at < base + capacity_;
}

std::byte* Heap::allocate(size_t nbytes) {
  const size_t size = (std::max<size_t>(nbytes, 1) + kPage - 1) / kPage * kPage;
  std::lock_guard lock(mutex_);
  if (mapping_.data() == nullptr)
    mapping_ = memory_.fd ? map_shared(fd(), capacity_) : map_own(capacity_);
  // First fit, lowest address first: few long-lived tensors, so nothing cleverer pays.
  const size_t alignment = size >= kHugePage ? kHugePage : kPage;
  const auto aligned = [&](size_t offset) {
    return (offset + alignment - 1) / alignment * alignment;
  };
  const auto found = std::find_if(free_.begin(), free_.end(), [&](const auto& hole) {
    return hole.first + hole.second >= aligned(hole.first) + size;
  });
  if (size < nbytes || found == free_.end())
    throw Error(Code::invalid_argument,
                "empty: " + std::to_string(nbytes) + " bytes do not fit into the shared heap of " +
                    std::to_string(capacity_) + " bytes, the machine's memory");
  const auto [begin, room] = *found;
  const size_t offset = aligned(begin);
  if (memory_.fd) use_huge_pages(offset, size);
  if (memory_.fd && ::fallocate(fd(), 0, static_cast<off_t>(offset), static_cast<off_t>(size)) != 0)
    throw_errno(Code::invalid_argument,
                "empty: " + std::to_string(nbytes) + " bytes of shared memory");
  free_.erase(found);
  if (offset > begin) free_.emplace(begin, offset - begin);
  const size_t end = offset + size;
  if (begin + room > end) free_.emplace(end, begin + room - end);
  used_.emplace(offset, size);
  return mapping_.data() + offset;
}

// Tells the kernel to put what is whole of a huge page into one (Linux 6.1 and newer; refused, the
// pages stay small): fewer page faults and look-ups for every rank that maps them. It takes a page
// that is there to be told so, and copies all that are: one each, then, before the rest is
// reserved.
void Heap::use_huge_pages(size_t offset, size_t nbytes) {
  const size_t end = offset + nbytes / kHugePage * kHugePage;
  for (size_t at = offset; at < end; at += kHugePage)
    if (::fallocate(fd(), 0, static_cast<off_t>(at), kPage) != 0) return;
  if (end > offset) ::madvise(mapping_.data() + offset, end - offset, kCollapse);
}

void Heap::release(std::byte* data) {
  std::lock_guard lock(mutex_);
  const auto used = used_.find(static_cast<size_t>(data - mapping_.data()));
  PYCOMM_CHECK(used != used_.end(), "memory that is not the heap's");
  auto [offset, size] = *used;
  used_.erase(used);
  // The pages go back to the system now. Where it refuses, they are used again by a later tensor.
  [[maybe_unused]] const int rc =
      memory_.fd ? ::fallocate(fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                               static_cast<off_t>(offset), static_cast<off_t>(size))
                 : ::madvise(mapping_.data() + offset, size, MADV_DONTNEED);
  auto next = free_.lower_bound(offset);
  if (next != free_.end() && offset + size == next->first) {
    size += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second == offset) {
      before->second += size;
      return;
    }
  }
  free_.emplace(offset, size);
}

}  // namespace pycomm::cpu
