#include "cuda/symmetric_memory.h"

#include <chrono>
#include <thread>
#include <utility>

#include "core/status.h"

namespace pycomm::cuda {
namespace {

constexpr int64_t kGranule = 2 << 20;  // of memory that other processes map: no one else's is in it

}  // namespace

void SymmetricMemory::allocate() {
  const auto nbytes = static_cast<size_t>((nbytes_ + kGranule - 1) / kGranule * kGranule);
  char*& mine = memories_[static_cast<size_t>(rank_)];
  mine = static_cast<char*>(device_->allocate_shared(nbytes));
  const auto stream = device_->new_stream();
  const auto zeroed = device_->new_event();
  device_->zero(mine, nbytes, stream);
  device_->record(zeroed, stream);
  while (!device_->passed(zeroed)) std::this_thread::sleep_for(std::chrono::microseconds(50));
  device_->free_event(zeroed);
  device_->free_stream(stream);
}

std::unique_ptr<SymmetricMemory> SymmetricMemory::create(std::shared_ptr<Device> device, int rank,
                                                         int size, int64_t nbytes,
                                                         const Exchange& exchange,
                                                         const std::string& lacks,
                                                         std::string* why) {
  std::unique_ptr<SymmetricMemory> self(new SymmetricMemory(std::move(device), rank, size, nbytes));
  // "!" and why not, or a device's id, a newline and the handle.
  const auto failure_in = [&](const std::vector<std::string>& told) {
    for (size_t of = 0; of < told.size(); ++of)
      if (told[of].starts_with('!')) {
        *why = "rank " + std::to_string(of) + ": " + told[of].substr(1);
        return true;
      }
    return false;
  };
  std::string mine = lacks.empty() ? "" : "!" + lacks;
  try {
    if (mine.empty()) {
      self->allocate();
      mine = self->device_->id() + "\n" + self->device_->handle_of(self->of(rank));
    }
  } catch (const Error& error) {
    mine = std::string("!") + error.what();
  }
  const auto told = exchange("memory", mine);
  if (failure_in(told)) {
    self->all_have_left();  // nobody has mapped it
    return nullptr;
  }
  mine.clear();
  try {
    for (size_t of = 0; of < told.size(); ++of) {
      const size_t end = told[of].find('\n');
      self->n_on_device_ += told[of].substr(0, end) == self->device_->id();
      self->handles_.push_back(told[of].substr(end + 1));
      if (static_cast<int>(of) != rank)
        self->memories_[of] = static_cast<char*>(self->device_->map_shared(self->handles_[of]));
    }
  } catch (const Error& error) {
    mine = std::string("!") + error.what();
  }
  if (!failure_in(exchange("mapped", mine))) return self;
  self->leave();
  (void)exchange("unmapped", "");
  self->all_have_left();
  return nullptr;
}

void SymmetricMemory::leave() {
  for (size_t of = 0; of < handles_.size(); ++of) {
    if (static_cast<int>(of) == rank_) continue;
    char* const theirs = std::exchange(memories_[of], nullptr);
    if (theirs != nullptr) device_->unmap_shared(theirs, handles_[of]);
  }
}

void SymmetricMemory::give_back() {
  char* const mine = std::exchange(memories_[static_cast<size_t>(rank_)], nullptr);
  if (mine != nullptr) device_->release_shared(mine);
}

SymmetricMemory::~SymmetricMemory() {
  if (releases_) give_back();
}

}  // namespace pycomm::cuda
