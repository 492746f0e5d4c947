// The kernels' index arithmetic, run on the CPU: every element is touched once, and vectors are
// aligned.
#include <numeric>

#include "cuda/indexing.h"
#include "testing.h"

using namespace pycomm::cuda;

TEST(vector_span_covers_each_element_once_and_aligned) {
  for (int element_size : {1, 2, 4, 8, 16}) {
    for (int misalignment = -1; misalignment < kVectorBytes; ++misalignment) {
      if (misalignment > 0 && misalignment % element_size) continue;
      for (int64_t n : {0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 100, 1000, 1023}) {
        const VectorSpan span = vector_span(n, element_size, misalignment);
        std::vector<int> touched(n);
        for (int64_t v = 0; v < span.n_vectors; ++v) {
          const int64_t first = span.head + v * span.per_vector;
          EXPECT_EQ((misalignment + first * element_size) % kVectorBytes, 0);
          for (int k = 0; k < span.per_vector; ++k) ++touched.at(first + k);
        }
        for (int64_t i = 0; i < span.n_scalars(); ++i) ++touched.at(span.scalar(i));
        for (int count : touched) EXPECT_EQ(count, 1);
        // The point of it: at most a vector's worth of scalars at each end.
        if (misalignment >= 0)
          EXPECT_TRUE(span.head < span.per_vector && span.tail < span.per_vector);
      }
    }
  }
}

TEST(arrays_misaligned_differently_share_no_vectors) {
  alignas(16) char a[64], b[64];
  EXPECT_EQ(common_misalignment(a, b), 0);
  EXPECT_EQ(common_misalignment(a + 4, b + 20), 4);
  EXPECT_EQ(common_misalignment(a + 4, b + 8), -1);
  EXPECT_EQ(vector_span(100, 4, common_misalignment(a + 4, b + 8)).n_vectors, 0);
}

TEST(find_segment_skips_empty_segments) {
  const std::vector<int> tiles = {0, 3, 0, 0, 1, 7, 0};
  std::vector<int32_t> begin = {0};
  for (int n : tiles) begin.push_back(begin.back() + n);
  int32_t tile = 0;
  for (int segment = 0; segment < static_cast<int>(tiles.size()); ++segment)
    for (int i = 0; i < tiles[segment]; ++i)
      EXPECT_EQ(find_segment(begin.data(), 7, tile++), segment);
  EXPECT_EQ(tile, begin.back());
}
