// Every operation is a set of messages over rings in a file that the ranks map: one ring for each
// ordered pair of ranks. The operations of a group move all at once, each as far as it can, until
// all are done or the communicator is aborted.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "fake_nccl/fake_comm.h"

namespace fake {

thread_local Group group;

namespace {

bool step(ncclComm* comm, Move& move) {
  Ring& ring = comm->shared->rings[move.is_send ? comm->rank * kMaxRanks + move.peer
                                                : move.peer * kMaxRanks + comm->rank];
  const uint64_t head = ring.head, tail = ring.tail;
  const auto take = [&](void* to, uint64_t at, uint64_t n) {
    for (uint64_t i = 0; i < n; ++i) static_cast<char*>(to)[i] = ring.bytes[(at + i) % kRing];
  };
  const auto give = [&](const void* from, uint64_t at, uint64_t n) {
    for (uint64_t i = 0; i < n; ++i)
      ring.bytes[(at + i) % kRing] = static_cast<const char*>(from)[i];
  };
  const uint64_t opening[2] = {move.kind, move.nbytes};
  if (!move.opened) {
    if (move.is_send) {
      if (kRing - (head - tail) < sizeof(opening)) return false;
      give(opening, head, sizeof(opening));
      ring.head = head + sizeof(opening);
    } else {
      uint64_t theirs[2];
      if (head - tail < sizeof(theirs)) return false;
      take(theirs, tail, sizeof(theirs));
      if (std::memcmp(theirs, opening, sizeof(theirs)) != 0) return false;
      ring.tail = tail + sizeof(theirs);
    }
    return move.opened = true;
  }
  const uint64_t room = move.is_send ? kRing - (head - tail) : head - tail;
  const uint64_t n = std::min(room, move.nbytes - move.done);
  if (n == 0) return false;
  if (move.is_send) {
    give(move.data + move.done, head, n);
    ring.head = head + n;
  } else {
    take(move.data + move.done, tail, n);
    ring.tail = tail + n;
  }
  move.done += n;
  return true;
}

void run(void* argument) {
  const std::unique_ptr<Job> job(static_cast<Job*>(argument));
  ncclComm* const comm = job->comm;
  for (const auto& each : job->before) each();
  bool complete = job->moves.empty();
  while (!complete && !comm->gone && !comm->revoked) {  // an error alone ends nothing
    bool moved = false;
    complete = true;
    std::vector<bool> blocked(2 * kMaxRanks, false);
    if (hanging_rank != comm->rank)
      for (Move& move : job->moves) {
        const bool ended = move.opened && move.done == move.nbytes;
        auto lane = blocked[static_cast<size_t>(move.is_send * kMaxRanks + move.peer)];
        if (ended || lane) {
          complete = complete && ended;
          continue;
        }
        while (step(comm, move)) moved = true;
        if (!move.opened || move.done < move.nbytes) {
          lane = true;
          complete = false;
        }
      }
    else
      complete = false;
    if (!moved && !complete) std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
  if (complete)
    for (const auto& each : job->after) each();
  comm->running--;
}

void submit(FakeStream* stream, std::unique_ptr<Job> job) {
  job->comm->running++;
  if (stream == nullptr)
    run(job.release());
  else
    stream->enqueue(run, job.release());
}

}  // namespace

int check(ncclComm* comm, const char* function) {
  if (const int result = failing(function); result != kSuccess) return result;
  if (comm == nullptr) return kInvalidArgument;
  if (comm->error != kSuccess) return comm->error;
  if (comm->revoked || !comm->ready) {
    last_error = comm->revoked ? "communicator was revoked" : "communicator is not ready";
    return kInvalidUsage;
  }
  return kSuccess;
}

Job& job_on(ncclComm* comm, void* stream) {
  for (auto& [on, job] : group.jobs)
    if (on == stream && job->comm == comm) return *job;
  group.jobs.emplace_back(static_cast<FakeStream*>(stream), new Job{comm, {}, {}, {}, {}});
  return *group.jobs.back().second;
}

int end_group() {
  if (--group.depth > 0) return kSuccess;
  auto jobs = std::move(group.jobs);
  group.jobs.clear();
  for (auto& [stream, job] : jobs) submit(stream, std::move(job));
  return kSuccess;
}

void exchange(ncclComm* comm, void* stream, uint64_t kind, const std::vector<int>& to,
              const std::function<std::pair<const void*, size_t>(int)>& out,
              const std::vector<int>& from, size_t nbytes_in,
              std::function<void(const std::vector<const char*>&)> end) {
  Job& job = job_on(comm, stream);
  const auto held =
      std::make_shared<std::vector<std::vector<char>>>(static_cast<size_t>(comm->size));
  for (const int peer : to) {
    const auto [data, nbytes] = out(peer);
    if (peer == comm->rank) continue;
    job.moves.push_back({true, peer, static_cast<char*>(const_cast<void*>(data)), nbytes, kind});
  }
  bool own = false;
  for (const int peer : from) {
    auto& memory = (*held)[static_cast<size_t>(peer)];
    memory.resize(nbytes_in);
    if (peer == comm->rank)
      own = true;
    else
      job.moves.push_back({false, peer, memory.data(), nbytes_in, kind});
  }
  if (own) {
    const void* data = out(comm->rank).first;
    job.before.push_back([held, data, nbytes_in, rank = static_cast<size_t>(comm->rank)] {
      std::memcpy((*held)[rank].data(), data, nbytes_in);
    });
  }
  job.after.push_back([held, end = std::move(end)] {
    std::vector<const char*> pointers;
    for (const auto& memory : *held) pointers.push_back(memory.data());
    end(pointers);
  });
}

std::vector<int> everyone(const ncclComm* comm) {
  std::vector<int> ranks(static_cast<size_t>(comm->size));
  for (int i = 0; i < comm->size; ++i) ranks[static_cast<size_t>(i)] = i;
  return ranks;
}

}  // namespace fake
