// A sum of bfloat16 for MPI libraries that have no such type: rounded once, to nearest even, as pycomm's.
// Compiled by peers.py against the library's own mpi.h.
#include <mpi.h>
#include <stdint.h>
#include <string.h>

static inline float widen(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

static inline uint16_t narrow(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static void sum(void* in, void* inout, int* n, MPI_Datatype* type) {
  (void)type;
  const uint16_t* a = in;
  uint16_t* b = inout;
  const int count = *n;
#pragma GCC ivdep
  for (int i = 0; i < count; ++i) b[i] = narrow(widen(a[i]) + widen(b[i]));
}

// The handle, as an integer: an int in one ABI, a pointer in the other. REQUIRES: MPI is initialised.
uint64_t bf16_sum(void) {
  MPI_Op op;
  uint64_t handle = 0;
  MPI_Op_create(sum, 1, &op);
  memcpy(&handle, &op, sizeof(op));
  return handle;
}
