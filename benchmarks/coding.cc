// How fast values are coded for the wire and back, against copying. Prints a line per measurement:
// what, values, bytes read and written, then a time in seconds for each round. coding.py compiles
// and runs it with the engine's sources.
#include "cpu/coding.h"

#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

using namespace pycomm;

namespace {

struct Task {
  std::string name;
  size_t numel, nbytes;
  std::function<void()> run;
  std::vector<double> seconds = {};
};

constexpr size_t kLarge = size_t{1} << 24, kSegment = kWireSegment;
constexpr int kRounds = 15;

}  // namespace

int main() {
  std::vector<float> values(kLarge), back(kLarge);
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (float& value : values) value = normal(random);
  std::vector<char> coded(kLarge * sizeof(float));
  std::vector<Task> tasks;
  for (const size_t numel : {kSegment, kLarge}) {
    // A segment many times over, so that both read as many values.
    const size_t times = kLarge / numel;
    const auto add = [&](const std::string& name, size_t nbytes,
                         const std::function<void()>& once) {
      tasks.push_back({name, numel, nbytes * times, [times, once] {
                         for (size_t i = 0; i < times; ++i) once();
                       }});
    };
    add("copy", 2 * numel * sizeof(float),
        [&, numel] { std::memcpy(back.data(), values.data(), numel * sizeof(float)); });
    for (Wire wire : {Wire::bf16, Wire::fp8, Wire::int8, Wire::int4}) {
      const size_t nbytes = numel * sizeof(float) + coded_nbytes(wire, numel);
      add(std::string("encode ") + name_of(wire), nbytes,
          [&, numel, wire] { cpu::encode(coded.data(), values.data(), numel, wire); });
      add(std::string("decode ") + name_of(wire), nbytes,
          [&, numel, wire] { cpu::decode(back.data(), coded.data(), numel, wire); });
    }
  }
  for (int round = -1; round < kRounds; ++round)  // they take turns; the first round warms up
    for (Task& task : tasks) {
      const auto begin = std::chrono::steady_clock::now();
      task.run();
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
      if (round >= 0) task.seconds.push_back(took.count());
    }
  for (const Task& task : tasks) {
    std::printf("%s\t%zu\t%zu", task.name.c_str(), task.numel, task.nbytes);
    for (double seconds : task.seconds) std::printf("\t%.9f", seconds);
    std::printf("\n");
  }
}
