// Small owners for what the kernel hands out: file descriptors and mappings; and errno as an Error.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <string>
#include <utility>

#include "core/status.h"

namespace pycomm::cpu {

class UniqueFd {
 public:
  UniqueFd() = default;
  explicit UniqueFd(int fd) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    if (this != &other) {
      reset();
      fd_ = std::exchange(other.fd_, -1);
    }
    return *this;
  }
  ~UniqueFd() { reset(); }
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }
  void reset() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }

 private:
  int fd_ = -1;
};

class Mapping {
 public:
  Mapping() = default;
  Mapping(void* data, size_t nbytes) : data_(static_cast<std::byte*>(data)), nbytes_(nbytes) {}
  Mapping(Mapping&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), nbytes_(std::exchange(other.nbytes_, 0)) {}
  Mapping& operator=(Mapping&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(nbytes_, other.nbytes_);
    return *this;
  }
  ~Mapping() {
    if (nbytes_ > 0) ::munmap(data_, nbytes_);
  }
  std::byte* release() {  // stays mapped
    nbytes_ = 0;
    return std::exchange(data_, nullptr);
  }
  std::byte* data() const { return data_; }
  size_t nbytes() const { return nbytes_; }

 private:
  std::byte* data_ = nullptr;
  size_t nbytes_ = 0;
};

// What a failed system call says: "memfd_create: Too many open files".
inline std::string errno_text(const std::string& what) {
  return what + ": " + std::strerror(errno);
}
// Error(code, what was refused); Error(no_files) where that was for want of file descriptors.
[[noreturn]] inline void throw_errno(Code code, const std::string& what) {
  if (errno == EMFILE || errno == ENFILE)
    throw Error(
        Code::no_files,
        errno_text(what) + " (the limit on open files is reached; raise it, see ulimit -n)");
  throw Error(code, errno_text(what));
}

}  // namespace pycomm::cpu
