// Ways: which of two ways takes ordinary memory from one rank of a host to another faster, here and
// now: over shared memory that one writes and the other reads, or pulled by process_vm_readv(2).
// Cores that share a cache do the first in half the time, cores that do not the second in a fifth
// (docs/performance.md), and a virtual machine's cores may move from one to the other. So it is
// measured as calls go by: each size has a way, the other one is tried now and then. What was found
// while a line was cheap to take from another core and while it was dear is kept apart, so that
// when the cores move nothing is tried anew.
//
// Deterministic: those who record and ask alike are told alike. Thread safety: none.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace pycomm::cpu {

enum class Way : uint32_t { shared, pulled };

class Ways {
 public:
  static constexpr uint64_t kLeast = 16 << 10;  // less goes over the board (board.h)
  // Kinds of operations cost differently and are kept apart, as are sizes.
  explicit Ways(int n_kinds)
      : n_cells_(static_cast<size_t>(n_kinds) * kClasses), cells_(2 * n_cells_) {}
  static int class_of(uint64_t nbytes);  // 0 to 63
  // The way for the next `nbytes`, and for more of them until one is recorded.
  Way choose(int kind, uint64_t nbytes);
  // What `nbytes` took that way: time in any one unit.
  void record(int kind, uint64_t nbytes, Way way, uint64_t time);
  // What some lines that another core has just written took to read.
  void probed(uint64_t time);

 private:
  static constexpr int kClasses = 14;  // 16 KiB to 128 MiB and more, by powers of two
  struct Cell {
    bool known = false;
    Way way = Way::shared;
    uint64_t countdown = 0;  // calls to the next try of the other way
    uint64_t most = 0;       // that it may be
    uint64_t awaited = 0;    // calls of the other way still to be measured; 0: it is not tried
    uint64_t usual = 0;      // cost of its way when that was last compared
    std::array<uint64_t, 2> last{}, before{};  // costs by way
  };
  Cell& cell(int kind, uint64_t nbytes);
  static uint64_t recent(const Cell& cell, Way way);
  void compare(Cell& cell, uint64_t nbytes);
  Cell* cells() { return &cells_[far_ ? n_cells_ : 0]; }  // that hold now

  const size_t n_cells_;
  std::vector<Cell> cells_;                        // near, then far
  std::array<Way, 2> latest_{};                    // for sizes that have none yet; near, far
  bool far_ = false;                               // lines are dear
  uint64_t probe_ = 0, least_probe_ = UINT64_MAX;  // the last one, the cheapest
};

}  // namespace pycomm::cpu
