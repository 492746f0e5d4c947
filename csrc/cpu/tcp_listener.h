// TcpListener: where ranks of other hosts connect to this one, on one address per NIC. It proves
// who they are before anything they say is read, and keeps each connection until the group it is
// for asks. Thread safety: all members.
#pragma once

#include <poll.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "core/siphash.h"
#include "cpu/posix.h"

namespace pycomm::cpu {

// What a connecting rank says about itself, once it has been challenged. Both sides prove that they
// know the job's secret:
//   listener -> Challenge; connecter -> Greeting with mac(challenge, greeting); listener ->
//   mac(greeting.nonce)
struct Challenge {
  uint64_t magic = 0x70636f6d6d2d6331ull;
  uint64_t nonce = 0;
};
struct Greeting {
  uint64_t group = 0;  // hash of the group's name and store prefix
  int32_t from = 0;
  int32_t to = 0;
  int32_t lane = 0;
  int16_t path = 0;     // which of the channel's connections this is,
  int16_t n_paths = 1;  // of how many that the connecting side tries
  uint64_t nonce = 0;
  uint64_t mac = 0;
};
uint64_t greeting_mac(const Secret& secret, const Challenge& challenge, const Greeting& greeting);
uint64_t welcome_mac(const Secret& secret, const Greeting& greeting);
uint64_t random_u64();
constexpr int kMaxPaths = 64;

struct SocketAddress {
  std::string address;  // IPv4 or IPv6, numeric
  int port = 0;
  std::string text() const;  // "10.0.0.1:4242", "[fd00::1]:4242"
};
// As published to other ranks: "10.0.0.1 4242 10.0.1.1 4242". Errors: Error(internal).
std::string pack(const std::vector<SocketAddress>& addresses);
std::vector<SocketAddress> unpack_addresses(const std::string& text);

class TcpListener {
 public:
  // Listens on a free port of each of `addresses`: numeric ones (IPv4 or IPv6) or names of network
  // interfaces, separated by commas. One that cannot be bound is left out, with a warning.
  // Errors: Error(invalid_argument) where none can.
  TcpListener(const std::string& addresses);
  const std::vector<SocketAddress>& addresses() const { return addresses_; }
  void add_waits(std::vector<pollfd>& entries) const;  // for connections to come in
  void set_secret(const Secret& secret) { secret_ = secret; }
  struct Taken {
    int path;
    int n_paths;
    UniqueFd socket;
  };
  // A connection from rank `from` of the group, once it has come and proved itself; never blocks.
  std::optional<Taken> take(uint64_t group, int from, int to, int lane);
  // Says it on stderr, unless it has been said.
  void warn_once(const std::string& text);
  // Connections for this group, which have come or will come, are closed: its rank here has left
  // it.
  void refuse(uint64_t group);

 private:
  struct Pending {
    UniqueFd socket;
    Challenge challenge;
    size_t sent = 0;
    Greeting greeting;
    size_t received = 0;
  };
  void accept_all();
  bool advance(Pending& pending);  // true when it is settled, one way or the other

  std::mutex mutex_;
  std::vector<UniqueFd> fds_;  // by address
  std::vector<SocketAddress> addresses_;
  Secret secret_{};
  std::vector<Pending> pending_;
  std::map<std::tuple<uint64_t, int, int, int, int>, Taken> ready_;  // the last int: path
  std::set<uint64_t> refused_;
  std::set<std::string> warned_;
};

// A non-blocking TCP socket that is connecting; from: the address it leaves by, or empty.
// Errors: Error(peer_lost), Error(internal).
UniqueFd tcp_connect(const SocketAddress& to, const std::string& from = "");
// The address of this end of a connection, or of the other.
SocketAddress own_address(int socket);
SocketAddress peer_address(int socket);
// PYCOMM_CONGESTION: a congestion control's name, or "system"; nullptr where it is not set.
const char* wanted_congestion_control();
bool set_congestion_control(int socket, std::string_view name);  // false: refused, see errno

}  // namespace pycomm::cpu
