// A stand-in for CUDA's header of this name: kernels run on the CPU, one fiber per thread.
#pragma once
#ifndef KDK_CUDA_ON_CPU
#error "this header is for the tests' CPU build only; nvcc must not find it"
#endif
// Standard headers come first: what follows makes macros of names that they may use.
#include <algorithm>
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <tuple>
#include <utility>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __constant__ static const
#define __align__(n) alignas(n)
// A plain shared array would be one array for all blocks.
#define __shared__ static_assert(false, "declare shared memory with SMEM_STATIC or SMEM_DYNAMIC");

#include "cuda_on_cpu/runtime.h"
static constexpr int warpSize = 32;

#include "cuda_on_cpu/device.h"
#include "cuda_on_cpu/host.h"
#include "cuda_on_cpu/math.h"
