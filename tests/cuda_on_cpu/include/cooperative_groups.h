// A stand-in for CUDA's header of this name: thread blocks and thread block clusters.
#pragma once
#include "cuda_runtime.h"

namespace cooperative_groups {

class thread_block {
 public:
  void sync(KDK_HERE) const { __syncthreads(file, line); }
  unsigned thread_rank() const {
    return (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  }
  unsigned num_threads() const { return blockDim.x * blockDim.y * blockDim.z; }
  unsigned size() const { return num_threads(); }
  dim3 group_index() const { return blockIdx; }
  dim3 thread_index() const { return threadIdx; }
};
inline thread_block this_thread_block() { return {}; }

class cluster_group {
 public:
  struct arrival_token {};
  void sync(KDK_HERE) const {
    ::cuda_on_cpu::cluster_arrive({file, line});
    ::cuda_on_cpu::cluster_wait({file, line});
  }
  arrival_token barrier_arrive(KDK_HERE) const {
    ::cuda_on_cpu::cluster_arrive({file, line});
    return {};
  }
  void barrier_wait(KDK_HERE) const { ::cuda_on_cpu::cluster_wait({file, line}); }
  void barrier_wait(arrival_token&&, KDK_HERE) const { ::cuda_on_cpu::cluster_wait({file, line}); }
  unsigned block_rank() const { return ::cuda_on_cpu::cluster_rank(); }
  unsigned num_blocks() const { return ::cuda_on_cpu::cluster_blocks(); }
  unsigned num_threads() const { return num_blocks() * this_thread_block().num_threads(); }
  unsigned thread_rank() const {
    return block_rank() * this_thread_block().num_threads() + this_thread_block().thread_rank();
  }
  template <typename T>
  T* map_shared_rank(T* p, int rank) const {
    return static_cast<T*>(::cuda_on_cpu::cluster_map(p, static_cast<unsigned>(rank)));
  }
};
inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
