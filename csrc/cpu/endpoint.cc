#include "cpu/endpoint.h"

#include <poll.h>
#include <sched.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <fstream>
#include <map>
#include <new>
#include <optional>
#include <set>
#include <sstream>

#include "core/engine.h"
#include "core/fingerprint.h"
#include "cpu/segment.h"
#include "cpu/waiter.h"

namespace pycomm::cpu {
namespace {

// How long to wait awake, by default: a wake-up takes some 80 us. Where ranks outnumber cores,
// yielding is what lets the others answer: stay with it longer.
constexpr std::chrono::microseconds kAwake(150), kAwakeOversubscribed(1000);
constexpr std::chrono::microseconds kAwakeMost(2000);  // whatever a wake-up takes

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

// One value a line; Error(internal) where one is missing.
std::string pack(const Member& member) {
  std::ostringstream out;
  out << member.host << '\n'
      << member.machine << '\n'
      << member.boot_id << '\n'
      << member.pid_namespace << '\n'
      << member.pid << '\n'
      << member.addresses << '\n'
      << member.mailbox << '\n'
      << member.file_size << '\n'
      << member.refused << '\n';
  return out.str();
}

Member unpack(const std::string& text) {
  Member member;
  std::istringstream in(text);
  std::string pid, file_size;
  for (std::string* value : {&member.host, &member.machine, &member.boot_id, &member.pid_namespace,
                             &pid, &member.addresses, &member.mailbox, &file_size, &member.refused})
    if (!std::getline(in, *value))
      throw Error(Code::internal, "a rank published a member entry that cannot be read");
  member.pid = std::stoi(pid);
  member.file_size = std::stoull(file_size);
  member.label = member.host;
  return member;
}

const std::string kFailed = "failed: ";  // in place of a member: why it could not set up

// What tells a process from a later one with its number; empty where there is none, or none that
// lives.
std::string birth(int pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string text;
  std::getline(file, text);
  std::istringstream fields(text.substr(std::min(text.size(), text.rfind(')') + 2)));
  std::string state, field;
  fields >> state;
  for (int i = 4; i <= 22 && fields; ++i) fields >> field;  // the 22nd is its start
  return state == "Z" || state == "X" ? "" : field;
}

std::string list_of(const std::vector<int>& ranks) {
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (size_t i = 0; i < ranks.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(ranks[i]);
  return text;
}

constexpr Clock::duration kCoreLook = std::chrono::microseconds(250);
constexpr Clock::duration kHeld = std::chrono::milliseconds(50);
constexpr Clock::duration kShortestStay = std::chrono::milliseconds(10);
constexpr Clock::duration kLongestStay = std::chrono::seconds(1);

int usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  return ::sched_getaffinity(0, sizeof(set), &set) == 0 ? std::max(1, CPU_COUNT(&set)) : 1;
}

}  // namespace

Member Endpoint::describe_self(const EndpointOptions& options) {
  Member self;
  self.boot_id = boot_id();
  self.machine = self.boot_id + "/" + namespace_id("net");
  self.pid_namespace = namespace_id("pid");
  self.pid = ::getpid();
  char name[256] = {};
  ::gethostname(name, sizeof(name) - 1);
  self.host = options.host_id.empty() ? std::string(name) + "-" + short_hash(self.machine)
                                      : options.host_id;
  listener_ = std::make_unique<TcpListener>(options.address);
  self.addresses = cpu::pack(listener_->addresses());
  self.file_size = file_size_limit();
  try {
    mailbox_ = std::make_unique<Mailbox>();
    self.mailbox = mailbox_->address();
    make_shared_memory("pycomm-probe", 4096);
    peer_memory_.heap().share();
  } catch (const Error& error) {
    if (error.code() == Code::no_files) throw;  // connections would need more of them
    self.refused = error.what();
  }
  return self;
}

std::shared_ptr<Endpoint> Endpoint::create(Store& store, int rank, int size,
                                           const EndpointOptions& options) {
  if (options.host_id.find('\n') != std::string::npos)
    throw Error(Code::invalid_argument, "a host id cannot hold a line break");
  const auto deadline = Clock::now() + options.timeout;
  std::shared_ptr<Endpoint> self(new Endpoint());
  self->rank_ = rank;
  std::optional<Error> failed;
  std::string me;
  try {
    me = pack(self->describe_self(options));
  } catch (const Error& error) {  // the others need not wait for their deadlines
    failed = error;
    me = kFailed + error.what();
  }
  if (rank == 0) {
    const uint64_t words[2] = {random_u64(), random_u64()};
    store.set("secret", std::string(reinterpret_cast<const char*>(words), sizeof(words)));
  }
  store.set("member/" + std::to_string(rank), me);
  if (failed) throw *failed;
  std::vector<std::string> keys{"secret"};
  for (int i = 0; i < size; ++i) keys.push_back("member/" + std::to_string(i));
  const auto values = store.get_all(keys, options.timeout);
  PYCOMM_CHECK(values[0].size() == sizeof(Secret), "the job's secret has another size");
  std::memcpy(self->secret_.data(), values[0].data(), sizeof(Secret));
  self->listener_->set_secret(self->secret_);
  for (int i = 0; i < size; ++i) {
    const std::string& text = values[static_cast<size_t>(i) + 1];
    if (text.starts_with(kFailed))
      throw Error(Code::peer_lost, "rank " + std::to_string(i) +
                                       " could not set itself up: " + text.substr(kFailed.size()));
    self->members_.push_back(unpack(text));
  }
  self->find_places();
  self->share_host(deadline);
  self->collect_warnings();
  return self;
}

Endpoint::~Endpoint() = default;

// Which ranks share memory: every rank comes to the same result.
void Endpoint::find_places() {
  for (int i = 0; i < size(); ++i) {
    Member& one = members_[static_cast<size_t>(i)];
    int n = 0;
    uint64_t limit = UINT64_MAX;
    for (const Member& other : members_)
      if (other.label == one.label && other.refused.empty()) {
        ++n;
        limit = std::min(limit, other.file_size);
      }
    if (one.refused.empty() && n > 1 && Segment(n).nbytes() > limit)
      one.host += "/" + std::to_string(i);
  }
  // In a second pass, so that the first saw every rank of a host alike.
  for (int i = 0; i < size(); ++i) {
    Member& one = members_[static_cast<size_t>(i)];
    if (one.host != one.label)
      one.refused = "the limit on file sizes (ulimit -f) is less than the host's shared memory";
    else if (!one.refused.empty())
      one.host += "/" + std::to_string(i);
  }
  const Member& me = member(rank_);
  int on_machine = 0;
  for (int i = 0; i < size(); ++i) {
    const Member& other = member(i);
    on_machine += other.boot_id == me.boot_id;
    const bool local = other.host == me.host;
    if (local && other.machine != me.machine)
      throw Error(Code::invalid_argument, "ranks " + std::to_string(rank_) + " and " +
                                              std::to_string(i) + " both say host '" + me.host +
                                              "' but run on different machines or network "
                                              "namespaces, which cannot share memory; give them "
                                              "different PYCOMM_HOST_ID, or unset it");
    local_index_.push_back(local ? static_cast<int>(local_ranks_.size()) : -1);
    if (local) local_ranks_.push_back(i);
  }
  oversubscribed_ = on_machine > usable_cores();
}

void Endpoint::share_host(Clock::time_point deadline) {
  try {
    exchange(deadline);
  } catch (const Error& error) {  // the others need not wait for their deadlines
    for (const int i : local_ranks_) {
      if (i == rank_ || !mailbox_) continue;
      try {
        mailbox_->send(member(i).mailbox, keyed("host"), rank_,
                       kFailed + std::string(error.what()).substr(0, 1000), {}, Clock::now());
      } catch (const Error&) {  // that one has gone as well
      }
    }
    throw;
  }
  await_host(1, deadline);
  look_at_memory(deadline);
}

// Every rank of a host hands its doorbell and its heap to every other, the first one also the page
// they share.
void Endpoint::exchange(Clock::time_point deadline) {
  const size_t n_local = local_ranks_.size();
  const auto index = static_cast<size_t>(place(rank_));
  const size_t nbytes = sizeof(HostLine) * n_local;
  const Member& me = member(rank_);
  doorbells_.resize(n_local);
  doorbells_[index] = UniqueFd(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!doorbells_[index]) throw_errno(Code::internal, "eventfd");
  SharedMemory memory;
  std::vector<int> mine{doorbells_[index].get(), peer_memory_.heap().fd()};
  if (n_local == 1) {
    host_page_ = map_own(nbytes);
  } else if (index == 0) {
    memory = make_shared_memory("pycomm-host", nbytes);
    host_page_ = map_shared(memory.fd.get(), nbytes);
    mine.push_back(memory.fd.get());
  }
  const uint64_t key = keyed("host");
  for (const int i : local_ranks_)
    if (i != rank_) mailbox_->send(member(i).mailbox, key, rank_, "", mine, deadline);
  std::vector<PeerMemory::Peer> peers(n_local);
  for (size_t i = 0; i < n_local; ++i) {
    if (i == index) continue;
    const int rank = local_ranks_[i];
    auto letter = mailbox_->take(key, rank, deadline);
    if (!letter)
      throw Error(Code::timeout, "rank " + std::to_string(rank) + " (" + whereabouts(rank) +
                                     ") did not come to share memory; did it start?");
    if (letter->text.starts_with(kFailed))
      throw Error(Code::peer_lost,
                  "rank " + std::to_string(rank) + " (" + whereabouts(rank) +
                      ") could not set itself up: " + letter->text.substr(kFailed.size()));
    PYCOMM_CHECK(letter->fds.size() == (i == 0 ? 3u : 2u), "what a rank of the host hands over");
    doorbells_[i] = std::move(letter->fds[0]);
    peers[i].heap = std::move(letter->fds[1]);
    if (i == 0) host_page_ = map_shared(letter->fds[2].get(), nbytes);
  }
  std::string watch_refused;
  for (size_t i = 0; i < n_local; ++i) {
    const Member& peer = member(local_ranks_[i]);
    // Where the peer's pid means something here. Elsewhere a lost peer shows by its deadline.
    const bool known = peer.pid_namespace == me.pid_namespace;
    const bool watch = known && peer.pid != me.pid;
    processes_.emplace_back(watch ? static_cast<int>(::syscall(SYS_pidfd_open, peer.pid, 0)) : -1);
    births_.emplace_back();
    if (watch && !processes_.back()) {
      watch_refused = errno_text("pidfd_open");
      births_.back() = birth(peer.pid);
    }
    peers[i].line = &host_line(local_ranks_[i]).memory;
    struct stat info{};
    if (peers[i].heap && ::fstat(peers[i].heap.get(), &info) == 0)
      peers[i].heap_nbytes = static_cast<size_t>(info.st_size);
  }
  std::vector<StandstillLine*> waits;
  for (const int i : local_ranks_) waits.push_back(&host_line(i).standstill);
  standstill_.attach(static_cast<int>(index), std::move(waits), local_ranks_);
  HostLine& line = host_line(rank_);
  peer_memory_.heap().instead().copy(line.memory_instead, kProblemBytes - 1);
  watch_refused.copy(line.watch_refused, kProblemBytes - 1);
  peer_memory_.attach(static_cast<int>(index), std::move(peers));
  line.landmark = reinterpret_cast<uint64_t>(&secret_);
  admit_siblings();
  line.attached.store(1, std::memory_order_release);  // pairs with await_host()
}

// Until every rank of the host has attached: what each found is what groups are made by.
void Endpoint::await_host(uint32_t stage, Clock::time_point deadline) {
  for (const int i : local_ranks_) ring(i);
  for (const int i : local_ranks_) {
    const auto attached = [&] {
      return host_line(i).attached.load(std::memory_order_acquire) >= stage;
    };
    while (!attached()) {
      prepare_sleep();
      sleep({}, attached() ? std::chrono::milliseconds(0) : std::chrono::milliseconds(20));
      if (attached()) break;
      if (ended(i) || Clock::now() >= deadline)
        throw Error(ended(i) ? Code::peer_lost : Code::timeout,
                    "rank " + std::to_string(i) + " (" + whereabouts(i) + ") " +
                        (ended(i) ? "ended" : "stands still") + " while this host's ranks set up");
    }
  }
}

void Endpoint::look_at_memory(Clock::time_point deadline) {
  HostLine& line = host_line(rank_);
  for (const int i : local_ranks_) {
    errno = 0;
    reached_.push_back(finds_landmark(i));
    if (!reached_.back() && line.reach_refused[0] == 0)
      (errno == 0 ? "process_vm_readv: a pid is another process's here"
                  : errno_text("process_vm_readv"))
          .copy(line.reach_refused, kProblemBytes - 1);
  }
  line.attached.store(2, std::memory_order_release);
  await_host(2, deadline);
}

// Yama, which many systems have, lets only a process's ancestors read its memory, and whom it
// names: here the launcher with all its descendants, the other ranks among them (prctl(2),
// PR_SET_PTRACER).
void Endpoint::admit_siblings() {
  std::ifstream file("/proc/sys/kernel/yama/ptrace_scope");
  int scope = 0;
  if (file >> scope && scope == 1) ::prctl(PR_SET_PTRACER, ::getppid(), 0, 0, 0);
}

// Reads the peer's copy of the secret, which also tells that its pid means it here.
bool Endpoint::finds_landmark(int rank) const {
  Secret found{};
  const iovec here{&found, sizeof(found)};
  const iovec there{reinterpret_cast<void*>(host_line(rank).landmark), sizeof(found)};
  return ::process_vm_readv(member(rank).pid, &here, 1, &there, 1, 0) == sizeof(found) &&
         found == secret_;
}

void Endpoint::collect_warnings() {
  // The ranks for which problem(rank) is the same text, this one the first of them.
  const auto report = [this](const std::vector<int>& ranks, const auto& problem,
                             const std::string& what, const std::string& instead) {
    const std::string mine = problem(rank_);
    std::vector<int> alike;
    for (const int i : ranks)
      if (problem(i) == mine) alike.push_back(i);
    if (mine.empty() || alike.front() != rank_) return;
    warnings_.push_back("host " + member(rank_).label + ", " + list_of(alike) + ": " + what + " (" +
                        mine + "); " + instead);
  };
  std::vector<int> same_label;
  for (int i = 0; i < size(); ++i)
    if (member(i).label == member(rank_).label) same_label.push_back(i);
  report(
      same_label, [this](int i) { return member(i).refused; }, "no memory shared with other ranks",
      "TCP to them instead, as to another host: several times slower. Lift what refuses it, "
      "or give the ranks different PYCOMM_HOST_ID to choose this.");
  if (local_ranks_.size() == 1) return;
  report(
      local_ranks_, [this](int i) { return std::string(host_line(i).memory_instead); },
      "no memfd for shared memory",
      "that file instead; it takes room there for all a group may use. Allow memfd_create.");
  report(
      local_ranks_, [this](int i) { return std::string(host_line(i).watch_refused); },
      "no watch over other ranks' processes",
      "/proc is read for it instead. Allow pidfd_open (Linux 5.3), or raise ulimit -n.");
  report(
      local_ranks_, [this](int i) { return std::string(host_line(i).reach_refused); },
      "no reading of other ranks' memory",
      "large tensors go through shared memory, several times slower between cores that share no "
      "cache. Allow process_vm_readv (kernel.yama.ptrace_scope at most 1, the same user and pid "
      "namespace, SYS_PTRACE in a container that forbids it), or use tensors from pycomm.empty().");
}

uint64_t Endpoint::keyed(std::string text) const {
  text.resize((text.size() + 7) / 8 * 8);
  return siphash(secret_, text.data(), text.size());
}

uint64_t Endpoint::agree(const std::string& name) {
  std::lock_guard lock(uses_mutex_);
  return keyed("name/" + std::to_string(uses_[name]++) + "/" + name);
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
  sleeper(rank).rung_at.store(Clock::now().time_since_epoch().count(), std::memory_order_relaxed);
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
    const auto since = Clock::now();
    ::poll(entries.data(), entries.size(), static_cast<int>(limit.count()));
    uint64_t rings = 0;
    if ((entries[0].revents & POLLIN) != 0) {
      [[maybe_unused]] const auto n = ::read(entries[0].fd, &rings, sizeof(rings));
      woken(since);
    }
  }
  sleeper(rank_).sleepers.fetch_sub(1, std::memory_order_relaxed);
}

// A bell that ended a sleep which began at `since`.
void Endpoint::woken(Clock::time_point since) {
  const int64_t rung = sleeper(rank_).rung_at.load(std::memory_order_relaxed);
  const int64_t took = Clock::now().time_since_epoch().count() - rung;
  if (rung < since.time_since_epoch().count() || took < 0) return;  // rung before it slept
  const int64_t average = wake_up_ns_.load(std::memory_order_relaxed);
  wake_up_ns_.store(average == 0 ? took : average + (took - average) / 8,
                    std::memory_order_relaxed);  // of two threads that store one may get lost
}

std::chrono::microseconds Endpoint::awake() const {
  const std::chrono::nanoseconds wake_up(wake_up_ns_.load(std::memory_order_relaxed));
  return std::clamp(std::chrono::duration_cast<std::chrono::microseconds>(2 * wake_up),
                    oversubscribed_ ? kAwakeOversubscribed : kAwake, kAwakeMost);
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

int Endpoint::freer_core() const {
  cpu_set_t usable;
  if (::sched_getaffinity(0, sizeof(usable), &usable) != 0) return -1;
  std::map<int, int> n_ranks;  // by core
  for (const int rank : local_ranks_)
    ++n_ranks[host_line(rank).core.load(std::memory_order_relaxed)];
  int best = ::sched_getcpu();
  const int here = n_ranks[best];
  // Of those who wait here the last one leaves: not all at once.
  for (const int rank : local_ranks_)
    if (rank > rank_ && host_line(rank).core.load(std::memory_order_relaxed) == best) return -1;
  for (int core = 0; core < CPU_SETSIZE; ++core)
    if (CPU_ISSET(core, &usable) && n_ranks[core] < n_ranks[best]) best = core;
  return n_ranks[best] + 2 <= here ? best : -1;
}

void Endpoint::leave_crowded_core() {
  // All relaxed: were two threads of this rank to move at once, it would do no harm.
  const auto now = Clock::now().time_since_epoch();
  if (now < next_look_.load(std::memory_order_relaxed)) return;
  next_look_.store(now + kCoreLook, std::memory_order_relaxed);
  const int core = freer_core();
  const bool was_crowded = crowded_.exchange(core >= 0, std::memory_order_relaxed);
  if (core < 0) return;
  const auto moved = moved_.load(std::memory_order_relaxed),
             stay = stay_.load(std::memory_order_relaxed);
  if (!was_crowded) {
    // Where the system moved it back at once, for load that is not ours, leave it there for longer
    // and longer. Else it held until ranks slept and were woken together: that is new.
    stay_.store(now - moved > kHeld ? kShortestStay : std::min(2 * stay, kLongestStay),
                std::memory_order_relaxed);
    return;
  }
  if (now < moved + stay) return;
  crowded_.store(false, std::memory_order_relaxed);
  moved_.store(now, std::memory_order_relaxed);
  cpu_set_t usable, there;
  CPU_ZERO(&there);
  CPU_SET(core, &there);
  if (::sched_getaffinity(0, sizeof(usable), &usable) != 0) return;
  if (::sched_setaffinity(0, sizeof(there), &there) == 0)
    ::sched_setaffinity(0, sizeof(usable), &usable);
}

bool Endpoint::ended(int rank) const {
  const int index = local_index_[static_cast<size_t>(rank)];
  if (index < 0) return false;
  if (const std::string& born = births_[static_cast<size_t>(index)]; !born.empty())
    return birth(member(rank).pid) != born;
  if (!processes_[static_cast<size_t>(index)]) return false;
  pollfd entry{processes_[static_cast<size_t>(index)].get(), POLLIN, 0};
  return ::poll(&entry, 1, 0) > 0;
}

}  // namespace pycomm::cpu
