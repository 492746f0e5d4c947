// How the rows of a batch reach their experts and come back: the tables of a Route, for each way.
// Of expert_plan.cc alone.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/expert_batch.h"
#include "cpu/expert_plan.h"

namespace pycomm::cpu {

// The order of items by (crossing, peer), each one's position in it, and the counts of each.
struct Order {
  Ints items, position;
  Counts counts;
};
Order by_crossing(const Ints& crossing, const Ints& peer, int64_t n_crossings, int64_t n_peers);

class Routes {
 public:
  Routes(const Batch& batch, const ExpertRequest& request);

  // last: where stages are experts, an item crosses with its last one instead of its first one.
  Route route(bool last) const { return through_hosts_ ? through_hosts(last) : direct(last); }

 private:
  const Batch& batch_;
  const ExpertPlaces& places_;
  const ExpertRequest& request_;
  const int64_t me_;
  const bool through_hosts_;
  const Slots seen_;  // of all tokens those of this rank's places, or of its host's

 public:
  const Home home;
  const Served served;
  Ints stage;  // of each slot of this rank

 private:
  Route direct(bool last) const;         // straight from rank to rank
  Route through_hosts(bool last) const;  // once to each host, and inside it over shared memory

  Slots seen() const;
  Slots mine() const;
  int64_t stage_of_slot(int64_t slot) const;
  // The part of its rank's tokens that a token is in: where tokens are cut, its crossing.
  int64_t part(int64_t token) const;
  int64_t n_beside(int64_t token) const { return batch_.n_of(batch_.source[at(token)]); }
  // In which crossing an item goes, whose slots are begin .. end - 1.
  int64_t crossing(const Slots& slots, int64_t begin, int64_t end, bool last) const;
  Order cross(const Ints& crossings, const Ints& peers) const;
  // From the source and the row of each of this rank's rows, or, in mode none, of its slots.
  std::vector<Expansion> expand(const Ints& source, const Ints& row) const;
  // A sum over output rows: that of one of this rank's rows.
  void add_partial_sum(int64_t row, Terms* terms) const;

  std::vector<bool> near_;  // by rank: nothing crosses from it
  Ints group_;              // by place: its stage, where experts are cut
};

}  // namespace pycomm::cpu
