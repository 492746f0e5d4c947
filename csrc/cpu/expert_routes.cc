#include "cpu/expert_routes.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace pycomm::cpu {

Order by_crossing(const Ints& crossing, const Ints& peer, int64_t n_crossings, int64_t n_peers) {
  Order order{Ints(crossing.size()), Ints(crossing.size()), Counts(at(n_crossings))};
  for (Ints& counts : order.counts) counts.resize(at(n_peers));
  for (size_t i = 0; i < crossing.size(); ++i) ++order.counts[at(crossing[i])][at(peer[i])];
  Counts next = order.counts;
  int64_t begin = 0;
  for (Ints& of_crossing : next)
    for (int64_t& count : of_crossing) begin += std::exchange(count, begin);
  for (size_t i = 0; i < crossing.size(); ++i) {
    order.position[i] = next[at(crossing[i])][at(peer[i])]++;
    order.items[at(order.position[i])] = static_cast<int64_t>(i);
  }
  return order;
}

Routes::Routes(const Batch& batch, const ExpertRequest& request)
    : batch_(batch),
      places_(batch.places),
      request_(request),
      me_(places_.rank),
      through_hosts_(request.mode == ExpertRequest::Mode::host),
      seen_(seen()),
      home(batch),
      served(batch, request, mine()) {
  for (int64_t rank = 0; rank < places_.n_ranks(); ++rank)
    near_.push_back(through_hosts_ ? places_.host_of[at(rank)] == places_.host() : rank == me_);
  for (int64_t place = 0; place < places_.n(); ++place) {
    const int64_t n_held = places_.n_held[at(places_.rank_of[at(place)])];
    group_.push_back(places_.local_of[at(place)] * request_.n_stages / n_held);
  }
  stage.reserve(at(served.slots.n()));
  for (int64_t i = 0; i < served.slots.n(); ++i) stage.push_back(stage_of_slot(i));
}

Slots Routes::seen() const {
  int64_t first = places_.n(), end = 0;
  for (int64_t place = 0; place < places_.n(); ++place) {
    const int64_t rank = places_.rank_of[at(place)];
    if (through_hosts_ ? places_.host_of[at(rank)] != places_.host() : rank != me_) continue;
    first = std::min(first, place);
    end = place + 1;
  }
  return batch_.slots(0, batch_.n(), first, end);
}

Slots Routes::mine() const {
  Slots found;
  for (int64_t i = 0; i < seen_.n(); ++i) {
    if (places_.rank_of[at(seen_.place[at(i)])] != me_) continue;
    found.token.push_back(seen_.token[at(i)]);
    found.place.push_back(seen_.place[at(i)]);
    found.column.push_back(seen_.column[at(i)]);
  }
  return found;
}

int64_t Routes::part(int64_t token) const {
  if (request_.n_crossings < 2) return 0;
  return batch_.token[at(token)] * request_.n_crossings / n_beside(token);
}

int64_t Routes::stage_of_slot(int64_t slot) const {
  const int64_t token = served.slots.token[at(slot)];
  if (request_.cuts_experts) return group_[at(served.slots.place[at(slot)])];
  if (request_.n_crossings == 0) return 0;
  if (!near_[at(batch_.source[at(token)])]) return 1 + part(token);
  return batch_.token[at(token)] * 2 >= n_beside(token) ? request_.n_stages - 1 : 0;
}

int64_t Routes::crossing(const Slots& slots, int64_t begin, int64_t end, bool last) const {
  if (!request_.cuts_experts) return part(slots.token[at(begin)]);
  int64_t found = group_[at(slots.place[at(begin)])];
  for (int64_t i = begin + 1; i < end; ++i) {
    const int64_t group = group_[at(slots.place[at(i)])];
    found = last ? std::max(found, group) : std::min(found, group);
  }
  return found;
}

Order Routes::cross(const Ints& crossings, const Ints& peers) const {
  return by_crossing(crossings, peers, request_.n_crossings, places_.n_ranks());
}

std::vector<Expansion> Routes::expand(const Ints& source, const Ints& row) const {
  std::vector<Expansion> found(at(request_.n_stages));
  for (int64_t out = 0; out < length(served.slot_of_out); ++out) {
    const int64_t slot = served.slot_of_out[at(out)];
    Expansion& part = found[at(slot < 0 ? 0 : stage[at(slot)])];
    part.to.push_back(out);
    const bool of_slots = request_.mode == ExpertRequest::Mode::none;
    const int64_t item = slot < 0 ? -1 : of_slots ? slot : served.slot_row[at(slot)];
    part.source.push_back(item < 0 ? 0 : source[at(item)]);
    part.rows.push_back(item < 0 ? -1 : row[at(item)]);
  }
  return found;
}

void Routes::add_partial_sum(int64_t row, Terms* terms) const {
  if (request_.layout == ExpertRequest::Layout::rank) {  // the caller made it
    terms->add(0, row);
  } else {
    for (int64_t i = served.row_bounds[at(row)]; i < served.row_bounds[at(row + 1)]; ++i)
      terms->add(0, served.out_of_slot[at(i)]);
  }
  terms->end();
}

Route Routes::direct(bool last) const {
  Route found;
  const bool rows = request_.mode == ExpertRequest::Mode::rank;
  // This rank's items, and where those that leave stand in the order of their leaving.
  const int64_t n_items = rows ? length(home.rank_token) : home.slots.n();
  Ints away, crossings, peers;
  for (int64_t i = 0; i < n_items; ++i) {
    const int64_t rank = rows ? home.rank_rank[at(i)] : home.rank[at(i)];
    if (rank == me_) continue;
    const int64_t begin = rows ? home.rank_begin[at(i)] : i;
    const int64_t end = rows ? home.rank_begin[at(i + 1)] : i + 1;
    away.push_back(i);
    peers.push_back(rank);
    crossings.push_back(crossing(home.slots, begin, end, last));
  }
  const Order leave = cross(crossings, peers);
  Ints source(at(n_items)), position(at(n_items));  // of the sum of each item at home
  for (size_t i = 0; i < away.size(); ++i) {
    source[at(away[i])] = 1;
    position[at(away[i])] = leave.position[i];
  }
  for (const int64_t i : leave.items) {
    const int64_t item = away[at(i)];
    found.leg.index.push_back(rows ? home.rank_token[at(item)]
                                   : home.slots.token[at(item)] - batch_.first());
  }
  found.leg.sends = leave.counts;

  // What comes to this rank's experts.
  const int64_t n_come = rows ? length(served.row_token) : served.slots.n();
  Ints from(at(n_come)), row(at(n_come)), foreign, own;
  crossings.clear();
  peers.clear();
  for (int64_t i = 0; i < n_come; ++i) {
    const int64_t begin = rows ? served.row_bounds[at(i)] : i;
    const int64_t end = rows ? served.row_bounds[at(i + 1)] : i + 1;
    const int64_t token = served.slots.token[at(begin)];
    row[at(i)] = batch_.token[at(token)];
    if (batch_.source[at(token)] == me_) {
      own.push_back(i);
      continue;
    }
    from[at(i)] = 1;
    foreign.push_back(i);
    peers.push_back(batch_.source[at(token)]);
    crossings.push_back(crossing(served.slots, begin, end, last));
  }
  const Order come = cross(crossings, peers);
  for (size_t i = 0; i < foreign.size(); ++i) row[at(foreign[i])] = come.position[i];
  found.leg.receives = come.counts;
  found.expansions = expand(from, row);

  // Back.
  size_t next = 0;
  for (const Ints& counts : come.counts) {
    const auto n = at(std::accumulate(counts.begin(), counts.end(), int64_t{0}));
    Terms sums;
    Ints out_rows;
    for (const size_t end = next + n; next < end; ++next) {
      const int64_t item = foreign[at(come.items[next])];
      if (rows)
        add_partial_sum(item, &sums);
      else
        out_rows.push_back(served.out_of_slot[at(item)]);
    }
    if (rows)
      found.leaving.push_back(std::move(sums));
    else
      found.leaving_rows.push_back(std::move(out_rows));
  }
  Terms of_ranks, of_hosts, of_tokens;
  size_t n_own = 0;
  for (int64_t i = 0; i < n_items; ++i)
    if (source[at(i)] == 0)
      position[at(i)] = rows ? static_cast<int64_t>(n_own++) : served.out_of_slot[at(own[n_own++])];
  if (rows) {
    for (const int64_t item : own) add_partial_sum(item, &found.own);
  } else {
    for (int64_t run = 0; run < length(home.rank_token); ++run) {
      for (int64_t i = home.rank_begin[at(run)]; i < home.rank_begin[at(run + 1)]; ++i)
        of_ranks.add(source[at(i)], position[at(i)]);
      of_ranks.end();
    }
    found.home.push_back(std::move(of_ranks));
  }
  int64_t run = 0;
  for (const int64_t n_ranks : home.host_terms) {
    for (const int64_t end = run + n_ranks; run < end; ++run)
      of_hosts.add(rows ? source[at(run)] : 0, rows ? position[at(run)] : run);
    of_hosts.end();
  }
  int64_t sum = 0;
  for (const int64_t n_hosts : home.hosts_a_token) {
    for (const int64_t end = sum + n_hosts; sum < end; ++sum) of_tokens.add(0, sum);
    of_tokens.end();
  }
  found.home.push_back(std::move(of_hosts));
  found.home.push_back(std::move(of_tokens));
  return found;
}

}  // namespace pycomm::cpu
