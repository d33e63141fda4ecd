// Vectors of the width that the target has, written with the compiler's vector extension: for
// loops whose register blocking must be said rather than hoped for.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
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

typedef int64_t Longs __attribute__((vector_size(KDK_VECTOR_BYTES)));
typedef float FewFloats __attribute__((vector_size(KDK_VECTOR_BYTES / 2)));  // as many as doubles

template <typename Real>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = Floats;
  using index = Ints;
};
template <>
struct VectorOf<double> {
  using type = Doubles;
  using index = Longs;
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
// The first n floats of a vector, zeros in the others.
KDK_INLINE Floats load_first(const float* p, int64_t n) {
  if (n >= kFloats) return load(p);
  float some[kFloats] = {};
  for (int64_t i = 0; i < n; ++i) some[i] = p[i];
  return load(some);
}
KDK_INLINE void store_first(float* p, int64_t n, Floats v) {
  if (n >= kFloats) {
    store(p, v);
  } else {
    for (int64_t i = 0; i < n; ++i) p[i] = v[i];
  }
}
// A value that is used often: without this GCC loads it for each use.
template <typename V>
KDK_INLINE V in_register(V v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__SSE__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}
// As elementary.h has it for one number: in registers both products are rounded.
KDK_INLINE Floats apart(Floats s, Floats t) { return in_register(s) - in_register(t); }

KDK_INLINE Floats broadcast(float x) { return x - Floats{}; }
KDK_INLINE Ints lane_index() {
  Ints lane;
  for (int l = 0; l < kFloats; ++l) lane[l] = l;
  return lane;
}
KDK_INLINE Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }

// sum += factor x. An operation that takes its factor from memory puts it into all lanes on the
// way; to have it there first would be one more for a pipe that multiplies and adds.
KDK_INLINE void add_product(Floats& sum, Floats x, const float* factor) {
#if defined(__AVX512F__)
  Floats own = sum;
  asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(own) : "v"(x), "m"(*factor));
  sum = own;
#else
  sum += *factor * x;
#endif
}

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

KDK_INLINE Floats root(Floats a) {
#if defined(__AVX512F__)
  return _mm512_maskz_sqrt_ps(0xffff, a);
#elif defined(__AVX__)
  return _mm256_sqrt_ps(a);
#elif defined(__SSE__)
  return _mm_sqrt_ps(a);
#else
  for (int l = 0; l < kFloats; ++l) a[l] = sqrtf(a[l]);
  return a;
#endif
}

// Lanes of two vectors: of the first, or counted on from its end, of the second.
template <typename Real, size_t... kFrom>
KDK_INLINE Vector<Real> shuffle(Vector<Real> a, Vector<Real> b, std::index_sequence<kFrom...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kFrom...);
#else
  return __builtin_shuffle(a, b, typename VectorOf<Real>::index{kFrom...});
#endif
}
// Of a pair of rows the blocks of kStep lanes that a transposition exchanges.
template <int kStep, typename Real, size_t... kLane>
KDK_INLINE void exchange(Vector<Real>& a, Vector<Real>& b, std::index_sequence<kLane...>) {
  constexpr size_t n = sizeof...(kLane);
  const Vector<Real> x = a, y = b;
  a = shuffle<Real>(x, y, std::index_sequence<((kLane & kStep) ? kLane - kStep + n : kLane)...>{});
  b = shuffle<Real>(x, y, std::index_sequence<((kLane & kStep) ? kLane + n : kLane + kStep)...>{});
}
template <int kStep = kFloats / 2>
KDK_INLINE void transpose(Floats (&v)[kFloats]) {
  for (int i = 0; i < kFloats; ++i)
    if (!(i & kStep))
      exchange<kStep, float>(v[i], v[i + kStep], std::make_index_sequence<kFloats>{});
  if constexpr (kStep > 1) transpose<kStep / 2>(v);
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

// Of as many vectors as they have lanes: all their sums, each in the order of sum_of.
template <typename Real, int kStep = kLanesOf<Real> / 2>
KDK_INLINE Vector<Real> sums_of(Vector<Real>* v) {
  constexpr auto kLane = std::make_index_sequence<kLanesOf<Real>>{};
  for (int i = 0; i < kStep; ++i) {
    // Lanes with the bit of kStep go on with the second vector.
    Vector<Real> a = v[i], b = v[i + kStep];
    exchange<kStep, Real>(a, b, kLane);
    v[i] = a + b;
  }
  if constexpr (kStep > 1) return sums_of<Real, kStep / 2>(v);
  return v[0];
}

}  // namespace KDK_NAMESPACE
