// Anonymous shared memory: zeroed, readable by this user alone, gone with its last mapping, so that
// nothing is left behind after kill -9. A memfd; where the system refuses that, a file that has
// lost its name, in /dev/shm or TMPDIR.
#pragma once

#include <cstddef>
#include <string>

#include "cpu/posix.h"

namespace pycomm::cpu {

struct SharedMemory {
  UniqueFd fd;
  std::string instead;  // of a memfd: what and why; empty for a memfd
};

// whole: the caller will touch all of it. A file's space is taken now then: a file system that
// fills up later would show as SIGBUS. Memory of a memfd counts as the process's own, once touched.
// Errors: Error(internal) naming what was refused and what to do.
SharedMemory make_shared_memory(const char* name, size_t nbytes, bool whole = true);
inline constexpr size_t kHugePage = 2 << 20;
// Mappings begin at multiples of kHugePage.
Mapping map_shared(int fd, size_t nbytes);
Mapping map_own(size_t nbytes);  // of this process alone, sparse
// The largest file this process may make (ulimit -f); shared memory counts as one.
size_t file_size_limit();

}  // namespace pycomm::cpu
