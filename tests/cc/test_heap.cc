// The heap behind pycomm.empty(): where tensors lie, that holes are used again, and that what is
// handed out is zero at first, seen by another mapping, and never overlaps.
#include <cstdint>
#include <random>

#include "core/status.h"
#include "cpu/heap.h"
#include "testing.h"

using namespace pycomm;
using namespace pycomm::cpu;

namespace {

constexpr size_t kPage = 4096;
constexpr size_t kCapacity = 64 << 20;

bool all_are(const std::byte* data, size_t nbytes, int value) {
  for (size_t i = 0; i < nbytes; ++i)
    if (data[i] != static_cast<std::byte>(value)) return false;
  return true;
}

void large_tensors_begin_at_huge_pages(Heap& heap) {
  std::byte* small = heap.allocate(1);
  const size_t odd = 3 * kHugePage + 5 * kPage + 7;
  std::byte* large = heap.allocate(odd);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(large) % kHugePage, 0u);
  EXPECT_TRUE(all_are(large, odd, 0));
  std::byte* between = heap.allocate(kPage);  // the gap before the large one is not lost
  EXPECT_TRUE(between > small && between < large);
  heap.release(large);
  std::byte* again = heap.allocate(odd);
  EXPECT_EQ(again, large);
  heap.release(small);
  heap.release(again);
  heap.release(between);
  std::byte* whole = heap.allocate(kCapacity);  // all holes are one again
  EXPECT_EQ(whole, small);
  heap.release(whole);
}

}  // namespace

TEST(large_tensors_of_a_shared_heap_begin_at_huge_pages) {
  Heap heap(kCapacity);
  heap.share();
  large_tensors_begin_at_huge_pages(heap);
}

TEST(large_tensors_of_an_own_heap_begin_at_huge_pages) {
  Heap heap(kCapacity);
  large_tensors_begin_at_huge_pages(heap);
}

TEST(another_mapping_sees_what_is_written) {
  Heap heap(kCapacity);
  heap.share();
  std::byte* large = heap.allocate(2 * kHugePage + kPage);
  std::memset(large, 7, 2 * kHugePage + kPage);
  const Mapping other = map_shared(heap.fd(), kCapacity);
  EXPECT_TRUE(all_are(other.data() + (large - heap.base()), 2 * kHugePage + kPage, 7));
}

TEST(a_tensor_that_does_not_fit_is_refused) {
  Heap heap(kCapacity);
  heap.share();
  std::byte* half = heap.allocate(kCapacity / 2);
  EXPECT_THROWS("do not fit into the shared heap", heap.allocate(kCapacity / 2 + 1));
  EXPECT_THROWS("do not fit into the shared heap", heap.allocate(SIZE_MAX));
  heap.release(half);
}

TEST(tensors_never_overlap) {
  Heap heap(kCapacity);
  heap.share();
  std::mt19937 random(1);
  struct Tensor {
    std::byte* data;
    size_t nbytes;
    int value;
  };
  std::vector<Tensor> tensors;
  for (int turn = 1; turn <= 200; ++turn) {
    if (tensors.size() >= 8 || (!tensors.empty() && random() % 3 == 0)) {
      const size_t at = random() % tensors.size();
      EXPECT_TRUE(all_are(tensors[at].data, tensors[at].nbytes, tensors[at].value));
      heap.release(tensors[at].data);
      tensors.erase(tensors.begin() + static_cast<std::ptrdiff_t>(at));
      continue;
    }
    const size_t nbytes = 1 + random() % (random() % 2 ? 5 * kHugePage / 2 : 3 * kPage);
    std::byte* data = heap.allocate(nbytes);
    std::memset(data, turn % 251, nbytes);
    tensors.push_back({data, nbytes, turn % 251});
  }
  for (const Tensor& tensor : tensors) {
    EXPECT_TRUE(all_are(tensor.data, tensor.nbytes, tensor.value));
    heap.release(tensor.data);
  }
}
