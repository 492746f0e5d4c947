// The reduction kernels for AVX2. The target is set in the file, since extension builds pass one
// set of flags to all sources.
#include "core/dtype.h"

#pragma GCC target("avx2,fma,bmi2,f16c")
#pragma GCC optimize("O3")
#define PYCOMM_F16C
#define PYCOMM_SIMD avx2
#include "cpu/reduce_kernels.inc"
