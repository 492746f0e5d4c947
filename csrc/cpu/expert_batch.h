// One batch as a rank sees it: the places of everybody's slots, and what this rank's experts take.
// Of expert_plan.cc alone.
#pragma once

#include <cstdint>
#include <span>

#include "cpu/expert_plan.h"

namespace pycomm::cpu {

inline size_t at(int64_t i) { return static_cast<size_t>(i); }
inline int64_t length(const Ints& of) { return static_cast<int64_t>(of.size()); }

// Slots by (token, place). token: among all ranks'; column: of ids.
struct Slots {
  Ints token, place, column;
  int64_t n() const { return length(token); }
};

class Batch {
 public:
  Batch(const ExpertPlaces& places, const ExpertRequest& request, std::span<const int32_t> ids,
        std::span<const int64_t> n_tokens, int64_t top_k);

  const ExpertPlaces& places;
  const int64_t top_k;
  Ints begin;          // by rank, and the end: its tokens among all
  Ints source, token;  // of each token: its rank, its number there
  int64_t lost = 0;    // slots that go nowhere

  int64_t n() const { return begin.back(); }
  int64_t n_of(int64_t rank) const { return begin[at(rank + 1)] - begin[at(rank)]; }
  int64_t first() const { return begin[at(places.rank)]; }  // of this rank's
  int64_t end() const { return begin[at(places.rank + 1)]; }
  // Of tokens first_token .. end_token - 1 those whose place is first_place .. end_place - 1.
  Slots slots(int64_t first_token, int64_t end_token, int64_t first_place, int64_t end_place) const;

 private:
  void keep_to_capacity(int64_t max_tokens, bool drop);

  std::vector<int32_t> keys_;  // [n, top_k]: place * 32 + column
};

// This rank's tokens: its slots in runs of one rank, those in runs of one host. *_begin: where each
// run's slots begin, and the end.
struct Home {
  explicit Home(const Batch& batch);

  Slots slots;
  Ints rank;  // of each slot
  Ints rank_token, rank_rank, rank_begin;
  Ints host_token, host_host, host_begin, host_terms;  // terms: ranks of each (token, host)
  Ints hosts_a_token;
};

// What this rank's experts take: its slots, and its rows (tokens) with where each one's slots
// begin. out_of_slot, slot_of_out: where slots and output rows lie in each other's order; -1 is
// padding.
struct Served {
  Served(const Batch& batch, const ExpertRequest& request, Slots mine);

  Slots slots;
  Ints slot_row, row_token, row_bounds{0};
  Ints local;  // of each slot: its expert's number on the rank
  Ints expert_counts, expert_offsets{0};
  Ints out_of_slot, slot_of_out;
};

}  // namespace pycomm::cpu
