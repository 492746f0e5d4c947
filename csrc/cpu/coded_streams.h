// CodedStreams: what a program's links send and receive in wire form (core/wire.h), a segment at a
// time, so that coding, sending and reducing overlap. A value that goes to several ranks is coded
// once, where it comes to stand (seal), and kept: all get the same bytes, and this rank keeps what
// those decode to. Thread safety: none; the interpreter's. Reused from launch to launch.
#pragma once

#include <memory>
#include <vector>

#include "core/engine.h"
#include "cpu/channel.h"

namespace pycomm::cpu {

constexpr uint64_t kCodedSegmentBytes = kWireSegment * sizeof(float);

class CodedStreams {
 public:
  void begin(const Launch& launch, size_t n_links);

  // Sends of `values`, the step's source, from byte *done on; raises *done by whole segments, the
  // last maybe short. Returns the coded bytes that the channel took. REQUIRES: *done < limit, both
  // whole segments or the end of the chunk.
  size_t send(const Launch& launch, size_t link, Channel& channel, const Step& step,
              const std::byte* values, uint64_t limit, uint64_t* done);

  // Receives the segment at *done to `to`, combined with `from` where the step reduces, and seals
  // it where the step says so; raises *done once it is whole. Returns the coded bytes taken.
  // REQUIRES: the whole segment may be written.
  size_t receive(const Launch& launch, size_t link, Channel& channel, const Step& step,
                 const std::byte* from, std::byte* to, uint64_t nbytes, uint64_t* done);

  // Codes n bytes of values that stand at byte `begin` of the step's chunk, for every send of it,
  // and writes to `to` what they decode to. to may be from. REQUIRES: begin is a whole segment.
  void seal(const Launch& launch, const Step& step, const std::byte* from, std::byte* to,
            uint64_t begin, uint64_t n);

 private:
  struct Stream {
    std::byte* out = nullptr;  // the segment under way, coded
    std::byte* in = nullptr;
    uint64_t sent = 0, received = 0;  // coded bytes of it that have moved
    bool coded = false;               // whether `out` holds it
  };
  std::byte* sealed(const Launch& launch, const Step& step, uint64_t begin);
  void keep_loss(const Launch& launch, const Step& step, uint64_t begin, const float* values,
                 const float* decoded, uint64_t numel) const;

  std::vector<Stream> streams_;          // by link
  std::vector<uint64_t> sealed_at_;      // by chunk: where its coded bytes are kept
  std::unique_ptr<std::byte[]> memory_;  // streams' segments, then sealed chunks
  uint64_t memory_nbytes_ = 0;
  std::unique_ptr<float[]> decoded_ = std::make_unique_for_overwrite<float[]>(kWireSegment);
};

}  // namespace pycomm::cpu
