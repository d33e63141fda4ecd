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

// Of a NaN among the two, these are b.
KDK_HD float lesser(float a, float b) { return a < b ? a : b; }
KDK_HD float greater(float a, float b) { return a > b ? a : b; }
KDK_HD float root(float x) { return sqrtf(x); }

// A distance from its square; no square below eps is told apart from eps.
template <typename F>
KDK_HD F distance(F d2, F eps, bool squared) {
  const F x = greater(eps, d2);
  return squared ? x : root(x);
}
// Its derivative by the square, 0 where that was below eps.
template <typename F>
KDK_HD F distance_slope(F d2, F d, F eps, F one, bool squared) {
  const F slope = squared ? one : 0.5f * one / d, none = 0.f * one;
  return (d2 >= eps) & (d2 > none) ? slope : none;
}

// Smooth-L1 of a difference already divided by beta, over beta: value c (x - c / 2) and slope c.
template <typename F>
KDK_HD F huber_slope(F x, F one) {
  return lesser(one, greater(-one, x));
}
template <typename F>
KDK_HD F huber_value(F x, F c, F half) {
  return c * (x - half * c);
}

}  // namespace KDK_NAMESPACE
