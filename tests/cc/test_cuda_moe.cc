// The host side of the MoE kernels' launch functions: arguments refused before any launch, nothing
// to do, and what a machine without a GPU says.
#include "cuda/cuda.h"
#include "cuda/moe.h"
#include "testing.h"

using namespace pycomm;

namespace {

alignas(16) char memory[64];
const void* const one[] = {memory};
void* const buffer[] = {memory};
const int64_t table[2] = {};
bool has_gpu() { return !cuda::info("").devices.empty(); }

Status expand(std::span<const void* const> sources, int64_t n, int64_t width, DType dtype) {
  return cuda::expand_rows(memory, sources, nullptr, table, nullptr, n, width, dtype, nullptr);
}
Status weigh(std::span<const void* const> sources, int64_t n, int64_t width, DType dtype) {
  auto* const floats = reinterpret_cast<float*>(memory);
  return cuda::weigh_rows(memory, floats, sources, nullptr, table, nullptr, nullptr, floats, memory,
                          n, width, dtype, nullptr);
}
Status combine(std::span<const void* const> sources, int64_t n, int64_t width, DType dtype,
               DType out_dtype) {
  return cuda::combine_rows(memory, out_dtype, sources, dtype, nullptr, table, table, nullptr, n,
                            width, nullptr);
}
Status dots(int64_t n, int64_t width, DType dtype) {
  return cuda::row_dots(reinterpret_cast<float*>(memory), memory, nullptr, memory, nullptr, n,
                        width, dtype, nullptr);
}
Status encode(std::span<void* const> buffers, int64_t n, int64_t width, DType dtype) {
  return cuda::encode_rows(buffers, nullptr, nullptr, nullptr, memory, n, width, dtype, nullptr);
}
Status decode(std::span<const void* const> sources, int64_t n, int64_t width, DType dtype) {
  return cuda::decode_rows(memory, sources, nullptr, table, nullptr, n, width, dtype, nullptr);
}

Status count(int64_t n, int64_t n_bins) {
  auto* const out = reinterpret_cast<int64_t*>(memory);
  return cuda::count_slots(out, out, out, table, n, n_bins, nullptr);
}

void expect_refused(const Status& status, const char* text) {
  EXPECT_EQ(status.code, Code::invalid_argument);
  if (status.message.find(text) == std::string::npos) EXPECT_EQ(status.message, text);
}

}  // namespace

TEST(dtypes_without_a_kernel_are_refused_by_name) {
  constexpr auto f32 = DType::float32, i32 = DType::int32;
  expect_refused(expand(one, 1, 1, i32), "'expand_rows' takes float32, float16 and bfloat16");
  expect_refused(weigh(one, 1, 1, i32), "'weigh_rows' takes float32");
  expect_refused(combine(one, 1, 1, i32, f32), "'combine_rows' takes float32");
  expect_refused(combine(one, 1, 1, f32, i32), "'combine_rows' takes float32");
  expect_refused(dots(1, 1, i32), "'row_dots' takes float32");
  expect_refused(encode(buffer, 1, 1, i32), "'encode_rows' takes float32");
  expect_refused(decode(one, 1, 1, i32), "'decode_rows' takes float32");
}

TEST(buffers_too_many_none_or_misaligned_are_refused) {
  const std::vector<const void*> many(cuda::kMaxRowBuffers + 1, memory);
  const std::vector<void*> many_out(cuda::kMaxRowBuffers + 1, memory);
  const void* const off[] = {memory, memory + 2};
  void* const off_out[] = {memory + 1};
  constexpr auto f32 = DType::float32;
  expect_refused(expand(many, 1, 1, f32), "'expand_rows' takes 1 to 128 buffers of rows, not 129");
  expect_refused(weigh({}, 1, 1, f32), "'weigh_rows' takes 1 to 128 buffers of rows, not 0");
  expect_refused(combine({}, 1, 1, f32, f32),
                 "'combine_rows' takes 1 to 128 buffers of rows, not 0");
  expect_refused(encode(many_out, 1, 1, f32), "'encode_rows' takes 1 to 128 buffers");
  expect_refused(decode({}, 1, 1, f32), "'decode_rows' takes 1 to 128 buffers");
  expect_refused(expand(off, 1, 1, f32), "4-byte aligned; buffer 1 is 2 bytes off");
  expect_refused(encode(off_out, 1, 1, DType::float16), "4-byte aligned; buffer 0 is 1 bytes off");
  expect_refused(decode(off, 1, 1, DType::float16), "4-byte aligned; buffer 1 is 2 bytes off");
}

TEST(sizes_that_make_no_sense_are_refused) {
  constexpr auto f32 = DType::float32;
  expect_refused(expand(one, -1, 4, f32), "takes no -1 rows of 4 values");
  expect_refused(weigh(one, -1, 4, f32), "takes no -1 rows of 4 values");
  expect_refused(combine(one, 1, -4, f32, f32), "takes no 1 rows of -4 values");
  expect_refused(dots(-1, 4, f32), "takes no -1 rows of 4 values");
  expect_refused(encode(buffer, -1, 4, f32), "takes no -1 rows of 4 values");
  expect_refused(decode(one, 1, -4, f32), "takes no 1 rows of -4 values");
  expect_refused(count(-1, 4), "'count_slots' takes no -1 slots in 4 bins");
  expect_refused(count(1, 0), "'count_slots' takes no 1 slots in 0 bins");
}

TEST(nothing_to_do_needs_no_gpu) {
  for (const DType dtype : {DType::float32, DType::float16, DType::bfloat16}) {
    for (const auto& [n, width] : {std::pair{0, 4}, std::pair{4, 0}}) {
      EXPECT_TRUE(expand(one, n, width, dtype).ok());
      EXPECT_TRUE(combine(one, n, width, dtype, DType::float32).ok());
      EXPECT_TRUE(encode(buffer, n, width, dtype).ok());
      EXPECT_TRUE(decode(one, n, width, dtype).ok());
    }
    EXPECT_TRUE(dots(0, 4, dtype).ok() && weigh(one, 0, 4, dtype).ok());
  }
}

TEST(a_launch_without_a_gpu_says_so) {
  if (has_gpu()) return;  // there it would run on host memory
  for (const Status& status :
       {expand(one, 1, 4, DType::float32), combine(one, 1, 4, DType::float16, DType::float32),
        dots(1, 4, DType::bfloat16), weigh(one, 1, 4, DType::bfloat16),
        encode(buffer, 1, 4, DType::float32), decode(one, 1, 4, DType::float16), count(1, 1)}) {
    EXPECT_EQ(status.code, Code::internal);
    EXPECT_TRUE(status.message.find("did not start: cudaError") != std::string::npos);
  }
}
