// The launch functions' host side: arguments refused before any launch, empty tensors, and what a
// machine without a GPU says.
#include "cuda/cuda.h"
#include "testing.h"

using namespace pycomm;

namespace {
alignas(16) char memory[1024];
bool has_gpu() { return !cuda::info("").devices.empty(); }
}  // namespace

TEST(dtypes_and_ops_without_a_kernel_are_refused_by_name) {
  const Status dtype =
      cuda::reduce(memory, memory, memory, 4, DType::int32, ReduceOp::sum, nullptr);
  EXPECT_EQ(dtype.code, Code::invalid_argument);
  EXPECT_EQ(dtype.message, "CUDA kernel 'reduce' takes float32, float16 and bfloat16, not int32");
  const Status op =
      cuda::reduce(memory, memory, memory, 4, DType::float32, ReduceOp::bxor, nullptr);
  EXPECT_EQ(op.code, Code::invalid_argument);
  EXPECT_TRUE(op.message.find("not bxor") != std::string::npos);
}

TEST(a_misaligned_quantised_buffer_is_refused) {
  for (const Status& status :
       {cuda::quantise(memory + 4, memory, 4, DType::float32, BlockCode::int8, nullptr),
        cuda::dequantise(memory, memory + 4, 4, DType::float32, BlockCode::e4m3, true, nullptr),
        cuda::requantise_sum(memory, memory + 4, 2, 16, 4, BlockCode::int8, 1.0f, nullptr)}) {
    EXPECT_EQ(status.code, Code::invalid_argument);
    EXPECT_TRUE(status.message.find("4 bytes off") != std::string::npos);
  }
  const Status status =
      cuda::requantise_sum(memory, memory, 2, 20, 4, BlockCode::int8, 1.0f, nullptr);
  EXPECT_TRUE(status.message.find("a multiple of 16 bytes apart; they are 20") !=
              std::string::npos);
}

TEST(int4_is_refused_by_name) {
  for (const Status& status :
       {cuda::quantise(memory, memory, 4, DType::float32, BlockCode::int4, nullptr),
        cuda::dequantise(memory, memory, 4, DType::float32, BlockCode::int4, true, nullptr)}) {
    EXPECT_EQ(status.code, Code::invalid_argument);
    EXPECT_TRUE(status.message.find("takes int8 and e4m3, not int4") != std::string::npos);
  }
}

TEST(nothing_to_do_needs_no_gpu) {
  EXPECT_TRUE(cuda::reduce(memory, memory, memory, 0, DType::float16, ReduceOp::max, nullptr).ok());
  EXPECT_TRUE(cuda::quantise(memory, memory, 0, DType::bfloat16, BlockCode::int8, nullptr).ok());
  EXPECT_TRUE(
      cuda::dequantise(memory, memory, 0, DType::float32, BlockCode::e4m3, false, nullptr).ok());
  EXPECT_TRUE(cuda::requantise_sum(memory, memory, 2, 16, 0, BlockCode::e4m3, 1.0f, nullptr).ok());
  const std::vector<cuda::Tensor> empty(300,
                                        cuda::Tensor{memory, 0});  // more than one launch takes
  EXPECT_TRUE(cuda::pack(memory, empty, 0.5f, DType::float32, nullptr).ok());
  EXPECT_TRUE(cuda::unpack(memory, {}, 0.5f, DType::float32, nullptr).ok());
}

TEST(a_launch_without_a_gpu_says_so) {
  if (has_gpu()) return;  // there it would run on host memory
  const Status status =
      cuda::reduce(memory, memory, memory, 4, DType::float32, ReduceOp::sum, nullptr);
  EXPECT_EQ(status.code, Code::internal);
  EXPECT_TRUE(status.message.find("CUDA kernel 'reduce' did not start: cudaError") == 0);
}

TEST(info_needs_neither_gpu_nor_nccl) {
  const cuda::Info info = cuda::info("/nowhere/libnccl.so.2");
  EXPECT_TRUE(info.runtime_version >= 12000);
  EXPECT_EQ(info.devices.empty(), !info.device_problem.empty());
  EXPECT_EQ(info.nccl_path.empty(), !info.nccl_problem.empty());
}
