#include "cuda/nccl_api.h"

#include <dlfcn.h>

#include <cstdlib>

namespace pycomm::cuda {
namespace {

constexpr const char* kRemedy =
    "; install nvidia-nccl-cu13 or nvidia-nccl-cu12, or set PYCOMM_NCCL_LIB to a libnccl.so.2 of "
    "2.18 or newer";

// Optional parts, each known by a function that came with it. Copy-engine collectives have none:
// they are a setting of a communicator whose buffers are windows.
constexpr const char* kByVersion = "-";
constexpr struct {
  const char *name, *symbol;
  int since;
  const char* gives;
} kFeatures[] = {
    {"split", "ncclCommSplit", 21800, "sub-groups, and the parts of hierarchical collectives"},
    {"register", "ncclCommRegister", 21900, "not used: tensors come and go with torch's allocator"},
    {"allocate", "ncclMemAlloc", 21900, "not used: memory is torch's"},
    {"window", "ncclCommWindowRegister", 22700,
     "not used: all ranks would have to register each tensor"},
    {"shrink", "ncclCommShrink", 22700, "a group of the ranks that are left"},
    {"alltoall", "ncclAlltoAll", 22800, "an even all_to_all as one call"},
    {"gather", "ncclGather", 22800, "not used: messages in one launch do the same"},
    {"scatter", "ncclScatter", 22800, "not used: messages in one launch do the same"},
    {"copy_engine", kByVersion, 22800, "not used: it needs windows"},
    {"revoke", "ncclCommRevoke", 22900, "a broken group's operations end, and it can be shrunk"},
    {"grow", "ncclCommGrow", 22900, "not used: a larger group is made anew"},
    {"suspend", "ncclCommSuspend", 22907, "not used"},
    {"call_config", "ncclAllReduceConfig", 23100, "not used: NCCL chooses for each call"},
};

template <class Function>
void look_up(void* library, const char* name, Function** function, std::string* missing) {
  *function = reinterpret_cast<Function*>(::dlsym(library, name));
  if (!*function) *missing += std::string(missing->empty() ? "" : ", ") + name;
}

}  // namespace

std::string nccl_version_name(int version) {
  return std::to_string(version / 10000) + "." + std::to_string(version / 100 % 100) + "." +
         std::to_string(version % 100);
}

Status NcclApi::open(const std::string& wheel, std::shared_ptr<const NcclApi>* result) {
  std::vector<std::string> paths;
  if (const char* chosen = std::getenv("PYCOMM_NCCL_LIB"); chosen && *chosen) {
    paths = {chosen};
  } else {
    if (!wheel.empty()) paths.push_back(wheel);
    paths.push_back("libnccl.so.2");
  }
  std::string tried;
  for (const std::string& path : paths) {
    std::shared_ptr<NcclApi> api(new NcclApi);  // the constructor is private
    const Status status = api->load(path);
    if (status.ok()) {
      *result = std::move(api);
      return {};
    }
    tried += (tried.empty() ? "" : "; ") + status.message;
  }
  return {Code::invalid_argument, "no usable NCCL: " + tried + kRemedy};
}

// The library is never closed: NCCL's threads and CUDA's callbacks may run in it until the process
// ends.
Status NcclApi::load(const std::string& path) {
  void* library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char* reason = ::dlerror();
    return {Code::invalid_argument, reason ? reason : path + ": cannot be opened"};
  }
  path_ = path;

  NcclResult (*get_version)(int*) = nullptr;
  std::string missing;
  look_up(library, "ncclGetVersion", &get_version, &missing);
  if (!missing.empty())
    return {Code::invalid_argument, path + ": is not NCCL (it has no ncclGetVersion)"};
  // The file that was found says more than the name that was asked for.
  if (Dl_info info; ::dladdr(reinterpret_cast<void*>(get_version), &info) && info.dli_fname)
    path_ = info.dli_fname;
  if (get_version(&version_) != NcclResult::success)
    return {Code::invalid_argument, path_ + ": ncclGetVersion failed"};
  if (version_ < kOldest) {
    return {Code::invalid_argument,
            path_ + ": is NCCL " + nccl_version_name(version_) + "; pycomm needs 2.18 or newer"};
  }

  look_up(library, "ncclGetErrorString", &error_string_, &missing);
  look_up(library, "ncclGetLastError", &last_error_, &missing);
  look_up(library, "ncclGetUniqueId", &get_unique_id, &missing);
  look_up(library, "ncclCommInitRankConfig", &comm_init_rank_config, &missing);
  look_up(library, "ncclCommSplit", &comm_split, &missing);
  look_up(library, "ncclCommGetAsyncError", &comm_get_async_error, &missing);
  look_up(library, "ncclCommFinalize", &comm_finalize, &missing);
  look_up(library, "ncclCommDestroy", &comm_destroy, &missing);
  look_up(library, "ncclCommAbort", &comm_abort, &missing);
  look_up(library, "ncclGroupStart", &group_start, &missing);
  look_up(library, "ncclGroupEnd", &group_end, &missing);
  look_up(library, "ncclAllReduce", &all_reduce, &missing);
  look_up(library, "ncclReduce", &reduce, &missing);
  look_up(library, "ncclBroadcast", &broadcast, &missing);
  look_up(library, "ncclAllGather", &all_gather, &missing);
  look_up(library, "ncclReduceScatter", &reduce_scatter, &missing);
  look_up(library, "ncclSend", &send, &missing);
  look_up(library, "ncclRecv", &recv, &missing);
  if (!missing.empty()) {
    return {Code::invalid_argument,
            path_ + ": says it is NCCL " + nccl_version_name(version_) + ", but lacks " + missing};
  }
  std::string optional;
  look_up(library, "ncclCommShrink", &comm_shrink, &optional);
  look_up(library, "ncclCommRevoke", &comm_revoke, &optional);
  look_up(library, "ncclAlltoAll", &all_to_all, &optional);
  for (const auto& [name, symbol, since, gives] : kFeatures) {
    const bool present =
        symbol == kByVersion ? version_ >= since : ::dlsym(library, symbol) != nullptr;
    features_.push_back({name, symbol, since, gives, present});
  }
  return {};
}

std::string NcclApi::describe(NcclResult result, NcclComm* comm) const {
  std::string text = "NCCL " + nccl_version_name(version_) + ": " + error_string_(result);
  if (const char* last = last_error_(comm); last && *last) text += std::string(" (") + last + ")";
  return text;
}

}  // namespace pycomm::cuda
