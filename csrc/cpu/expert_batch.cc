#include "cpu/expert_batch.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <string>
#include <utility>

#include "core/status.h"

namespace pycomm::cpu {
namespace {

constexpr int kColumnBits = 5;  // top_k is 32 at most
constexpr int32_t kColumn = (1 << kColumnBits) - 1;

[[noreturn]] void refuse(const std::string& text) { throw Error(Code::invalid_argument, text); }

}  // namespace

ExpertPlaces::ExpertPlaces(int64_t rank_, int64_t n_experts, Ints host_of_, Ints n_held_,
                           Ints rank_of_, Ints local_of_, Ints expert_of_)
    : rank(rank_),
      host_of(std::move(host_of_)),
      n_held(std::move(n_held_)),
      rank_of(std::move(rank_of_)),
      local_of(std::move(local_of_)),
      expert_of(std::move(expert_of_)),
      of_expert(at(n_experts)) {
  PYCOMM_CHECK(rank >= 0 && rank < n_ranks() && n_held.size() == host_of.size(),
               "a rank's experts for each rank");
  PYCOMM_CHECK(rank_of.size() == local_of.size() && rank_of.size() == expert_of.size(),
               "rank, local number and expert of each place");
  for (int64_t each = 0; each < n_ranks(); ++each) {
    const size_t host = at(host_of[at(each)]);
    if (host >= members.size()) members.resize(host + 1);
    local_index.push_back(length(members[host]));
    members[host].push_back(each);
  }
  for (int64_t place = 0; place < n(); ++place) {
    PYCOMM_CHECK(expert_of[at(place)] < n_experts, "a place is of an expert that exists");
    of_expert[at(expert_of[at(place)])].push_back(static_cast<int32_t>(place));
  }
}

int64_t ExpertPlaces::gateway(int64_t from, int64_t to_host) const {
  const Ints& of = members[at(to_host)];
  return of[at(local_index[at(from)] % length(of))];
}

Batch::Batch(const ExpertPlaces& places_, const ExpertRequest& request,
             std::span<const int32_t> ids, std::span<const int64_t> n_tokens, int64_t top_k_)
    : places(places_), top_k(top_k_), begin{0}, keys_(ids.size()) {
  for (const int64_t n : n_tokens) begin.push_back(begin.back() + n);
  PYCOMM_CHECK(length(begin) == places.n_ranks() + 1, "tokens of each rank");
  PYCOMM_CHECK(begin.back() * top_k == static_cast<int64_t>(ids.size()), "top_k ids a token");
  source.resize(at(n()));
  token.resize(at(n()));
  const auto nowhere = static_cast<int32_t>(places.n());
  for (int64_t rank = 0; rank < places.n_ranks(); ++rank)
    for (int64_t t = begin[at(rank)]; t < begin[at(rank + 1)]; ++t) {
      source[at(t)] = rank;
      token[at(t)] = t - begin[at(rank)];
      const auto turn = static_cast<uint64_t>(rank + token[at(t)]);
      for (int64_t k = 0; k < top_k; ++k) {
        const int32_t id = ids[at(t * top_k + k)];
        if (id < 0 || at(id) >= places.of_expert.size())
          refuse("rank " + std::to_string(rank) + " names expert " + std::to_string(id) +
                 "; there are 0 to " + std::to_string(places.of_expert.size() - 1));
        const auto& replicas = places.of_expert[at(id)];
        const size_t n_replicas = replicas.size();
        int32_t place = nowhere;
        if (n_replicas == 1)
          place = replicas[0];
        else if (n_replicas > 1)
          place = replicas[turn % n_replicas];
        lost += place == nowhere;
        keys_[at(t * top_k + k)] = place << kColumnBits | static_cast<int32_t>(k);
      }
    }
  if (request.max_tokens > 0) keep_to_capacity(request.max_tokens, request.drop);
}

void Batch::keep_to_capacity(int64_t max_tokens, bool drop) {
  const int64_t nowhere = places.n();
  Ints counts(at(nowhere + 1));
  int64_t first = nowhere, over = 0;
  for (int32_t& key : keys_) {
    const int64_t place = key >> kColumnBits;
    if (counts[at(place)]++ < max_tokens || place == nowhere) continue;
    ++over;
    first = std::min(first, place);
    if (drop) key = static_cast<int32_t>(nowhere << kColumnBits) | (key & kColumn);
  }
  lost += over;
  if (over == 0 || drop) return;
  counts.pop_back();
  refuse("expert " + std::to_string(places.expert_of[at(first)]) + " on rank " +
         std::to_string(places.rank_of[at(first)]) + " gets " + std::to_string(counts[at(first)]) +
         " tokens, " + std::to_string(over) + " slots too many in all; max_tokens is " +
         std::to_string(max_tokens) + "; raise it to " +
         std::to_string(*std::max_element(counts.begin(), counts.end())) +
         ", or pass drop=True to leave them out and count them");
}

Slots Batch::slots(int64_t first_token, int64_t end_token, int64_t first_place,
                   int64_t end_place) const {
  Slots found;
  const auto most = at((end_token - first_token) * top_k);
  for (Ints* each : {&found.token, &found.place, &found.column}) each->reserve(most);
  std::array<int32_t, kColumn + 1> chosen;
  for (int64_t t = first_token; t < end_token; ++t) {
    size_t n = 0;
    for (int64_t k = 0; k < top_k; ++k) {
      const int32_t key = keys_[at(t * top_k + k)];
      if (const int64_t place = key >> kColumnBits; place < first_place || place >= end_place)
        continue;
      size_t i = n++;
      for (; i > 0 && chosen[i - 1] > key; --i) chosen[i] = chosen[i - 1];
      chosen[i] = key;
    }
    for (size_t i = 0; i < n; ++i) {
      found.token.push_back(t);
      found.place.push_back(chosen[i] >> kColumnBits);
      found.column.push_back(chosen[i] & kColumn);
    }
  }
  return found;
}

Home::Home(const Batch& batch)
    : slots(batch.slots(batch.first(), batch.end(), 0, batch.places.n())),
      hosts_a_token(at(batch.end() - batch.first())) {
  const ExpertPlaces& places = batch.places;
  for (int64_t i = 0; i < slots.n(); ++i) {
    const int64_t token = slots.token[at(i)] - batch.first();
    rank.push_back(places.rank_of[at(slots.place[at(i)])]);
    const int64_t host = places.host_of[at(rank.back())];
    const bool new_token = i == 0 || slots.token[at(i)] != slots.token[at(i - 1)];
    if (new_token || host != host_host.back()) {
      host_token.push_back(token);
      host_host.push_back(host);
      host_begin.push_back(i);
      host_terms.push_back(0);
      ++hosts_a_token[at(token)];
    }
    if (new_token || rank.back() != rank_rank.back()) {
      rank_token.push_back(token);
      rank_rank.push_back(rank.back());
      rank_begin.push_back(i);
      ++host_terms.back();
    }
  }
  rank_begin.push_back(slots.n());
  host_begin.push_back(slots.n());
}

Served::Served(const Batch& batch, const ExpertRequest& request, Slots mine)
    : slots(std::move(mine)) {
  const int64_t n = slots.n(), n_local = batch.places.n_held[at(batch.places.rank)];
  expert_counts.resize(at(n_local));
  for (int64_t i = 0; i < n; ++i) {
    if (i == 0 || slots.token[at(i)] != slots.token[at(i - 1)]) {
      row_token.push_back(slots.token[at(i)]);
      if (i > 0) row_bounds.push_back(i);
    }
    slot_row.push_back(length(row_token) - 1);
    local.push_back(batch.places.local_of[at(slots.place[at(i)])]);
    ++expert_counts[at(local.back())];
  }
  if (n > 0) row_bounds.push_back(n);
  for (const int64_t count : expert_counts)
    expert_offsets.push_back(expert_offsets.back() +
                             (count + request.align - 1) / request.align * request.align);
  if (request.layout == ExpertRequest::Layout::rank) {
    slot_of_out.assign(row_bounds.begin(), row_bounds.end() - 1);
    out_of_slot = slot_row;
  } else if (request.layout == ExpertRequest::Layout::token) {
    slot_of_out.resize(at(n));
    std::iota(slot_of_out.begin(), slot_of_out.end(), 0);
    out_of_slot = slot_of_out;
  } else {
    slot_of_out.assign(at(expert_offsets.back()), -1);
    out_of_slot.resize(at(n));
    Ints next(expert_offsets.begin(), expert_offsets.end() - 1);
    for (int64_t i = 0; i < n; ++i) {
      out_of_slot[at(i)] = next[at(local[at(i)])]++;
      slot_of_out[at(out_of_slot[at(i)])] = i;
    }
  }
}

}  // namespace pycomm::cpu
