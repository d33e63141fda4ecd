// exp and log that a CPU compiler can vectorise, and their CUDA counterparts.
//
// libm's are calls, which stop the vectoriser; these are branch-free arithmetic, good to about
// 1.5 ulp, and keep -inf, +inf, NaN and results that underflow (to 0 below 2^-126) right.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define KDK_HD __host__ __device__ __forceinline__
#else
#define KDK_HD inline __attribute__((always_inline))
#endif

namespace KDK_NAMESPACE {

// s - t of two products, and exactly 0 where these are equal: contracted with one of them to a
// fused multiply-add, it would be what that one's rounding took, and a slope made of nothing.
KDK_HD float apart(float s, float t) {
#ifdef __CUDA_ARCH__
  return __fsub_rn(s, t);  // is never contracted
#else
  return s == t ? 0.f : s - t;
#endif
}

#if defined(__CUDACC__) || defined(KDK_CUDA_ON_CPU)

KDK_HD float vexp(float x) {
#ifdef __CUDA_ARCH__
  return __expf(x);
#else
  return expf(x);
#endif
}
KDK_HD float vexp_nonpositive(float x) { return vexp(x); }
KDK_HD float vlog(float x) { return logf(x); }
KDK_HD float vlog_unit(float x) { return logf(x); }
KDK_HD float vlog_normal(float x) { return logf(x); }
KDK_HD float vexpm1(float x) { return expm1f(x); }

#else

KDK_HD float bits_to_float(int32_t i) {
  float f;
  memcpy(&f, &i, 4);
  return f;
}
KDK_HD int32_t float_to_bits(float f) {
  int32_t i;
  memcpy(&i, &f, 4);
  return i;
}

// 2^r for |r| <= 1/2, minimax with relative error 2e-9 before rounding.
KDK_HD float exp2_fraction(float r) {
  float q = 1.5353359914e-4f;
  q = q * r + 1.3398874540e-3f;
  q = q * r + 9.6184373667e-3f;
  q = q * r + 5.5503324707e-2f;
  q = q * r + 2.4022647914e-1f;
  q = q * r + 6.9314720286e-1f;
  return q * r + 1.f;
}

constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// 2^x for x <= 0: what a softmax needs, with nothing spent on overflow. 0 below -126.
KDK_HD float vexp2_nonpositive(float x) {
  const float y = x < -126.f ? -126.f : x;  // NaN stays
  const float n = std::rint(y);
  const int32_t p = float_to_bits(exp2_fraction(y - n));
  // Unsigned, for a NaN converts to a number whose shift leaves nothing.
  const uint32_t scale = static_cast<uint32_t>(static_cast<int32_t>(n)) << 23;
  return x < -126.f ? 0.f : bits_to_float(static_cast<int32_t>(static_cast<uint32_t>(p) + scale));
}

// e^x for x <= 0, off by up to x roundings.
KDK_HD float vexp_nonpositive(float x) { return vexp2_nonpositive(x * kLog2E); }

KDK_HD float vexp(float x) {
  // The clamp keeps the exponent arithmetic in range; NaN passes through both selects.
  float y = x < -88.f ? -88.f : x;
  y = y > 88.72284f ? 88.72284f : y;
  const float shifted = y * kLog2E + kRound;
  const float n = shifted - kRound;
  // ln 2 in two parts, so that the remainder is exact to float.
  const float p = exp2_fraction(((y - n * 0.693359375f) + n * 2.12194440e-4f) * kLog2E);
  // n reaches 128: scale in two steps so that neither factor overflows.
  const int32_t i = float_to_bits(shifted) - float_to_bits(kRound);
  const int32_t half = i >> 1;
  const float e = p * bits_to_float((half + 127) << 23) * bits_to_float((i - half + 127) << 23);
  const float low = x < -87.33654f ? 0.f : e;
  return x > 88.72283f ? INFINITY : low;
}

// log x 2^-lift, of a normal x.
KDK_HD float log_normal(float x, float lift) {
  // x = 2^k * m with m in [sqrt(1/2), sqrt(2)).
  const int32_t ix = float_to_bits(x) - 0x3f3504f3;
  const int32_t k = ix >> 23;
  const float m = bits_to_float((ix & 0x007fffff) + 0x3f3504f3);
  const float f = m - 1.f;
  const float z = f * f;
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float e = static_cast<float>(k) - lift;
  const float tail = p * f * z - e * 2.12194440e-4f - 0.5f * z;
  return f + tail + e * 0.693359375f;
}

// For positive x that are neither subnormal nor infinite.
KDK_HD float vlog_normal(float x) { return log_normal(x, 0.f); }
// For 0 <= x <= 1 that is no subnormal.
KDK_HD float vlog_unit(float x) { return x == 0.f ? -INFINITY : log_normal(x, 0.f); }

KDK_HD float vlog(float x) {
  // Subnormals are lifted by 2^25 first.
  const bool small = x < 1.17549435e-38f;
  float out = log_normal(small ? x * 33554432.f : x, small ? 25.f : 0.f);
  out = x == INFINITY ? x : out;
  out = x == 0.f ? -INFINITY : out;
  return x >= 0.f ? out : x * 0.f / 0.f;  // negative or NaN
}

constexpr double kLog2EDouble = 1.4426950408889634, kLn2Double = 0.6931471805599453;

// log x in double, to about 1e-14: for a row's sums, of which every class has its error.
KDK_HD double vlog_double(double x) {
  int64_t i;
  memcpy(&i, &x, 8);
  // x = 2^k m with m in [sqrt(1/2), sqrt(2)); the exponent becomes a double by its own bits.
  const int64_t j = i - 0x3fe6a09e667f3bcdLL;
  const int64_t bits = (i - (j & ~0xfffffffffffffLL));
  double m, k;
  memcpy(&m, &bits, 8);
  const int64_t biased = ((j >> 52) & 0xfffLL) ^ 0x800LL;  // k + 2048
  const int64_t magic = biased | 0x4330000000000000LL;
  memcpy(&k, &magic, 8);
  k -= 4503599627370496.0 + 2048.0;
  const double f = (m - 1.0) / (m + 1.0), z = f * f;
  double p = 1.0 / 17.0;
  p = p * z + 1.0 / 15.0;
  p = p * z + 1.0 / 13.0;
  p = p * z + 1.0 / 11.0;
  p = p * z + 1.0 / 9.0;
  p = p * z + 1.0 / 7.0;
  p = p * z + 1.0 / 5.0;
  p = p * z + 1.0 / 3.0;
  const double log = k * kLn2Double + (2.0 * f + 2.0 * f * z * p);
  const double finite = x < INFINITY ? log : x;  // NaN and infinity are their own
  return x == 0.0 ? -INFINITY : finite;
}

// e^x - 1: (2^r - 1) scaled and corrected, so that small x keeps its relative accuracy.
KDK_HD float vexpm1(float x) {
  const float big = vexp(x) - 1.f;
  float s = 1.f / 40320.f;  // Taylor on |x| <= 1/2
  s = s * x + 1.f / 5040.f;
  s = s * x + 1.f / 720.f;
  s = s * x + 1.f / 120.f;
  s = s * x + 1.f / 24.f;
  s = s * x + 1.f / 6.f;
  s = s * x + 0.5f;
  const float small = x + x * x * s;
  return fabsf(x) <= 0.5f ? small : big;
}

#endif

}  // namespace KDK_NAMESPACE
