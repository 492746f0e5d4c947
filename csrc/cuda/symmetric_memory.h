// SymmetricMemory: as many bytes on the device of each rank of one host, which all of them have
// mapped: by CUDA IPC between processes, by the address itself between the threads of one.
// Thread safety: one thread at a time.
// Invariant: a rank's memory is given back only after all have said that they left it; else it
// stays to the end of the process, since another may be reading it.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cuda/device.h"

namespace pycomm::cuda {

class SymmetricMemory {
 public:
  // What all ranks have given under this name, by rank; all call it.
  using Exchange =
      std::function<std::vector<std::string>(const std::string& name, const std::string& mine)>;
  // Zeros. All ranks call it, with one nbytes. nullptr, on all of them, where one has no such
  // memory, cannot map another's, or lacks something else, and says what; `why` has it.
  static std::unique_ptr<SymmetricMemory> create(std::shared_ptr<Device> device, int rank, int size,
                                                 int64_t nbytes, const Exchange& exchange,
                                                 const std::string& lacks, std::string* why);
  ~SymmetricMemory();

  char* of(int rank) const { return memories_[static_cast<size_t>(rank)]; }
  int size() const { return static_cast<int>(memories_.size()); }
  int64_t nbytes() const { return nbytes_; }
  int n_on_device() const { return n_on_device_; }  // ranks whose device is this one's
  // Unmaps the others'. REQUIRES: what this rank's device reads of them has ended.
  void leave();
  // Every rank has left: this one's is given back at the end, or at once.
  void all_have_left() { releases_ = true; }
  void give_back();

 private:
  SymmetricMemory(std::shared_ptr<Device> device, int rank, int size, int64_t nbytes)
      : device_(std::move(device)),
        rank_(rank),
        nbytes_(nbytes),
        memories_(static_cast<size_t>(size), nullptr) {}
  void allocate();

  const std::shared_ptr<Device> device_;
  const int rank_;
  const int64_t nbytes_;
  int n_on_device_ = 0;
  bool releases_ = false;
  std::vector<char*> memories_;       // by rank
  std::vector<std::string> handles_;  // likewise
};

}  // namespace pycomm::cuda
