#include "cpu/expert_plan.h"

#include <algorithm>

#include "cpu/expert_batch.h"
#include "cpu/expert_routes.h"

namespace pycomm::cpu {
namespace {

// [rows, top_k]: each row's slots, then -1.
Ints slots_of_rows(const Served& served, int64_t top_k) {
  Ints table(at(length(served.row_token) * top_k), -1);
  for (int64_t i = 0; i < served.slots.n(); ++i) {
    const int64_t row = served.slot_row[at(i)];
    table[at(row * top_k + i - served.row_bounds[at(row)])] = i;
  }
  return table;
}

// The way of one value a slot. home_weights: the index of each of this rank's slots among its own.
Leg scalars(const Batch& batch, const Routes& routes, const Ints& home_weights) {
  Leg leg;
  const int64_t n_ranks = batch.places.n_ranks();
  const Order order = by_crossing(Ints(home_weights.size()), routes.home.rank, 1, n_ranks);
  for (const int64_t item : order.items) leg.index.push_back(home_weights[at(item)]);
  leg.sends = order.counts;
  leg.receives.assign(1, Ints(at(n_ranks)));
  for (const int64_t token : routes.served.slots.token)
    ++leg.receives[0][at(batch.source[at(token)])];
  return leg;
}

}  // namespace

ExpertTables expert_tables(const ExpertPlaces& places, const ExpertRequest& request,
                           std::span<const int32_t> ids, std::span<const int64_t> n_tokens,
                           int64_t top_k) {
  const Batch batch(places, request, ids, n_tokens, top_k);
  const Routes routes(batch, request);
  const Served& served = routes.served;
  const Slots &mine = served.slots, &home = routes.home.slots;
  const int64_t n_local = length(served.expert_counts);
  ExpertTables found;
  found.expert_counts = served.expert_counts;
  found.expert_offsets = served.expert_offsets;
  found.stage_counts.resize(at(request.n_stages * n_local));
  for (int64_t i = 0; i < mine.n(); ++i) {
    ++found.stage_counts[at(routes.stage[at(i)] * n_local + served.local[at(i)])];
    found.slot_weights.push_back(mine.token[at(i)] * top_k + mine.column[at(i)]);
  }
  for (int64_t i = 0; i < home.n(); ++i)
    found.home_weights.push_back((home.token[at(i)] - batch.first()) * top_k + home.column[at(i)]);
  found.dropped = batch.lost;
  found.slot_of_out = served.slot_of_out;
  found.slot_expert = served.local;
  if (request.layout == ExpertRequest::Layout::rank)
    found.slot_of_row = slots_of_rows(served, top_k);
  found.scalars = scalars(batch, routes, found.home_weights);
  found.out = routes.route(false);
  if (request.cuts_experts) found.back = routes.route(true);
  const Ints& hosts = routes.home.hosts_a_token;
  found.every_token_goes = std::find(hosts.begin(), hosts.end(), 0) == hosts.end();
  return found;
}

}  // namespace pycomm::cpu
