// nccl_api.h's own declarations against NCCL's header: compiled where one is found (CPATH may name
// its folder), and NOT RUN where none is.
#if __has_include(<nccl.h>)
#include <nccl.h>
#define HAS_NCCL_HEADER 1
#else
#define HAS_NCCL_HEADER 0
#endif

#include "cuda/nccl_api.h"
#include "testing.h"

#if HAS_NCCL_HEADER
using namespace pycomm::cuda;

template <class Ours, class Theirs>
constexpr bool same(Ours ours, Theirs theirs) {
  return sizeof(Ours) == sizeof(Theirs) && static_cast<int>(ours) == static_cast<int>(theirs);
}

static_assert(NCCL_VERSION_CODE >= NcclApi::kOldest);
static_assert(sizeof(NcclUniqueId) == sizeof(ncclUniqueId));
static_assert(same(NcclResult::success, ncclSuccess));
static_assert(same(NcclResult::invalid_argument, ncclInvalidArgument));
static_assert(same(NcclResult::remote_error, ncclRemoteError));
static_assert(same(NcclResult::in_progress, ncclInProgress));
static_assert(same(NcclDType::int8, ncclInt8));
static_assert(same(NcclDType::uint8, ncclUint8));
static_assert(same(NcclDType::int32, ncclInt32));
static_assert(same(NcclDType::uint32, ncclUint32));
static_assert(same(NcclDType::int64, ncclInt64));
static_assert(same(NcclDType::uint64, ncclUint64));
static_assert(same(NcclDType::float16, ncclFloat16));
static_assert(same(NcclDType::float32, ncclFloat32));
static_assert(same(NcclDType::float64, ncclFloat64));
static_assert(same(NcclDType::bfloat16, ncclBfloat16));
static_assert(same(NcclOp::sum, ncclSum));
static_assert(same(NcclOp::product, ncclProd));
static_assert(same(NcclOp::max, ncclMax));
static_assert(same(NcclOp::min, ncclMin));
static_assert(same(NcclOp::avg, ncclAvg));
static_assert(kNcclNoColor == NCCL_SPLIT_NOCOLOR);
#ifdef NCCL_SHRINK_ABORT
static_assert(kNcclShrinkAbort == NCCL_SHRINK_ABORT);
#endif
// A newer ncclConfig_t has more behind these.
static_assert(sizeof(NcclConfig) <= sizeof(ncclConfig_t));
static_assert(offsetof(NcclConfig, size) == offsetof(ncclConfig_t, size));
static_assert(offsetof(NcclConfig, magic) == offsetof(ncclConfig_t, magic));
static_assert(offsetof(NcclConfig, version) == offsetof(ncclConfig_t, version));
static_assert(offsetof(NcclConfig, blocking) == offsetof(ncclConfig_t, blocking));
static_assert(offsetof(NcclConfig, cga_cluster_size) == offsetof(ncclConfig_t, cgaClusterSize));
static_assert(offsetof(NcclConfig, min_ctas) == offsetof(ncclConfig_t, minCTAs));
static_assert(offsetof(NcclConfig, max_ctas) == offsetof(ncclConfig_t, maxCTAs));
static_assert(offsetof(NcclConfig, net_name) == offsetof(ncclConfig_t, netName));
static_assert(offsetof(NcclConfig, split_share) == offsetof(ncclConfig_t, splitShare));
#endif

TEST(our_declarations_are_those_of_nccl_h) {
#if HAS_NCCL_HEADER
  const ncclConfig_t theirs = NCCL_CONFIG_INITIALIZER;
  const pycomm::cuda::NcclConfig ours;
  EXPECT_EQ(ours.magic, theirs.magic);
  EXPECT_EQ(ours.max_ctas, theirs.maxCTAs);  // "left to NCCL"
  EXPECT_EQ(ours.split_share, theirs.splitShare);
#else
  throw ::testing::NotRun{"no nccl.h among the compiler's headers; CPATH may name its folder"};
#endif
}
