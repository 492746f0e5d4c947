// Communicators of the fake NCCL: how ranks meet in a file under /dev/shm, and the switches of
// tests.
#include "fake_nccl/fake_comm.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <thread>

namespace fake {

thread_local std::string last_error;
thread_local std::string own_host;
thread_local bool hangs_across = false;
std::atomic<int> hanging_rank{-1}, slow_polls{0}, last_max_ctas{0};

namespace {

std::mutex switches_mutex;
std::string fail_function, fail_text;
int fail_result = 0;
std::atomic<int> n_communicators{0};
std::vector<ncclComm*> all;  // under switches_mutex

Shared* map(const std::string& name) {
  const std::string path = "/dev/shm/" + name;
  const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (fd < 0 || ::ftruncate(fd, sizeof(Shared)) != 0) return nullptr;
  void* memory = ::mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  ::close(fd);
  return memory == MAP_FAILED ? nullptr : static_cast<Shared*>(memory);
}

}  // namespace

int failing(const char* function) {
  const std::lock_guard lock(switches_mutex);
  if (fail_function != function) return kSuccess;
  fail_function.clear();
  last_error = fail_text;
  return fail_result;
}

void fail(ncclComm* comm, int result, const char* text) {
  const std::lock_guard lock(switches_mutex);
  comm->error_text = text;
  comm->error = result;
}

ncclComm* make(const std::string& name, int rank, int size, bool blocking) {
  auto* comm = new ncclComm;
  comm->name = name;
  comm->rank = rank;
  comm->size = size;
  comm->blocking = blocking;
  comm->polls = slow_polls;
  n_communicators++;
  const std::lock_guard lock(switches_mutex);
  all.push_back(comm);
  return comm;
}

void join(ncclComm* comm) {
  comm->shared = map(comm->name);
  const char *alone = std::getenv("FAKE_NCCL_NO_NETWORK"), *host = std::getenv("PYCOMM_HOST_ID");
  comm->shared->hosts[comm->rank] =
      std::hash<std::string>()(own_host.empty() && alone && host ? host : own_host);
  comm->shared->joined++;
  comm->pending = [comm, hangs = hangs_across] {
    if (comm->polls-- > 0 || comm->shared->joined < comm->size) return false;
    for (int rank = 0; rank < comm->size; ++rank)
      if (comm->shared->hosts[rank] != comm->shared->hosts[comm->rank]) {
        if (!hangs && comm->error == kSuccess) fail(comm, kSystemError, "socket: no route to host");
        return false;
      }
    ::unlink(("/dev/shm/" + comm->name).c_str());
    comm->ready = true;
    return true;
  };
}

int progress(ncclComm* comm) {
  if (comm->error != kSuccess) return comm->error;
  const std::lock_guard lock(comm->pending_mutex);
  if (comm->pending && !comm->pending()) {
    const int error = comm->error;  // what it may have found
    return error != kSuccess ? error : kInProgress;
  }
  comm->pending = nullptr;
  return kSuccess;
}

int answer(ncclComm* comm) {
  if (!comm->blocking) return progress(comm);
  int result;
  while ((result = progress(comm)) == kInProgress)
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  return result;
}

const char* last_error_of(ncclComm* comm) {
  const std::lock_guard lock(switches_mutex);
  if (comm != nullptr && !comm->error_text.empty()) last_error = comm->error_text;
  return last_error.c_str();
}

void free_comm(ncclComm* comm) {
  comm->gone = true;
  while (comm->running > 0) std::this_thread::sleep_for(std::chrono::microseconds(20));
  {
    const std::lock_guard lock(switches_mutex);
    std::erase(all, comm);
  }
  if (comm->shared != nullptr) ::munmap(comm->shared, sizeof(Shared));
  ::unlink(("/dev/shm/" + comm->name).c_str());
  n_communicators--;
  delete comm;
}

}  // namespace fake

using namespace fake;

extern "C" {

void fake_nccl_fail_next(const char* function, int result, const char* text) {
  const std::lock_guard lock(switches_mutex);
  fail_function = function;
  fail_result = result;
  fail_text = text;
}
void fake_nccl_hang(int rank) { hanging_rank = rank; }
void fake_nccl_no_network(const char* host, bool hangs) {
  own_host = host == nullptr ? "" : host;
  hangs_across = hangs;
}
void fake_nccl_slow_init(int polls) { slow_polls = polls; }
int fake_nccl_n_communicators() { return n_communicators; }
int fake_nccl_max_ctas() { return last_max_ctas; }
void fake_nccl_async_error(int rank, int result, const char* text) {
  const std::lock_guard lock(switches_mutex);
  for (ncclComm* comm : all)
    if (comm->rank == rank) {
      comm->error_text = text;
      comm->error = result;
    }
}
}
