// SipHash-2-4, a keyed hash made for short messages; here it proves to a peer that both know the
// job's secret. Source: Aumasson & Bernstein, "SipHash: a fast short-input PRF", INDOCRYPT 2012.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace pycomm {

using Secret = std::array<uint64_t, 2>;

// nbytes must be a multiple of 8: all our messages are.
inline uint64_t siphash(const Secret& key, const void* data, size_t nbytes) {
  uint64_t v0 = key[0] ^ 0x736f6d6570736575ull, v1 = key[1] ^ 0x646f72616e646f6dull;
  uint64_t v2 = key[0] ^ 0x6c7967656e657261ull, v3 = key[1] ^ 0x7465646279746573ull;
  const auto round = [&] {
    v0 += v1;
    v1 = std::rotl(v1, 13);
    v1 ^= v0;
    v0 = std::rotl(v0, 32);
    v2 += v3;
    v3 = std::rotl(v3, 16);
    v3 ^= v2;
    v0 += v3;
    v3 = std::rotl(v3, 21);
    v3 ^= v0;
    v2 += v1;
    v1 = std::rotl(v1, 17);
    v1 ^= v2;
    v2 = std::rotl(v2, 32);
  };
  const auto absorb = [&](uint64_t word) {
    v3 ^= word;
    round();
    round();
    v0 ^= word;
  };
  for (size_t i = 0; i + 8 <= nbytes; i += 8) {
    uint64_t word;
    std::memcpy(&word, static_cast<const char*>(data) + i, 8);
    absorb(word);
  }
  absorb(static_cast<uint64_t>(nbytes) << 56);
  v2 ^= 0xff;
  for (int i = 0; i < 4; ++i) round();
  return v0 ^ v1 ^ v2 ^ v3;
}

}  // namespace pycomm
