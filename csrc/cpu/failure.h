// What an engine does about failure (failure.cc) that the rest of it uses too.
#pragma once

#include <chrono>
#include <string>

#include "core/engine.h"
#include "cpu/segment.h"

namespace pycomm::cpu {

constexpr auto kStorePatience =
    std::chrono::milliseconds(200);  // for the store's answer, where it matters
constexpr auto kWordPatience = std::chrono::milliseconds(
    2000);  // likewise where else nobody learns why: a connection to the store may take that long
constexpr auto kGrace = std::chrono::milliseconds(
    50);  // after a broken link: the reason is on its way from a rank of this host
constexpr auto kRetire =
    std::chrono::milliseconds(1000);  // for a rank that is in the middle of a block of ours

constexpr auto kStandstill = std::chrono::milliseconds(
    400);  // of waiting, before a rank asks whether others wait for it elsewhere
constexpr auto kLookAgain = std::chrono::milliseconds(50);

std::string seconds_text(Clock::duration duration);
// Says why a group is broken, unless that has been said.
void poison(SegmentHeader& header, const Status& why);

}  // namespace pycomm::cpu
