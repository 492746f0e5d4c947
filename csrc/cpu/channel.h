// Channel: a two-way FIFO of bytes between this rank and one peer. Never blocks.
// Thread safety: none; the engine's lock guards it.
// Invariant: bytes arrive in the order written. Both sides call align_*() at the same place in the
// stream, after each message, so that the next one starts aligned for any element type.
#pragma once

#include <poll.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "core/status.h"

namespace pycomm::cpu {

class Channel {
 public:
  virtual ~Channel() = default;
  // Takes up to nbytes; returns how many. A caller that was refused some offers the same bytes, and
  // maybe more, later. Throws Error(peer_lost) where the link is broken.
  virtual size_t write(const void* data, size_t nbytes) = 0;
  // What has arrived and lies together, at least `at_least` bytes where that many have come; empty
  // when nothing has. Valid until the next call. Throws as write() does, and the error a peer sent
  // with poison().
  virtual std::span<const std::byte> readable(size_t at_least = 1) = 0;
  virtual void consume(size_t nbytes) = 0;
  // Copies up to nbytes of what has arrived to data; returns how many.
  virtual size_t read(void* data, size_t nbytes) = 0;
  virtual void align_write() = 0;
  virtual void align_read() = 0;
  // Makes what was written visible to a peer that sleeps. Called once at the end of each round of
  // progress.
  virtual void flush() = 0;
  virtual bool flushed() const {
    return true;
  }  // all that was written has left this rank's own buffers
  // Tells the peer that the group is broken, past anything half-written. Best effort; never throws.
  virtual void poison(const Status& why) = 0;
  // Whether poison() can say why; else the peer sees the link break.
  virtual bool can_say_why() const { return true; }
  virtual size_t segment_nbytes() const = 0;  // the most that one write() should be offered
  // What to sleep on until it can go on, where that is a socket.
  virtual void add_waits(std::vector<pollfd>&) const {}
  virtual bool joined() const {
    return true;
  }  // the peer has answered: from here on the link itself tells when it goes
  // Called now and then before that, while the peer is needed. Throws Error(peer_lost) where it is
  // gone for sure.
  virtual void probe() {}
  virtual std::string describe() const = 0;  // "shm", "tcp 10.0.0.2:4242"

  uint64_t bytes_written() const { return bytes_written_; }

 protected:
  uint64_t bytes_written_ = 0;
};

}  // namespace pycomm::cpu
