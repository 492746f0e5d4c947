// Interpreter: runs one rank's program over channels, without blocking, as many bytes as will move.
// It keeps data dependencies only: a step's bytes stay behind those of the steps it depends on, so
// chunks flow through a rank segment by segment. On every link it first says what it runs and
// checks what the peer says (Fingerprint); no program ends before all have agreed. Thread safety:
// none; the engine's lock guards it. Reused from launch to launch, so that a warm call allocates
// nothing.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/engine.h"
#include "cpu/channel.h"
#include "cpu/coded_streams.h"

namespace pycomm::cpu {

class Interpreter {
 public:
  using ChannelOf = std::function<Channel&(int peer)>;
  // tile_nbytes: the program runs over this much of every chunk, then over the next; 0 for all at
  // once. Inside a host a tile stays in the cache between its reduction and its gather; across
  // hosts each tile would pay the links' latency again.
  void begin(const Launch& launch, const ChannelOf& channel_of, uint64_t tile_nbytes);
  // True once this rank's part is done. `moved` is set when anything moved.
  // Throws what channels throw, and Error(mismatch).
  bool advance(const Launch& launch, bool* moved);
  // Peers whose bytes, or whose reading, this rank waits for; not those it would get to later.
  std::vector<int> blocked_on(const Launch& launch) const;
  bool talks_to(int peer) const;
  bool all_entered() const;  // every peer has said that it runs this too
  std::string describe_wait(const Launch& launch)
      const;  // "rank 5 (shared memory), round 7 of 14, chunk 3, 1024 of 4096 bytes"

 private:
  struct Link {
    const PeerSteps* steps = nullptr;
    Channel* channel = nullptr;
    size_t send = 0, recv = 0;   // cursors into steps
    size_t said = 0, heard = 0;  // bytes of the fingerprints exchanged
    uint64_t unsealed = 0;       // bytes that the receive under way has written beyond those done
    Fingerprint mine, theirs;
    bool done() const {
      return send == steps->sends.size() && recv == steps->recvs.size() &&
             said == sizeof(Fingerprint) && heard == sizeof(Fingerprint) && channel->flushed();
    }
  };
  void begin_tile(const Launch& launch);
  bool advance_tile(const Launch& launch, bool* moved);
  uint64_t nbytes_of(const Launch& launch, const Step& step) const;  // in this tile
  bool advance_copies(const Launch& launch);
  bool advance_send(const Launch& launch, Link& link);
  bool advance_recv(const Launch& launch, Link& link);
  uint64_t allowed(const Program& program, const Step& step, uint64_t nbytes) const;
  // The step at `cursor` of a link's list, where only the peer keeps it from moving; else -1.
  int32_t blocked_step(const Launch& launch, const std::vector<int32_t>& list, size_t cursor) const;
  const std::byte* source(const Launch& launch, const Step& step) const;
  std::byte* destination(const Launch& launch, const Step& step);

  size_t receive(const Launch& launch, Link& link, const Step& step, uint64_t limit,
                 uint64_t nbytes, uint64_t* done);

  std::vector<Link> links_;
  std::vector<uint64_t> done_;  // bytes done, by step
  size_t copies_left_ = 0;
  uint64_t tile_nbytes_ = 0;
  uint64_t tile_begin_ = 0;  // in every chunk
  CodedStreams coded_;
  std::unique_ptr<std::byte[]> scratch_;
  uint64_t scratch_nbytes_ = 0;
  uint64_t scratch_stride_ = 0;
};

}  // namespace pycomm::cpu
