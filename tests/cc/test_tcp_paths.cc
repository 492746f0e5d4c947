// A TCP channel over several connections: stripes, paths that do not open or break, and a peer that
// speaks the protocol by hand and says wrong things.
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>

#include <cstdlib>
#include <cstring>
#include <set>

#include "cpu/tcp_channel.h"
#include "ranks.h"

using namespace pycomm;
using namespace pycomm::testing;

namespace {

constexpr uint64_t kGroup = 7;

struct Header {  // the wire's, written here once more
  uint16_t magic = 0x7066;
  uint8_t code = 0;
  uint8_t next = 0;
  uint32_t nbytes = 0;
  uint64_t number = 0;
};
static_assert(sizeof(Header) == 16);

struct Variable {  // set while it lives
  Variable(const char* name, const char* value) : name_(name) { ::setenv(name, value, 1); }
  ~Variable() { ::unsetenv(name_); }
  const char* const name_;
};
struct Sockets : Variable {  // per pair of NICs
  explicit Sockets(const char* n) : Variable("PYCOMM_SOCKETS", n) {}
};

// Two hosts of one rank each; addresses: what each listens on.
struct Hosts {
  MemoryStore store;
  std::shared_ptr<cpu::Endpoint> endpoints[2];

  explicit Hosts(const std::string& addresses = "127.0.0.1") {
    const auto join = [&](int rank) {
      cpu::EndpointOptions options;
      options.host_id = rank == 0 ? "a" : "b";
      options.address = addresses;
      endpoints[rank] = cpu::Endpoint::create(store, rank, 2, options);
    };
    std::thread other(join, 1);
    join(0);
    other.join();
  }
  std::vector<cpu::SocketAddress> addresses(int rank) const {
    return cpu::unpack_addresses(endpoints[0]->member(rank).addresses);
  }
  std::unique_ptr<cpu::TcpChannel> channel(int rank, std::vector<cpu::SocketAddress> to) {
    return std::make_unique<cpu::TcpChannel>(
        cpu::TcpPeer{kGroup, rank, 1 - rank, rank == 0 ? "b" : "a", std::move(to),
                     cpu::kMessageLane},
        *endpoints[rank]);
  }
  std::unique_ptr<cpu::TcpChannel> channel(int rank) { return channel(rank, addresses(1 - rank)); }
};

std::vector<std::byte> pattern(size_t nbytes) {
  std::vector<std::byte> data(nbytes);
  for (size_t i = 0; i < nbytes; ++i)
    data[i] = static_cast<std::byte>((i * 0x9e3779b97f4a7c15ull) >> 56);
  return data;
}

// Moves `sent` from one end to the other, driving both, and checks it.
void carry(cpu::Channel& from, cpu::Channel& to, const std::vector<std::byte>& sent) {
  std::vector<std::byte> got(sent.size());
  for (size_t out = 0, in = 0; in < sent.size();) {
    if (out < sent.size())
      out += from.write(sent.data() + out, std::min(sent.size() - out, from.segment_nbytes()));
    from.flush();
    in += to.read(got.data() + in, got.size() - in);
  }
  EXPECT_TRUE(got == sent);
}

// Both ends, once all `n` connections stand on the connecting side.
void join(cpu::TcpChannel& connects, cpu::TcpChannel& accepts, size_t n) {
  const auto standing = [&] {
    const auto sent = connects.bytes_by_path();
    return static_cast<size_t>(
        std::count_if(sent.begin(), sent.end(), [](auto b) { return b > 0; }));
  };
  const auto data = pattern(1 << 20);
  while (standing() < n) carry(connects, accepts, data);
}

// Rank 0 by hand, against a real rank 1.
class Forger {
 public:
  Forger(Hosts& hosts, int n_paths) : hosts_(hosts), end_(hosts.channel(1)) {
    for (int path = 0; path < n_paths; ++path) connect(path, n_paths);
    while (!end_->joined()) end_->read(nullptr, 0);
  }
  cpu::TcpChannel& end() { return *end_; }
  void say(int path, const void* data, size_t nbytes) {
    const auto* bytes = static_cast<const std::byte*>(data);
    while (nbytes > 0) {
      const auto n = ::send(sockets_[static_cast<size_t>(path)].get(), bytes, nbytes, MSG_NOSIGNAL);
      if (n > 0)
        bytes += n, nbytes -= static_cast<size_t>(n);
      else
        std::this_thread::yield();
    }
  }
  void say(int path, Header header, const std::vector<std::byte>& payload) {
    header.nbytes = static_cast<uint32_t>(payload.size());
    say(path, &header, sizeof(header));
    say(path, payload.data(), payload.size());
  }
  void cut(int path) { sockets_[static_cast<size_t>(path)].reset(); }
  int receive_buffered(int path) {  // what the real rank sent and nobody reads
    char sink[4096];
    return static_cast<int>(
        ::recv(sockets_[static_cast<size_t>(path)].get(), sink, sizeof(sink), 0));
  }

 private:
  void connect(int path, int n_paths) {
    cpu::UniqueFd socket = cpu::tcp_connect(hosts_.addresses(1)[0]);
    const auto hear = [&](void* data, size_t nbytes) {
      for (size_t n = 0; n < nbytes;) {
        end_->read(nullptr, 0);  // rank 1 answers while it looks for connections
        const auto got = ::recv(socket.get(), static_cast<char*>(data) + n, nbytes - n, 0);
        if (got > 0) n += static_cast<size_t>(got);
      }
    };
    cpu::Challenge challenge;
    while (!end_->joined() && path > 0) end_->read(nullptr, 0);
    hear(&challenge, sizeof(challenge));
    cpu::Greeting greeting{kGroup, 0, 1, cpu::kMessageLane, 0, 0, 99, 0};
    greeting.path = static_cast<int16_t>(path);
    greeting.n_paths = static_cast<int16_t>(n_paths);
    greeting.mac = cpu::greeting_mac(hosts_.endpoints[0]->secret(), challenge, greeting);
    while (::send(socket.get(), &greeting, sizeof(greeting), MSG_NOSIGNAL) < 0)
      std::this_thread::yield();
    uint64_t welcome = 0;
    hear(&welcome, sizeof(welcome));
    EXPECT_EQ(welcome, cpu::welcome_mac(hosts_.endpoints[0]->secret(), greeting));
    sockets_.push_back(std::move(socket));
  }
  Hosts& hosts_;
  std::unique_ptr<cpu::TcpChannel> end_;
  std::vector<cpu::UniqueFd> sockets_;
};

std::vector<std::byte> read_all(cpu::Channel& channel, size_t nbytes) {
  std::vector<std::byte> got(nbytes);
  for (size_t n = 0; n < nbytes;) n += channel.read(got.data() + n, nbytes - n);
  return got;
}

void read_for_ever(cpu::Channel& channel) {
  std::vector<std::byte> sink(100'000);
  for (;;) channel.read(sink.data(), sink.size());
}

}  // namespace

TEST(stripes_go_over_every_nic_and_socket_and_arrive_in_order) {
  const Sockets sockets("2");
  Hosts hosts("127.0.0.1,127.0.0.2");
  const auto a = hosts.channel(0), b = hosts.channel(1);
  join(*a, *b, 4);
  carry(*a, *b, pattern(5'000'003));
  carry(*b, *a, pattern(5'000'003));
  for (const auto* end : {a.get(), b.get()}) {
    EXPECT_EQ(end->bytes_by_path().size(), size_t{4});
    for (const uint64_t sent : end->bytes_by_path()) EXPECT_TRUE(sent >= 128 << 10);
  }
  // Small ones stay on one path: the receiver looks at one socket.
  const auto before = a->bytes_by_path();
  for (int i = 0; i < 20; ++i) carry(*a, *b, pattern(100));
  const auto after = a->bytes_by_path();
  int used = 0;
  for (size_t i = 0; i < 4; ++i) used += before[i] != after[i];
  EXPECT_EQ(used, 1);
}

TEST(collectives_and_messages_of_any_size_over_four_connections) {
  const Sockets sockets("4");
  run_ranks({"a", "b", "b"}, [](Group& group, const auto&, Store&) {
    for (const uint64_t numel : {1, 1000, 300'001, 1'000'000}) {
      std::vector<float> data(numel);
      for (uint64_t i = 0; i < numel; ++i) data[i] = static_cast<float>(i % 17 + group.rank());
      group.run(all_reduce(data.data(), numel));
      for (uint64_t i = 0; i < numel; ++i)
        if (data[i] != static_cast<float>(3 * (i % 17) + 3)) {
          ::testing::fail(__FILE__, __LINE__, "element " + std::to_string(i));
          break;
        }
    }
  });
}

TEST(stripes_that_come_early_wait_for_those_before_them) {
  Hosts hosts;
  Forger forger(hosts, 3);
  const auto data = pattern(300'000);
  const auto piece = [&](size_t begin, size_t end) {
    return std::vector<std::byte>(data.begin() + static_cast<ptrdiff_t>(begin),
                                  data.begin() + static_cast<ptrdiff_t>(end));
  };
  forger.say(0, {.next = 0, .number = 3}, piece(150'000, 300'000));  // the last comes first,
  forger.say(2, {.next = 0, .number = 2}, piece(140'001, 150'000));
  std::vector<std::byte> got(data.size());
  for (int i = 0; i < 100; ++i) EXPECT_EQ(forger.end().read(got.data(), got.size()), size_t{0});
  forger.say(1, {.next = 1, .number = 0}, piece(0, 1));  // the first on any path it likes
  forger.say(1, {.next = 2, .number = 1}, piece(1, 140'001));
  EXPECT_TRUE(read_all(forger.end(), data.size()) == data);
}

TEST(a_path_that_stalls_holds_the_bytes_behind_it_and_no_more) {
  Hosts hosts;
  Forger forger(hosts, 2);
  const auto data = pattern(100'000);
  const Header first{.next = 1, .nbytes = 50'000, .number = 0};
  forger.say(1, {.next = 0, .number = 1}, {data.begin() + 50'000, data.end()});
  forger.say(0, &first, sizeof(first));
  forger.say(0, data.data(), 20'000);
  EXPECT_TRUE(read_all(forger.end(), 20'000) ==
              std::vector<std::byte>(data.begin(), data.begin() + 20'000));
  std::byte sink[10];
  for (int i = 0; i < 100; ++i) EXPECT_EQ(forger.end().read(sink, 10), size_t{0});
  forger.say(0, data.data() + 20'000, 30'000);
  EXPECT_TRUE(read_all(forger.end(), 80'000) ==
              std::vector<std::byte>(data.begin() + 20'000, data.end()));
}

TEST(one_of_several_connections_cut_is_a_lost_peer_that_names_it) {
  {  // in the middle of a frame
    Hosts hosts;
    Forger forger(hosts, 2);
    const Header first{.next = 1, .nbytes = 50'000, .number = 0};
    forger.say(0, &first, sizeof(first));
    forger.say(0, pattern(20'000).data(), 20'000);
    forger.cut(0);
    EXPECT_TRUE(read_all(forger.end(), 20'000) == pattern(20'000));
    EXPECT_THROWS("rank 1 lost rank 0 (host a, tcp 127.0.0.1:", read_for_ever(forger.end()));
  }
  {  // before the frame that is due on it
    Hosts hosts;
    Forger forger(hosts, 2);
    forger.say(0, {.next = 1, .number = 0}, pattern(100));
    forger.cut(1);
    EXPECT_TRUE(read_all(forger.end(), 100) == pattern(100));
    EXPECT_THROWS("it closed the connection", read_for_ever(forger.end()));
  }
  {  // seen by the side that writes, whichever path it was
    for (const int path : {0, 1}) {
      Hosts hosts;
      Forger forger(hosts, 2);
      const auto data = pattern(1 << 20);
      forger.cut(path);
      EXPECT_THROWS(
          "rank 1 lost rank 0", for (;;) {
            forger.end().write(data.data(), data.size());
            forger.end().flush();
            forger.receive_buffered(1 - path);
          });
    }
  }
}

TEST(what_makes_no_sense_on_the_wire_is_a_lost_peer) {
  const auto payload = pattern(100);
  for (const Header& wrong :
       {Header{.magic = 0x7067, .nbytes = 100}, Header{.nbytes = (1 << 20) + 1},
        Header{.next = 2, .nbytes = 100}, Header{.next = 255, .nbytes = 100},
        Header{.code = 3, .nbytes = 1 << 20}, Header{.nbytes = UINT32_MAX}}) {
    Hosts hosts;
    Forger forger(hosts, 2);
    forger.say(0, &wrong, sizeof(wrong));
    forger.say(0, payload.data(), payload.size());
    EXPECT_THROWS("its bytes make no sense", read_for_ever(forger.end()));
  }
  {  // a frame said twice
    Hosts hosts;
    Forger forger(hosts, 2);
    forger.say(0, {.next = 1, .number = 0}, payload);
    forger.say(1, {.next = 1, .number = 0}, payload);
    EXPECT_THROWS("its bytes make no sense", read_for_ever(forger.end()));
  }
}

TEST(a_second_connection_that_claims_a_path_is_dropped) {
  Hosts hosts;
  Forger forger(hosts, 1);
  cpu::UniqueFd socket = cpu::tcp_connect(hosts.addresses(1)[0]);
  cpu::Challenge challenge;
  const auto taken = [&] {
    return hosts.endpoints[1]->listener().take(kGroup, 0, 1, cpu::kMessageLane);
  };
  for (size_t n = 0; n < sizeof(challenge);) {
    EXPECT_TRUE(!taken());
    const auto got =
        ::recv(socket.get(), reinterpret_cast<char*>(&challenge) + n, sizeof(challenge) - n, 0);
    if (got > 0) n += static_cast<size_t>(got);
  }
  // Numbers out of range are a stranger's, whoever signed them.
  cpu::Greeting greeting{kGroup, 0, 1, cpu::kMessageLane, 5, 2, 99, 0};
  greeting.mac = cpu::greeting_mac(hosts.endpoints[0]->secret(), challenge, greeting);
  while (::send(socket.get(), &greeting, sizeof(greeting), MSG_NOSIGNAL) < 0)
    std::this_thread::yield();
  char end = 0;
  ssize_t got = -1;
  while (got < 0) {
    EXPECT_TRUE(!taken());
    got = ::recv(socket.get(), &end, 1, 0);
    if (got < 0 && errno != EAGAIN) got = 0;
  }
  EXPECT_EQ(got, ssize_t{0});
  forger.say(0, {.next = 0, .number = 0}, pattern(10));
  EXPECT_TRUE(read_all(forger.end(), 10) == pattern(10));
}

TEST(a_path_that_is_refused_is_left_out) {
  Hosts hosts;
  // Nobody listens there: 127.0.0.3 is this machine, and the port is held by another address of it.
  cpu::TcpListener elsewhere("127.0.0.1");
  cpu::SocketAddress blocked{"127.0.0.3", elsewhere.addresses()[0].port};
  auto to = hosts.addresses(1);
  to.push_back(blocked);
  const auto a = hosts.channel(0, to), b = hosts.channel(1);
  for (int i = 0; i < 3; ++i) {
    carry(*a, *b, pattern(1'000'000));
    carry(*b, *a, pattern(1'000'000));
  }
  const auto sent = a->bytes_by_path();
  EXPECT_EQ(sent.size(), size_t{2});
  EXPECT_TRUE(sent[0] > 3'000'000 && sent[1] == 0);
  EXPECT_TRUE(a->describe().find("127.0.0.3:" + std::to_string(blocked.port) +
                                 ": connecting failed: Connection refused") != std::string::npos);
}

TEST(without_any_path_the_error_names_ranks_host_and_addresses) {
  Hosts hosts;
  const int port = hosts.addresses(1)[0].port;
  const auto a = hosts.channel(0, {{"127.0.0.3", port}, {"127.0.0.4", port}});
  std::string what;
  try {
    for (;;) a->read(nullptr, 0);
  } catch (const Error& error) {
    EXPECT_TRUE(error.code() == Code::peer_lost);
    what = error.what();
  }
  for (const std::string part :
       {"rank 0 lost rank 1 (host b, tcp no path)", "127.0.0.3:", "127.0.0.4:", "refused"})
    EXPECT_TRUE(what.find(part) != std::string::npos);
}

TEST(a_listener_takes_names_and_leaves_out_what_it_cannot_bind) {
  EXPECT_EQ(cpu::TcpListener("lo").addresses()[0].address, std::string("127.0.0.1"));
  EXPECT_EQ(cpu::TcpListener("127.0.0.1,lo").addresses().size(), size_t{2});
  // 192.0.2.1 is nobody's (RFC 5737).
  const cpu::TcpListener some("192.0.2.1,127.0.0.2");
  EXPECT_EQ(some.addresses().size(), size_t{1});
  EXPECT_EQ(some.addresses()[0].address, std::string("127.0.0.2"));
  EXPECT_THROWS("cannot listen on 192.0.2.1", cpu::TcpListener("192.0.2.1"));
  EXPECT_THROWS("not a numeric IP address", cpu::TcpListener("nosuch0"));
  EXPECT_THROWS("no address", cpu::TcpListener(""));
}

TEST(addresses_survive_being_published) {
  const auto there = cpu::unpack_addresses(cpu::pack({{"10.0.0.1", 80}, {"fd00::1", 4242}}));
  EXPECT_EQ(there.size(), size_t{2});
  EXPECT_EQ(there[0].text(), std::string("10.0.0.1:80"));
  EXPECT_EQ(there[1].text(), std::string("[fd00::1]:4242"));
  for (const char* bad : {"", "10.0.0.1", "10.0.0.1 80 x", "10.0.0.1 0", "10.0.0.1 70000"})
    EXPECT_THROWS("cannot be read", cpu::unpack_addresses(bad));
}

// What the TCP sockets of this process use that are connected to each other.
std::set<std::string> congestion_controls() {
  std::set<std::string> found;
  for (int fd = 3; fd < 256; ++fd) {
    sockaddr_storage peer;
    socklen_t length = sizeof(peer);
    char name[16] = {};
    socklen_t name_length = sizeof(name) - 1;
    if (::getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &length) == 0 &&
        ::getsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, name, &name_length) == 0)
      found.insert(name);
  }
  return found;
}

TEST(congestion_control_is_the_one_wanted) {
  for (const char* wanted : {"reno", "system", ""}) {
    const Variable variable("PYCOMM_CONGESTION", wanted);
    const auto before = congestion_controls();
    EXPECT_TRUE(before.empty());
    const cpu::UniqueFd fresh(::socket(AF_INET, SOCK_STREAM, 0));
    char of_system[16] = {};
    socklen_t length = sizeof(of_system) - 1;
    EXPECT_EQ(::getsockopt(fresh.get(), IPPROTO_TCP, TCP_CONGESTION, of_system, &length), 0);
    Hosts hosts;
    auto a = hosts.channel(0), b = hosts.channel(1);
    join(*a, *b, 1);
    const auto found = congestion_controls();
    EXPECT_EQ(found.size(), size_t{1});
    const std::string name = *found.begin();
    if (wanted == std::string("reno")) EXPECT_EQ(name, std::string("reno"));
    if (wanted == std::string("system")) EXPECT_EQ(name, std::string(of_system));
    if (*wanted == 0)  // loopback is a short path
      EXPECT_EQ(name.starts_with("bbr"), false);
  }
  const Variable variable("PYCOMM_CONGESTION", "nosuch");
  EXPECT_THROWS("PYCOMM_CONGESTION=nosuch", cpu::TcpListener("127.0.0.1"));
}

TEST(a_number_of_sockets_that_makes_no_sense_is_refused) {
  for (const char* bad : {"0", "17", "two", "-1"}) {
    const Sockets sockets(bad);
    Hosts hosts;
    const auto a = hosts.channel(0);
    EXPECT_THROWS("PYCOMM_SOCKETS is", a->read(nullptr, 0));
  }
}
