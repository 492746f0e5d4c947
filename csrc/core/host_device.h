// PYCOMM_HD: arithmetic that the CPU engine, CUDA kernels and tests share. Always inlined on the
// host, so that what a file compiled for AVX makes of it can never stand in for plain code.
#pragma once

#ifdef __CUDACC__
#define PYCOMM_HD __host__ __device__ __forceinline__
#else
#define PYCOMM_HD inline __attribute__((always_inline))
#endif
