// What every .cu file shares: shared memory macros, the launch, copies, reductions, clusters.
//
// The same source is compiled by nvcc and, with KDK_CUDA_ON_CPU, by g++ against the stand-in
// headers of tests/cuda_on_cpu, which run a kernel with one fiber per thread under sanitizers.
// Inline PTX and the branches between the two builds live in this file only.
#pragma once
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "tensor.h"

// Shared memory is declared only through these: the CPU build needs an array per block, with
// poison around it. SMEM_STATIC(float, sums, 32) gives an array; SMEM_DYNAMIC(float, row) gives a
// pointer to the bytes asked for at the launch (16-byte aligned). Both stand as statements.
#ifdef KDK_CUDA_ON_CPU
#define SMEM_STATIC(type, name, count)            \
  static const char kdk_key_##name = 0;           \
  auto& name = *reinterpret_cast<type(*)[count]>( \
      ::cuda_on_cpu::shared_static(&kdk_key_##name, sizeof(type) * (count), alignof(type), #name))
#define SMEM_DYNAMIC(type, name) \
  type* const name = static_cast<type*>(::cuda_on_cpu::shared_dynamic())
#else
#define SMEM_STATIC(type, name, count) __shared__ type name[count]
#define SMEM_DYNAMIC(type, name)                                    \
  extern __shared__ __align__(16) unsigned char kdk_dynamic_smem[]; \
  type* const name = reinterpret_cast<type*>(kdk_dynamic_smem)
#endif

// Device code for sm_80 has no clusters: there a cluster is one block.
#if defined(KDK_CUDA_ON_CPU) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900)
#define KDK_HAS_CLUSTERS 1
#else
#define KDK_HAS_CLUSTERS 0
#endif

namespace KDK_NAMESPACE {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kMaxCluster = 16;  // 8 where portable, 16 as an H100 allows

// ---------------------------------------------------------------------------- host: device, launch

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // a failed launch must not be found again by the next caller
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Makes `device` current and puts the caller's device back.
class DeviceGuard {
 public:
  DeviceGuard(int64_t device, const char* what) {
    check(cudaGetDevice(&before_), what);
    if (before_ != device) check(cudaSetDevice(static_cast<int>(device)), what);
    changed_ = before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline int device_attribute(cudaDeviceAttr attribute, int64_t device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, static_cast<int>(device)), "device attribute");
  return value;
}
inline int sm_count(int64_t device) {
  return device_attribute(cudaDevAttrMultiProcessorCount, device);
}
inline int max_smem(int64_t device) {  // bytes a block may ask for
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}
// The code in the binary counts too, but every toolkit we build with has sm_90a.
inline bool has_clusters(int64_t device) {
  return device_attribute(cudaDevAttrClusterLaunch, device) != 0;
}

struct LaunchConfig {
  const char* name;  // for messages
  dim3 grid;
  dim3 block;
  int64_t device;
  int64_t stream;   // the cudaStream_t as an integer
  size_t smem = 0;  // dynamic shared memory, bytes
  int cluster = 1;  // blocks along x that form a cluster; grid.x is a multiple of it
};

namespace detail {

struct PreparedLaunch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute[1];
};

template <typename Kernel>
void prepare(const LaunchConfig& c, Kernel* kernel, PreparedLaunch& p) {
  p.config.gridDim = c.grid;
  p.config.blockDim = c.block;
  p.config.dynamicSmemBytes = c.smem;
  p.config.stream = reinterpret_cast<cudaStream_t>(c.stream);
  if (c.smem > 48 * 1024)
    check(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(c.smem)),
        c.name);
  if (c.cluster > 8)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          c.name);
  if (c.cluster > 1) {
    p.attribute[0].id = cudaLaunchAttributeClusterDimension;
    p.attribute[0].val.clusterDim.x = static_cast<unsigned>(c.cluster);
    p.attribute[0].val.clusterDim.y = 1;
    p.attribute[0].val.clusterDim.z = 1;
    p.config.attrs = p.attribute;
    p.config.numAttrs = 1;
  }
}

}  // namespace detail

// Starts `kernel` on the stream; never waits, so it can be captured in a CUDA graph. An empty grid
// is no work, not an error. Throws std::runtime_error with the kernel's name.
template <typename... P, typename... A>
void launch(const LaunchConfig& c, void (*kernel)(P...), A&&... args) {
  static_assert(sizeof...(P) == sizeof...(A), "the kernel takes another number of arguments");
  if (c.grid.x == 0 || c.grid.y == 0 || c.grid.z == 0) return;
  DeviceGuard guard(c.device, c.name);
  detail::PreparedLaunch p;
  detail::prepare(c, kernel, p);
#ifdef KDK_CUDA_ON_CPU
  ::cuda_on_cpu::name_next_kernel(c.name);
#endif
  check(cudaLaunchKernelEx(&p.config, kernel, static_cast<P>(std::forward<A>(args))...), c.name);
}

// How many clusters of this launch fit on the device at once; 0 where it cannot run at all.
template <typename... P>
int max_active_clusters(const LaunchConfig& c, void (*kernel)(P...)) {
  DeviceGuard guard(c.device, c.name);
  detail::PreparedLaunch p;
  int count = 0;
  try {
    detail::prepare(c, kernel, p);
  } catch (const std::runtime_error&) {
    return 0;
  }
  if (cudaOccupancyMaxActiveClusters(&count, kernel, &p.config) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

// ---------------------------------------------------------------------------- shared memory layout

// Cuts dynamic shared memory into arrays, on the device and (with a null base) for its size on the
// host, so that both come from one function. The CPU build poisons a gap between the arrays.
class SmemCarver {
 public:
  __host__ __device__ explicit SmemCarver(void* base = nullptr)
      : base_(static_cast<unsigned char*>(base)) {}
  template <typename T>
  __host__ __device__ T* take(int64_t count) {
    const size_t at = bytes_;
    bytes_ += (sizeof(T) * static_cast<size_t>(count) + 15) / 16 * 16;
#ifdef KDK_CUDA_ON_CPU
    if (base_) return static_cast<T*>(::cuda_on_cpu::carve(base_, at, sizeof(T) * count, index_++));
    return nullptr;
#else
    return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
#endif
  }
  __host__ __device__ size_t bytes() const { return bytes_; }

 private:
  unsigned char* base_;
  size_t bytes_ = 0;
#ifdef KDK_CUDA_ON_CPU
  int index_ = 0;
#endif
};

// ---------------------------------------------------------------------------- values and vectors

__host__ __device__ inline float to_float(float x) { return x; }
__host__ __device__ inline float to_float(__half x) { return __half2float(x); }
__host__ __device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__host__ __device__ inline T from_float(float x) {  // to nearest, ties to even
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return static_cast<T>(x);
  }
}

// 16 bytes: the widest access of one thread, 4 floats or 8 halves.
template <typename T>
struct alignas(16) Vec {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];

  __device__ T& operator[](int i) { return v[i]; }
  __device__ const T& operator[](int i) const { return v[i]; }
  __device__ void to(float* out) const {
#pragma unroll
    for (int i = 0; i < kSize; ++i) out[i] = to_float(v[i]);
  }
  __device__ static Vec from(const float* in) {
    Vec r;
#pragma unroll
    for (int i = 0; i < kSize; ++i) r.v[i] = from_float<T>(in[i]);
    return r;
  }
};

template <typename T>
__host__ __device__ inline bool aligned16(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

namespace detail {
template <typename T>
__device__ inline Vec<T> as_vec(uint4 bits) {
  Vec<T> r;
  memcpy(&r, &bits, 16);
  return r;
}
template <typename T>
__device__ inline uint4 as_bits(const Vec<T>& v) {
  uint4 bits;
  memcpy(&bits, &v, 16);
  return bits;
}
}  // namespace detail

// Plain loads are kept in cache; the streaming ones are for data that is read or written once.
template <typename T>
__device__ inline Vec<T> load_vec(const T* p) {
  return detail::as_vec<T>(*reinterpret_cast<const uint4*>(p));
}
template <typename T>
__device__ inline Vec<T> load_vec_streaming(const T* p) {
  return detail::as_vec<T>(__ldcs(reinterpret_cast<const uint4*>(p)));
}
template <typename T>
__device__ inline void store_vec(T* p, const Vec<T>& v) {
  *reinterpret_cast<uint4*>(p) = detail::as_bits(v);
}
template <typename T>
__device__ inline void store_vec_streaming(T* p, const Vec<T>& v) {
  __stcs(reinterpret_cast<uint4*>(p), detail::as_bits(v));
}

// ---------------------------------------------------------------------------- exp2 and log2

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

// One instruction, 2 ulp; subnormal results become 0, which is below anything a softmax keeps.
__device__ inline float fast_exp2(float x) {
#ifdef KDK_CUDA_ON_CPU
  const float y = exp2f(x);
  return y < 0x1p-126f ? 0.f : y;
#elif defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 0.f;  // host pass of nvcc
#endif
}
// Absolute error 2^-22 near 1, 2 ulp elsewhere: for log-sum-exp, whose sum is at least 1.
__device__ inline float fast_log2(float x) { return __log2f(x); }

// ---------------------------------------------------------------------------- asynchronous copies

// 16 bytes from global to shared memory, both 16-byte aligned; bytes beyond `valid` are zero and
// are not read. Seen by the issuing thread after cp_async_wait, by the block after a barrier too.
__device__ inline void cp_async16(void* smem, const void* gmem, int valid = 16) {
#ifdef KDK_CUDA_ON_CPU
  ::cuda_on_cpu::cp_async(smem, gmem, 16, valid);
#elif defined(__CUDA_ARCH__)
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(smem));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(gmem), "r"(valid)
               : "memory");
#endif
}
__device__ inline void cp_async_commit() {
#ifdef KDK_CUDA_ON_CPU
  ::cuda_on_cpu::cp_async_commit();
#elif defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most `kPending` of this thread's newest groups are still under way.
template <int kPending = 0>
__device__ inline void cp_async_wait() {
#ifdef KDK_CUDA_ON_CPU
  ::cuda_on_cpu::cp_async_wait(kPending);
#elif defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// ---------------------------------------------------------------------------- reductions

struct Sum {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {  // of a number and NaN, the number, as fmaxf
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
  __device__ int operator()(int a, int b) const { return a > b ? a : b; }
};

// Shuffles of any trivially copyable T of whole words, such as a (maximum, sum) pair.
namespace detail {
template <typename T, typename Shuffle>
__device__ inline T by_words(T value, Shuffle shuffle) {
  static_assert(sizeof(T) % 4 == 0 && std::is_trivially_copyable_v<T>, "whole words only");
  int words[sizeof(T) / 4];
  memcpy(words, &value, sizeof(T));
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(T) / 4); ++i) words[i] = shuffle(words[i]);
  memcpy(&value, words, sizeof(T));
  return value;
}
}  // namespace detail
template <typename T>
__device__ inline T shuffle_xor(T value, int lane_mask) {
  return detail::by_words(value, [=](int w) { return __shfl_xor_sync(kFullMask, w, lane_mask); });
}
template <typename T>
__device__ inline T shuffle_from(T value, int lane) {
  return detail::by_words(value, [=](int w) { return __shfl_sync(kFullMask, w, lane); });
}

// Every lane gets `op` over its group of kWidth lanes. The butterfly gives all lanes the same bits
// where op is commutative.
template <int kWidth = kWarp, typename T, typename Op>
__device__ inline T warp_reduce(T value, Op op) {
#pragma unroll
  for (int step = kWidth / 2; step > 0; step /= 2) value = op(value, shuffle_xor(value, step));
  return value;
}
template <typename T>
__device__ inline T warp_sum(T value) {
  return warp_reduce(value, Sum{});
}

// Every thread of a one-dimensional block of kThreads gets `op` over the block, always combined in
// the same order. All threads must call it. Two barriers, so that it can be called again at once.
template <int kThreads, typename T, typename Op>
__device__ inline T block_reduce(T value, Op op) {
  static_assert(kThreads % kWarp == 0 && kThreads <= 1024, "whole warps");
  constexpr int kWarps = kThreads / kWarp;
  value = warp_reduce(value, op);
  if constexpr (kWarps > 1) {
    SMEM_STATIC(T, partial, kWarps);
    if (threadIdx.x % kWarp == 0) partial[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = partial[0];
#pragma unroll
    for (int w = 1; w < kWarps; ++w) value = op(value, partial[w]);
    __syncthreads();
  }
  return value;
}
template <int kThreads, typename T>
__device__ inline T block_sum(T value) {
  return block_reduce<kThreads>(value, Sum{});
}
template <int kThreads, typename T>
__device__ inline T block_max(T value) {
  return block_reduce<kThreads>(value, Max{});
}

// ---------------------------------------------------------------------------- clusters

__device__ inline int cluster_rank() {
#if KDK_HAS_CLUSTERS
  return static_cast<int>(cooperative_groups::this_cluster().block_rank());
#else
  return 0;
#endif
}
__device__ inline int cluster_size() {
#if KDK_HAS_CLUSTERS
  return static_cast<int>(cooperative_groups::this_cluster().num_blocks());
#else
  return 1;
#endif
}
// A barrier for all threads of all blocks of the cluster. A kernel whose blocks touch each other's
// shared memory ends with one: a block that left has no shared memory.
__device__ inline void cluster_sync() {
#if KDK_HAS_CLUSTERS
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}
// The same shared variable in the block of another rank.
template <typename T>
__device__ inline T* cluster_map(T* shared, int rank) {
#if KDK_HAS_CLUSTERS
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
#else
  return shared;
#endif
}

// Every thread of every block gets `op` over the blocks' values in rank order. `value` is the same
// in all threads of a block, and all threads must call. `slot` is a shared variable for this
// reduction alone; it may serve again once another cluster barrier has come in between, which is
// how two slots in turn serve a loop. Blocks read each other's slots after the barrier: to write
// into theirs before it would take one more, as a block that has not begun has no shared memory.
template <typename T, typename Op>
__device__ inline T cluster_reduce(T value, Op op, T* slot) {
  const int size = cluster_size();
  if (size == 1) return value;
  if (threadIdx.x == 0) *slot = value;
  cluster_sync();
  // One remote read a lane, then shuffles; the lanes beyond the cluster repeat its last block.
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const T theirs = *cluster_map(slot, lane < size ? lane : size - 1);
  value = shuffle_from(theirs, 0);
  for (int r = 1; r < size; ++r) value = op(value, shuffle_from(theirs, r));
  return value;
}

}  // namespace KDK_NAMESPACE
