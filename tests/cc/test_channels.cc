// Channels as pipes of bytes: what goes in one end in pieces of any size comes out of the other in
// pieces of any other, in order and aligned; and what a reader sees when the other end breaks.
#include <algorithm>
#include <random>

#include "cpu/shared_memory.h"
#include "cpu/shm_channel.h"
#include "cpu/tcp_channel.h"
#include "ranks.h"

using namespace pycomm;
using namespace pycomm::testing;

namespace {

// Two ends that know each other, on one host or on two, and the memory between them.
struct Pair {
  MemoryStore store;
  std::shared_ptr<cpu::Endpoint> endpoints[2];
  cpu::Segment segments[2];
  std::unique_ptr<cpu::Channel> ends[2];

  // n_ranks: what the segment is cut for; more ranks have smaller rings.
  explicit Pair(bool shared, int n_ranks = 16)
      : segments{cpu::Segment(n_ranks), cpu::Segment(n_ranks)} {
    const auto join = [&](int rank) {
      cpu::EndpointOptions options;
      options.host_id = shared || rank == 0 ? "a" : "b";
      endpoints[rank] = cpu::Endpoint::create(store, rank, 2, options);
    };
    std::thread other(join, 1);
    join(0);
    other.join();
    const auto memory = cpu::make_shared_memory("test", segments[0].nbytes());
    for (int rank = 0; rank < 2; ++rank) {
      const int peer = 1 - rank;
      if (shared) {
        segments[rank].attach(cpu::map_shared(memory.fd.get(), segments[rank].nbytes()));
        ends[rank] = std::make_unique<cpu::ShmChannel>(segments[rank], rank, peer,
                                                       cpu::kMessageLane, *endpoints[rank], peer);
      } else {
        const cpu::Member& member = endpoints[rank]->member(peer);
        const cpu::TcpPeer address{
            7, rank, peer, member.host, cpu::unpack_addresses(member.addresses), cpu::kMessageLane};
        ends[rank] = std::make_unique<cpu::TcpChannel>(address, *endpoints[rank]);
      }
    }
  }
};

std::byte value_at(uint64_t seed, uint64_t position) {
  return static_cast<std::byte>((position * 0x9e3779b97f4a7c15ull + seed * 77) >> 56);
}

// Both ends draw the same sizes from the seed: small ones, empty ones, and some larger than any
// buffer.
std::vector<size_t> message_sizes(uint64_t seed, size_t count) {
  std::mt19937_64 rng(seed);
  std::vector<size_t> sizes;
  for (size_t i = 0; i < count; ++i) {
    constexpr size_t limits[] = {1, 64, 100, 5000, 70'000, 300'000};
    sizes.push_back(rng() % limits[rng() % 6]);
  }
  return sizes;
}

void write_all(cpu::Channel& channel, uint64_t seed, const std::vector<size_t>& sizes) {
  std::mt19937_64 rng(seed + 1);
  for (size_t m = 0; m < sizes.size(); ++m) {
    std::vector<std::byte> message(sizes[m]);
    for (size_t i = 0; i < message.size(); ++i) message[i] = value_at(seed + m, i);
    size_t done = 0, offered = 0;
    while (done < message.size()) {
      // More may be offered later, never less; what is offered ends between two elements.
      offered =
          std::min(message.size(), std::max(offered, (done + 1 + rng() % 100'000 + 15) / 16 * 16));
      const size_t n = channel.write(message.data() + done, offered - done);
      if (n > offered - done) return EXPECT_TRUE(n <= offered - done);
      done += n;
      if (n == 0 || rng() % 8 == 0) {
        channel.flush();
        std::this_thread::yield();
      }
    }
    channel.align_write();
  }
  do channel.flush();
  while (!channel.flushed());
}

void read_all(cpu::Channel& channel, uint64_t seed, const std::vector<size_t>& sizes) {
  std::mt19937_64 rng(seed + 2);
  for (size_t m = 0; m < sizes.size(); ++m) {
    std::vector<std::byte> message(sizes[m]);
    const bool in_place = rng() % 2 == 0;  // as a reduction reads, whole elements where they lie
    size_t done = 0;
    while (done < message.size()) {
      size_t n = 0;
      const size_t want = std::min(message.size() - done, 1 + rng() % 90'000);
      if (in_place) {
        const size_t element = std::min<size_t>(16, message.size() - done);
        const auto here = channel.readable(element);
        n = std::min(here.size(), std::max(want, element));
        if (n < message.size() - done) n = n / 16 * 16;
        if (n > 0) {
          if (reinterpret_cast<uintptr_t>(here.data()) % 16 != 0)
            return EXPECT_TRUE(false && "aligned");
          std::memcpy(message.data() + done, here.data(), n);
          channel.consume(n);
        }
      } else {
        n = channel.read(message.data() + done, want);
      }
      done += n;
      if (n == 0 || rng() % 8 == 0) {
        channel.flush();
        std::this_thread::yield();
      }
    }
    channel.align_read();
    for (size_t i = 0; i < message.size(); ++i)
      if (message[i] != value_at(seed + m, i)) {
        ::testing::fail(__FILE__, __LINE__,
                        "message " + std::to_string(m) + " of " + std::to_string(message.size()) +
                            " bytes differs at " + std::to_string(i));
        return;
      }
  }
}

// Both directions at once, each end in a thread of its own that reads while it cannot write.
void check_both_ways(bool shared, uint64_t seed, int n_ranks) {
  Pair pair(shared, n_ranks);
  const std::vector<size_t> sizes[2] = {message_sizes(seed, 120), message_sizes(seed + 50, 120)};
  std::mutex locks[2];  // a channel is for one thread at a time
  struct Locked final : cpu::Channel {
    Locked(cpu::Channel& to, std::mutex& by) : channel(to), mutex(by) {}
    cpu::Channel& channel;
    std::mutex& mutex;
    std::vector<std::byte> copy;
    size_t write(const void* data, size_t n) override {
      std::lock_guard lock(mutex);
      return channel.write(data, n);
    }
    std::span<const std::byte> readable(size_t at_least) override {
      std::lock_guard lock(mutex);
      return channel.readable(at_least);
    }
    void consume(size_t n) override {
      std::lock_guard lock(mutex);
      channel.consume(n);
    }
    size_t read(void* data, size_t n) override {
      std::lock_guard lock(mutex);
      return channel.read(data, n);
    }
    void align_write() override {
      std::lock_guard lock(mutex);
      channel.align_write();
    }
    void align_read() override {
      std::lock_guard lock(mutex);
      channel.align_read();
    }
    void flush() override {
      std::lock_guard lock(mutex);
      channel.flush();
    }
    bool flushed() const override {
      std::lock_guard lock(mutex);
      return channel.flushed();
    }
    void poison(const Status& why) override { channel.poison(why); }
    size_t segment_nbytes() const override { return channel.segment_nbytes(); }
    std::string describe() const override { return channel.describe(); }
  };
  std::vector<std::thread> threads;
  for (int end = 0; end < 2; ++end) {
    threads.emplace_back([&, end] {
      Locked channel(*pair.ends[end], locks[end]);
      write_all(channel, seed + static_cast<uint64_t>(end) * 1000, sizes[end]);
    });
    threads.emplace_back([&, end] {
      Locked channel(*pair.ends[end], locks[end]);
      read_all(channel, seed + static_cast<uint64_t>(1 - end) * 1000, sizes[1 - end]);
    });
  }
  for (auto& thread : threads) thread.join();
  for (int end = 0; end < 2; ++end) {
    size_t total = 0;
    for (const size_t size : sizes[end]) total += size;
    EXPECT_EQ(pair.ends[end]->bytes_written(), total);
  }
}

// Drives both ends of a connection until it stands.
void join(Pair& pair) {
  const char hello = 'h';
  char heard[2] = {};
  while (pair.ends[0]->write(&hello, 1) == 0) pair.ends[1]->read(heard, 0);
  pair.ends[0]->flush();
  while (pair.ends[1]->read(heard, 1) == 0) pair.ends[0]->flush();
  EXPECT_EQ(heard[0], 'h');
  for (int end = 0; end < 2; ++end) EXPECT_TRUE(pair.ends[end]->joined());
}

// What reading the other end throws, once it does.
std::string error_of(cpu::Channel& channel, Code* code) {
  std::vector<std::byte> sink(100'000);
  try {
    for (;;)
      if (channel.read(sink.data(), sink.size()) == 0) std::this_thread::yield();
  } catch (const Error& error) {
    *code = error.code();
    return error.what();
  }
}

}  // namespace

TEST(shared_memory_carries_bytes_in_pieces_of_any_size) {
  for (const uint64_t seed : {1, 2, 3})
    check_both_ways(true, seed, 16);  // rings of 128 KiB: many times around
  check_both_ways(true, 4, 2);
}

TEST(tcp_carries_bytes_in_pieces_of_any_size) {
  for (const uint64_t seed : {1, 2, 3}) check_both_ways(false, seed, 2);
}

TEST(a_ring_takes_no_more_than_it_holds) {
  Pair pair(true);
  const size_t holds = pair.segments[0].ring_bytes();
  std::vector<std::byte> data(holds + 100);
  for (int lap = 0; lap < 5; ++lap) {
    EXPECT_EQ(pair.ends[0]->write(data.data(), data.size()), holds);
    EXPECT_EQ(pair.ends[0]->write(data.data(), 1), size_t{0});
    size_t got = 0;
    while (got < holds) got += pair.ends[1]->read(data.data(), 1000);
    EXPECT_EQ(got, holds);
    EXPECT_EQ(pair.ends[1]->read(data.data(), 1), size_t{0});
    EXPECT_TRUE(pair.ends[1]->readable().empty());
    const size_t odd = 3;  // the next lap begins elsewhere
    EXPECT_EQ(pair.ends[0]->write(data.data(), odd), odd);
    pair.ends[0]->align_write();
    EXPECT_EQ(pair.ends[1]->read(data.data(), odd), odd);
    pair.ends[1]->align_read();
  }
}

TEST(a_peer_hears_why_after_what_was_sent_before) {
  Pair pair(false);
  join(pair);
  const std::vector<std::byte> sent(3000, std::byte{9});
  EXPECT_EQ(pair.ends[0]->write(sent.data(), sent.size()), sent.size());
  pair.ends[0]->poison({Code::mismatch, "they called something else"});
  std::vector<std::byte> got(3000);
  for (size_t n = 0; n < got.size();) n += pair.ends[1]->read(got.data() + n, got.size() - n);
  EXPECT_TRUE(got == sent);
  Code code{};
  EXPECT_EQ(error_of(*pair.ends[1], &code), std::string("they called something else"));
  EXPECT_TRUE(code == Code::mismatch);
}

TEST(poison_in_the_middle_of_a_frame_is_a_lost_peer) {
  Pair pair(false);
  join(pair);
  const std::vector<std::byte> large(64 << 20);
  while (pair.ends[0]->write(large.data(), 1 << 20) == 1 << 20) {
  }  // until the socket is full
  pair.ends[0]->poison({Code::mismatch, "not heard"});
  Code code{};
  EXPECT_TRUE(error_of(*pair.ends[1], &code).find("rank 1 lost rank 0") != std::string::npos);
  EXPECT_TRUE(code == Code::peer_lost);
}

TEST(a_peer_that_goes_is_lost_after_its_last_byte) {
  Pair pair(false);
  join(pair);
  const std::vector<std::byte> sent(50'000, std::byte{4});
  size_t written = 0;
  while (written < sent.size())
    written += pair.ends[0]->write(sent.data() + written, sent.size() - written);
  while (!pair.ends[0]->flushed()) pair.ends[0]->flush();
  pair.ends[0].reset();
  std::vector<std::byte> got(sent.size());
  for (size_t n = 0; n < got.size();) n += pair.ends[1]->read(got.data() + n, got.size() - n);
  EXPECT_TRUE(got == sent);
  Code code{};
  EXPECT_TRUE(error_of(*pair.ends[1], &code).find("closed the connection") != std::string::npos);
  EXPECT_TRUE(code == Code::peer_lost);
}

TEST(a_send_to_a_peer_that_went_ends_with_what_the_peer_said) {
  for (const bool says_why : {false, true}) {
    Pair pair(false);
    join(pair);
    // A frame cut in its middle stands before the word, or the end.
    const std::vector<std::byte> large(64 << 20);
    while (pair.ends[0]->write(large.data(), 1 << 20) == 1 << 20) {
    }
    const std::vector<std::byte> whole(1000);
    while (pair.ends[1]->write(whole.data(), whole.size()) == 0) {
    }
    pair.ends[1]->flush();
    if (says_why) pair.ends[1]->poison({Code::timeout, "rank 1 gave up"});
    pair.ends[1].reset();
    Code code{};
    std::string what;
    try {
      for (;;) {
        pair.ends[0]->write(large.data(), 1 << 20);
        pair.ends[0]->flush();
      }
    } catch (const Error& error) {
      code = error.code();
      what = error.what();
    }
    // A reset may have swept away what the peer said.
    EXPECT_TRUE(code == Code::peer_lost || (says_why && what == "rank 1 gave up"));
  }
}

TEST(a_rank_that_never_connects_and_ends_is_noticed) {
  Pair pair(false);
  pair.ends[1]->probe();
  pair.ends[1]->probe();  // it listens: nothing to report
  EXPECT_TRUE(pair.ends[1]->read(nullptr, 0) == 0 && !pair.ends[1]->joined());
  pair.ends[0].reset();
  pair.endpoints[0].reset();
  EXPECT_THROWS("rank 1 lost rank 0", for (;;) pair.ends[1]->probe());
}

TEST(a_stranger_without_the_secret_is_dropped) {
  Pair pair(false);
  const cpu::SocketAddress listener =
      cpu::unpack_addresses(pair.endpoints[1]->member(1).addresses).front();
  std::vector<cpu::UniqueFd> strangers;
  for (const std::string& says :
       {std::string(), std::string("GET / HTTP/1.0\r\n\r\n"), std::string(5000, 'x')}) {
    cpu::UniqueFd socket = cpu::tcp_connect(listener);
    while (!says.empty() && ::write(socket.get(), says.data(), says.size()) < 0)
      std::this_thread::yield();
    strangers.push_back(std::move(socket));
  }
  // One who speaks the protocol, and claims to be rank 0, with another secret.
  cpu::UniqueFd socket = cpu::tcp_connect(listener);
  cpu::Greeting greeting{7, 0, 1, cpu::kMessageLane, 0, 1, 1, 0};
  Secret secret{};
  greeting.mac = cpu::greeting_mac(secret, cpu::Challenge{}, greeting);
  while (::write(socket.get(), &greeting, sizeof(greeting)) < 0) std::this_thread::yield();
  for (int i = 0; i < 100; ++i) pair.ends[1]->read(nullptr, 0);
  EXPECT_TRUE(!pair.ends[1]->joined());
  join(pair);
}
