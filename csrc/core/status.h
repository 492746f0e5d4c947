// Status: what went wrong in the world (a peer, a link, an argument), as a code that Python maps to
// one exception class and a message that names the fact, both sides and what to do. Thrown as
// Error; an engine stores it and hands it to every waiter.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace pycomm {

enum class Code : int {
  ok = 0,
  invalid_argument,  // found before anything was sent
  timeout,           // a peer did not answer before the deadline
  peer_lost,         // a process ended or a connection broke
  mismatch,          // two ranks called different collectives
  closed,            // the group was closed, or broke earlier
  internal,          // a bug of ours, or a call that the system refuses
  no_files,          // the limit on open files is reached
  nonfinite,         // a result holds NaN or infinity, and the caller wants to be told
};

struct [[nodiscard]] Status {
  Code code = Code::ok;
  std::string message;
  bool ok() const { return code == Code::ok; }
};

class Error : public std::runtime_error {
 public:
  Error(Code code, const std::string& message) : std::runtime_error(message), code_(code) {}
  explicit Error(const Status& status) : Error(status.code, status.message) {}
  Code code() const { return code_; }
  Status status() const { return {code_, what()}; }

 private:
  Code code_;
};

}  // namespace pycomm

// For our own bugs: what must hold whatever the world does.
#define PYCOMM_CHECK(condition, text)                                               \
  do {                                                                              \
    if (!(condition)) [[unlikely]]                                                  \
      throw ::pycomm::Error(::pycomm::Code::internal,                               \
                            std::string(__FILE__) + ": " #condition ": " + (text)); \
  } while (0)
