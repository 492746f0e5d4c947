// The coding kernels for AVX-512 (F, BW, DQ, VL). See reduce_avx2.cc.
#include "core/wire.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#pragma GCC optimize("O3")
#define PYCOMM_SIMD avx512
#include "cpu/coding_kernels.inc"
