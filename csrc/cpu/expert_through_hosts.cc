#include <utility>

#include "cpu/expert_routes.h"

namespace pycomm::cpu {

Route Routes::through_hosts(bool last) const {
  Route found;
  const int64_t host = places_.host(), n_crossings = request_.n_crossings;
  const Ints& members = places_.members[at(host)];
  const int64_t n_members = length(members);
  OnHost on_host;
  for (const int64_t rank : members) on_host.staged.push_back(batch_.n_of(rank));
  on_host.arrived.resize(at(n_members));
  on_host.partials.resize(at(n_members));
  on_host.gateway.resize(at(n_crossings));
  found.leaving.resize(at(n_crossings));

  // The tokens that this host's experts need: those of its own ranks first, then crossing by
  // crossing; of one number in order.
  Ints begins;  // of each one's slots, and the end
  for (int64_t i = 0; i < seen_.n(); ++i)
    if (i == 0 || seen_.token[at(i)] != seen_.token[at(i - 1)]) begins.push_back(i);
  begins.push_back(seen_.n());
  std::vector<Ints> numbered(at(1 + n_crossings));
  for (int64_t i = 0; i + 1 < length(begins); ++i) {
    const bool is_near = near_[at(batch_.source[at(seen_.token[at(begins[at(i)])])])];
    const int64_t number =
        is_near ? 0 : 1 + crossing(seen_, begins[at(i)], begins[at(i + 1)], last);
    numbered[at(number)].push_back(i);
  }
  Ints row_of(at(batch_.n()));
  for (int64_t row = 0; row < length(served.row_token); ++row)
    row_of[at(served.row_token[at(row)])] = row;
  Ints source(served.row_token.size()), rows(served.row_token.size());
  found.leg.receives.assign(at(n_crossings), Ints(at(places_.n_ranks())));
  for (int64_t number = 0; number <= n_crossings; ++number)
    for (const int64_t i : numbered[at(number)]) {
      const int64_t begin = begins[at(i)], end = begins[at(i + 1)];
      const int64_t token = seen_.token[at(begin)], from = batch_.source[at(token)];
      // There: source q is what rank q of the host staged of its own, source n_members + q what
      // it holds as a gateway.
      const int64_t holder = number > 0 ? places_.gateway(from, host) : from;
      const int64_t via = places_.local_index[at(holder)];
      const int64_t held = number > 0 ? on_host.arrived[at(via)]++ : batch_.token[at(token)];
      Terms* sums = nullptr;  // this rank's over the host's partial sums
      if (holder == me_) sums = number > 0 ? &on_host.gateway[at(number - 1)] : &on_host.own;
      if (holder == me_ && number > 0) ++found.leg.receives[at(number - 1)][at(from)];
      int64_t before = -1;
      for (int64_t slot = begin; slot < end; ++slot) {  // the ranks that need it, ascending
        const int64_t rank = places_.rank_of[at(seen_.place[at(slot)])];
        if (rank == std::exchange(before, rank)) continue;
        const int64_t local = places_.local_index[at(rank)];
        const int64_t position = on_host.partials[at(local)]++;
        if (sums != nullptr) sums->add(local, position);
        if (rank != me_) continue;
        const int64_t row = row_of[at(token)];
        source[at(row)] = number > 0 ? n_members + via : via;
        rows[at(row)] = held;
        add_partial_sum(row, number > 0 ? &found.leaving[at(number - 1)] : &found.own);
      }
      if (sums != nullptr) sums->end();
    }
  found.expansions = expand(source, rows);

  // This rank's tokens to the gateways of other hosts, and the sums that come back.
  Ints away, crossings, peers, hosts_row(home.host_token.size());
  int64_t n_own = 0;
  for (int64_t i = 0; i < length(home.host_token); ++i) {
    if (home.host_host[at(i)] == host) {
      hosts_row[at(i)] = n_own++;
      continue;
    }
    away.push_back(i);
    peers.push_back(places_.gateway(me_, home.host_host[at(i)]));
    crossings.push_back(
        crossing(home.slots, home.host_begin[at(i)], home.host_begin[at(i + 1)], last));
  }
  const Order leave = cross(crossings, peers);
  for (const int64_t i : leave.items) found.leg.index.push_back(home.host_token[at(away[at(i)])]);
  found.leg.sends = leave.counts;
  for (size_t i = 0; i < away.size(); ++i) hosts_row[at(away[i])] = leave.position[i];
  Terms of_tokens;
  int64_t next = 0;
  for (const int64_t n_hosts : home.hosts_a_token) {
    for (const int64_t end = next + n_hosts; next < end; ++next)
      of_tokens.add(home.host_host[at(next)] == host ? 0 : 1, hosts_row[at(next)]);
    of_tokens.end();
  }
  found.home.push_back(std::move(of_tokens));
  found.on_host = std::move(on_host);
  return found;
}

}  // namespace pycomm::cpu
