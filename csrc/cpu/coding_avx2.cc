// The coding kernels for AVX2. See reduce_avx2.cc.
#include "core/wire.h"

#pragma GCC target("avx2,fma,bmi2,f16c")
#pragma GCC optimize("O3")
#define PYCOMM_AVX2_NARROWING
#define PYCOMM_SIMD avx2
#include "cpu/coding_kernels.inc"
