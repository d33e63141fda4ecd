// Vectors of the width that the target has, written with the compiler's vector extension: for
// loops whose register blocking must be said rather than hoped for.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace KDK_NAMESPACE {

#if defined(__AVX512F__)
#define KDK_VECTOR_BYTES 64
#elif defined(__AVX__)
#define KDK_VECTOR_BYTES 32
#else
#define KDK_VECTOR_BYTES 16
#endif

typedef float Floats __attribute__((vector_size(KDK_VECTOR_BYTES)));
typedef double Doubles __attribute__((vector_size(KDK_VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(KDK_VECTOR_BYTES)));
constexpr int kFloats = KDK_VECTOR_BYTES / 4;
#if defined(__x86_64__) && !defined(__AVX512F__)
constexpr int kRegisters = 16;
#else
constexpr int kRegisters = 32;
#endif

#define KDK_INLINE inline __attribute__((always_inline))
// For the bodies of parallel loops: inlined into the serial and the parallel call, they could be
// contracted to different fused multiply-adds, and the number of threads would change the bits.
#define KDK_ONE_COPY __attribute__((noinline))

template <typename Real>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = Floats;
};
template <>
struct VectorOf<double> {
  using type = Doubles;
};
template <typename Real>
using Vector = typename VectorOf<Real>::type;
template <typename Real>
constexpr int kLanesOf = KDK_VECTOR_BYTES / static_cast<int>(sizeof(Real));

template <typename Real>
KDK_INLINE Vector<Real> load(const Real* p) {
  Vector<Real> v;
  memcpy(&v, p, sizeof(v));
  return v;
}
template <typename Real, typename V>
KDK_INLINE void store(Real* p, V v) {
  memcpy(p, &v, sizeof(v));
}
// A value that is used often: without this GCC loads it for each use.
template <typename V>
KDK_INLINE V in_register(V v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__SSE__)
  asm("" : "+x"(v));
#endif
  return v;
}

KDK_INLINE Floats broadcast(float x) { return x - Floats{}; }
KDK_INLINE Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }

KDK_INLINE Floats lesser(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_maskz_min_ps(0xffff, a, b);  // the plain one warns in GCC 12
#elif defined(__AVX__)
  return _mm256_min_ps(a, b);
#elif defined(__SSE__)
  return _mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}
KDK_INLINE Floats greater(Floats a, Floats b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, a, b);
#elif defined(__AVX__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// The lanes' sum, always in the same order: halves are added until one lane is left.
#if defined(__SSE2__)
KDK_INLINE float sum_of_lanes(__m128 x) {
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
KDK_INLINE double sum_of_lanes(__m128d x) {
  return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)));
}
#if defined(__AVX__)
KDK_INLINE float sum_of_lanes(__m256 x) {
  return sum_of_lanes(_mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
}
KDK_INLINE double sum_of_lanes(__m256d x) {
  return sum_of_lanes(_mm_add_pd(_mm256_castpd256_pd128(x), _mm256_extractf128_pd(x, 1)));
}
#endif
#if defined(__AVX512F__)
KDK_INLINE __m256d upper_half(__m512d x) { return _mm512_maskz_extractf64x4_pd(0xff, x, 1); }
KDK_INLINE float sum_of_lanes(__m512 x) {
  return sum_of_lanes(
      _mm256_add_ps(_mm512_castps512_ps256(x), _mm256_castpd_ps(upper_half(_mm512_castps_pd(x)))));
}
KDK_INLINE double sum_of_lanes(__m512d x) {
  return sum_of_lanes(_mm256_add_pd(_mm512_castpd512_pd256(x), upper_half(x)));
}
#endif
template <typename Real, typename V>
KDK_INLINE Real sum_of(V v) {
  return sum_of_lanes(v);
}
#else
template <typename Real, typename V>
KDK_INLINE Real sum_of(V v) {
  constexpr int n = static_cast<int>(sizeof(V) / sizeof(Real));
  Real x[n];
  memcpy(x, &v, sizeof(v));
  for (int width = n / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) x[l] += x[l + width];
  return x[0];
}
#endif

}  // namespace KDK_NAMESPACE
