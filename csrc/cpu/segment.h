// Segment: the shared memory of one group's ranks on one host. One mapping, laid out here and
// nowhere else:
//   header | board entry per rank | transfer records per ordered pair | ring per ordered pair and
//   lane | board's large slots per rank | stage per rank
// What ranks write by turns and others read is larger than the own caches of two cores: a line has
// then left both for the shared cache when it is written again, which takes a third of the time.
// Anonymous (memfd): pages cost memory once they are touched, and everything goes with the last
// process.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>

#include "core/fingerprint.h"
#include "core/status.h"
#include "cpu/posix.h"

namespace pycomm::cpu {

constexpr size_t kBoardBytes = 16 * 1024;  // a rank's largest contribution to a native collective
constexpr size_t kStageSlot = 64 * 1024;   // a block of a large collective (staged.h)
constexpr size_t kInlineBytes = 48;        // rides in the flag's own cache line
constexpr size_t kSmallBytes = 2 * 1024;   // above it fewer collectives ahead with many ranks
constexpr size_t kProbeLines = 32, kWordsPerLine = 8;
constexpr uint32_t kBoardSlots = 16;                  // how far ahead a rank may be
constexpr uint32_t kAnnouncements = 2 * kBoardSlots;  // so those that are compared are still there

// A rank's contribution to a native collective (board.h).
struct alignas(64) BoardLine {
  std::atomic<uint32_t> sequence{0};  // published last; counts native collectives from 1
  uint32_t pad = 0;
  std::atomic<uint64_t> hash{0};  // Fingerprint::hash()
  std::byte payload[kInlineBytes];
};
static_assert(sizeof(BoardLine) == 64);

// What a rank last entered; read only by ranks that have waited for a while, to say what the others
// are doing.
struct alignas(64) Announcement {
  std::atomic<uint64_t> version{0};  // odd while it is written
  std::atomic<uint64_t> words[sizeof(Fingerprint) / sizeof(uint64_t)];
};

struct alignas(128) BoardEntry {  // so that the transfer records behind them are aligned
  BoardLine lines[kBoardSlots];
  alignas(64) std::atomic<uint32_t> direct_done{0};  // the last direct collective (direct.h) in
                                                     // which the rank has done its part
  alignas(64) std::atomic<uint64_t> shared{0};   // a broadcast's blocks on their way to this rank
  alignas(64) std::atomic<uint32_t> writing{0};  // it is writing into another rank's memory
  alignas(64) std::atomic<uint32_t> closed{0};   // the rank left the group
  alignas(64) std::atomic<uint64_t> given{0};    // blocks in its stage, over all collectives
  alignas(64) std::atomic<uint64_t> reduced{0};  // (staged.h), of which its own piece is reduced
  alignas(64) std::atomic<uint64_t> taken{0};    // blocks of the others that it needs no more
  // Lines to time the reading of (probe.h).
  alignas(64) std::atomic<uint64_t> probe[kProbeLines * kWordsPerLine];
  Announcement announcements[kAnnouncements];  // by the collective's sequence number
  alignas(64) std::byte small[kBoardSlots][kSmallBytes];
};

// Single producer, single consumer. head and tail count bytes from the start; tail - head <= the
// ring's size.
struct RingControl {
  alignas(64) std::atomic<uint64_t> tail{0};  // by the producer: bytes before it are complete
  alignas(64) std::atomic<uint64_t> head{0};  // by the consumer: bytes before it may be overwritten
};

// Where memory lies in its rank's address space; 0: nowhere.
struct Place {
  uint64_t address = 0;
  uint64_t in_heap = 0;  // 1: every rank of the host can map it (heap.h)
  Place at(uint64_t offset) const { return {address + offset, in_heap}; }
};

// One large message between two ranks (rendezvous.h). `use` counts the messages a record has
// carried.
struct alignas(128) TransferRecord {
  std::atomic<uint64_t> state{0};              // use << 2 | offered, accepted or withdrawn
  Place place;                                 // where the receiver wants it; with `accepted`
  std::atomic<uint64_t> unusual{0};            // of record 0: what the receiver wants otherwise
  std::atomic<uint64_t> posted{0};             // of record 0: the receives of a tag (asked.h)
  alignas(64) std::atomic<uint64_t> taken{0};  // blocks that one side or the other moves
  std::atomic<uint64_t> sent{0};               // use whose blocks the sender has moved
  std::atomic<uint64_t> received{0};           // use that is over: the record is free
};
constexpr uint32_t kTransfers = 4;  // per ordered pair; more messages wait for one

struct SegmentHeader {
  std::atomic<uint32_t> poisoned{
      0};  // 0 sound, 1 being written, 2 `code` and `text` say why every operation fails
  int32_t code = 0;
  char text[2000] = {};
};

constexpr int kLanes = 2;  // 0 collectives, 1 point-to-point: neither waits behind the other
enum Lane : int { kCollectiveLane = 0, kMessageLane = 1 };

class Segment {
 public:
  explicit Segment(int n_ranks) : n_ranks_(n_ranks) {}
  static size_t ring_bytes(int n_ranks) {
    // All of a lane's together within the cache that cores share; 64 KiB keeps a segment in flight.
    const auto n = static_cast<size_t>(n_ranks);
    size_t bytes = size_t{2} << 20;
    while (n * (n - 1) * bytes > size_t{32} << 20 && bytes > size_t{64} << 10) bytes /= 2;
    return bytes;
  }
  // Of the board, for contributions of more than kSmallBytes. A power of two, since sequence
  // numbers wrap.
  static uint32_t n_large_slots(int n_ranks) {
    const size_t share = (size_t{8} << 20) / static_cast<size_t>(n_ranks) / kBoardBytes;
    return static_cast<uint32_t>(std::bit_floor(std::clamp<size_t>(share, 2, 128)));
  }
  static size_t stage_bytes(int n_ranks) {
    const size_t share = (size_t{8} << 20) / static_cast<size_t>(n_ranks);
    return std::clamp(share, size_t{256} << 10, size_t{2} << 20) / kStageSlot * kStageSlot;
  }
  size_t nbytes() const {
    return stages_offset() + static_cast<size_t>(n_ranks_) * stage_bytes(n_ranks_);
  }
  uint32_t n_large_slots() const { return n_large_slots(n_ranks_); }
  void attach(Mapping mapping) { mapping_ = std::move(mapping); }

  SegmentHeader& header() const { return *reinterpret_cast<SegmentHeader*>(mapping_.data()); }
  BoardEntry& board(int index) const {
    return *reinterpret_cast<BoardEntry*>(mapping_.data() + kHeaderBytes +
                                          static_cast<size_t>(index) * sizeof(BoardEntry));
  }
  RingControl& ring_control(int from, int to, Lane lane) const {
    return *reinterpret_cast<RingControl*>(ring(from, to, lane));
  }
  std::byte* ring_data(int from, int to, Lane lane) const {
    return ring(from, to, lane) + sizeof(RingControl);
  }
  size_t ring_bytes() const { return ring_bytes(n_ranks_); }
  // Room for nbytes. A small contribution lies elsewhere in its slot each time round.
  std::byte* large_slot(int index, uint32_t sequence, size_t nbytes) const {
    const uint32_t n = n_large_slots();
    const size_t used = (nbytes + 63) / 64 * 64, round = sequence / n % (kBoardBytes / used);
    return mapping_.data() + large_slots_offset() +
           (static_cast<size_t>(index) * n + sequence % n) * kBoardBytes + round * used;
  }
  std::byte* stage(int index) const {
    return mapping_.data() + stages_offset() + static_cast<size_t>(index) * stage_bytes(n_ranks_);
  }
  TransferRecord& transfer(int from, int to, uint32_t slot) const {
    const auto n = static_cast<size_t>(n_ranks_);
    const size_t index = (static_cast<size_t>(from) * n + static_cast<size_t>(to)) * kTransfers;
    return reinterpret_cast<TransferRecord*>(mapping_.data() + kHeaderBytes +
                                             n * sizeof(BoardEntry))[index + slot];
  }

 private:
  static constexpr size_t kHeaderBytes = 4096;
  static_assert(sizeof(SegmentHeader) <= kHeaderBytes);
  size_t transfers_nbytes() const {
    const auto n = static_cast<size_t>(n_ranks_);
    return n * n * kTransfers * sizeof(TransferRecord);
  }
  size_t stages_offset() const {
    return large_slots_offset() + static_cast<size_t>(n_ranks_) * n_large_slots() * kBoardBytes;
  }
  size_t large_slots_offset() const {
    const auto n = static_cast<size_t>(n_ranks_);
    return kHeaderBytes + n * sizeof(BoardEntry) + transfers_nbytes() +
           kLanes * n * n * ring_stride();
  }
  size_t ring_stride() const { return sizeof(RingControl) + ring_bytes(n_ranks_); }
  std::byte* ring(int from, int to, Lane lane) const {
    const auto n = static_cast<size_t>(n_ranks_);
    const size_t index =
        (static_cast<size_t>(lane) * n + static_cast<size_t>(from)) * n + static_cast<size_t>(to);
    return mapping_.data() + kHeaderBytes + n * sizeof(BoardEntry) + transfers_nbytes() +
           index * ring_stride();
  }

  const int n_ranks_;
  Mapping mapping_;
};

}  // namespace pycomm::cpu
