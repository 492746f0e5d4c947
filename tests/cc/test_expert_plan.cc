// The tables of an expert exchange, followed for all ranks at once with numbers in place of rows:
// every token reaches its experts in order, and their outputs add up where it came from, in every
// mode, cut and number of crossings.
#include <algorithm>
#include <random>
#include <string>
#include <utility>

#include "core/status.h"
#include "cpu/expert_plan.h"
#include "testing.h"

using namespace pycomm;
using namespace pycomm::cpu;
using Mode = ExpertRequest::Mode;

namespace {

size_t at(int64_t i) { return static_cast<size_t>(i); }
int64_t length(const Ints& of) { return static_cast<int64_t>(of.size()); }
void append(Ints& to, const Ints& from) { to.insert(to.end(), from.begin(), from.end()); }

// experts[r]: those that rank r holds, in its order.
ExpertPlaces places_of(int64_t rank, const Ints& host_of, const std::vector<Ints>& experts,
                       int64_t n_experts) {
  Ints n_held, rank_of, local_of, expert_of;
  for (const Ints& held : experts) n_held.push_back(length(held));
  const int64_t n_hosts = *std::max_element(host_of.begin(), host_of.end()) + 1;
  for (int64_t host = 0; host < n_hosts; ++host)
    for (int64_t each = 0; each < length(host_of); ++each)
      for (int64_t local = 0; host_of[at(each)] == host && local < n_held[at(each)]; ++local) {
        rank_of.push_back(each);
        local_of.push_back(local);
        expert_of.push_back(experts[at(each)][at(local)]);
      }
  return {rank, n_experts, host_of, n_held, rank_of, local_of, expert_of};
}

// Rows of one rank, by crossing and peer, to each peer: what arrives, by crossing and sender.
std::vector<Ints> all_to_all(const std::vector<Ints>& rows, const std::vector<const Counts*>& sends,
                             const std::vector<const Counts*>& receives) {
  const size_t n = rows.size();
  std::vector<Ints> arrived(n);
  std::vector<size_t> next(n, 0);
  for (size_t crossing = 0; crossing < sends[0]->size(); ++crossing) {
    std::vector<std::vector<Ints>> pieces(n, std::vector<Ints>(n));  // [to][from]
    for (size_t from = 0; from < n; ++from)
      for (size_t to = 0; to < n; ++to) {
        const int64_t count = (*sends[from])[crossing][to];
        EXPECT_EQ(count, (*receives[to])[crossing][from]);
        for (int64_t i = 0; i < count; ++i) pieces[to][from].push_back(rows[from].at(next[from]++));
      }
    for (size_t to = 0; to < n; ++to)
      for (const Ints& piece : pieces[to]) append(arrived[to], piece);
  }
  for (size_t from = 0; from < n; ++from) EXPECT_EQ(next[from], rows[from].size());
  return arrived;
}

Ints sums(const Terms& terms, const std::vector<const Ints*>& sources) {
  Ints found;
  for (size_t i = 0; i + 1 < terms.offsets.size(); ++i) {
    int64_t sum = 0;
    for (int64_t j = terms.offsets[i]; j < terms.offsets[i + 1]; ++j)
      sum += sources.at(at(terms.source.at(at(j))))->at(at(terms.rows.at(at(j))));
    found.push_back(sum);
  }
  return found;
}

struct Case {
  Ints host_of, n_tokens;
  std::vector<Ints> experts;
  int64_t n_experts, top_k;
  ExpertRequest request;
};

struct Exchange {
  explicit Exchange(const Case& of, std::mt19937& random) : of(of), n(length(of.host_of)) {
    for (int64_t rank = 0; rank < n; ++rank) {
      begin.push_back(n_all);
      n_all += of.n_tokens[at(rank)];
    }
    std::vector<int32_t> every(at(of.n_experts));
    for (size_t e = 0; e < every.size(); ++e) every[e] = static_cast<int32_t>(e);
    for (int64_t t = 0; t < n_all; ++t) {
      std::shuffle(every.begin(), every.end(), random);
      ids.insert(ids.end(), every.begin(), every.begin() + of.top_k);
    }
    for (int64_t rank = 0; rank < n; ++rank) {
      places.push_back(places_of(rank, of.host_of, of.experts, of.n_experts));
      tables.push_back(expert_tables(places.back(), of.request, ids, of.n_tokens, of.top_k));
    }
  }

  // The oracle: the tokens of each of a rank's experts, and the sum over a token's slots.
  bool goes_to(int64_t token, int64_t expert, int64_t rank) const {
    const auto* const first = &ids[at(token * of.top_k)];
    if (std::find(first, first + of.top_k, expert) == first + of.top_k) return false;
    const auto& replicas = places[0].of_expert[at(expert)];
    // Of ranks that begin there the last: those before it have no tokens.
    const int64_t source = std::upper_bound(begin.begin(), begin.end(), token) - begin.begin() - 1;
    const int64_t turn = source + token - begin[at(source)];
    return places[0].rank_of[at(replicas[at(turn % static_cast<int64_t>(replicas.size()))])] ==
           rank;
  }
  static int64_t output(int64_t token, int64_t expert) { return 1 + 1009 * token + 7 * expert; }

  void run() {
    const bool hosts = of.request.mode == Mode::host;
    std::vector<Ints> own(at(n)), packed(at(n));
    std::vector<const Counts*> sends, receives;
    for (int64_t rank = 0; rank < n; ++rank) {
      for (int64_t t = 0; t < of.n_tokens[at(rank)]; ++t)
        own[at(rank)].push_back(begin[at(rank)] + t);
      const Leg& leg = tables[at(rank)].out.leg;
      for (const int64_t row : leg.index) packed[at(rank)].push_back(own[at(rank)].at(at(row)));
      sends.push_back(&leg.sends);
      receives.push_back(&leg.receives);
    }
    const auto arrived = all_to_all(packed, sends, receives);
    std::vector<Ints> outputs(at(n));  // of experts
    for (int64_t rank = 0; rank < n; ++rank) {
      std::vector<const Ints*> sources{&own[at(rank)], &arrived[at(rank)]};
      if (hosts) {
        sources.clear();
        const Ints& members = places[0].members[at(of.host_of[at(rank)])];
        for (const std::vector<Ints>* kind : {&std::as_const(own), &arrived})
          for (const int64_t member : members) sources.push_back(&(*kind)[at(member)]);
        for (size_t i = 0; i < members.size(); ++i)
          EXPECT_EQ(tables[at(rank)].out.on_host->arrived[i], length(arrived[at(members[i])]));
      }
      Ints got(tables[at(rank)].slot_of_out.size(), -2), expected;
      for (const Expansion& stage : tables[at(rank)].out.expansions)
        for (size_t i = 0; i < stage.to.size(); ++i)
          got.at(at(stage.to[i])) =
              stage.rows[i] < 0 ? -1 : sources.at(at(stage.source[i]))->at(at(stage.rows[i]));
      for (const int64_t expert : of.experts[at(rank)]) {
        for (int64_t t = 0; t < n_all; ++t)
          if (goes_to(t, expert, rank)) {
            expected.push_back(t);
            outputs[at(rank)].push_back(output(t, expert));
          }
        while (length(expected) % of.request.align != 0) expected.push_back(-1);
        outputs[at(rank)].resize(expected.size(), -1'000'000'000);  // in no sum
      }
      EXPECT_TRUE(got == expected);
    }
    back(outputs);
  }

  void back(const std::vector<Ints>& outputs) {
    const bool hosts = of.request.mode == Mode::host;
    std::vector<const Route*> routes;
    std::vector<const Counts*> sends, receives;
    std::vector<Ints> partial(at(n)), leaving(at(n)), own(at(n));
    for (int64_t rank = 0; rank < n; ++rank) {
      const ExpertTables& table = tables[at(rank)];
      const Route& route = table.back ? *table.back : table.out;
      routes.push_back(&route);
      sends.push_back(&route.leg.receives);
      receives.push_back(&route.leg.sends);
      own[at(rank)] = sums(route.own, {&outputs[at(rank)]});
      partial[at(rank)] = own[at(rank)];
      for (const Terms& terms : route.leaving)
        append(hosts ? partial[at(rank)] : leaving[at(rank)], sums(terms, {&outputs[at(rank)]}));
      for (const Ints& rows : route.leaving_rows)
        for (const int64_t row : rows) leaving[at(rank)].push_back(outputs[at(rank)].at(at(row)));
    }
    for (int64_t rank = 0; hosts && rank < n; ++rank) {
      std::vector<const Ints*> sources;
      for (const int64_t member : places[0].members[at(of.host_of[at(rank)])])
        sources.push_back(&partial[at(member)]);
      for (const Terms& terms : routes[at(rank)]->on_host->gateway)
        append(leaving[at(rank)], sums(terms, sources));
      own[at(rank)] = sums(routes[at(rank)]->on_host->own, sources);
    }
    const auto returned = all_to_all(leaving, sends, receives);
    for (int64_t rank = 0; rank < n; ++rank) {
      const bool slots = of.request.mode == Mode::none;
      std::vector<const Ints*> sources{slots ? &outputs[at(rank)] : &own[at(rank)],
                                       &returned[at(rank)]};
      Ints level;
      for (const Terms& terms : routes[at(rank)]->home) {
        level = sums(terms, sources);
        sources = {&level};
      }
      Ints expected;
      for (int64_t t = begin[at(rank)]; t < begin[at(rank)] + of.n_tokens[at(rank)]; ++t) {
        expected.push_back(0);
        for (int64_t k = 0; k < of.top_k; ++k)
          expected.back() += output(t, ids[at(t * of.top_k + k)]);
      }
      EXPECT_TRUE(level == expected);
    }
  }

  const Case& of;
  const int64_t n;
  int64_t n_all = 0;
  Ints begin;
  std::vector<int32_t> ids;
  std::vector<ExpertPlaces> places;
  std::vector<ExpertTables> tables;
};

}  // namespace

TEST(tokens_reach_their_experts_and_come_back) {
  std::mt19937 random(1);
  const std::vector<Ints> layouts{{0}, {0, 0, 0}, {0, 1}, {0, 1, 0, 0}, {0, 1, 2, 0, 1}};
  for (const Ints& host_of : layouts)
    for (const Mode mode : {Mode::none, Mode::rank, Mode::host})
      for (const bool cuts_experts : {false, true})
        for (const int64_t n_crossings : {1, 3})
          for (const bool replicas : {false, true}) {
            const int64_t n = length(host_of), n_experts = 7;
            Case of{host_of, {}, std::vector<Ints>(host_of.size()), n_experts, 3, {}};
            for (int64_t rank = 0; rank < n; ++rank)
              of.n_tokens.push_back(static_cast<int64_t>(random() % 9));
            for (int64_t e = 0; e < n_experts; ++e) {
              const int64_t first = static_cast<int64_t>(random()) % n;
              of.experts[at(first)].push_back(e);
              if (replicas && n > 1 && e % 2 == 0) of.experts[at((first + 1) % n)].push_back(e);
            }
            const bool crosses =
                mode == Mode::host ? *std::max_element(host_of.begin(), host_of.end()) > 0 : n > 1;
            of.request.mode = mode;
            of.request.cuts_experts = cuts_experts;
            of.request.n_crossings = crosses ? n_crossings : 0;
            of.request.n_stages = cuts_experts ? n_crossings : crosses ? n_crossings + 2 : 1;
            of.request.align = replicas ? 4 : 1;
            Exchange(of, random).run();
          }
}

TEST(capacity_is_kept_or_refused_with_the_count_that_it_takes) {
  const ExpertPlaces places = places_of(0, {0, 0}, {{0}, {1, 2}}, 3);
  const std::vector<int32_t> ids{0, 1, 0, 1, 0, 2};  // of two tokens of rank 0, one of rank 1
  const Ints n_tokens{2, 1};
  ExpertRequest request;
  request.mode = Mode::rank;
  request.n_crossings = 1;
  request.n_stages = 3;
  request.max_tokens = 2;
  std::string text;
  try {
    expert_tables(places, request, ids, n_tokens, 2);
  } catch (const Error& error) {
    text = error.what();
  }
  EXPECT_EQ(
      text,
      "expert 0 on rank 0 gets 3 tokens, 1 slots too many in all; max_tokens is 2; raise it to "
      "3, or pass drop=True to leave them out and count them");
  request.drop = true;
  const ExpertTables kept = expert_tables(places, request, ids, n_tokens, 2);
  EXPECT_EQ(kept.dropped, 1);
  EXPECT_TRUE(kept.expert_counts == Ints{2});
}
