// Where the rows of one batch of an expert exchange go: the index tables that every rank makes for
// itself from all ranks' choices of experts (pycomm/moe/tables.py has the vocabulary and says what
// each table is for). Thread safety: pure.
//
// One pass over the slots of all ranks' tokens, one over those of this rank's host or rank; tables
// of integers, no arithmetic of rows.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace pycomm::cpu {

using Ints = std::vector<int64_t>;
using Counts = std::vector<Ints>;  // [crossing][peer]

// Where experts are (pycomm/moe/placement.py), as this rank sees it. Places ascend by (host, rank,
// the rank's own order); a slot without a place goes nowhere.
struct ExpertPlaces {
  int64_t rank = 0;                             // this one
  Ints host_of;                                 // by rank; hosts are numbered as they first appear
  Ints n_held;                                  // by rank: its experts, used or not
  Ints rank_of, local_of, expert_of;            // by place
  std::vector<std::vector<int32_t>> of_expert;  // places, by expert; replicas take turns

  ExpertPlaces(int64_t rank, int64_t n_experts, Ints host_of, Ints n_held, Ints rank_of,
               Ints local_of, Ints expert_of);
  int64_t n() const { return static_cast<int64_t>(rank_of.size()); }
  int64_t n_ranks() const { return static_cast<int64_t>(host_of.size()); }
  int64_t host() const { return host_of[static_cast<size_t>(rank)]; }
  // Of ranks of a host, in order; and where a rank stands among them.
  std::vector<Ints> members;
  Ints local_index;
  // The rank of another host through which that of `from` sends to the host and hears from it.
  int64_t gateway(int64_t from, int64_t to_host) const;
};

struct ExpertRequest {
  enum class Mode { none, rank, host } mode = Mode::none;
  enum class Layout { expert, rank, token } layout = Layout::expert;
  bool cuts_experts = false;  // stages are of experts; else of tokens
  int64_t n_crossings = 0;    // 0 where nothing crosses
  int64_t n_stages = 1;       // of tokens: n_crossings + 2, or 1 where nothing crosses
  int64_t align = 1;
  int64_t max_tokens = 0;  // 0: any number
  bool drop = false;
};

struct Terms {  // pycomm/moe/rows.py
  Ints source, rows, offsets{0};
  void add(int64_t from, int64_t row) {
    source.push_back(from);
    rows.push_back(row);
  }
  void end() { offsets.push_back(static_cast<int64_t>(rows.size())); }
};

struct Leg {
  Ints index;
  Counts sends, receives;
};

struct Expansion {
  Ints to, source, rows;
};

struct OnHost {
  Ints staged, arrived, partials;
  std::vector<Terms> gateway;
  Terms own;
};

struct Route {
  Leg leg;
  std::vector<Expansion> expansions;
  std::vector<Terms> leaving;
  std::vector<Ints> leaving_rows;
  Terms own;
  std::vector<Terms> home;
  std::optional<OnHost> on_host;
};

struct ExpertTables {
  Ints expert_counts, expert_offsets;
  Ints stage_counts;  // [stages, local experts]
  int64_t dropped = 0;
  Ints slot_of_out, slot_expert, slot_of_row, slot_weights, home_weights;
  Leg scalars;
  Route out;
  std::optional<Route> back;      // where it is not `out`
  bool every_token_goes = false;  // each of this rank's tokens has an expert
};

// ids: experts of all ranks' tokens, one rank after the other, [sum of n_tokens, top_k]; a token
// names none twice. Errors: Error(invalid_argument), on all ranks the same, for an id that does not
// exist and where an expert gets more than max_tokens and drop is off. REQUIRES: top_k is 1 to 32.
ExpertTables expert_tables(const ExpertPlaces& places, const ExpertRequest& request,
                           std::span<const int32_t> ids, std::span<const int64_t> n_tokens,
                           int64_t top_k);

}  // namespace pycomm::cpu
