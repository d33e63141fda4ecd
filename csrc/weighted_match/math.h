// One element of a feature map: how far two of them lie apart, and the powers that are summed over
// pixels or channels. The derivations are in kdkernels/ops/weighted_match/README.md.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/elementary.h"

namespace KDK_NAMESPACE {

// How a difference counts.
enum Measure : int { kSquared = 0, kAbsolute = 1, kSmoothL1 = 2 };
// |x|^p by multiplication, as few exponents as people use; any other through powf.
enum Power : int { kFirst = 1, kSecond = 2, kThird = 3, kFourth = 4, kAnyPower = 0 };

KDK_HD float sign_of(float x) { return static_cast<float>((x > 0.f) - (x < 0.f)); }

// NaN stays NaN in all of these.
template <int kMeasure>
KDK_HD float slope(float d, float inverse_beta) {
  if (kMeasure == kSquared) return 2.f * d;
  if (kMeasure == kAbsolute) return d != d ? d : sign_of(d);
  const float x = d * inverse_beta;
  const float low = x < -1.f ? -1.f : x;
  return low > 1.f ? 1.f : low;
}
template <int kMeasure>
KDK_HD float measure(float d, float beta, float inverse_beta) {
  if (kMeasure == kSquared) return d * d;
  if (kMeasure == kAbsolute) return fabsf(d);
  const float c = slope<kSmoothL1>(d, inverse_beta);
  return c * (d - 0.5f * beta * c);
}

// |x|, or x where `odd`. In bits: a choice between the two keeps sums of them from being
// vectorised.
KDK_HD float magnitude(float x, bool odd) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  bits &= odd ? 0xffffffffu : 0x7fffffffu;
  memcpy(&x, &bits, 4);
  return x;
}

// |x|^p, or x^p where `odd` says that p is an odd number whose sign is kept.
template <int kPower>
KDK_HD float power(float x, float p, bool odd) {
  const float a = magnitude(x, odd);
  if (kPower == kFirst) return a;
  if (kPower == kSecond) return x * x;
  if (kPower == kThird) return a * (x * x);
  if (kPower == kFourth) return (x * x) * (x * x);
  const float y = powf(fabsf(x), p);
  return odd && x < 0.f ? -y : y;
}
// Its derivative by x; 0 at 0, where |x| has none.
template <int kPower>
KDK_HD float power_slope(float x, float p, bool odd) {
  if (kPower == kFirst) return x != x ? x : (odd ? 1.f : sign_of(x));
  if (kPower == kSecond) return 2.f * x;
  if (kPower == kThird) return 3.f * (odd ? x : fabsf(x)) * x;
  if (kPower == kFourth) return 4.f * x * (x * x);
  const float y = p * powf(fabsf(x), p - 1.f);
  return odd || x >= 0.f ? y : -y;
}

}  // namespace KDK_NAMESPACE
