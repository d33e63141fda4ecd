// What the stand-in headers ask of the run time. See ../../README.md.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cuda_on_cpu/vectors.h"

// Of the running thread; set at each switch, since one OS thread runs them all.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace cuda_on_cpu {

// The line of the kernel that waits, for messages and for telling barriers apart.
struct Where {
  const char* file;
  int line;
};
#define KDK_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// Shared memory.
void* shared_static(const void* key, size_t bytes, size_t align, const char* name);
void* shared_dynamic();
void* carve(void* base, size_t at, size_t bytes, int index);

// Barriers of a block, with a vote; a warp's collectives; barriers of a cluster.
enum class Vote { none, any, all, count };
int block_barrier(Vote vote, int predicate, Where where);

enum class WarpOp {
  sync,
  shuffle,
  ballot,
  add,
  min,
  max,
  umin,
  umax,
  bit_and,
  bit_or,
  bit_xor,
  match_any
};
// `arg` is the lane to read for shuffle. Gives the lane's result.
uint64_t warp_collective(WarpOp op, unsigned mask, uint64_t value, int arg, Where where);
unsigned active_lanes();
unsigned lane_id();

unsigned cluster_rank();
unsigned cluster_blocks();
void cluster_arrive(Where where);
void cluster_wait(Where where);
void* cluster_map(const void* shared, unsigned rank);

// cp.async: a copy that lands somewhere between its issue and the wait.
void cp_async(void* to, const void* from, int bytes, int valid);
void cp_async_commit();
void cp_async_wait(int pending);

void thread_fence();
[[noreturn]] void trap(const char* what, Where where);

// Host side.
struct LaunchParameters {
  dim3 grid, block, cluster;
  size_t dynamic_smem = 0;
};
using KernelBody = void (*)(void* arguments);
void name_next_kernel(const char* name);
// cudaError code; throws std::runtime_error for what only shows while the kernel runs.
int launch(const LaunchParameters& p, const void* kernel, KernelBody body, void* arguments);
int set_attribute(const void* kernel, int attribute, int value);
int device_attribute(int attribute);
int max_active_clusters(const LaunchParameters& p, const void* kernel);
void set_seed(uint64_t seed);

}  // namespace cuda_on_cpu
