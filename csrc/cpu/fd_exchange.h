// Hands file descriptors between the ranks of one host through the leader's abstract unix socket,
// found through the store. Only processes of the same user are answered (SO_PEERCRED): abstract
// sockets have no file permissions.
#pragma once

#include <chrono>
#include <string>
#include <vector>

#include "core/store.h"
#include "cpu/posix.h"

namespace pycomm::cpu {

// All ranks of a host call this with the same key; index 0 is the leader. Each gives any number of
// descriptors (they may differ) and gets every member's, in index order. The given ones stay open
// and the caller's. Errors: Error(timeout) naming how many came; Error(internal) where the kernel
// refuses.
std::vector<UniqueFd> exchange_fds(Store& store, const std::string& key, int index, int n_members,
                                   const std::vector<int>& mine, std::chrono::milliseconds timeout);

}  // namespace pycomm::cpu
