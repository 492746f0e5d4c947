#include "core/fingerprint.h"

#include <cstring>
#include <vector>

namespace pycomm {

uint64_t fnv1a(const void* data, size_t nbytes, uint64_t seed) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  uint64_t hash = seed;
  for (size_t i = 0; i < nbytes; ++i) hash = (hash ^ bytes[i]) * 0x100000001b3ull;
  return hash;
}

uint64_t Fingerprint::hash() const {
  // Word by word (8 multiplications): this runs in every call, and a board line is one cache line.
  uint64_t words[8];
  static_assert(sizeof(words) == sizeof(Fingerprint));
  std::memcpy(words, this, sizeof(words));
  words[0] = magic;  // leaves `rank` out
  uint64_t hash = 0xcbf29ce484222325ull;
  for (int i = 0; i < 6;
       ++i) {  // the last two words are the algorithm's name; algorithm_hash covers it
    hash = (hash ^ words[i]) * 0x9e3779b97f4a7c15ull;
    hash ^= hash >> 29;
  }
  return hash;
}

std::string Fingerprint::describe() const {
  std::vector<std::string> parts;
  if (reduces(collective)) parts.push_back(name_of(op));
  if (collective != Collective::barrier) {
    parts.push_back(name_of(dtype));
    parts.push_back(std::to_string(numel) + " elements");
  }
  if (rooted(collective)) parts.push_back("root " + std::to_string(root));
  if (has_counts) parts.push_back("uneven counts");
  if (wire != Wire::none) parts.push_back(std::string("wire ") + name_of(wire));
  if (algorithm[0] != '\0') parts.emplace_back(algorithm, strnlen(algorithm, sizeof(algorithm)));
  std::string text = std::string(name_of(collective)) + " #" + std::to_string(sequence);
  for (size_t i = 0; i < parts.size(); ++i) text += (i == 0 ? " (" : ", ") + parts[i];
  return parts.empty() ? text : text + ")";
}

std::string describe_mismatch(const Fingerprint& mine, const Fingerprint& theirs) {
  const std::string here = mine.describe(), there = theirs.describe();
  const bool counts_alone = here == there && mine.counts_hash != theirs.counts_hash;
  return "collective mismatch: rank " + std::to_string(mine.rank) + " called " + here + ", rank " +
         std::to_string(theirs.rank) + " called " + there +
         (counts_alone ? " with other counts" : "") +
         ". Every rank must make the same calls in the same order; the group cannot be used any "
         "more.";
}

}  // namespace pycomm
