#include "cpu/endpoint.h"

#include <poll.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include <algorithm>
#include <fstream>
#include <new>
#include <set>
#include <sstream>

#include "core/engine.h"
#include "core/fingerprint.h"
#include "cpu/fd_exchange.h"
#include "cpu/waiter.h"

namespace pycomm::cpu {
namespace {

std::string namespace_id(const char* kind) {
  struct stat info{};
  if (::stat((std::string("/proc/self/ns/") + kind).c_str(), &info) != 0) return "?";
  return std::to_string(info.st_ino);
}

std::string boot_id() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string id;
  std::getline(file, id);
  return id.empty() ? "unknown" : id;
}

std::string short_hash(const std::string& text) {
  std::ostringstream out;
  out << std::hex << (fnv1a(text.data(), text.size()) & 0xffffffffu);
  return out.str();
}

Member describe_self(const EndpointOptions& options, const TcpListener& listener) {
  Member self;
  self.boot_id = boot_id();
  self.machine = self.boot_id + "/" + namespace_id("net");
  self.pid_namespace = namespace_id("pid");
  self.pid = ::getpid();
  self.probe = reinterpret_cast<uint64_t>(&PeerMemory::probe());
  self.addresses = pack(listener.addresses());
  char name[256] = {};
  ::gethostname(name, sizeof(name) - 1);
  self.host = options.host_id.empty() ? std::string(name) + "-" + short_hash(self.machine)
                                      : options.host_id;
  return self;
}

std::string pack(const Member& member) {
  std::ostringstream out;
  out << member.host << '\n'
      << member.machine << '\n'
      << member.boot_id << '\n'
      << member.pid_namespace << '\n'
      << member.pid << '\n'
      << member.probe << '\n'
      << member.addresses << '\n';
  return out.str();
}

Member unpack(const std::string& text) {
  Member member;
  std::istringstream in(text);
  std::string pid, probe;
  std::getline(in, member.host);
  std::getline(in, member.machine);
  std::getline(in, member.boot_id);
  std::getline(in, member.pid_namespace);
  std::getline(in, pid);
  std::getline(in, probe);
  if (!std::getline(in, member.addresses))
    throw Error(Code::internal, "a rank published a member entry that cannot be read");
  member.pid = std::stoi(pid);
  member.probe = std::stoull(probe);
  return member;
}

int usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  return ::sched_getaffinity(0, sizeof(set), &set) == 0 ? std::max(1, CPU_COUNT(&set)) : 1;
}

}  // namespace

std::shared_ptr<Endpoint> Endpoint::create(Store& store, int rank, int size,
                                           const EndpointOptions& options) {
  if (options.host_id.find('\n') != std::string::npos)
    throw Error(Code::invalid_argument, "a host id cannot hold a line break");
  std::shared_ptr<Endpoint> self(new Endpoint());
  self->rank_ = rank;
  self->listener_ = std::make_unique<TcpListener>(options.address);
  if (rank == 0) {
    const uint64_t words[2] = {random_u64(), random_u64()};
    store.set("secret", std::string(reinterpret_cast<const char*>(words), sizeof(words)));
  }
  store.set("member/" + std::to_string(rank), pack(describe_self(options, *self->listener_)));
  std::vector<std::string> keys{"secret"};
  for (int i = 0; i < size; ++i) keys.push_back("member/" + std::to_string(i));
  const auto values = store.get_all(keys, options.timeout);
  PYCOMM_CHECK(values[0].size() == sizeof(Secret), "the job's secret has another size");
  std::memcpy(self->secret_.data(), values[0].data(), sizeof(Secret));
  self->listener_->set_secret(self->secret_);
  for (int i = 0; i < size; ++i)
    self->members_.push_back(unpack(values[static_cast<size_t>(i) + 1]));

  const Member& me = self->member(rank);
  int on_machine = 0;
  for (int i = 0; i < size; ++i) {
    const Member& other = self->member(i);
    on_machine += other.boot_id == me.boot_id;
    const bool local = other.host == me.host;
    if (local && other.machine != me.machine)
      throw Error(Code::invalid_argument, "ranks " + std::to_string(rank) + " and " +
                                              std::to_string(i) + " both say host '" + me.host +
                                              "' but run on different machines or network "
                                              "namespaces, which cannot share memory; give them "
                                              "different PYCOMM_HOST_ID, or unset it");
    self->local_index_.push_back(local ? static_cast<int>(self->local_ranks_.size()) : -1);
    if (local) self->local_ranks_.push_back(i);
  }
  self->oversubscribed_ = on_machine > usable_cores();
  self->share_host(store, options.timeout);
  return self;
}

Endpoint::~Endpoint() = default;

void Endpoint::share_host(Store& store, std::chrono::milliseconds timeout) {
  const int n_local = static_cast<int>(local_ranks_.size());
  const int index = local_index_[static_cast<size_t>(rank_)];
  const size_t nbytes = sizeof(HostLine) * static_cast<size_t>(n_local);
  UniqueFd doorbell(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!doorbell)
    throw_errno(Code::internal, "eventfd (is the limit on open files reached? see ulimit -n)");
  std::vector<int> mine{doorbell.get(), peer_memory_.heap().fd()};
  UniqueFd memory;
  if (index == 0) {
    memory = make_memfd("pycomm-host", nbytes);
    mine.push_back(memory.get());
  }
  auto fds =
      exchange_fds(store, "host/" + std::to_string(local_ranks_[0]), index, n_local, mine, timeout);
  PYCOMM_CHECK(fds.size() == 2 * static_cast<size_t>(n_local) + 1,
               "a doorbell and a heap per rank, and the host's page");
  host_page_ = map_shared(fds[2].get(), nbytes);
  fds.erase(fds.begin() + 2);
  const Member& me = member(rank_);
  std::vector<PeerMemory::Peer> peers;
  for (size_t i = 0; i < local_ranks_.size(); ++i) {
    const Member& peer = member(local_ranks_[i]);
    doorbells_.push_back(std::move(fds[2 * i]));
    // Where the peer's pid means something here. Elsewhere a lost peer shows by its deadline.
    const bool known = peer.pid_namespace == me.pid_namespace;
    const bool watch = known && peer.pid != me.pid;
    processes_.emplace_back(watch ? static_cast<int>(::syscall(SYS_pidfd_open, peer.pid, 0)) : -1);
    peers.push_back({known ? peer.pid : 0, peer.probe, std::move(fds[2 * i + 1]),
                     &host_line(local_ranks_[i]).memory});
  }
  peer_memory_.attach(index, std::move(peers));
}

std::string Endpoint::whereabouts(int rank) const {
  return "host " + member(rank).host + ", pid " + std::to_string(member(rank).pid);
}

Endpoint::HostLine& Endpoint::host_line(int rank) const {
  return reinterpret_cast<HostLine*>(host_page_.data())[place(rank)];
}

void Endpoint::ring(int rank) {
  // Orders the caller's publication before this look at the sleeper; pairs with the fence in
  // prepare_sleep().
  full_fence();
  ring_sleeper(rank);
}

void Endpoint::ring_others(const std::vector<int>& ranks) {
  full_fence();  // as in ring()
  for (const int rank : ranks)
    if (rank != rank_) ring_sleeper(rank);
}

void Endpoint::ring_sleeper(int rank) {
  if (sleeper(rank).sleepers.load(std::memory_order_relaxed) == 0) return;
  const uint64_t one = 1;
  // A full counter (EAGAIN) has been rung already.
  [[maybe_unused]] const auto n =
      ::write(doorbells_[static_cast<size_t>(local_index_[static_cast<size_t>(rank)])].get(), &one,
              sizeof(one));
}

void Endpoint::prepare_sleep() {
  sleeper(rank_).sleepers.fetch_add(1, std::memory_order_relaxed);
  full_fence();  // what the caller re-checks next is newer than this
}

void Endpoint::sleep(const std::vector<pollfd>& sockets, std::chrono::milliseconds limit) {
  const int index = local_index_[static_cast<size_t>(rank_)];
  if (limit.count() > 0) {
    std::vector<pollfd> entries{{doorbells_[static_cast<size_t>(index)].get(), POLLIN, 0}};
    entries.insert(entries.end(), sockets.begin(), sockets.end());
    ::poll(entries.data(), entries.size(), static_cast<int>(limit.count()));
    uint64_t rings = 0;
    if ((entries[0].revents & POLLIN) != 0) {
      [[maybe_unused]] const auto n = ::read(entries[0].fd, &rings, sizeof(rings));
    }
  }
  sleeper(rank_).sleepers.fetch_sub(1, std::memory_order_relaxed);
}

bool Endpoint::shares_core(const std::vector<int>& ranks) {
  const int core = ::sched_getcpu();
  auto& mine = host_line(rank_).core;
  // Relaxed: a hint; a stale one costs some microseconds.
  if (mine.load(std::memory_order_relaxed) != core) mine.store(core, std::memory_order_relaxed);
  return std::any_of(ranks.begin(), ranks.end(), [&](int rank) {
    return rank != rank_ && host_line(rank).core.load(std::memory_order_relaxed) == core;
  });
}

bool Endpoint::ended(int rank) const {
  const int index = local_index_[static_cast<size_t>(rank)];
  if (index < 0 || !processes_[static_cast<size_t>(index)]) return false;
  pollfd entry{processes_[static_cast<size_t>(index)].get(), POLLIN, 0};
  return ::poll(&entry, 1, 0) > 0;
}

}  // namespace pycomm::cpu
