#include "cpu/ways.h"

#include <algorithm>
#include <bit>
#include <utility>

namespace pycomm::cpu {
namespace {

constexpr uint64_t kScale = 1 << 20;  // costs are of so many bytes
// Calls between two tries, in multiples of a try's. A try costs at most a twentieth of them, but
// for those that come anyway.
constexpr uint64_t kRare = 32 << 20;  // bytes
constexpr uint64_t kFewest = 4, kUntried = 16, kMost = 64, kDearest = 20;

// Of a try; the last two count. The caches are full of what the other way used, and shared memory
// is a ring of some size, which has to come round.
uint64_t calls_of_try(Way way, uint64_t nbytes) {
  constexpr uint64_t kRing = 2 << 20, kLongest = 129;
  return way == Way::pulled ? 2 : std::clamp<uint64_t>(1 + kRing / nbytes, 2, kLongest);
}

constexpr size_t index(Way way) { return static_cast<size_t>(way); }
constexpr Way other(Way way) { return way == Way::shared ? Way::pulled : Way::shared; }

}  // namespace

int Ways::class_of(uint64_t nbytes) {
  return std::clamp(static_cast<int>(std::bit_width(nbytes / kLeast)) - 1, 0, kClasses - 1);
}

Ways::Cell& Ways::cell(int kind, uint64_t nbytes) {
  return cells()[kind * kClasses + class_of(nbytes)];
}

// The lesser of the last two: a call that something else held up changes nothing.
uint64_t Ways::recent(const Cell& cell, Way way) {
  return std::min(cell.last[index(way)], cell.before[index(way)]);
}

Way Ways::choose(int kind, uint64_t nbytes) {
  const Cell& cell = this->cell(kind, nbytes);
  if (!cell.known) return latest_[far_];
  return cell.awaited > 0 ? other(cell.way) : cell.way;
}

// Both ways were measured just now.
void Ways::compare(Cell& cell, uint64_t nbytes) {
  uint64_t mine = recent(cell, cell.way), theirs = recent(cell, other(cell.way));
  // Where the two are near each other shared memory is the better guess: other programs slow it
  // more while it is tried.
  if (theirs < (cell.way == Way::shared ? mine * 9 / 10 : mine)) {
    cell.way = other(cell.way);
    std::swap(mine, theirs);
    for (Cell* each = cells(); each < cells() + n_cells_; ++each)  // they may find the same
      if (each->known && each->way != cell.way)
        each->countdown = std::min<uint64_t>(each->countdown, kUntried);
  }
  const uint64_t loss = std::max(theirs, mine) - mine;
  // What the first calls say of a process that has just started does not hold for long.
  cell.most = std::min(2 * cell.most, kMost);
  cell.countdown = std::clamp(kDearest * loss / mine, kFewest, cell.most) *
                   calls_of_try(other(cell.way), nbytes);
  cell.usual = mine;
}

void Ways::record(int kind, uint64_t nbytes, Way way, uint64_t time) {
  Cell& cell = this->cell(kind, nbytes);
  const uint64_t cost = std::max<uint64_t>(time * kScale / nbytes, 1);
  uint64_t& last = cell.last[index(way)];
  cell.before[index(way)] = last == 0 ? cost : last;
  last = cost;
  if (!cell.known) {
    cell.known = true;
    cell.way = way;
    // What is right for one size mostly is for others: only the first of a kind is tried at once,
    // and what is so large that a program may have only a few of it.
    const Cell* first = cells() + kind * kClasses;
    const bool told =
        std::any_of(first, first + kClasses, [](const Cell& c) { return c.most > 0; });
    cell.most = told ? kMost : kFewest;
    cell.countdown = nbytes >= kRare ? 1 : told ? kUntried : 2;
    cell.usual = cost;
  } else if (cell.awaited > 0) {
    if (way != cell.way && --cell.awaited == 0) compare(cell, nbytes);
  } else if (way == cell.way) {  // else chosen before the last comparison
    const bool slower = recent(cell, way) > cell.usual * 3 / 2;
    if (slower || --cell.countdown == 0) cell.awaited = calls_of_try(other(way), nbytes);
  }
  latest_[far_] = cell.way;
}

void Ways::probed(uint64_t time) {
  // The lesser of two: a probe that something else held up changes nothing.
  const uint64_t price = std::min(time, std::exchange(probe_, time));
  if (price == 0) return;  // the first
  least_probe_ = std::min(least_probe_, price);
  far_ = price * 2 > least_probe_ * (far_ ? 3 : 4);
}

}  // namespace pycomm::cpu
