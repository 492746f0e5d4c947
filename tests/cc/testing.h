// The C++ tests' harness: TEST(name) { ... } registers, main() runs those whose name contains
// argv[1] (all without it). An EXPECT that fails is printed and counted, from any thread, and the
// test goes on; ASSERT_TRUE leaves the test, from its own thread only. Each test has kDeadlineS
// seconds, or PYCOMM_TEST_DEADLINE_S; one that hangs is named and ends the process, since its
// threads cannot be stopped.
#pragma once

#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

namespace testing {

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr unsigned kDeadlineS = 240;  // some 10 times slower
#else
constexpr unsigned kDeadlineS = 60;
#endif

struct Test {
  const char* name;
  void (*run)();
};
struct Abandoned {};  // thrown by ASSERT_TRUE once its failure is counted
// Thrown by a test that cannot run here; it counts as neither passed nor failed.
struct NotRun {
  std::string why;
};

inline std::vector<Test> tests;
inline std::atomic<int> failures{0};  // EXPECTs failed in the running test
inline const char* volatile running = "";

struct Registration {
  Registration(const char* name, void (*run)()) { tests.push_back({name, run}); }
};

template <typename T>
std::string show(const T& value) {
  std::ostringstream out;
  if constexpr (requires { out << value; }) {
    out << value;
  } else if constexpr (std::is_enum_v<T>) {
    out << +static_cast<std::underlying_type_t<T>>(value);
  } else {
    out << "(a value)";
  }
  return out.str();
}

inline void fail(const char* file, int line, const std::string& text) {
  failures++;
  std::fprintf(stderr, "%s:%d: %s\n", file, line, text.c_str());
}

template <typename A, typename B>
void expect_eq(const A& a, const B& b, const char* expression, const char* file, int line) {
  if (!(a == b)) fail(file, line, std::string(expression) + ": " + show(a) + " is not " + show(b));
}

template <typename Function>
void expect_throws(Function&& function, const char* text, const char* file, int line) {
  try {
    function();
  } catch (const std::exception& e) {
    if (!std::strstr(e.what(), text))
      fail(file, line, std::string("threw '") + e.what() + "' without '" + text + "'");
    return;
  }
  fail(file, line, std::string("did not throw; expected an exception with '") + text + "'");
}

inline void on_alarm(int) {
  // Only write() and _exit() are safe in a signal handler.
  const char *before = "TIMED OUT: ", *after = "\n";
  for (const char* text : {before, static_cast<const char*>(running), after})
    if (::write(2, text, std::strlen(text)) < 0) break;
  ::_exit(124);
}

inline int run_all(const char* filter) {
  std::signal(SIGALRM, on_alarm);
  const char* const told = std::getenv("PYCOMM_TEST_DEADLINE_S");
  const unsigned deadline_s = told != nullptr ? static_cast<unsigned>(std::atoi(told)) : kDeadlineS;
  int passed = 0, failed = 0, not_run = 0;
  for (const Test& test : tests) {
    if (!std::strstr(test.name, filter)) continue;
    running = test.name;
    failures = 0;
    ::alarm(deadline_s);
    try {
      test.run();
    } catch (const Abandoned&) {
    } catch (const NotRun& reason) {
      ::alarm(0);
      std::printf("NOT RUN %s: %s\n", test.name, reason.why.c_str());
      ++not_run;
      continue;
    } catch (const std::exception& e) {
      fail(test.name, 0, std::string("threw: ") + e.what());
    }
    ::alarm(0);
    if (failures) std::fprintf(stderr, "FAILED %s\n", test.name);
    failures ? ++failed : ++passed;
  }
  std::printf("%d passed, %d failed", passed, failed);
  std::printf(not_run > 0 ? ", %d NOT RUN\n" : "\n", not_run);
  return failed ||
         passed + failed == 0;  // nothing ran: a filter that matches nothing is no success
}

}  // namespace testing

#define TEST(name)                                                           \
  static void test_##name();                                                 \
  static const ::testing::Registration register_##name{#name, &test_##name}; \
  static void test_##name()
#define EXPECT_TRUE(...) \
  ((__VA_ARGS__) ? void() : ::testing::fail(__FILE__, __LINE__, "is false: " #__VA_ARGS__))
#define ASSERT_TRUE(...)                                              \
  do {                                                                \
    if (!(__VA_ARGS__)) {                                             \
      ::testing::fail(__FILE__, __LINE__, "is false: " #__VA_ARGS__); \
      throw ::testing::Abandoned{};                                   \
    }                                                                 \
  } while (0)
#define EXPECT_EQ(a, b) ::testing::expect_eq((a), (b), #a " == " #b, __FILE__, __LINE__)
#define EXPECT_THROWS(text, ...) \
  ::testing::expect_throws([&] { __VA_ARGS__; }, text, __FILE__, __LINE__)

int main(int argc, char** argv) { return ::testing::run_all(argc > 1 ? argv[1] : ""); }
