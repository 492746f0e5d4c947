#include "cpu/shared_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>

namespace pycomm::cpu {
namespace {

UniqueFd nameless_file(const std::string& folder) {
  UniqueFd fd(::open(folder.c_str(), O_TMPFILE | O_RDWR | O_EXCL | O_CLOEXEC, 0600));
  if (fd) return fd;
  std::string path = folder + "/pycomm-XXXXXX";  // a file system without O_TMPFILE
  fd = UniqueFd(::mkostemp(path.data(), O_CLOEXEC));
  if (fd) ::unlink(path.c_str());
  return fd;
}

// ENOSPC and the like, without the SIGBUS that touching the pages would end in.
bool reserve(int fd, size_t nbytes, bool whole) {
  return ::ftruncate(fd, static_cast<off_t>(nbytes)) == 0 &&
         (!whole || ::fallocate(fd, 0, 0, static_cast<off_t>(nbytes)) == 0);
}

}  // namespace

size_t file_size_limit() {
  rlimit limit{};
  return ::getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY
             ? static_cast<size_t>(limit.rlim_cur)
             : SIZE_MAX;
}

SharedMemory make_shared_memory(const char* name, size_t nbytes, bool whole) {
  if (nbytes > file_size_limit())  // asked for all the same, the kernel sends SIGXFSZ
    throw Error(Code::internal, std::to_string(nbytes) +
                                    " bytes of shared memory are more than the limit on file "
                                    "sizes, " +
                                    std::to_string(file_size_limit()) +
                                    " bytes; raise it (ulimit -f)");
  UniqueFd fd(::memfd_create(name, MFD_CLOEXEC));
  if (fd) {
    if (!reserve(fd.get(), nbytes, false))
      throw_errno(Code::internal, "ftruncate of shared memory to " + std::to_string(nbytes));
    return {std::move(fd), ""};
  }
  if (errno == EMFILE || errno == ENFILE) throw_errno(Code::internal, "memfd_create");
  std::string refused = errno_text("memfd_create");
  const char* temporary = std::getenv("TMPDIR");
  for (const std::string folder : {"/dev/shm", temporary != nullptr ? temporary : "/tmp"}) {
    fd = nameless_file(folder);
    if (fd && reserve(fd.get(), nbytes, whole))
      return {std::move(fd), "a file in " + folder + " instead of a memfd (" + refused + ")"};
    refused += ", " + errno_text(folder + ": " + std::to_string(nbytes) + " bytes");
  }
  throw Error(Code::internal, "shared memory is refused everywhere: " + refused +
                                  ". Allow memfd_create, or make room in /dev/shm or TMPDIR");
}

namespace {
// Begins at a multiple of a huge page, in a wider range of addresses that is taken first.
Mapping map(int flags, int fd, size_t nbytes) {
  const size_t wide = nbytes + kHugePage;
  void* range =
      ::mmap(nullptr, wide, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  void* data = MAP_FAILED;
  if (range != MAP_FAILED) {
    const auto begin = reinterpret_cast<uintptr_t>(range);
    const uintptr_t at = (begin + kHugePage - 1) / kHugePage * kHugePage;
    data = ::mmap(reinterpret_cast<void*>(at), nbytes, PROT_READ | PROT_WRITE, flags | MAP_FIXED,
                  fd, 0);
    const int error = errno;
    if (data == MAP_FAILED) {
      ::munmap(range, wide);
    } else {
      const size_t page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
      const uintptr_t end = (at + nbytes + page - 1) / page * page;
      if (at > begin) ::munmap(range, at - begin);
      if (end < begin + wide) ::munmap(reinterpret_cast<void*>(end), begin + wide - end);
    }
    errno = error;
  }
  if (data == MAP_FAILED)
    throw_errno(Code::internal, "mmap of " + std::to_string(nbytes) + " bytes of memory");
  return Mapping(data, nbytes);
}
}  // namespace

#if defined(__SANITIZE_THREAD__)
// ThreadSanitizer knows memory by its address. The ranks of a process, which are its threads in
// tests, have to see shared memory at one, or no order that an atomic in it makes would be seen.
// Kept until the process ends.
Mapping map_shared(int fd, size_t nbytes) {
  static std::mutex mutex;
  static std::map<ino_t, std::byte*> mapped;  // of memfds: one file system
  struct stat info{};
  if (::fstat(fd, &info) != 0) throw_errno(Code::internal, "fstat of shared memory");
  std::lock_guard lock(mutex);
  auto& data = mapped[info.st_ino];
  if (data == nullptr) {
    Mapping whole = map(MAP_SHARED, fd, std::max(nbytes, static_cast<size_t>(info.st_size)));
    data = whole.release();
  }
  return Mapping(data, 0);
}
#else
Mapping map_shared(int fd, size_t nbytes) { return map(MAP_SHARED, fd, nbytes); }
#endif

Mapping map_own(size_t nbytes) {
  return map(MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, nbytes);
}

}  // namespace pycomm::cpu
