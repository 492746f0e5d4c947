#include "cpu/coded_streams.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "cpu/coding.h"
#include "cpu/reduce.h"

namespace pycomm::cpu {
namespace {

constexpr uint64_t kAlign = 64;
constexpr uint64_t align_up(uint64_t nbytes) { return (nbytes + kAlign - 1) & ~(kAlign - 1); }
constexpr uint64_t kUnsealed = UINT64_MAX;

uint64_t coded(const Launch& launch, uint64_t nbytes) {
  return coded_nbytes(launch.wire, nbytes / sizeof(float));
}

uint64_t segment(uint64_t begin, uint64_t end) { return std::min(end - begin, kCodedSegmentBytes); }

}  // namespace

void CodedStreams::begin(const Launch& launch, size_t n_links) {
  const uint64_t stride = align_up(coded(launch, kCodedSegmentBytes));
  uint64_t needed = 2 * stride * n_links;
  sealed_at_.assign(static_cast<size_t>(launch.program->n_chunks), kUnsealed);
  for (const Step& step : launch.program->steps) {
    if (step.kind == StepKind::send || (step.flags & kSealed) == 0) continue;
    sealed_at_[static_cast<size_t>(step.chunk)] = needed;
    needed += align_up(coded(launch, launch.layout.nbytes(step.chunk)));
  }
  if (needed > memory_nbytes_) {
    memory_ = std::make_unique_for_overwrite<std::byte[]>(needed);
    memory_nbytes_ = needed;
  }
  streams_.assign(n_links, Stream{});
  for (size_t i = 0; i < n_links; ++i) {
    streams_[i].out = memory_.get() + 2 * i * stride;
    streams_[i].in = streams_[i].out + stride;
  }
  if (launch.residual != nullptr) std::memset(launch.residual, 0, launch.output_nbytes);
}

std::byte* CodedStreams::sealed(const Launch& launch, const Step& step, uint64_t begin) {
  const uint64_t at = sealed_at_[static_cast<size_t>(step.chunk)];
  PYCOMM_CHECK(at != kUnsealed, "no step seals this chunk");
  return memory_.get() + at + coded(launch, begin);
}

void CodedStreams::keep_loss(const Launch& launch, const Step& step, uint64_t begin,
                             const float* values, const float* decoded, uint64_t numel) const {
  float* loss = launch.residual + (launch.layout.output_offset(step.chunk) + begin) / sizeof(float);
  for (uint64_t i = 0; i < numel; ++i) loss[i] = values[i] - decoded[i];
}

size_t CodedStreams::send(const Launch& launch, size_t link, Channel& channel, const Step& step,
                          const std::byte* values, uint64_t limit, uint64_t* done) {
  Stream& stream = streams_[link];
  const std::byte* out = stream.out;
  uint64_t end = *done + segment(*done, limit);
  if ((step.flags & kSealed) != 0) {
    out = sealed(launch, step, *done);
    end = limit;
  } else if (!stream.coded) {
    const auto* from = reinterpret_cast<const float*>(values + *done);
    const uint64_t numel = (end - *done) / sizeof(float);
    encode(stream.out, from, numel, launch.wire);
    if (launch.residual != nullptr) {
      decode(decoded_.get(), stream.out, numel, launch.wire);
      keep_loss(launch, step, *done, from, decoded_.get(), numel);
    }
    stream.coded = true;
  }
  const size_t n = channel.write(
      out + stream.sent,
      std::min<uint64_t>(coded(launch, end - *done) - stream.sent, channel.segment_nbytes()));
  stream.sent += n;
  while (*done < end) {
    const uint64_t whole = segment(*done, end), nbytes = coded(launch, whole);
    if (stream.sent < nbytes) break;
    stream.sent -= nbytes;
    stream.coded = false;
    *done += whole;
  }
  return n;
}

size_t CodedStreams::receive(const Launch& launch, size_t link, Channel& channel, const Step& step,
                             const std::byte* from, std::byte* to, uint64_t nbytes,
                             uint64_t* done) {
  Stream& stream = streams_[link];
  const uint64_t whole = segment(*done, nbytes), needed = coded(launch, whole);
  const size_t n = channel.read(stream.in + stream.received, needed - stream.received);
  stream.received += n;
  if (stream.received < needed) return n;
  stream.received = 0;
  const uint64_t numel = whole / sizeof(float);
  auto* written = reinterpret_cast<float*>(to + *done);
  if (step.kind == StepKind::recv) {
    decode(written, stream.in, numel, launch.wire);
  } else {
    decode(decoded_.get(), stream.in, numel, launch.wire);
    const void* first = from + *done;
    const void* second = decoded_.get();
    if (step.peer < launch.program->rank) std::swap(first, second);
    reduce(written, first, second, numel, DType::float32, launch.op);
  }
  if ((step.flags & kSealed) != 0) seal(launch, step, to + *done, to + *done, *done, whole);
  *done += whole;
  return n;
}

void CodedStreams::seal(const Launch& launch, const Step& step, const std::byte* from,
                        std::byte* to, uint64_t begin, uint64_t n) {
  for (uint64_t at = 0; at < n;) {
    const uint64_t whole = segment(at, n), numel = whole / sizeof(float);
    const auto* values = reinterpret_cast<const float*>(from + at);
    auto* decoded = reinterpret_cast<float*>(to + at);
    std::byte* out = sealed(launch, step, begin + at);
    encode(out, values, numel, launch.wire);
    if (launch.residual != nullptr) {
      decode(decoded_.get(), out, numel, launch.wire);
      keep_loss(launch, step, begin + at, values, decoded_.get(), numel);
      std::memcpy(decoded, decoded_.get(), whole);
    } else {
      decode(decoded, out, numel, launch.wire);
    }
    at += whole;
  }
}

}  // namespace pycomm::cpu
