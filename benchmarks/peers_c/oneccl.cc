// oneCCL's C++ API as C functions for ctypes, each blocking until its result stands. Compiled by peers.py.
#include <oneapi/ccl.hpp>

#include <cstring>
#include <memory>
#include <vector>

namespace {
std::shared_ptr<ccl::kvs> kvs;
std::unique_ptr<ccl::communicator> comm;
ccl::datatype type_of(int bf16) { return bf16 ? ccl::datatype::bfloat16 : ccl::datatype::float32; }
}  // namespace

extern "C" {
// Rank 0 makes the address (256 bytes), the others are given it.
void peer_address(char* address) {
  ccl::init();
  kvs = ccl::create_main_kvs();
  const auto bytes = kvs->get_address();
  std::memcpy(address, bytes.data(), bytes.size());
}
void peer_join(int size, int rank, const char* address) {
  ccl::init();
  if (rank != 0) {
    ccl::kvs::address_type bytes;
    std::memcpy(bytes.data(), address, bytes.size());
    kvs = ccl::create_kvs(bytes);
  }
  comm = std::make_unique<ccl::communicator>(ccl::create_communicator(size, rank, kvs));
}
void peer_all_reduce(void* in, void* out, size_t n, int bf16) {
  ccl::allreduce(in, out, n, type_of(bf16), ccl::reduction::sum, *comm).wait();
}
void peer_reduce_scatter(void* in, void* out, size_t n_out, int bf16) {
  ccl::reduce_scatter(in, out, n_out, type_of(bf16), ccl::reduction::sum, *comm).wait();
}
void peer_all_gather(void* in, void* out, size_t n_in, int bf16) {
  const std::vector<size_t> counts(static_cast<size_t>(comm->size()), n_in);
  ccl::allgatherv(in, n_in, out, counts, type_of(bf16), *comm).wait();
}
void peer_all_to_all(void* in, void* out, size_t n_each, int bf16) {
  ccl::alltoall(in, out, n_each, type_of(bf16), *comm).wait();
}
void peer_broadcast(void* data, size_t n, int bf16) {
  ccl::broadcast(data, n, type_of(bf16), 0, *comm).wait();
}
void peer_barrier() { ccl::barrier(*comm).wait(); }
}
