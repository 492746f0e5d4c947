// How NCCL is found, judged and opened, against small libraries with its names (fake_nccl/).
#include <cstdlib>
#include <map>

#include "cuda/nccl_api.h"
#include "fake_nccl/fake_nccl.h"
#include "testing.h"

using pycomm::cuda::NcclApi;

namespace {

struct Opened {
  pycomm::Status status;
  std::shared_ptr<const NcclApi> api;
};

Opened open(const char* chosen, const std::string& wheel = "") {
  if (chosen) {
    ::setenv("PYCOMM_NCCL_LIB", chosen, 1);
  } else {
    ::unsetenv("PYCOMM_NCCL_LIB");
  }
  Opened opened;
  opened.status = NcclApi::open(wheel, &opened.api);
  return opened;
}

bool contains(const std::string& text, const std::string& part) {
  if (text.find(part) == std::string::npos)
    std::fprintf(stderr, "'%s' lacks '%s'\n", text.c_str(), part.c_str());
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST(good_library_opens_with_version_path_and_features) {
  const Opened opened = open(FAKE_NCCL_GOOD);
  ASSERT_TRUE(opened.status.ok());
  EXPECT_EQ(opened.api->version(), 22905);
  EXPECT_EQ(opened.api->path(), FAKE_NCCL_GOOD);
  std::map<std::string, bool> features;
  for (const auto& feature : opened.api->features()) features[feature.name] = feature.present;
  EXPECT_EQ(features.size(), opened.api->features().size());
  for (const char* present :
       {"split", "register", "window", "shrink", "alltoall", "revoke", "copy_engine"})
    EXPECT_TRUE(features.at(present));
  for (const char* absent : {"suspend", "grow", "allocate"}) EXPECT_TRUE(!features.at(absent));
}

TEST(oldest_library_opens_without_the_newer_features) {
  const Opened opened = open(FAKE_NCCL_OLDEST);
  ASSERT_TRUE(opened.status.ok());
  for (const auto& feature : opened.api->features())
    EXPECT_EQ(feature.present, feature.name == "split");
}

TEST(describe_names_version_result_and_last_error) {
  const Opened opened = open(FAKE_NCCL_GOOD);
  ASSERT_TRUE(opened.status.ok());
  ::fake_nccl_fail_next("ncclGetUniqueId", 2, "connection refused by peer 3");
  pycomm::cuda::NcclUniqueId id;
  const auto result = opened.api->get_unique_id(&id);
  EXPECT_EQ(opened.api->describe(result, nullptr),
            "NCCL 2.29.5: unhandled system error (connection refused by peer 3)");
}

TEST(too_old_is_refused_with_both_versions) {
  const Opened opened = open(FAKE_NCCL_OLD);
  EXPECT_EQ(opened.status.code, pycomm::Code::invalid_argument);
  EXPECT_TRUE(contains(opened.status.message, "is NCCL 2.17.1; pycomm needs 2.18 or newer"));
  EXPECT_TRUE(contains(opened.status.message, FAKE_NCCL_OLD));
  EXPECT_TRUE(!opened.api);
}

TEST(a_missing_function_is_named) {
  EXPECT_TRUE(contains(open(FAKE_NCCL_NO_SPLIT).status.message,
                       "says it is NCCL 2.20.3, but lacks ncclCommSplit"));
}

TEST(a_library_that_is_not_nccl_is_named) {
  EXPECT_TRUE(contains(open("libm.so.6").status.message, "libm.so.6: is not NCCL"));
}

TEST(the_chosen_library_is_the_only_one_tried) {
  const Opened opened = open("/nowhere/libnccl.so.2", FAKE_NCCL_GOOD);
  EXPECT_TRUE(!opened.status.ok());
  EXPECT_TRUE(contains(opened.status.message, "/nowhere/libnccl.so.2"));
  EXPECT_TRUE(contains(opened.status.message, "set PYCOMM_NCCL_LIB"));
}

TEST(the_wheel_comes_before_the_system) {
  const Opened opened = open(nullptr, FAKE_NCCL_GOOD);
  ASSERT_TRUE(opened.status.ok());
  EXPECT_EQ(opened.api->path(), FAKE_NCCL_GOOD);
}
