#include "core/fingerprint.h"

#include <cstring>

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
  std::string text = std::string(name_of(collective)) + " #" + std::to_string(sequence) + " (";
  if (reduces(collective)) text += std::string(name_of(op)) + ", ";
  if (collective != Collective::barrier)
    text += std::string(name_of(dtype)) + ", " + std::to_string(numel) + " elements";
  if (rooted(collective)) text += ", root " + std::to_string(root);
  if (has_counts) text += ", uneven counts";
  if (algorithm[0] != '\0')
    text += std::string(", ") + std::string(algorithm, strnlen(algorithm, sizeof(algorithm)));
  return text + ")";
}

std::string describe_mismatch(const Fingerprint& mine, const Fingerprint& theirs) {
  return "collective mismatch: rank " + std::to_string(mine.rank) + " called " + mine.describe() +
         ", rank " + std::to_string(theirs.rank) + " called " + theirs.describe() +
         ". Every rank must make the same calls in the same order; the group cannot be used any "
         "more.";
}

}  // namespace pycomm
