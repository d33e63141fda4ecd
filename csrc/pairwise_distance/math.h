// One pair of samples: its distance, and the Huber match of two such numbers. The derivations are
// in kdkernels/ops/pairwise_distance/README.md.
#pragma once
#include <cmath>

#include "common/elementary.h"

namespace KDK_NAMESPACE {

// Places in the float32[4] tensor `scalars` of distance_match.
enum MatchScalar : int { kBeta = 0, kEps = 1 };
// What the sum over pairs is divided by.
enum MatchReduction : int { kAllPairs = 0, kKeptPairs = 1, kSum = 2 };

KDK_HD float lesser(float a, float b) { return a < b ? a : b; }
KDK_HD float greater(float a, float b) { return a > b ? a : b; }

// A distance from its square; no square below eps is told apart from eps.
KDK_HD float distance(float d2, float eps, bool squared) {
  const float x = greater(d2, eps);
  return squared ? x : sqrtf(x);
}
// Its derivative by the square, 0 where that was below eps.
KDK_HD float distance_slope(float d2, float d, float eps, bool squared) {
  const float slope = squared ? 1.f : 0.5f / d;
  return (d2 >= eps) & (d2 > 0.f) ? slope : 0.f;
}

// Smooth-L1 of a difference already divided by beta, over beta: value c (x - c / 2) and slope c.
template <typename F>
KDK_HD F huber_slope(F x, F one) {
  return lesser(greater(x, -one), one);
}
template <typename F>
KDK_HD F huber_value(F x, F c, F half) {
  return c * (x - half * c);
}

}  // namespace KDK_NAMESPACE
