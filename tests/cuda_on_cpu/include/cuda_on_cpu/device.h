// Barriers, warp collectives, atomics and cached accesses.
#pragma once

inline void __syncthreads(KDK_HERE) {
  ::cuda_on_cpu::block_barrier(::cuda_on_cpu::Vote::none, 0, {file, line});
}
inline int __syncthreads_or(int p, KDK_HERE) {
  return ::cuda_on_cpu::block_barrier(::cuda_on_cpu::Vote::any, p, {file, line});
}
inline int __syncthreads_and(int p, KDK_HERE) {
  return ::cuda_on_cpu::block_barrier(::cuda_on_cpu::Vote::all, p, {file, line});
}
inline int __syncthreads_count(int p, KDK_HERE) {
  return ::cuda_on_cpu::block_barrier(::cuda_on_cpu::Vote::count, p, {file, line});
}
inline void __syncwarp(unsigned mask = 0xffffffffu, KDK_HERE) {
  ::cuda_on_cpu::warp_collective(::cuda_on_cpu::WarpOp::sync, mask, 0, 0, {file, line});
}

namespace cuda_on_cpu {
template <typename T>
T shuffle(unsigned mask, T value, int source, Where where) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 2, "no such shuffle in CUDA");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_collective(WarpOp::shuffle, mask, bits, source, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
inline int segment_end(int lane, int width) { return (lane & ~(width - 1)) + width; }
}  // namespace cuda_on_cpu

// CUDA's rules: a lane beyond the segment of `width` lanes gives the caller's own value, except
// that xor may read earlier segments.
template <typename T>
inline T __shfl_sync(unsigned mask, T v, int lane, int width = 32, KDK_HERE) {
  const int me = static_cast<int>(::cuda_on_cpu::lane_id());
  return ::cuda_on_cpu::shuffle(mask, v, (me & ~(width - 1)) | (lane & (width - 1)), {file, line});
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T v, int lane_mask, int width = 32, KDK_HERE) {
  const int me = static_cast<int>(::cuda_on_cpu::lane_id());
  const int from = me ^ lane_mask;
  return ::cuda_on_cpu::shuffle(mask, v, from >= ::cuda_on_cpu::segment_end(me, width) ? me : from,
                                {file, line});
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, KDK_HERE) {
  const int me = static_cast<int>(::cuda_on_cpu::lane_id());
  const int from = me + static_cast<int>(delta);
  return ::cuda_on_cpu::shuffle(mask, v, from >= ::cuda_on_cpu::segment_end(me, width) ? me : from,
                                {file, line});
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, KDK_HERE) {
  const int me = static_cast<int>(::cuda_on_cpu::lane_id());
  const int from = me - static_cast<int>(delta);
  return ::cuda_on_cpu::shuffle(mask, v, from < (me & ~(width - 1)) ? me : from, {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int p, KDK_HERE) {
  return static_cast<unsigned>(
      ::cuda_on_cpu::warp_collective(::cuda_on_cpu::WarpOp::ballot, mask, p != 0, 0, {file, line}));
}
inline int __any_sync(unsigned mask, int p, KDK_HERE) {
  return __ballot_sync(mask, p, file, line) != 0;
}
inline int __all_sync(unsigned mask, int p, KDK_HERE) {
  return __ballot_sync(mask, p, file, line) == mask;
}
inline unsigned __activemask() { return ::cuda_on_cpu::active_lanes(); }

#define KDK_REDUCE(name, T, op)                                                       \
  inline T __reduce_##name##_sync(unsigned mask, T v, KDK_HERE) {                     \
    return static_cast<T>(::cuda_on_cpu::warp_collective(                             \
        ::cuda_on_cpu::WarpOp::op, mask, static_cast<unsigned>(v), 0, {file, line})); \
  }
KDK_REDUCE(add, int, add)
KDK_REDUCE(add, unsigned, add)
KDK_REDUCE(min, int, min)
KDK_REDUCE(min, unsigned, umin)
KDK_REDUCE(max, int, max)
KDK_REDUCE(max, unsigned, umax)
KDK_REDUCE(and, unsigned, bit_and)
KDK_REDUCE(or, unsigned, bit_or)
KDK_REDUCE(xor, unsigned, bit_xor)
#undef KDK_REDUCE

template <typename T>
inline unsigned __match_any_sync(unsigned mask, T v, KDK_HERE) {
  uint64_t bits = 0;
  std::memcpy(&bits, &v, sizeof(T));
  return static_cast<unsigned>(::cuda_on_cpu::warp_collective(::cuda_on_cpu::WarpOp::match_any,
                                                              mask, bits, 0, {file, line}));
}

// Integer atomics. There are none for floats: their order would change the result.
#define KDK_ATOMICS(T)                                                                       \
  inline T atomicAdd(T* p, T v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }       \
  inline T atomicAnd(T* p, T v) { return __atomic_fetch_and(p, v, __ATOMIC_RELAXED); }       \
  inline T atomicOr(T* p, T v) { return __atomic_fetch_or(p, v, __ATOMIC_RELAXED); }         \
  inline T atomicXor(T* p, T v) { return __atomic_fetch_xor(p, v, __ATOMIC_RELAXED); }       \
  inline T atomicExch(T* p, T v) { return __atomic_exchange_n(p, v, __ATOMIC_RELAXED); }     \
  inline T atomicCAS(T* p, T expected, T v) {                                                \
    __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED); \
    return expected;                                                                         \
  }                                                                                          \
  inline T atomicMax(T* p, T v) {                                                            \
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);                                            \
    if (old < v) __atomic_store_n(p, v, __ATOMIC_RELAXED);                                   \
    return old;                                                                              \
  }                                                                                          \
  inline T atomicMin(T* p, T v) {                                                            \
    T old = __atomic_load_n(p, __ATOMIC_RELAXED);                                            \
    if (v < old) __atomic_store_n(p, v, __ATOMIC_RELAXED);                                   \
    return old;                                                                              \
  }
KDK_ATOMICS(int)
KDK_ATOMICS(unsigned)
KDK_ATOMICS(unsigned long long)
#undef KDK_ATOMICS
inline int atomicSub(int* p, int v) { return __atomic_fetch_sub(p, v, __ATOMIC_RELAXED); }
inline unsigned atomicSub(unsigned* p, unsigned v) {
  return __atomic_fetch_sub(p, v, __ATOMIC_RELAXED);
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  const unsigned old = __atomic_load_n(p, __ATOMIC_RELAXED);
  __atomic_store_n(p, old >= limit ? 0 : old + 1, __ATOMIC_RELAXED);
  return old;
}

inline void __threadfence() { ::cuda_on_cpu::thread_fence(); }
inline void __threadfence_block() { ::cuda_on_cpu::thread_fence(); }
inline void __threadfence_system() { ::cuda_on_cpu::thread_fence(); }
inline void __nanosleep(unsigned) {}
inline void __trap(KDK_HERE) { ::cuda_on_cpu::trap("__trap()", {file, line}); }

template <typename T>
inline T __ldg(const T* p) {
  return *p;
}
template <typename T>
inline T __ldcs(const T* p) {
  return *p;
}
template <typename T>
inline T __ldca(const T* p) {
  return *p;
}
template <typename T>
inline T __ldcg(const T* p) {
  return *p;
}
template <typename T>
inline T __ldlu(const T* p) {
  return *p;
}
template <typename T>
inline T __ldcv(const T* p) {
  return *p;
}
template <typename T>
inline void __stcs(T* p, T v) {
  *p = v;
}
template <typename T>
inline void __stcg(T* p, T v) {
  *p = v;
}
template <typename T>
inline void __stwb(T* p, T v) {
  *p = v;
}
template <typename T>
inline void __stwt(T* p, T v) {
  *p = v;
}
