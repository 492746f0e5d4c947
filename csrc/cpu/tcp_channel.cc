#include "cpu/tcp_channel.h"

#include <sys/socket.h>

#include <algorithm>
#include <cstdlib>

namespace pycomm::cpu {
namespace {

// How long a host may leave a path unanswered: less where others stand, more where it is the last.
constexpr auto kPathPatience = std::chrono::seconds(3);
constexpr auto kLastPathPatience = std::chrono::seconds(15);
constexpr auto kLookAtPaths = std::chrono::milliseconds(1);
constexpr size_t kDirectBytes = 16 << 10;  // more of a frame than this is read past the staging

int sockets_per_nic() {
  const char* text = std::getenv("PYCOMM_SOCKETS");
  if (text == nullptr || *text == '\0') return 1;
  char* end = nullptr;
  const long n = std::strtol(text, &end, 10);
  if (*end != '\0' || n < 1 || n > 16)
    throw Error(Code::invalid_argument,
                "PYCOMM_SOCKETS is '" + std::string(text) +
                    "'; give the number of connections per pair of NICs, 1 to 16");
  return static_cast<int>(n);
}

}  // namespace

std::string TcpChannel::describe() const {
  std::string text = "host " + peer_.host + ", tcp ";
  for (size_t i = 0; i < peer_.addresses.size(); ++i)
    text += (i > 0 ? " and " : "") + peer_.addresses[i].text();
  if (out_ < 0 && !accepts())
    for (const auto& path : paths_)
      if (path && path->unanswered() > std::chrono::seconds(1))
        text += ", no answer from " + path->describe();
  return text + problems_;
}

std::vector<uint64_t> TcpChannel::bytes_by_path() const {
  std::vector<uint64_t> sent;
  for (const auto& path : paths_) sent.push_back(path ? path->bytes_sent() : 0);
  return sent;
}

void TcpChannel::add_waits(std::vector<pollfd>& entries) const {
  if (out_ < 0 && accepts()) endpoint_.listener().add_waits(entries);
  for (size_t i = 0; i < paths_.size(); ++i)
    if (paths_[i]) paths_[i]->add_wait(entries, in_ < 0 || static_cast<size_t>(in_) == i);
}

// Before the lower rank connects, nothing shows whether it lives. Its listener does: when its
// process has ended nobody answers there. Once connected, a host that is gone acknowledges nothing.
void TcpChannel::probe() {
  for (const auto& path : paths_)
    if (path && path->is_open() && path->silent())
      lost(path->describe(), "its host has acknowledged nothing for 20 s");
  if (joined() || !accepts()) return;
  if (!knock_) {
    try {
      knock_ = tcp_connect(peer_.addresses.front());
    } catch (const Error&) {
      return;  // no route from here says nothing about that process
    }
  }
  pollfd entry{knock_.get(), POLLOUT, 0};
  if (::poll(&entry, 1, 0) <= 0) return;
  int error = 0;
  socklen_t length = sizeof(error);
  ::getsockopt(knock_.get(), SOL_SOCKET, SO_ERROR, &error, &length);
  knock_.reset();
  if (error == ECONNREFUSED)  // another error may be a firewall's
    lost(peer_.addresses.front().text(), "nobody listens there any more");
}

void TcpChannel::lost(const std::string& path, const std::string& how) const {
  throw Error(Code::peer_lost, "rank " + std::to_string(peer_.rank) + " lost rank " +
                                   std::to_string(peer_.peer) + " (host " + peer_.host + ", tcp " +
                                   path + "): " + how +
                                   ". Its process ended or the network between broke.");
}

// ---- paths ----

void TcpChannel::connect_paths() {
  const auto& own = endpoint_.listener().addresses();
  const auto& theirs = peer_.addresses;
  const size_t n_nics = std::max(own.size(), theirs.size());
  n_pending_ = std::min<size_t>(n_nics * static_cast<size_t>(sockets_per_nic()), kMaxPaths);
  Greeting greeting{peer_.group, peer_.rank, peer_.peer, peer_.lane, 0, 0, 0, 0};
  greeting.n_paths = static_cast<int16_t>(n_pending_);
  for (size_t i = 0; i < n_pending_; ++i) {
    greeting.path = static_cast<int16_t>(i);
    // Where the host has one address, the system's routes know best.
    paths_.push_back(std::make_unique<TcpSocket>(
        theirs[i % theirs.size()], own.size() > 1 ? own[i % own.size()].address : "", greeting));
  }
}

// A path that failed, or that the other host leaves unanswered, is left out with a warning; without
// any there is no channel.
void TcpChannel::give_up_paths() {
  const auto patience =
      n_open_ > 0 ? Clock::duration(kPathPatience) : Clock::duration(kLastPathPatience);
  std::string failed;
  for (auto& path : paths_) {
    if (!path || path->is_open()) continue;
    if (path->problem().empty() && path->unanswered() < patience) continue;
    failed +=
        "; " + path->describe() + ": " +
        (path->problem().empty() ? "no answer, is a port or a cable blocked?" : path->problem());
    path.reset();
    --n_pending_;
  }
  problems_ += failed;
  if (n_pending_ > 0 || problems_.empty()) return;  // one warning for all of them
  if (n_open_ == 0) lost("no path", problems_.substr(2));
  endpoint_.listener().warn_once("rank " + std::to_string(peer_.rank) + " cannot reach rank " +
                                 std::to_string(peer_.peer) + " (host " + peer_.host +
                                 ") by every path and goes on by the others" + problems_);
}

void TcpChannel::advance_paths() {
  if (accepts()) {
    while (auto taken =
               endpoint_.listener().take(peer_.group, peer_.peer, peer_.rank, peer_.lane)) {
      if (paths_.empty()) {
        paths_.resize(static_cast<size_t>(taken->n_paths));
        n_pending_ = paths_.size();
      }
      const auto index = static_cast<size_t>(taken->path);
      if (index >= paths_.size() || paths_[index]) continue;  // no second one: it is dropped
      paths_[index] = std::make_unique<TcpSocket>(std::move(taken->socket));
      ++n_open_;
      --n_pending_;
    }
  } else {
    if (paths_.empty()) connect_paths();
    for (const auto& path : paths_)
      if (path && !path->is_open() && path->advance(endpoint_.secret())) {
        ++n_open_;
        --n_pending_;
      }
    give_up_paths();
  }
}

bool TcpChannel::open() {
  if (n_pending_ == 0) [[likely]]
    return true;
  if (out_ >= 0) {
    const auto now = Clock::now();
    if (now - looked_ < kLookAtPaths) return true;
    looked_ = now;
  }
  advance_paths();
  for (size_t i = 0; out_ < 0 && i < paths_.size(); ++i)
    if (paths_[i] && paths_[i]->is_open()) out_ = static_cast<int>(i);
  return out_ >= 0;
}

// The path with the least before it, once `more` bytes are on the current one.
int TcpChannel::least_queued(size_t more) const {
  int best = out_;
  size_t least = SIZE_MAX;
  for (size_t i = 0; i < paths_.size(); ++i) {
    if (!paths_[i] || !paths_[i]->is_open()) continue;
    const size_t queued = paths_[i]->queued() + (static_cast<int>(i) == out_ ? more : 0);
    if (queued >= least) continue;
    least = queued;
    best = static_cast<int>(i);
  }
  return best;
}

// ---- out ----

size_t TcpChannel::send(int path, const void* data, size_t nbytes) {
  TcpSocket& socket = *paths_[static_cast<size_t>(path)];
  const size_t n = socket.send(data, nbytes);
  if (!socket.problem().empty()) [[unlikely]] {
    hear_last_words();
    lost(socket);
  }
  return n;
}

// After a failed send: the peer's own account of what went wrong may have come in. It says more.
void TcpChannel::hear_last_words() {
  for (bool more = true; more;) {
    more = false;
    while (next_frame() && !paths_[static_cast<size_t>(in_)]->staged().empty()) {
      consume(std::min(frame_left_in_, paths_[static_cast<size_t>(in_)]->staged().size()));
      more = true;
    }
    if (in_ < 0 || !paths_[static_cast<size_t>(in_)]) return;
    TcpSocket& socket = *paths_[static_cast<size_t>(in_)];
    const size_t before = socket.staged().size();
    socket.receive(nullptr, 0);
    more = more || socket.staged().size() > before;
  }
}

size_t TcpChannel::write(const void* data, size_t nbytes) {
  if (!open() || nbytes == 0) return 0;
  if (frame_left_out_ == 0) {
    const bool stripes = n_open_ > 1 && nbytes > kGatherBytes;
    frame_left_out_ = std::min(nbytes, stripes ? kStripeBytes : kFrameBytes);
    next_out_ = stripes ? least_queued(frame_left_out_) : out_;
    const FrameHeader header{kFrameMagic, 0, static_cast<uint8_t>(next_out_),
                             static_cast<uint32_t>(frame_left_out_), n_out_++};
    paths_[static_cast<size_t>(out_)]->gather(&header, sizeof(header));
  }
  TcpSocket& socket = *paths_[static_cast<size_t>(out_)];
  size_t n = std::min(nbytes, frame_left_out_);
  if (n <= kGatherBytes && socket.gathered() < 4 * kGatherBytes)
    socket.gather(data, n);
  else
    n = send(out_, data, n);
  frame_left_out_ -= n;
  bytes_written_ += n;
  if (frame_left_out_ == 0) out_ = next_out_;
  return n;
}

void TcpChannel::flush() {
  for (size_t i = 0; i < paths_.size(); ++i)
    if (paths_[i] && paths_[i]->gathered() > 0) send(static_cast<int>(i), nullptr, 0);
}

bool TcpChannel::flushed() const {
  return std::all_of(paths_.begin(), paths_.end(),
                     [](const auto& path) { return !path || path->gathered() == 0; });
}

void TcpChannel::poison(const Status& why) {
  if (out_ < 0) return;
  if (!can_say_why()) {  // mid-frame no word gets through
    for (const auto& path : paths_)
      if (path) path->shut_down();
    return;
  }
  TcpSocket& socket = *paths_[static_cast<size_t>(out_)];
  const size_t nbytes = std::min(why.message.size(), TcpSocket::kStagingBytes / 2);
  const FrameHeader header{kFrameMagic, static_cast<uint8_t>(why.code), static_cast<uint8_t>(out_),
                           static_cast<uint32_t>(nbytes), n_out_++};
  socket.gather(&header, sizeof(header));
  socket.gather(why.message.data(), nbytes);
  for (const auto& path : paths_)
    if (path && path->gathered() > 0) path->send(nullptr, 0);
}

// ---- in ----

size_t TcpChannel::receive(void* data, size_t nbytes, size_t staged) {
  const auto& path = paths_[static_cast<size_t>(in_)];
  if (!path || !path->is_open()) {  // the peer uses a path before this side has seen it stand
    advance_paths();
    if (!path || !path->is_open()) return 0;
  }
  const size_t n = path->receive(data, nbytes, staged);
  if (!path->problem().empty() && n == 0) lost(*path);
  return n;
}

// Nobody has said on which path the first frame comes.
void TcpChannel::receive_somewhere() {
  const TcpSocket* broken = nullptr;
  for (size_t i = 0; i < paths_.size(); ++i) {
    if (!paths_[i] || !paths_[i]->is_open()) continue;
    if (paths_[i]->staged().size() < sizeof(FrameHeader)) paths_[i]->receive(nullptr, 0);
    FrameHeader header;
    if (paths_[i]->staged().size() >= sizeof(header)) {
      std::memcpy(&header, paths_[i]->staged().data(), sizeof(header));
      if (header.number == 0) {
        in_ = static_cast<int>(i);
        return;
      }
    }
    if (!paths_[i]->problem().empty()) broken = paths_[i].get();
  }
  if (broken != nullptr) lost(*broken);
}

bool TcpChannel::next_frame() {
  while (frame_left_in_ == 0) {
    if (in_ < 0) return false;
    const auto& path = paths_[static_cast<size_t>(in_)];
    if (!path || path->staged().size() < sizeof(FrameHeader)) return false;
    FrameHeader header;
    std::memcpy(&header, path->staged().data(), sizeof(header));
    if (header.magic != kFrameMagic || header.nbytes > kFrameBytes || header.number != n_in_ ||
        header.next >= paths_.size())
      lost(path->describe(), "its bytes make no sense");
    if (header.code != 0) {
      if (header.nbytes > TcpSocket::kStagingBytes / 2)
        lost(path->describe(), "its bytes make no sense");
      if (path->staged().size() < sizeof(header) + header.nbytes)
        return false;  // the text is on its way
      const auto* text = reinterpret_cast<const char*>(path->staged().data() + sizeof(header));
      throw Error(static_cast<Code>(header.code), std::string(text, header.nbytes));
    }
    path->unstage(sizeof(header));
    path->align_staged();  // after an odd-sized frame
    frame_left_in_ = header.nbytes;
    next_in_ = header.next;
    ++n_in_;
    if (frame_left_in_ == 0) in_ = next_in_;
  }
  return true;
}

std::span<const std::byte> TcpChannel::readable(size_t at_least) {
  if (!open()) return {};
  if (in_ < 0) receive_somewhere();
  if (in_ < 0) return {};
  const auto here = [this] {
    const auto staged = paths_[static_cast<size_t>(in_)]->staged();
    return staged.first(std::min(frame_left_in_, staged.size()));
  };
  if (!next_frame() || here().size() < std::min(at_least, frame_left_in_)) {
    receive(nullptr, 0, TcpSocket::kStagingBytes);
    if (!next_frame()) return {};
  }
  return here();
}

void TcpChannel::consume(size_t nbytes) {
  paths_[static_cast<size_t>(in_)]->unstage(nbytes);
  frame_left_in_ -= nbytes;
  if (frame_left_in_ == 0) in_ = next_in_;
}

size_t TcpChannel::read(void* data, size_t nbytes) {
  if (!open()) return 0;
  if (next_frame() && paths_[static_cast<size_t>(in_)]->staged().empty()) {
    // Nothing staged: the frame's rest goes straight to where it belongs, and of what follows
    // only what is small is worth a copy.
    const size_t n = std::min(nbytes, frame_left_in_);
    const size_t staged = frame_left_in_ < kDirectBytes ? TcpSocket::kStagingBytes
                          : n == frame_left_in_         ? sizeof(FrameHeader)
                                                        : 0;
    const size_t got = receive(data, n, staged);
    frame_left_in_ -= got;
    if (frame_left_in_ == 0) in_ = next_in_;
    return got;
  }
  const auto here = readable();
  const size_t n = std::min(nbytes, here.size());
  if (n == 0) return 0;
  std::memcpy(data, here.data(), n);
  consume(n);
  return n;
}

}  // namespace pycomm::cpu
