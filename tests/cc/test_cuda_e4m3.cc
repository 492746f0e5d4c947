// Our e4m3 rounding against NVIDIA's, on the host: what the kernels' conversion instruction does
// must be what CPU code does.
#include <cuda_fp8.h>

#include <random>

#include "core/block_format.h"
#include "testing.h"

TEST(rounds_as_the_cuda_headers_do) {
  std::mt19937 random(3);
  for (int i = 0; i < 4'000'000; ++i) {
    // All bit patterns are equally likely; every second one is moved into e4m3's own range of
    // exponents.
    uint32_t bits = random();
    if (i % 2) bits = (bits & 0x807fffffu) | ((110u + bits / 7 % 28u) << 23);
    const float x = __builtin_bit_cast(float, bits);
    const int expected = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
    // NaN keeps its sign there and loses it here; both are NaN.
    ASSERT_TRUE(int{pycomm::e4m3_by_integers(x)} == expected ||
                ((expected & 0x7f) == 0x7f && x != x));
  }
}
