// NCCL, opened at run time: the module never links it, so one build runs without NCCL and with any
// version from 2.18 on. The declarations are our own, of NCCL's binary interface: plain C types,
// and functions looked up by name.
#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/status.h"

namespace pycomm::cuda {

struct NcclComm;  // opaque
struct NcclUniqueId {
  char bytes[128];
};
enum class NcclResult : int {  // values that are not here are errors too
  success = 0,
  invalid_argument = 4,
  remote_error = 6,
  in_progress = 7,
};
enum class NcclDType : int {
  int8 = 0,
  uint8 = 1,
  int32 = 2,
  uint32 = 3,
  int64 = 4,
  uint64 = 5,
  float16 = 6,
  float32 = 7,
  float64 = 8,
  bfloat16 = 9,
};
enum class NcclOp : int { sum = 0, product = 1, max = 2, min = 3, avg = 4 };

// ncclConfig_t of 2.18. A newer library reads as much of it as `size` says and takes its defaults
// for what has come since.
struct NcclConfig {
  size_t size = sizeof(NcclConfig);
  uint32_t magic = 0xcafebeef;
  uint32_t version = 21800;
  int blocking = 0;  // calls return in_progress instead of waiting for other ranks
  int cga_cluster_size = INT_MIN;
  int min_ctas = INT_MIN;
  int max_ctas = INT_MIN;
  const char* net_name = nullptr;
  int split_share = INT_MIN;
};
constexpr int kNcclShrinkAbort = 1;
constexpr int kNcclNoColor = -1;  // of comm_split: this rank is in none of the new communicators

// What versions of NCCL differ in: known by a symbol ("-": by the version), since when, what pycomm
// makes of it, and whether the open library has it.
struct NcclFeature {
  std::string name, symbol;
  int since;
  std::string gives;
  bool present;
};

// An open NCCL. Immutable after open(), so any thread may use it. Streams are cudaStream_t as
// void*.
class NcclApi {
 public:
  static constexpr int kOldest = 21800;  // 2.18, the first with ncclCommSplit

  // Opens the library named by PYCOMM_NCCL_LIB where that is set, and no other; else wheel (the
  // libnccl.so.2 that came with torch, or empty); else what the system's loader finds. Fails with a
  // message that names every path tried and why not.
  static Status open(const std::string& wheel, std::shared_ptr<const NcclApi>* result);

  const std::string& path() const { return path_; }
  int version() const { return version_; }                                // 21805 is 2.18.5
  const std::vector<NcclFeature>& features() const { return features_; }  // in a fixed order

  // NCCL's word for a result, with the communicator's last error where there is one.
  std::string describe(NcclResult result, NcclComm* comm) const;

  NcclResult (*get_unique_id)(NcclUniqueId*);
  // config: nullptr, or an ncclConfig_t (NcclConfig) of any version up to this library's.
  NcclResult (*comm_init_rank_config)(NcclComm**, int n_ranks, NcclUniqueId, int rank,
                                      void* config);
  NcclResult (*comm_split)(NcclComm*, int color, int key, NcclComm** result, void* config);
  // Optional, nullptr where the library lacks it: a communicator without these ranks, also of one
  // with operations that hang (kNcclShrinkAbort); and the end of all operations of this rank
  // (flags: 0).
  NcclResult (*comm_shrink)(NcclComm*, int* excluded, int n_excluded, NcclComm** result,
                            void* config, int flags);
  NcclResult (*comm_revoke)(NcclComm*, int flags);
  // Optional likewise: count elements from and to each rank, itself too. Not in place.
  NcclResult (*all_to_all)(const void*, void*, size_t count, NcclDType, NcclComm*, void* stream);
  NcclResult (*comm_get_async_error)(NcclComm*, NcclResult*);
  NcclResult (*comm_finalize)(NcclComm*);
  NcclResult (*comm_destroy)(NcclComm*);
  NcclResult (*comm_abort)(NcclComm*);
  NcclResult (*group_start)();
  NcclResult (*group_end)();
  NcclResult (*all_reduce)(const void*, void*, size_t, NcclDType, NcclOp, NcclComm*, void* stream);
  NcclResult (*reduce)(const void*, void*, size_t, NcclDType, NcclOp, int root, NcclComm*,
                       void* stream);
  NcclResult (*broadcast)(const void*, void*, size_t, NcclDType, int root, NcclComm*, void* stream);
  NcclResult (*all_gather)(const void*, void*, size_t, NcclDType, NcclComm*, void* stream);
  NcclResult (*reduce_scatter)(const void*, void*, size_t, NcclDType, NcclOp, NcclComm*,
                               void* stream);
  NcclResult (*send)(const void*, size_t, NcclDType, int peer, NcclComm*, void* stream);
  NcclResult (*recv)(void*, size_t, NcclDType, int peer, NcclComm*, void* stream);

 private:
  NcclApi() = default;
  Status load(const std::string& path);

  std::string path_;
  int version_ = 0;
  std::vector<NcclFeature> features_;
  const char* (*error_string_)(NcclResult) = nullptr;
  const char* (*last_error_)(NcclComm*) = nullptr;
};

std::string nccl_version_name(int version);  // 21805 -> "2.18.5"

}  // namespace pycomm::cuda
